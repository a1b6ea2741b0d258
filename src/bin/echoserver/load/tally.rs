//! What the threads count.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::Value;

/// An hour, in nanoseconds; longer times count as this.
const MAX_TIME: u64 = 3_600_000_000_000;
/// Different errors, greetings and addresses that are kept.
const MAX_TEXTS: usize = 20;

/// How often a time of so many nanoseconds was measured, with this number of significant digits.
#[derive(Debug)]
pub(crate) struct Times<const DIGITS: u8>(pub(crate) Histogram<u64>);

impl<const DIGITS: u8> Default for Times<DIGITS> {
    fn default() -> Self {
        Self(Histogram::new_with_bounds(1, MAX_TIME, DIGITS).expect("valid bounds"))
    }
}

impl<const DIGITS: u8> Times<DIGITS> {
    pub(crate) fn record(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(MAX_TIME);
        self.0.saturating_record(nanos.max(1));
    }
}

#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Messages that came back.
    pub(crate) messages: u64,
    /// Bytes that came back, all verified.
    pub(crate) bytes: u64,
    /// Attempts to open a connection.
    pub(crate) attempts: u64,
    /// Connections that were opened.
    pub(crate) opened: u64,
    /// Connections that got at least one byte back.
    pub(crate) answered: u64,
    /// Connections that failed, or could not be opened.
    pub(crate) failed: u64,
    /// Messages in flight when their connection failed, too young to be unanswered.
    pub(crate) lost: u64,
    /// Messages without an answer at the end, or when their connection failed. Their age is one of the times in `rtt`.
    pub(crate) unanswered: u64,
    /// The least of these ages.
    pub(crate) least_age: Option<Duration>,
    pub(crate) rtt: Times<3>,
    pub(crate) connect: Times<2>,
    /// How late this thread itself was with each message of a schedule.
    pub(crate) lateness: Times<2>,
    /// Local addresses of connections that never got an answer.
    pub(crate) never_answered: Vec<String>,
    /// How often each first line was received.
    pub(crate) greetings: BTreeMap<String, u64>,
    /// How often each error occurred.
    pub(crate) errors: BTreeMap<String, u64>,
}

impl Tally {
    /// Adds a message without an answer, whose age is a lower bound of its round-trip time.
    pub(crate) fn add_unanswered(&mut self, age: Duration) {
        self.unanswered += 1;
        self.least_age = self.least_age.into_iter().chain([age]).min();
        self.rtt.record(age);
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.messages += other.messages;
        self.bytes += other.bytes;
        self.attempts += other.attempts;
        self.opened += other.opened;
        self.answered += other.answered;
        self.failed += other.failed;
        self.lost += other.lost;
        self.unanswered += other.unanswered;
        let ages = [self.least_age, other.least_age];
        self.least_age = ages.into_iter().flatten().min();
        self.rtt.0 += &other.rtt.0;
        self.connect.0 += &other.connect.0;
        self.lateness.0 += &other.lateness.0;
        for (error, times) in &other.errors {
            count(&mut self.errors, error, *times);
        }
        for (greeting, times) in &other.greetings {
            count(&mut self.greetings, greeting, *times);
        }
        self.never_answered.extend_from_slice(&other.never_answered);
        self.never_answered.truncate(MAX_TEXTS);
    }
}

/// Counts a text. Only a number of different ones is kept.
pub(crate) fn count(counts: &mut BTreeMap<String, u64>, text: &str, times: u64) {
    let is_kept = counts.len() < MAX_TEXTS || counts.contains_key(text);
    let text = if is_kept { text } else { "others" };
    *counts.entry(text.to_owned()).or_default() += times;
}

/// What all threads have counted.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    /// Messages and bytes are those of the measured time; the rest includes the warm-up and what came after the end.
    pub(crate) total: Tally,
    pub(crate) warm_up_messages: u64,
    pub(crate) warm_up_bytes: u64,
    /// Messages that came back after the end.
    pub(crate) after_end: u64,
    pub(crate) elapsed: Duration,
    /// A JSON object for each interval.
    pub(crate) series: Vec<Value>,
    /// CPU time of this process in the measured time.
    pub(crate) cpu: Option<Duration>,
}

impl Measured {
    pub(crate) fn per_second(&self, count: u64) -> f64 {
        count as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}
