//! What the server counts: one writer each, and anyone may read.
//!
//! A counter is written by one thread only, so adding to it is a load, an addition and a store,
//! without the bus lock of a read-modify-write; each thread's counters have cache lines of their
//! own. Nothing is published per message: the counters *are* the published values.
//!
//! Two balances follow, and are checked when a server ends ([`Stats::check_balance`]):
//! every connection accepted is open or closed for a reason, and every byte that came in went out,
//! is still buffered, or was discarded for a reason.

use std::fmt;
use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crossbeam_utils::CachePadded;

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client ended its stream, and everything was answered.
    PeerClosed,
    /// The handler asked for it.
    Handler,
    /// The client reset the connection, or vanished.
    Reset,
    /// The operating system reported another error.
    Error,
    /// The handler panicked.
    Panic,
    /// A message exceeds the buffer, or an answer does: the handler left a full input as it was, or
    /// was refused room in an empty output.
    BufferFull,
    /// No byte had moved for the idle timeout.
    IdleTimeout,
    /// The server shut down, and what had arrived was answered.
    Shutdown,
    /// The server shut down, and the drain timeout ran out first.
    DrainTimeout,
}

impl CloseReason {
    /// Every reason, in the order of [`WorkerStats::closed`].
    pub const ALL: [CloseReason; 9] = [
        Self::PeerClosed,
        Self::Handler,
        Self::Reset,
        Self::Error,
        Self::Panic,
        Self::BufferFull,
        Self::IdleTimeout,
        Self::Shutdown,
        Self::DrainTimeout,
    ];

    /// The reason in one lower-case word, as logs and metrics show it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PeerClosed => "peer_closed",
            Self::Handler => "handler",
            Self::Reset => "reset",
            Self::Error => "error",
            Self::Panic => "panic",
            Self::BufferFull => "buffer_full",
            Self::IdleTimeout => "idle_timeout",
            Self::Shutdown => "shutdown",
            Self::DrainTimeout => "drain_timeout",
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A number that one thread writes and any thread reads.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. Only the counter's one writer may call this: two would lose counts.
    pub(crate) fn add(&self, count: u64) {
        self.0.store(self.get().wrapping_add(count), Relaxed);
    }

    /// Moves a gauge from one of its parts' old value to the new one; same single writer.
    pub(crate) fn adjust(&self, from: usize, to: usize) {
        self.add((to as u64).wrapping_sub(from as u64));
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What one worker counts; written by its thread only.
#[derive(Debug, Default)]
pub(crate) struct WorkerCounters {
    pub(crate) assigned: Counter,
    pub(crate) closed: [Counter; CloseReason::ALL.len()],
    pub(crate) bytes_in: Counter,
    pub(crate) bytes_out: Counter,
    pub(crate) bytes_generated: Counter,
    pub(crate) buffered: Counter,
    pub(crate) discarded: [Counter; CloseReason::ALL.len()],
    pub(crate) wakes: Counter,
    pub(crate) yields: Counter,
}

impl WorkerCounters {
    pub(crate) fn closed(&self) -> u64 {
        self.closed.iter().map(Counter::get).sum()
    }

    fn snapshot(&self) -> WorkerStats {
        WorkerStats {
            assigned: self.assigned.get(),
            closed: self.closed.each_ref().map(Counter::get),
            bytes_in: self.bytes_in.get(),
            bytes_out: self.bytes_out.get(),
            bytes_generated: self.bytes_generated.get().cast_signed(),
            buffered: self.buffered.get(),
            discarded: self.discarded.each_ref().map(Counter::get),
            wakes: self.wakes.get(),
            yields: self.yields.get(),
        }
    }
}

/// What the acceptor counts; written by its thread only.
#[derive(Debug, Default)]
pub(crate) struct AcceptorCounters {
    pub(crate) accepted: Counter,
    pub(crate) errors: Counter,
    pub(crate) pauses: Counter,
    pub(crate) paused_us: Counter,
}

/// Every counter of one server.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) acceptor: CachePadded<AcceptorCounters>,
    pub(crate) workers: Box<[Arc<CachePadded<WorkerCounters>>]>,
}

impl Counters {
    pub(crate) fn new(workers: usize) -> Self {
        Self {
            acceptor: CachePadded::default(),
            workers: (0..workers).map(|_| Arc::default()).collect(),
        }
    }

