//! What the connections of a worker share: counters, wake-ups, timeouts, time and turns.

use std::sync::Arc;

use crossbeam_utils::CachePadded;

use crate::connection::waker::WakeQueue;
use crate::stats::WorkerCounters;
use crate::system::{Millis, NEVER};

/// How turns are shared out. A *turn* is one call that drives a connection. After a turn of at least `bulk_bytes`, or one
/// that has used its budget, a connection is *bulk*, otherwise *interactive*. Interactive connections are driven at once;
/// events and wake-ups only put bulk ones into the run queue, of which each tick serves a share.
///
/// The default budgets are a choice between latency and throughput. Measured with one worker on one CPU and all load on
/// another, as medians of 5 to 9 interleaved rounds, where a raw epoll loop has a throughput of 1:
///
/// | budget of bulk turns | p99 of a ping beside 20 floods | beside 200 | throughput of 50 floods |
/// | --- | --- | --- | --- |
/// | 256 KiB | 0.13 ms | 0.15 ms | 1.0 |
/// | 512 KiB | 0.20 ms | 0.22 ms | 1.0 |
/// | 1 MiB | 0.25 ms | 0.36 ms | 1.1 |
/// | 4 MiB | 1.1 ms | | 1.2 |
/// | raw epoll loop | 1.4 ms | 14 ms | 1 |
/// | tokio | 24 ms | 176 ms | 1.2 |
///
/// Larger budgets gain because data that was just copied is still in the CPU's cache. 16 turns in a row of the same
/// connection, with a poll after each, would keep the latency and gain 0.0 to 0.1, but one flood would wait 16 times as
/// long for the others.
///
/// With one bulk turn for each 32, 48 and 64 interactive ones, 500 pings beside 50 floods get 1.0, 1.1 and 1.3 times the
/// messages of a server that drives all connections in turn, and the floods 0.9, 0.9 and 0.8 to 0.95 of the throughput.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turns {
    /// Bytes that an interactive connection may read and send in a turn.
    pub(crate) interactive_budget: u64,
    /// The same for a bulk connection.
    pub(crate) bulk_budget: u64,
    /// Bytes read and sent in a turn from which on a connection is bulk.
    pub(crate) bulk_bytes: u64,
    /// Each tick has one bulk turn, and one more for this many interactive turns.
    pub(crate) interactive_per_bulk: usize,
}

impl Turns {
    pub(crate) const DEFAULT: Self = Self {
        interactive_budget: 64 << 10,
        bulk_budget: 256 << 10,
        // A message of 16 KiB that is echoed.
        bulk_bytes: 32 << 10,
        interactive_per_bulk: 64,
    };
}

/// What the connections of a worker, and their handlers, share. It lives as long as the worker; `now` is of the current tick,
/// `token` of the current turn, and `budget` of a part of the tick.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) counters: Arc<CachePadded<WorkerCounters>>,
    pub(crate) wake_queue: WakeQueue,
    pub(crate) timeouts: Timeouts,
    pub(crate) turns: Turns,
    /// How far a graceful shutdown has come.
    pub(crate) drain: Drain,
    /// The time at the start of the tick.
    pub(crate) now: Millis,
    /// The connection that is driven.
    pub(crate) token: usize,
    /// Bytes that it may read and send before others are driven: [`Turns::interactive_budget`], and while the run queue is
    /// served, [`Turns::bulk_budget`]. What was read is still answered, which can send as many bytes again.
    pub(crate) budget: u64,
}

impl Shared {
    pub(crate) fn new(
        timeouts: Timeouts,
        wake_queue: WakeQueue,
        counters: Arc<CachePadded<WorkerCounters>>,
    ) -> Self {
        Self {
            counters,
            wake_queue,
            timeouts,
            turns: Turns::DEFAULT,
            drain: Drain::Off,
            now: 0,
            token: 0,
            budget: Turns::DEFAULT.interactive_budget,
        }
    }
}

/// How far a graceful shutdown has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// None was requested.
    Off,
    /// Data that arrives is still read and answered.
    Answering { deadline: Millis },
    /// Only what had arrived before is still read and answered.
    Finishing { deadline: Millis },
}

/// Timeouts of a worker's connections. Except for `drain` and `stuck`, deadlines are rounded up by at most an eighth of the timeout,
/// so that one wake-up serves many connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    /// A connection is closed when the client has sent nothing, and accepted none of the pending output,
    /// for this long.
    pub(crate) idle: Option<Millis>,
    /// How long an answer may take that a handler has announced.
    pub(crate) answer: Option<Millis>,
    /// The same as `idle` for a connection that only sends its last output.
    pub(crate) close: Millis,
    /// How long a connection that holds buffers makes no progress until it may be reset for the benefit of others.
    pub(crate) stuck: Millis,
    /// How long to wait for the EOF of a client after the server has shut its write half down.
    pub(crate) linger: Millis,
    /// Time limit of a shutdown.
    pub(crate) drain: Millis,
}

impl Timeouts {
    /// The last part of a shutdown, in which only data that had arrived before is read. Long enough to deliver what the
    /// kernel's buffers hold and to refuse the rest, and so short that the end of a stream that was sent before has arrived.
    pub(crate) fn finish(&self) -> Millis {
        self.drain / 4
    }
}

/// Returns the time `timeout` after `since`, rounded up to a multiple of an eighth of the timeout.
pub(crate) fn deadline_after(since: Millis, timeout: Millis) -> Millis {
    let step = (timeout / 8).max(1);
    let deadline = since.saturating_add(timeout);
    deadline.checked_next_multiple_of(step).unwrap_or(NEVER)
}

#[cfg(test)]
mod tests;
