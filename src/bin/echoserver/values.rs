//! Parsers of the values of options: one grammar for times, one for sizes, one for counts. Their errors state the
//! bounds.

use std::ops::RangeInclusive;
use std::time::Duration;

use bytesize::ByteSize;
use echoserver::{Address, Config};
use humantime::format_duration;

use crate::error::escape_control;

/// The maximum of any time, so that it can be added to the time of day.
pub(crate) const MAX_TIME: Duration = Duration::from_secs(100 * 31_557_600);

/// The bounds of `TCP_KEEPIDLE` in Linux.
const KEEPALIVE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(32_767);

const MAX_MODE: u32 = 0o777;

/// More than any machine has.
const MAX_MEMORY: u64 = 1 << 50;

/// The bounds of a rate, in messages per second.
const RATE: RangeInclusive<f64> = 1e-6..=1e7;

/// Returns a parser of decimal numbers.
pub(crate) fn count<T: TryFrom<usize> + 'static>(
    bounds: RangeInclusive<usize>,
) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        // Without a sign.
        let digits = Some(text).filter(|text| is_made_of(text, "0123456789"));
        let number = digits.and_then(|text| text.parse().ok());
        let number = number.filter(|number| bounds.contains(number));
        let (min, max) = (bounds.start(), bounds.end());
        let number = number.and_then(|number| T::try_from(number).ok());
        number.ok_or_else(|| format!("expected a number from {min} to {max}"))
    }
}

/// Addresses in one value.
#[derive(Clone, Debug)]
pub(crate) struct Addresses(pub(crate) Vec<Address>);

/// Parses addresses that are separated by commas. A backslash before a comma makes it a part of a path.
pub(crate) fn addresses(text: &str) -> Result<Addresses, String> {
    // An argument contains no zero byte.
    let hidden = text.replace("\\,", "\0");
    let parts = hidden.split(',').map(|part| part.replace('\0', ","));
    let parse = |part: String| {
        let address = part.parse::<Address>();
        address.map_err(|error| match &part {
            part if part == text => error.to_string(),
            part => format!("'{}': {error}", escape_control(part)),
        })
    };
    parts.map(parse).collect::<Result<_, _>>().map(Addresses)
}

/// Parses the size of a buffer or a message.
pub(crate) fn size(text: &str) -> Result<usize, String> {
    let size = size_up_to(text, Config::MAX_BUFFER_SIZE as u64);
    let size = size.and_then(|size| usize::try_from(size).ok());
    size.ok_or_else(|| "expected a size from 1B to 1GiB, such as 4096, 64K or 1MiB".to_owned())
}

/// Parses the size of a memory.
pub(crate) fn memory(text: &str) -> Result<u64, String> {
    size_up_to(text, MAX_MEMORY)
        .ok_or_else(|| "expected a size from 1B to 1PiB, such as 512M or 2GiB".to_owned())
}

/// Parses a number of bytes, or a number with a unit. A lone letter means a power of 1024, as in other servers.
fn size_up_to(text: &str, max: u64) -> Option<u64> {
    // `ByteSize` takes a lone letter for a power of 1000.
    let has_letter = text.ends_with(|letter: char| "kmgtKMGT".contains(letter));
    let unit = if has_letter { "iB" } else { "" };
    let size: ByteSize = format!("{text}{unit}").parse().ok()?;
    Some(size.as_u64()).filter(|size| (1..=max).contains(size))
}

/// Returns a parser of times of at least `min`: a number of seconds, or numbers with units.
pub(crate) fn time(min: Duration) -> impl Fn(&str) -> Result<Duration, String> + Clone {
    move |text| {
        let time = parse_time(text).filter(|time| (min..=MAX_TIME).contains(time));
        time.ok_or_else(|| expected_time("", &(min..=MAX_TIME)))
    }
}

/// Parses a time, which may be zero.
pub(crate) fn any_time(text: &str) -> Result<Duration, String> {
    time(Duration::ZERO)(text)
}

/// Parses the idle time of TCP keepalive. Zero turns it off.
pub(crate) fn keepalive(text: &str) -> Result<Duration, String> {
    let time = parse_time(text).filter(|time| time.is_zero() || KEEPALIVE.contains(time));
    time.ok_or_else(|| expected_time("0, or ", &KEEPALIVE))
}

fn parse_time(text: &str) -> Option<Duration> {
    if is_made_of(text, "0123456789.") {
        return Duration::try_from_secs_f64(text.parse().ok()?).ok();
    }
    humantime::parse_duration(text).ok()
}

fn expected_time(other: &str, bounds: &RangeInclusive<Duration>) -> String {
    let [min, max] = [*bounds.start(), *bounds.end()].map(format_duration);
    format!("expected {other}a time from {min} to {max}, such as 5, 0.5, 500ms or 1m30s")
}

/// Parses the permissions of a file.
pub(crate) fn mode(text: &str) -> Result<u32, String> {
    let digits = Some(text).filter(|text| is_made_of(text, "01234567"));
    let mode = digits.and_then(|text| u32::from_str_radix(text, 8).ok());
    mode.filter(|mode| *mode <= MAX_MODE)
        .ok_or_else(|| format!("expected octal permissions up to {MAX_MODE:04o}, such as 0660"))
}

/// Parses a number of messages per second.
pub(crate) fn rate(text: &str) -> Result<f64, String> {
    let (digits, factor) = match text.strip_suffix(['k', 'K']) {
        Some(thousands) => (thousands, 1e3),
        None => (text, 1.0),
    };
    let rate = digits.parse().ok().map(|number: f64| number * factor);
    let rate = rate.filter(|rate| RATE.contains(rate));
    let (min, max) = RATE.into_inner();
    let expected = format!("messages per second from {min} to {max}, such as 0.1, 50000 or 50k");
    rate.ok_or_else(|| format!("expected {expected}"))
}

fn is_made_of(text: &str, letters: &str) -> bool {
    text.chars().all(|letter| letters.contains(letter))
}

#[cfg(test)]
mod tests;