    /// Connections accepted and not yet closed, those in a mailbox included.
    pub(crate) fn open(&self) -> u64 {
        let closed: u64 = self.workers.iter().map(|worker| worker.closed()).sum();
        self.acceptor.accepted.get().saturating_sub(closed)
    }

    pub(crate) fn snapshot(&self) -> Stats {
        Stats {
            accepted: self.acceptor.accepted.get(),
            accept_errors: self.acceptor.errors.get(),
            accept_pauses: self.acceptor.pauses.get(),
            accept_paused: Duration::from_micros(self.acceptor.paused_us.get()),
            workers: self
                .workers
                .iter()
                .map(|worker| worker.snapshot())
                .collect(),
        }
    }
}

/// A snapshot of what a server has counted since it started.
///
/// Each number is exact; a snapshot of a *running* server is not taken at one instant, so sums of
/// several numbers may be off by what moved meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Connections accepted.
    pub accepted: u64,
    /// Failed calls of accept, the passing ones included.
    pub accept_errors: u64,
    /// How often accepting was paused, for want of descriptors or at the connection limit.
    pub accept_pauses: u64,
    /// How long accepting has been paused in all; a pause counts once it is over.
    pub accept_paused: Duration,
    /// Each worker's own numbers.
    pub workers: Vec<WorkerStats>,
}

impl Stats {
    /// The sum over the workers.
    #[must_use]
    pub fn total(&self) -> WorkerStats {
        let mut total = WorkerStats::default();
        for worker in &self.workers {
            total += worker;
        }
        total
    }

    /// Connections open now, those on their way to a worker included.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.accepted.saturating_sub(self.total().total_closed())
    }

    /// Every number with its name, as logs show them: `bytes_in`, `closed_idle_timeout`. Bytes are in bytes,
    /// `accept_paused_ms` in milliseconds.
    #[must_use]
    pub fn fields(&self) -> Vec<(String, i64)> {
        let total = self.total();
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let by_reason = |what: &str, counts: [u64; CloseReason::ALL.len()]| -> Vec<_> {
            CloseReason::ALL
                .iter()
                .zip(counts)
                .map(|(reason, count)| (format!("{what}_{reason}"), number(count)))
                .collect()
        };
        let named = |name: &str, value| (name.to_owned(), number(value));
        let mut fields = vec![
            named("accepted", self.accepted),
            named("open", self.open()),
            named("closed", total.total_closed()),
        ];
        fields.extend(by_reason("closed", total.closed));
        fields.extend([
            named("bytes_in", total.bytes_in),
            named("bytes_out", total.bytes_out),
            ("bytes_generated".to_owned(), total.bytes_generated),
            named("buffered", total.buffered),
            named("discarded", total.total_discarded()),
        ]);
        fields.extend(by_reason("discarded", total.discarded));
        let paused_ms = u64::try_from(self.accept_paused.as_millis()).unwrap_or(u64::MAX);
        fields.extend([
            named("accept_errors", self.accept_errors),
            named("accept_pauses", self.accept_pauses),
            named("accept_paused_ms", paused_ms),
            named("wakes", total.wakes),
            named("yields", total.yields),
        ]);
        fields
    }

    /// What does not add up for a server that has ended, in one line: beyond
    /// [`check_balance`](Self::check_balance), every connection must have been closed once, and no byte be left
    /// in a buffer.
    #[must_use]
    pub fn check_final_balance(&self) -> Option<String> {
        let total = self.total();
        let (assigned, closed) = (total.assigned, total.total_closed());
        self.check_balance().or_else(|| {
            (assigned != closed || total.buffered != 0).then(|| {
                format!(
                    "{assigned} connections assigned, {closed} closed, {} bytes still buffered",
                    total.buffered
                )
            })
        })
    }

    /// What does not add up, if anything, in one line. Meant for a server at rest or at its end.
    #[must_use]
    pub fn check_balance(&self) -> Option<String> {
        let total = self.total();
        if self.accepted != total.assigned {
            return Some(format!(
                "{} connections accepted, but {} reached a worker",
                self.accepted, total.assigned
            ));
        }
        let kept = total.bytes_in.wrapping_add_signed(total.bytes_generated);
        let gone = total.bytes_out + total.buffered + total.total_discarded();
        (kept != gone).then(|| {
            format!(
                "{} bytes in, {:+} by handlers, but {} out, {} buffered, {} discarded",
                total.bytes_in,
                total.bytes_generated,
                total.bytes_out,
                total.buffered,
                total.total_discarded()
            )
        })
    }
}

