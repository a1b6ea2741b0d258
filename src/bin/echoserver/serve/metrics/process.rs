//! The `process_*` metrics that Prometheus' client libraries have in common. Without /proc there are none.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use super::exposition::Exposition;

/// Clock ticks per second in /proc, a constant of Linux' interface.
const TICKS_PER_SECOND: f64 = 100.0;

/// A value with the name, without `process_`, and the help of its metric.
type Metric = (&'static str, &'static str, f64);

/// Returns what the texts of /proc/self/stat and /proc/self/status contain.
fn parse(stat: &str, status: &str) -> Option<[Metric; 4]> {
    // The name, in parentheses, may contain anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    let cpu = (ticks()? + ticks()?) / TICKS_PER_SECOND;
    let bytes = |name| Some(number(status, name)? * 1024.0);
    let (size, rss) = (bytes("VmSize:")?, bytes("VmRSS:")?);
    Some([
        ("cpu_seconds_total", "User and system CPU time.", cpu),
        ("virtual_memory_bytes", "Virtual memory size.", size),
        ("resident_memory_bytes", "Resident memory size.", rss),
        ("threads", "Threads.", number(status, "Threads:")?),
    ])
}

/// Returns the number after `name` at the start of a line.
fn number(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Adds the metrics of this process, which started at `start`.
pub(super) fn add(metrics: &mut Exposition, start: SystemTime) {
    let read = |file: &str| fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
    let Some(found) = parse(&read("stat"), &read("status")) else {
        return;
    };
    for (name, help, value) in found {
        metrics.value(&format!("process_{name}"), help, value);
    }
    if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
        // Without that of the directory itself.
        let count = descriptors.count().saturating_sub(1);
        metrics.value("process_open_fds", "Open file descriptors.", count);
    }
    if let Some(limit) = number(&read("limits"), "Max open files") {
        let help = "Maximum number of open file descriptors.";
        metrics.value("process_max_fds", help, limit);
    }
    if let Ok(start) = start.duration_since(UNIX_EPOCH) {
        let help = "Start time in seconds since 1970-01-01 UTC.";
        metrics.value("process_start_time_seconds", help, start.as_secs_f64());
    }
}

#[cfg(test)]
mod tests;
