//! Counters with one writer each, which any thread can read.
//!
//! Because a counter has only one writer, adding to it is a load, an addition and a store, without
//! the bus lock of an atomic read-modify-write. The counters of each thread are on their own cache
//! lines. Nothing is published per message: readers load the counters themselves.
//!
//! Two equations hold for a server at rest, and [`Stats::check_balance`] checks them:
//!
//! * Each accepted connection is open, or was closed for a reason.
//! * Each byte received or generated was sent, is buffered, or was discarded for a reason.

use std::fmt;
use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crossbeam_utils::CachePadded;

/// The reason why a connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client closed its side, and all its input was answered.
    PeerClosed,
    /// The handler returned [`Action::Close`](crate::Action::Close).
    Handler,
    /// The client reset the connection or became unreachable.
    Reset,
    /// The operating system reported another error.
    Error,
    /// The handler panicked.
    Panic,
    /// A message or an answer is larger than the buffer: the handler returned
    /// [`Action::Continue`](crate::Action::Continue) with a full input, or [`Action::Flush`](crate::Action::Flush) with an
    /// empty output.
    BufferFull,
    /// The client sent nothing that was read, and accepted no output, for the idle timeout; or it accepted no output for
    /// 10 s after the connection was to be closed.
    IdleTimeout,
    /// The server shut down after answering all input that had arrived.
    Shutdown,
    /// The server shut down, and the drain timeout expired first, or the client ended its stream with data that came
    /// too late to be answered.
    DrainTimeout,
    /// No memory for the connection's buffers.
    OutOfMemory,
}

impl CloseReason {
    /// All reasons, in the order of [`WorkerStats::closed`].
    pub const ALL: [CloseReason; 10] = [
        Self::PeerClosed,
        Self::Handler,
        Self::Reset,
        Self::Error,
        Self::Panic,
        Self::BufferFull,
        Self::IdleTimeout,
        Self::Shutdown,
        Self::DrainTimeout,
        Self::OutOfMemory,
    ];

    /// Returns the name used in logs and metrics, such as `idle_timeout`.
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
            Self::OutOfMemory => "out_of_memory",
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A counter that one thread writes and any thread can read.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. Only the one writer may call this: with two writers, counts would be lost.
    pub(crate) fn add(&self, count: u64) {
        self.0.store(self.get().wrapping_add(count), Relaxed);
    }

    /// Sets it to `value` if that is larger. Same single writer.
    pub(crate) fn raise(&self, value: u64) {
        if value > self.get() {
            self.0.store(value, Relaxed);
        }
    }

    /// Updates a sum after one of its terms changed from `old` to `new`. Same single writer.
    pub(crate) fn adjust(&self, old: usize, new: usize) {
        self.add((new as u64).wrapping_sub(old as u64));
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The counters of one worker, written by its thread only.
#[derive(Debug, Default)]
pub(crate) struct WorkerCounters {
    pub(crate) assigned: Counter,
    pub(crate) closed: [Counter; CloseReason::ALL.len()],
    pub(crate) bytes_in: Counter,
    pub(crate) bytes_out: Counter,
    pub(crate) bytes_generated: Counter,
    pub(crate) buffered: Counter,
    pub(crate) discarded: [Counter; CloseReason::ALL.len()],
    pub(crate) ticks: Counter,
    pub(crate) yields: Counter,
    /// In milliseconds.
    pub(crate) longest_tick: Counter,
}

impl WorkerCounters {
    #[cfg(any(test, feature = "testing"))]
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
            ticks: self.ticks.get(),
            yields: self.yields.get(),
            longest_tick: Duration::from_millis(self.longest_tick.get()),
        }
    }
}

/// The counters of the acceptor, written by its thread only.
#[derive(Debug, Default)]
pub(crate) struct AcceptorCounters {
    pub(crate) accepted: Counter,
    pub(crate) errors: Counter,
    pub(crate) pauses: Counter,
    /// The length of pauses that have ended, in milliseconds.
    pub(crate) paused_ms: Counter,
    /// 1 in a pause, otherwise 0.
    pub(crate) is_paused: Counter,
    /// Connections that no worker had capacity for before the deadline of a shutdown.
    pub(crate) expired: Counter,
}

/// All counters of one server.
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

    /// Returns a snapshot.
    pub(crate) fn snapshot(&self) -> Stats {
        Stats {
            accepted: self.acceptor.accepted.get(),
            accept_errors: self.acceptor.errors.get(),
            accept_pauses: self.acceptor.pauses.get(),
            accept_paused: Duration::from_millis(self.acceptor.paused_ms.get()),
            is_accept_paused: self.acceptor.is_paused.get() == 1,
            expired: self.acceptor.expired.get(),
            workers: self
                .workers
                .iter()
                .map(|worker| worker.snapshot())
                .collect(),
        }
    }
}

