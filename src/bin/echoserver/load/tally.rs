//! What was counted and measured.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

/// An hour, in nanoseconds; longer times count as this.
const MAX_TIME: u64 = 3_600_000_000_000;
/// Different errors that are kept.
const MAX_ERRORS: usize = 20;

/// A part of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Period {
    WarmUp,
    Second(u64),
}

#[derive(Clone, Debug)]
pub(crate) struct Tally {
    /// Messages that came back.
    pub(crate) messages: u64,
    /// Bytes that came back, all verified.
    pub(crate) bytes: u64,
    /// Connections that were opened.
    pub(crate) opened: u64,
    /// Connections that got at least one byte back. Each counts once in the warm-up, and once after it.
    pub(crate) answered: u64,
    /// Connections that failed, or could not be opened.
    pub(crate) failed: u64,
    /// Messages in flight when their connection failed.
    pub(crate) lost: u64,
    /// Messages that were due, and had not come back at the end.
    pub(crate) unanswered: u64,
    pub(crate) elapsed: Duration,
    /// In nanoseconds.
    pub(crate) rtt: Histogram<u64>,
    pub(crate) connect: Histogram<u64>,
    /// How often each error occurred.
    pub(crate) errors: BTreeMap<String, u64>,
}

impl Tally {
    pub(crate) fn new() -> Self {
        let histogram =
            |digits| Histogram::new_with_bounds(1, MAX_TIME, digits).expect("valid bounds");
        Self {
            messages: 0,
            bytes: 0,
            opened: 0,
            answered: 0,
            failed: 0,
            lost: 0,
            unanswered: 0,
            elapsed: Duration::ZERO,
            rtt: histogram(3),
            connect: histogram(2),
            errors: BTreeMap::new(),
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.messages += other.messages;
        self.bytes += other.bytes;
        self.opened += other.opened;
        self.answered += other.answered;
        self.failed += other.failed;
        self.lost += other.lost;
        self.unanswered += other.unanswered;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.rtt += &other.rtt;
        self.connect += &other.connect;
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

pub(crate) fn record(histogram: &mut Histogram<u64>, time: Duration) {
    histogram.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(MAX_TIME).max(1));
}