/// One worker's part of [`Stats`], or the sum of several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerStats {
    /// Connections taken from the mailbox.
    pub assigned: u64,
    /// Connections closed, by [reason](CloseReason::ALL).
    pub closed: [u64; CloseReason::ALL.len()],
    /// Bytes received.
    pub bytes_in: u64,
    /// Bytes sent.
    pub bytes_out: u64,
    /// Bytes that handlers put into the world, less those they took out of it: 0 for an echo.
    pub bytes_generated: i64,
    /// Bytes in the buffers of open connections.
    pub buffered: u64,
    /// Bytes received or made but never sent, by the [reason](CloseReason::ALL) their connection ended.
    pub discarded: [u64; CloseReason::ALL.len()],
    /// How often the worker's poll returned.
    pub wakes: u64,
    /// How often a connection had spent its budget and went to the back of the queue.
    pub yields: u64,
}

impl WorkerStats {
    /// Connections closed, whatever the reason.
    #[must_use]
    pub fn total_closed(&self) -> u64 {
        self.closed.iter().sum()
    }

    /// Connections closed for `reason`.
    #[must_use]
    pub fn closed_for(&self, reason: CloseReason) -> u64 {
        self.closed[reason as usize]
    }

    /// Bytes discarded, whatever the reason.
    #[must_use]
    pub fn total_discarded(&self) -> u64 {
        self.discarded.iter().sum()
    }
}

impl AddAssign<&WorkerStats> for WorkerStats {
    fn add_assign(&mut self, other: &WorkerStats) {
        self.assigned += other.assigned;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.bytes_generated += other.bytes_generated;
        self.buffered += other.buffered;
        self.wakes += other.wakes;
        self.yields += other.yields;
        for index in 0..CloseReason::ALL.len() {
            self.closed[index] += other.closed[index];
            self.discarded[index] += other.discarded[index];
        }
    }
}

/// One line: what was accepted, moved and closed, and what else happened at all.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ALWAYS: [&str; 7] = [
            "accepted",
            "open",
            "closed",
            "bytes_in",
            "bytes_out",
            "buffered",
            "discarded",
        ];
        let told = |(name, value): &(String, i64)| *value != 0 || ALWAYS.contains(&name.as_str());
        for (index, (name, value)) in self.fields().into_iter().filter(told).enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{name}={value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_index_their_own_place() {
        for (index, reason) in CloseReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
        }
    }

    #[test]
    fn a_gauge_shifts_both_ways() {
        let gauge = Counter::default();
        gauge.adjust(0, 7);
        gauge.adjust(7, 3);
        assert_eq!(gauge.get(), 3);
    }

    #[test]
    fn balances_are_found_wanting() {
        let counters = Counters::new(2);
        counters.acceptor.accepted.add(2);
        counters.workers[0].assigned.add(1);
        let lost = counters
            .snapshot()
            .check_balance()
            .expect("one connection is missing");
        assert!(
            lost.contains("2 connections accepted, but 1 reached"),
            "{lost}"
        );

        counters.workers[1].assigned.add(1);
        counters.workers[1].bytes_in.add(10);
        counters.workers[1].bytes_out.add(6);
        counters.workers[0].discarded[CloseReason::Reset as usize].add(3);
        let lost = counters
            .snapshot()
            .check_balance()
            .expect("one byte is missing");
        assert!(lost.contains("10 bytes in"), "{lost}");

        counters.workers[0].buffered.add(1);
        assert_eq!(counters.snapshot().check_balance(), None);
        let open = counters
            .snapshot()
            .check_final_balance()
            .expect("two are open");
        assert!(
            open.contains("2 connections assigned, 0 closed, 1 bytes still"),
            "{open}"
        );
        assert_eq!(counters.snapshot().open(), 2);
    }

    #[test]
    fn the_line_names_only_what_happened() {
        let counters = Counters::new(1);
        counters.acceptor.accepted.add(3);
        counters.workers[0].assigned.add(3);
        counters.workers[0].closed[CloseReason::IdleTimeout as usize].add(2);
        let line = counters.snapshot().to_string();
        assert!(
            line.starts_with("accepted=3 open=1 closed=2 closed_idle_timeout=2 bytes_in=0"),
            "{line}"
        );
    }
}
