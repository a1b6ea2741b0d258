//! What the threads count.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

/// An hour, in nanoseconds; longer times count as this.
const MAX_TIME: u64 = 3_600_000_000_000;
/// Different errors that are kept.
const MAX_ERRORS: usize = 20;

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
    /// Connections that were opened.
    pub(crate) opened: u64,
    /// Connections that got at least one byte back.
    pub(crate) answered: u64,
    /// Connections that failed, or could not be opened.
    pub(crate) failed: u64,
    /// Messages in flight when their connection failed.
    pub(crate) lost: u64,
    /// Messages that a schedule made due.
    pub(crate) due: u64,
    pub(crate) rtt: Times<3>,
    pub(crate) connect: Times<2>,
    /// How often each error occurred.
    pub(crate) errors: BTreeMap<String, u64>,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.messages += other.messages;
        self.bytes += other.bytes;
        self.opened += other.opened;
        self.answered += other.answered;
        self.failed += other.failed;
        self.lost += other.lost;
        self.due += other.due;
        self.rtt.0 += &other.rtt.0;
        self.connect.0 += &other.connect.0;
        for (error, count) in &other.errors {
            self.add_errors(error, *count);
        }
    }

    pub(crate) fn add_errors(&mut self, error: &str, count: u64) {
        let is_kept = self.errors.len() < MAX_ERRORS || self.errors.contains_key(error);
        let error = if is_kept { error } else { "other errors" };
        *self.errors.entry(error.to_owned()).or_default() += count;
    }
}

/// What all threads have counted.
pub(crate) struct Measured {
    /// Without the messages of the warm-up.
    pub(crate) total: Tally,
    pub(crate) warm_up_messages: u64,
    pub(crate) warm_up_bytes: u64,
    pub(crate) elapsed: Duration,
}

impl Measured {
    /// Returns the messages that were due and have not come back, lost ones apart.
    pub(crate) fn unanswered(&self) -> u64 {
        let done = self.warm_up_messages + self.total.messages + self.total.lost;
        self.total.due.saturating_sub(done)
    }

    pub(crate) fn per_second(&self, count: u64) -> f64 {
        count as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}
