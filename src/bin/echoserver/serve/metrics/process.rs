//! The `process_*` metrics that Prometheus' client libraries have in common. Without /proc there are none.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::exposition::Exposition;
use crate::platform;

/// Clock ticks per second in /proc, a constant of Linux' interface.
const TICKS_PER_SECOND: u64 = 100;

/// The part of a process' state that /proc/self/stat and /proc/self/status contain.
#[derive(Debug, PartialEq, Eq)]
struct ProcessState {
    cpu: Duration,
    virtual_bytes: u64,
    resident_bytes: u64,
    threads: u64,
}

impl ProcessState {
    fn parse(stat: &str, status: &str) -> Option<Self> {
        // The name, in parentheses, may contain anything.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_whitespace().skip(11);
        let mut number_of_ticks = || fields.next()?.parse::<u64>().ok();
        let ticks = number_of_ticks()? + number_of_ticks()?;
        let number = |name: &str| -> Option<u64> {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?;
            value.trim().trim_end_matches(" kB").parse().ok()
        };
        Some(Self {
            cpu: Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND),
            virtual_bytes: number("VmSize:")? * 1024,
            resident_bytes: number("VmRSS:")? * 1024,
            threads: number("Threads:")?,
        })
    }
}

/// Adds the metrics of this process, which started at `start`.
pub(super) fn add(metrics: &mut Exposition, start: SystemTime) {
    let read = |file: &str| fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
    let Some(state) = ProcessState::parse(&read("stat"), &read("status")) else {
        return;
    };
    metrics.value(
        "process_cpu_seconds_total",
        "User and system CPU time.",
        state.cpu.as_secs_f64(),
    );
    metrics.value(
        "process_virtual_memory_bytes",
        "Virtual memory size.",
        state.virtual_bytes,
    );
    metrics.value(
        "process_resident_memory_bytes",
        "Resident memory size.",
        state.resident_bytes,
    );
    metrics.value("process_threads", "Threads.", state.threads);
    if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
        // Without that of the directory itself.
        let count = descriptors.count().saturating_sub(1);
        metrics.value("process_open_fds", "Open file descriptors.", count);
    }
    if let Some(limit) = platform::descriptor_limit() {
        metrics.value(
            "process_max_fds",
            "Maximum number of open file descriptors.",
            limit,
        );
    }
    if let Ok(start) = start.duration_since(UNIX_EPOCH) {
        metrics.value(
            "process_start_time_seconds",
            "Start time in seconds since 1970-01-01 UTC.",
            start.as_secs_f64(),
        );
    }
}

#[cfg(test)]
mod tests;
