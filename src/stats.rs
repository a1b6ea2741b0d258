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
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crossbeam_utils::CachePadded;

/// The reason why a connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client ended its half of the connection first, and all its input was answered.
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
    /// The server shut down after answering all input that had arrived in time. A client that kept sending is among these;
    /// its bytes that came too late are counted as discarded for [`DrainTimeout`](Self::DrainTimeout).
    Shutdown,
    /// The server shut down, and the drain timeout expired first, or the client ended its stream with data that came
    /// too late to be answered.
    DrainTimeout,
    /// The system had no memory for buffers, and the connection was the one that had been stuck longest, or the one that
    /// needed them.
    OutOfMemory,
    /// The same at the limit of [`buffer_memory`](crate::Config::buffer_memory).
    BufferMemory,
    /// The handler had announced an answer, which did not come within the
    /// [`answer_timeout`](crate::Config::answer_timeout).
    AnswerTimeout,
    /// The handler returned [`Action::Reset`](crate::Action::Reset).
    HandlerReset,
}

impl CloseReason {
    /// All reasons.
    pub const ALL: &'static [CloseReason] = &[
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
        Self::BufferMemory,
        Self::AnswerTimeout,
        Self::HandlerReset,
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
            Self::BufferMemory => "buffer_memory",
            Self::AnswerTimeout => "answer_timeout",
            Self::HandlerReset => "handler_reset",
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A count for each [`CloseReason`].
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct ByReason([u64; CloseReason::ALL.len()]);

impl ByReason {
    /// Returns the count for `reason`.
    #[must_use]
    pub fn get(&self, reason: CloseReason) -> u64 {
        self.0[reason as usize]
    }

    /// Returns the sum for all reasons.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// Shows the reasons that occurred.
impl fmt::Debug for ByReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = CloseReason::ALL.iter().zip(self.0);
        f.debug_map()
            .entries(counts.filter(|(_, count)| *count > 0))
            .finish()
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

    /// Sets it to `value`. Same single writer.
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// Updates a sum after one of its terms changed from `old` to `new`. Same single writer.
    pub(crate) fn adjust(&self, old: usize, new: usize) {
        self.add((new as u64).wrapping_sub(old as u64));
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number with its names and its meaning.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Number {
    /// The name in [`Stats::fields`].
    pub field: &'static str,
    /// The name for Prometheus, without a prefix: that of a counter ends with `_total`, others are gauges. One that begins
    /// with `worker_` is of interest for each worker.
    pub metric: &'static str,
    /// What it means, in one sentence.
    pub help: &'static str,
    /// The number.
    pub value: Value,
}

/// A number in [`Stats`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value {
    /// A count or a state, 0 or 1.
    Count(u64),
    /// A difference.
    Net(i64),
    /// A count for each reason.
    ByReason(ByReason),
    /// A duration.
    Time(Duration),
}

/// A type of the fields in a snapshot.
pub(crate) trait Field {
    /// What a thread counts with.
    type Counter;

    fn read(counter: &Self::Counter) -> Self;
    /// Adds the number of another thread.
    fn merge(&mut self, other: &Self);
    fn value(&self) -> Value;
}

/// Implements [`Field`] for a type with one counter.
macro_rules! field {
    ($type:ty, $value:ident, $read:expr, $merge:expr) => {
        impl Field for $type {
            type Counter = Counter;

            fn read(counter: &Counter) -> Self {
                $read(counter.get())
            }

            fn merge(&mut self, other: &Self) {
                *self = $merge(*self, *other);
            }

            fn value(&self) -> Value {
                Value::$value(*self)
            }
        }
    };
}

field!(u64, Count, u64::from, |sum: u64, other| sum + other);
field!(i64, Net, u64::cast_signed, |sum: i64, other| sum + other);
// The longest of all.
field!(Duration, Time, Duration::from_millis, Duration::max);

impl Field for ByReason {
    type Counter = [Counter; CloseReason::ALL.len()];