/// A snapshot of a server's counters since its start.
///
/// Each number is exact. A snapshot of a *running* server is not taken at one instant, so its numbers
/// may not match each other exactly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Connections accepted.
    pub accepted: u64,
    /// Calls of `accept` that failed, including those retried at once.
    pub accept_errors: u64,
    /// How often accepting paused: without file descriptors, at the connection limit, with every
    /// worker's queue full, or after another error.
    pub accept_pauses: u64,
    /// How long accepting paused in total, without a pause that [lasts](Self::is_accept_paused).
    pub accept_paused: Duration,
    /// Accepting is paused.
    pub is_accept_paused: bool,
    /// Connections accepted in a shutdown that no worker had capacity for before its deadline. They were
    /// reset, and count as [`CloseReason::DrainTimeout`] in the [`total`](Self::total).
    pub expired: u64,
    /// The numbers of each worker.
    pub workers: Vec<WorkerStats>,
}

impl Stats {
    /// Returns the sum over all workers, and the [`expired`](Self::expired) connections.
    #[must_use]
    pub fn total(&self) -> WorkerStats {
        let mut total = WorkerStats::default();
        for worker in &self.workers {
            total += worker;
        }
        total.assigned += self.expired;
        total.closed[CloseReason::DrainTimeout as usize] += self.expired;
        total
    }

    /// Returns the number of open connections, including those that wait in a worker's queue.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.accepted.saturating_sub(self.total().total_closed())
    }

    /// Returns each number with the name it has in logs, such as `bytes_in` and
    /// `closed_idle_timeout`. `accept_paused_ms` is in milliseconds.
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
            named("ticks", total.ticks),
            named("yields", total.yields),
        ]);
        fields
    }

    /// Checks the counters of a server that has ended; returns the first inconsistency in one line.
    ///
    /// In addition to [`check_balance`](Self::check_balance), each connection must have been closed
    /// once, and no byte may be left in a buffer.
    #[must_use]
    pub fn check_final_balance(&self) -> Option<String> {
        let total = self.total();
        let (assigned, closed) = (total.assigned, total.total_closed());
        self.check_balance().or_else(|| {
            (assigned != closed || total.buffered != 0).then(|| {
                format!(
                    "{assigned} connections assigned, but {closed} closed, and {} bytes still buffered",
                    total.buffered
                )
            })
        })
    }

    /// Checks that all connections and bytes are accounted for; returns the first inconsistency in
    /// one line.
    ///
    /// Meaningful for a server at rest or at its end.
    #[must_use]
    pub fn check_balance(&self) -> Option<String> {
        let total = self.total();
        if self.accepted != total.assigned {
            return Some(format!(
                "{} connections accepted, but {} assigned to workers",
                self.accepted, total.assigned
            ));
        }
        let produced = total.bytes_in.wrapping_add_signed(total.bytes_generated);
        let accounted = total.bytes_out + total.buffered + total.total_discarded();
        (produced != accounted).then(|| {
            format!(
                "{} bytes in, {:+} generated by handlers, but {} out, {} buffered, {} discarded",
                total.bytes_in,
                total.bytes_generated,
                total.bytes_out,
                total.buffered,
                total.total_discarded()
            )
        })
    }
}

/// The numbers of one worker, or the sum of several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerStats {
    /// Connections that the worker took from its queue.
    pub assigned: u64,
    /// Connections closed, by [reason](CloseReason::ALL).
    pub closed: [u64; CloseReason::ALL.len()],
    /// Bytes received.
    pub bytes_in: u64,
    /// Bytes sent.
    pub bytes_out: u64,
    /// Net bytes generated by handlers: produced minus consumed. 0 for an echo.
    pub bytes_generated: i64,
    /// Bytes in the buffers of open connections.
    pub buffered: u64,
    /// Bytes received or generated but not sent, by the [reason](CloseReason::ALL) their connection
    /// was closed.
    pub discarded: [u64; CloseReason::ALL.len()],
    /// Ticks of the worker's event loop, each with one wait for events.
    pub ticks: u64,
    /// How often a connection used its budget and moved to the back of the run queue.
    pub yields: u64,
    /// The longest tick: how long the events of other connections have waited at most. Of several workers, the
    /// longest of all.
    pub longest_tick: Duration,
}

impl WorkerStats {
    /// Returns the number of connections closed, for any reason.
    #[must_use]
    pub fn total_closed(&self) -> u64 {
        self.closed.iter().sum()
    }

    /// Returns the number of connections closed for `reason`.
    #[must_use]
    pub fn closed_for(&self, reason: CloseReason) -> u64 {
        self.closed[reason as usize]
    }

    /// Returns the number of bytes discarded, for any reason.
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
        self.ticks += other.ticks;
        self.yields += other.yields;
        self.longest_tick = self.longest_tick.max(other.longest_tick);
        for index in 0..CloseReason::ALL.len() {
            self.closed[index] += other.closed[index];
            self.discarded[index] += other.discarded[index];
        }
    }
}

/// Writes one line of `name=value` pairs; most counters are left out while they are zero.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ALWAYS_SHOWN: [&str; 7] = [
            "accepted",
            "open",
            "closed",
            "bytes_in",
            "bytes_out",
            "buffered",
            "discarded",
        ];
        let is_shown =
            |(name, value): &(String, i64)| *value != 0 || ALWAYS_SHOWN.contains(&name.as_str());
        for (index, (name, value)) in self.fields().into_iter().filter(is_shown).enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{name}={value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
