//! Parsers of the values of options. Their errors say what is expected.

use std::num::NonZeroUsize;
use std::time::Duration;

use bytesize::ByteSize;
use echoserver::Config;

/// Bounds of `TCP_KEEPIDLE` in Linux.
const MIN_KEEPALIVE: Duration = Duration::from_secs(1);
const MAX_KEEPALIVE: Duration = Duration::from_secs(32_767);

pub(crate) fn parse_workers(text: &str) -> Result<NonZeroUsize, String> {
    let bounds = || format!("expected a number from 1 to {}", Config::MAX_WORKERS);
    let workers = text.parse().map_err(|_| bounds())?;
    NonZeroUsize::new(workers)
        .filter(|workers| workers.get() <= Config::MAX_WORKERS)
        .ok_or_else(bounds)
}

pub(crate) fn parse_count(text: &str) -> Result<NonZeroUsize, String> {
    text.parse()
        .map_err(|_| "expected a number of at least 1".to_owned())
}

pub(crate) fn parse_buffer_size(text: &str) -> Result<usize, String> {
    // A lone letter means a power of 1024, as in other servers; `ByteSize` takes it for a power of 1000.
    let unit = if text.ends_with(|letter: char| "kmgKMG".contains(letter)) {
        "iB"
    } else {
        ""
    };
    let size: ByteSize = format!("{text}{unit}")
        .parse()
        .map_err(|_| "expected a size such as 65536, 64K or 1MiB")?;
    let size = usize::try_from(size.as_u64()).unwrap_or(usize::MAX);
    match size {
        1..=Config::MAX_BUFFER_SIZE => Ok(size),
        _ => Err("expected a size from 1B to 1GiB".to_owned()),
    }
}

pub(crate) fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "expected octal permissions such as 0660".to_owned())
}

pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("expected a duration such as 500ms, 30s or 5m: {error}"))
}

pub(crate) fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text)?;
    let bounds = "expected a duration of at least 1ms".to_owned();
    Some(interval)
        .filter(|interval| *interval >= Duration::from_millis(1))
        .ok_or(bounds)
}

/// Parses the idle time of TCP keepalive, within the bounds of the kernel. Zero turns it off.
pub(crate) fn parse_keepalive(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text)?;
    let bounds = MIN_KEEPALIVE..=MAX_KEEPALIVE;
    Some(time)
        .filter(|time| time.is_zero() || bounds.contains(time))
        .ok_or_else(|| {
            let (min, max) = bounds.into_inner();
            format!("expected 0s, or a duration from {min:?} to {max:?}")
        })
}

/// Parses a duration: a number of seconds, or one with a unit.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    const EXPECTED: &str = "expected a time such as 10, 0.5, 500ms or 5m";
    let duration = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|_| EXPECTED)?,
        Err(_) => humantime::parse_duration(text).map_err(|_| EXPECTED)?,
    };
    match (MIN_TIME..=MAX_TIME).contains(&duration) {
        true => Ok(duration),
        false => Err("expected a time from 1ms to 1000 days".to_owned()),
    }
}

const MIN_TIME: Duration = Duration::from_millis(1);
const MAX_TIME: Duration = Duration::from_secs(1_000 * 86_400);

pub(crate) fn parse_time_or_0(text: &str) -> Result<Duration, String> {
    match text.trim_matches('0') {
        "" | "." | "s" if !text.is_empty() => Ok(Duration::ZERO),
        _ => parse_time(text),
    }
}

pub(crate) fn parse_rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (1e-6..=1e7).contains(rate));
    rate.ok_or_else(|| "expected messages per second such as 1, 0.1 or 50000".to_owned())
}

#[cfg(test)]
mod tests;