    fn read(counters: &Self::Counter) -> Self {
        Self(counters.each_ref().map(Counter::get))
    }

    fn merge(&mut self, other: &Self) {
        for (sum, count) in self.0.iter_mut().zip(&other.0) {
            *sum += count;
        }
    }

    fn value(&self) -> Value {
        Value::ByReason(*self)
    }
}

/// Declares counters, once each: the name of a field, its type, its name for Prometheus and its documentation, which is the
/// help text as well. Defines a struct of counters, a struct of their values, and what follows from the list.
macro_rules! counters {
    (
        $(#[$counters_doc:meta])* $counters:ident;
        $(#[$stats_doc:meta])* $stats:ident { $($(#[$other_doc:meta])* $other:ident: $other_type:ty,)* }
        $($(#[doc = $help:literal])+ $field:ident: $type:ty = $metric:literal,)*
    ) => {
        $(#[$counters_doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $counters {
            $(pub(crate) $field: <$type as Field>::Counter,)*
        }

        $(#[$stats_doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct $stats {
            $($(#[doc = $help])+ pub $field: $type,)*
            $($(#[$other_doc])* pub $other: $other_type,)*
        }

        impl $stats {
            fn read(counters: &$counters, $($other: $other_type)*) -> Self {
                Self { $($field: Field::read(&counters.$field),)* $($other,)* }
            }

            /// Adds the numbers of another thread.
            #[allow(dead_code)] // there is one acceptor
            fn merge(&mut self, other: &Self) {
                $(self.$field.merge(&other.$field);)*
            }

            /// Returns the numbers that a thread has counted, with their names.
            #[must_use]
            pub fn numbers(&self) -> Vec<Number> {
                vec![$(Number {
                    field: stringify!($field),
                    metric: $metric,
                    help: concat!($($help),+).trim_ascii(),
                    value: self.$field.value(),
                },)*]
            }
        }
    };
}

counters! {
    /// The counters of one worker, written by its thread only.
    WorkerCounters;
    /// The numbers of one worker, or the sum of several.
    WorkerStats {}
    /// Connections closed, by reason.
    closed: ByReason = "connections_closed_total",
    /// Bytes received.
    bytes_in: u64 = "received_bytes_total",
    /// Bytes sent.
    bytes_out: u64 = "sent_bytes_total",
    /// Bytes sent or to be sent that were not received, such as greetings, less those that were consumed.
    bytes_generated: i64 = "generated_bytes",
    /// Bytes in the buffers of open connections.
    buffered: u64 = "buffered_bytes",
    /// Open connections that have sent everything and wait for the client's EOF, at most 1 s.
    lingering: u64 = "connections_lingering",
    /// Memory of the buffers that connections hold, in bytes.
    buffer_memory: u64 = "buffer_memory_bytes",
    /// Bytes received or generated but not sent, by the reason for which their connection was closed.
    discarded: ByReason = "discarded_bytes_total",
    /// Ticks of the event loop, each with one wait for events.
    ticks: u64 = "worker_ticks_total",
    /// Turns of bulk connections, which wait in a queue behind the small messages of others.
    bulk_turns: u64 = "worker_bulk_turns_total",
    /// Open connections that are bulk: their last turn moved 32 KiB or more, or used its budget.
    bulk: u64 = "worker_bulk_connections",
    /// The longest tick: how long the events of other connections have waited at most.
    longest_tick: Duration = "worker_longest_tick_seconds",
    /// Connections that the worker took from its queue.
    assigned: u64 = "worker_connections_assigned_total",
}

counters! {
    /// The counters of the acceptor, written by its thread only.
    AcceptorCounters;
    /// A snapshot of a server's counters since its start.
    ///
    /// Each number is exact. A snapshot of a *running* server is not taken at one instant, so its numbers
    /// may not match each other exactly.
    Stats {
        /// The numbers of each worker.
        workers: Vec<WorkerStats>,
    }
    /// Connections accepted.
    accepted: u64 = "connections_accepted_total",
    /// Calls of accept that failed, including those retried at once.
    accept_errors: u64 = "accept_errors_total",
    /// How often accepting paused: without descriptors, at the connection limit, with full queues or after another error.
    accept_pauses: u64 = "accept_pauses_total",
    /// How long accepting paused. A pause that has not ended is not included.
    accept_paused: Duration = "accept_paused_seconds_total",
    /// 1 while accepting is paused, otherwise 0.
    is_accept_paused: u64 = "accept_paused",
    /// Connections that were reset at the end of a shutdown before a worker had capacity for them. They count as closed
    /// for the drain timeout.
    expired: u64 = "connections_expired_total",
}

impl WorkerCounters {
    /// Connections closed, for any reason.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn closed(&self) -> u64 {
        self.closed.iter().map(Counter::get).sum()
    }
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
        let workers = self.workers.iter().map(|worker| WorkerStats::read(worker));
        Stats::read(&self.acceptor, workers.collect())
    }
}

impl Stats {
    /// Returns the sum over all workers, and the [`expired`](Self::expired) connections.
    #[must_use]
    pub fn total(&self) -> WorkerStats {
        let mut total = WorkerStats::default();
        for worker in &self.workers {
            total.merge(worker);
        }
        total.assigned += self.expired;
        total.closed.0[CloseReason::DrainTimeout as usize] += self.expired;
        total
    }

    /// Returns the number of open connections, including those that wait in a worker's queue.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.accepted.saturating_sub(self.total().closed.total())
    }

    /// Returns each number with the name it has in logs, such as `bytes_in` and
    /// `closed_idle_timeout`. Durations are in milliseconds.
    #[must_use]
    pub fn fields(&self) -> Vec<(String, i64)> {
        let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let mut fields = Vec::new();
        for number in [self.numbers(), self.total().numbers()].concat() {
            let name = number.field;
            match number.value {
                Value::Count(count) => fields.push((name.to_owned(), signed(count))),
                Value::Net(net) => fields.push((name.to_owned(), net)),
                Value::Time(time) => {
                    fields.push((format!("{name}_ms"), signed(time.as_millis() as u64)));
                }
                Value::ByReason(counts) => {
                    fields.push((name.to_owned(), signed(counts.total())));
                    for reason in CloseReason::ALL {
                        fields.push((format!("{name}_{reason}"), signed(counts.get(*reason))));
                    }
                }
            }
        }
        fields.insert(1, ("open".to_owned(), signed(self.open())));
        fields
    }

    /// Checks the counters of a server that has ended; returns the first inconsistency in one line.
    ///
    /// In addition to [`check_balance`](Self::check_balance), each connection must have been closed
    /// once, and no byte may be left in a buffer.
    #[must_use]
    pub fn check_final_balance(&self) -> Option<String> {
        let total = self.total();
        let (assigned, closed, buffered) = (total.assigned, total.closed.total(), total.buffered);
        let lingering = total.lingering;
        if assigned == closed && buffered == 0 && lingering == 0 {
            return self.check_balance();
        }
        Some(format!(
            "{assigned} connections assigned, but {closed} closed, {lingering} lingering, and {buffered} bytes still buffered"
        ))
    }

    /// Checks that all connections and bytes are accounted for; returns the first inconsistency in
    /// one line.
    ///
    /// Meaningful for a server at rest or at its end.
    #[must_use]
    pub fn check_balance(&self) -> Option<String> {
        let total = self.total();
        let (accepted, assigned) = (self.accepted, total.assigned);
        if accepted != assigned {
            return Some(format!(
                "{accepted} connections accepted, but {assigned} assigned to workers"
            ));
        }
        let (bytes_in, generated) = (total.bytes_in, total.bytes_generated);
        let accounted = total.bytes_out + total.buffered + total.discarded.total();
        (bytes_in.wrapping_add_signed(generated) != accounted).then(|| {
            format!(
                "{bytes_in} bytes in, {generated:+} generated by handlers, but {accounted} out, buffered or discarded"
            )
        })
    }
}

#[cfg(test)]
mod tests;
