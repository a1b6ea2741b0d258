//! Numbers as text, and values of options that `check` and `load` share.

use std::fmt;
use std::time::Duration;

/// A number with separators: 3,000,000.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count<Number>(pub(crate) Number);

impl<Number: fmt::Display> fmt::Display for Count<Number> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let mut text = String::new();
        for (place, digit) in digits.chars().enumerate() {
            if place > 0 && (digits.len() - place).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        f.pad(&text)
    }
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
