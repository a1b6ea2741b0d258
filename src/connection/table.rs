//! A worker's connections: the connection table, the run queue and the timers.
//!
//! This is all of a worker except its poll call. Time, readiness and new streams are arguments, so a
//! simulated kernel can drive exactly the code that serves sockets.
//!
//! A connection that becomes ready is driven at once, up to a budget of bytes. A connection that has
//! used its budget moves to the back of the run queue, which is run once per tick, before any event is
//! handled. While the run queue is not empty, the worker must not sleep. A flooding connection
//! therefore delays the others by one budget per tick.
//!
//! Time is a number of milliseconds since a fixed moment. It is read once per tick, and nothing is
//! scheduled per message: a connection records its last activity, and a sweep of the whole table, a few
//! times per timeout, finds the connections whose timeout has expired.

use std::collections::VecDeque;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_utils::CachePadded;
use slab::Slab;

use crate::connection::buffer::Pool;
use crate::connection::{Connection, Readiness, Status, Stream};
use crate::handler::Handler;
use crate::peer::Peer;
use crate::stats::{CloseReason, WorkerCounters};
use crate::work_queue::Receiver;

/// Milliseconds since a moment chosen by the caller.
pub(crate) type Millis = u64;

/// Limits and timeouts of each connection of a worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Capacity of a buffer in bytes; a connection has two.
    pub(crate) buffer_size: usize,
    /// Rounds of at most one buffer read and one sent before other connections are served.
    pub(crate) budget: u32,
    /// A connection without a transferred byte for this long is closed.
    pub(crate) idle_timeout: Option<Millis>,
    /// How long to wait for the EOF of a client after the server has shut its write half down.
    pub(crate) linger_timeout: Millis,
    /// Time limit of a drain.
    pub(crate) drain_timeout: Millis,
}

/// Converts to milliseconds, rounded up so that no deadline is early.
pub(crate) fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(Millis::MAX)
}

/// An event from a worker's poll.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// The queue of new connections may hold an item.
    Wake,
    /// The stream with this token is possibly ready.
    Ready(usize, Readiness),
}

#[derive(Debug)]
struct Entry<S, H> {
    connection: Connection<S, H>,
    peer: Peer,
    opened: Millis,
    /// When a byte was last transferred. While lingering: when that began, so that further input does
    /// not extend it (except in a drain, which has its own deadline).
    last_activity: Millis,
    lingering: bool,
    /// The connection is in the run queue.
    queued: bool,
}

/// The deadlines of a drain.
#[derive(Clone, Copy, Debug)]
struct Drain {
    /// No connection is read from after this: a client that still sends may never stop.
    read_deadline: Millis,
    /// All connections are closed at this.
    deadline: Millis,
}

#[derive(Debug)]
pub(crate) struct ConnectionTable<S, H> {
    entries: Slab<Entry<S, H>>,
    /// Tokens of runnable connections, each at most once (see [`Entry::queued`]).
    run_queue: VecDeque<usize>,
    pool: Pool,
    limits: Limits,
    next_sweep: Option<Millis>,
    drain: Option<Drain>,
    counters: Arc<CachePadded<WorkerCounters>>,
    /// A connection was closed since the last [`ConnectionTable::take_closed`].
    closed: bool,
    /// The worker's index, for the log.
    worker: usize,
}

impl<S: Stream, H: Handler> ConnectionTable<S, H> {
    pub(crate) fn new(
        limits: Limits,
        counters: Arc<CachePadded<WorkerCounters>>,
        worker: usize,
    ) -> Self {
        Self {
            entries: Slab::new(),
            run_queue: VecDeque::new(),
            pool: Pool::new(limits.buffer_size),
            limits,
            next_sweep: None,
            drain: None,
            counters,
            closed: false,
            worker,
        }
    }

    /// Runs one tick: first the run queue, then the events, then new connections, then the timers.
    ///
    /// New connections follow the events so that a token freed in this batch is not reused while the
    /// batch may still hold events for its previous owner. `open` registers a new stream under the given
    /// token and creates its handler.
    pub(crate) fn tick(
        &mut self,
        now: Millis,
        events: impl Iterator<Item = Event>,
        receiver: &mut Receiver<(S, Peer)>,
        mut open: impl FnMut(&mut S, &Peer, usize) -> Result<H, CloseReason>,
    ) {
        for _ in 0..self.run_queue.len() {
            if let Some(token) = self.run_queue.pop_front() {
                self.entries[token].queued = false;
                self.drive(token, now);
            }
        }
        let mut woken = false;
        for event in events {
            match event {
                Event::Wake => woken = true,
                Event::Ready(token, readiness) => self.on_ready(token, readiness, now),
            }
        }
        if woken {
            for (stream, peer) in receiver.take_all() {
                self.register(stream, peer, now, &mut open);
            }
            if receiver.is_closed() && self.drain.is_none() {
                self.start_drain(now);
            }
        }
        self.run_timers(now);
    }

    /// How long the worker may sleep; `None` means until the next event.
    pub(crate) fn poll_timeout(&self, now: Millis) -> Option<Millis> {
        if !self.run_queue.is_empty() {
            return Some(0);
        }
        self.next_sweep.map(|at| at.saturating_sub(now))
    }

    /// Whether a connection was closed since the last call.
    pub(crate) fn take_closed(&mut self) -> bool {
        mem::take(&mut self.closed)
    }

    /// Whether the drain is complete: no connection is open, and none can arrive.
    pub(crate) fn is_drained(&self) -> bool {
        self.drain.is_some() && self.entries.is_empty()
    }

    fn register(
        &mut self,
        mut stream: S,
        peer: Peer,
        now: Millis,
        open: &mut impl FnMut(&mut S, &Peer, usize) -> Result<H, CloseReason>,
    ) {
        self.reserve_slot();
        let counters = &self.counters;
        counters.assigned.add(1);
        let slot = self.entries.vacant_entry();
        let token = slot.key();
        // Contain panics from the handler factory too.
        let opened = catch_unwind(AssertUnwindSafe(|| open(&mut stream, &peer, token)));
        let handler = match opened.unwrap_or(Err(CloseReason::Panic)) {
            Ok(handler) => handler,
            Err(reason) => {
                log::debug!(target: "echoserver::access", peer:%, worker = self.worker, reason:%; "not opened");
                drop(stream);
                counters.closed[reason as usize].add(1);
                self.closed = true;
                return;
            }
        };
        let mut connection = Connection::new(stream, handler);
        if self.drain.is_some() {
            connection.drain();
        }
        slot.insert(Entry {
            connection,
            peer,
            opened: now,
            last_activity: now,
            lingering: false,
            queued: false,
        });
        if let Some(idle_timeout) = self.limits.idle_timeout {
            self.schedule_sweep(now.saturating_add(idle_timeout));
        }
        self.drive(token, now);
    }

    /// Grows a full table by a quarter; doubling would waste up to half of it.
    fn reserve_slot(&mut self) {
        let len = self.entries.len();
        if len == self.entries.capacity() {
            self.entries.reserve_exact((len / 4).max(64));
        }
    }

    /// Adds readiness to a connection and drives it, unless it is in the run queue. An unknown token
    /// belongs to a connection that was closed earlier in this batch.
    #[inline(always)]
    fn on_ready(&mut self, token: usize, readiness: Readiness, now: Millis) {
        let Some(entry) = self.entries.get_mut(token) else {
            return;
        };
        let connection = &mut entry.connection;
        connection.add_readiness(readiness);
        if entry.queued {
            return;
        }
        let status = connection.drive(&mut self.pool, self.limits.budget, &self.counters);
        if connection.take_progress() && (!entry.lingering || self.drain.is_some()) {
            entry.last_activity = now;
        }
        if status != Status::Idle || connection.linger_reason().is_some() {
            self.handle_status(token, status, now);
        }
    }

    /// Acts on a status other than a plain `Idle`.
    #[inline(never)]
    fn handle_status(&mut self, token: usize, status: Status, now: Millis) {
        let entry = &mut self.entries[token];
        match status {
            Status::Idle => {}
            Status::Runnable => {
                self.counters.yields.add(1);
                entry.queued = true;
                self.run_queue.push_back(token);
            }
            Status::Closed(reason) => return self.close(token, reason, now),
        }
        if entry.connection.linger_reason().is_some() && !entry.lingering {
            entry.lingering = true;
            entry.last_activity = now;
            self.schedule_sweep(now.saturating_add(self.limits.linger_timeout));
        }
    }

    /// Drives a connection without new readiness.
    fn drive(&mut self, token: usize, now: Millis) {
        self.on_ready(token, Readiness::default(), now);
    }

    /// Drives all connections that are not in the run queue.
    fn drive_all(&mut self, now: Millis) {
        let waiting = self.entries.iter().filter(|(_, entry)| !entry.queued);
        let waiting: Vec<_> = waiting.map(|(token, _)| token).collect();
        for token in waiting {
            self.drive(token, now);
        }
    }

    fn close(&mut self, token: usize, reason: CloseReason, now: Millis) {
        let Entry {
            connection,
            peer,
            opened,
            queued,
            ..
        } = self.entries.remove(token);
        if queued {
            self.run_queue.retain(|&runnable| runnable != token);
        }
        let counters = &self.counters;
        counters.buffered.adjust(connection.buffered(), 0);
        counters.discarded[reason as usize].add(connection.buffered() as u64);
        log::debug!(
            target: "echoserver::access",
            peer:%, worker = self.worker, ms = now.saturating_sub(opened),
            bytes_in = connection.bytes_in(), bytes_out = connection.bytes_out(), reason:%;
            "closed"
        );
        // Dropping the handler runs user code. The panic hook has already reported a panic.
        let _panic = catch_unwind(AssertUnwindSafe(|| drop(connection)));
        // Counted last, so that the descriptor is closed before the count is visible.
        counters.closed[reason as usize].add(1);
        self.closed = true;
    }

    fn schedule_sweep(&mut self, at: Millis) {
        self.next_sweep = Some(self.next_sweep.map_or(at, |next| next.min(at)));
    }

    /// Closes expired connections, if a sweep is due.
    fn run_timers(&mut self, now: Millis) {
        if self.next_sweep.is_none_or(|at| now < at) {
            return;
        }
        self.next_sweep = None;
        if let Some(drain) = self.drain {
            self.advance_drain(drain, now);
        }
        let mut expired = Vec::new();
        let mut earliest = None;
        for (token, entry) in &self.entries {
            let Some(timeout) = self.timeout_of(entry) else {
                continue;
            };
            let at = entry.last_activity.saturating_add(timeout);
            if at <= now {
                expired.push(token);
            } else {
                // Up to an eighth of the timeout late, so that one sweep serves many connections.
                let at = at.max(now.saturating_add(timeout / 8)).max(now + 1);
                earliest = Some(earliest.map_or(at, |earliest: Millis| earliest.min(at)));
            }
        }
        if let Some(at) = earliest {
            self.schedule_sweep(at);
        }
        for token in expired {
            self.expire(token, now);
        }
    }

    /// How long a connection may stay open without progress.
    fn timeout_of(&self, entry: &Entry<S, H>) -> Option<Millis> {
        match entry.connection.linger_reason() {
            Some(_) => Some(self.limits.linger_timeout),
            None => self.limits.idle_timeout,
        }
    }

    /// Closes an expired connection: cleanly if no output is pending, otherwise at once.
    fn expire(&mut self, token: usize, now: Millis) {
        let connection = &mut self.entries[token].connection;
        if let Some(reason) = connection.linger_reason() {
            return self.close(token, reason, now);
        }
        connection.close_after_flush(CloseReason::IdleTimeout);
        self.drive(token, now);
        let entry = self.entries.get(token);
        if entry.is_some_and(|entry| entry.connection.linger_reason().is_none()) {
            self.close(token, CloseReason::IdleTimeout, now);
        }
    }

    /// Answers the data that has arrived, then closes every connection, those that arrive later included.
    fn start_drain(&mut self, now: Millis) {
        let drain_timeout = self.limits.drain_timeout;
        self.drain = Some(Drain {
            read_deadline: now.saturating_add(drain_timeout / 2),
            deadline: now.saturating_add(drain_timeout),
        });
        for (_, entry) in &mut self.entries {
            entry.connection.drain();
        }
        self.drive_all(now);
        self.schedule_sweep(now);
    }

    fn advance_drain(&mut self, drain: Drain, now: Millis) {
        if now >= drain.deadline {
            let open = self.entries.iter();
            let open: Vec<_> = open
                .map(|(token, entry)| (token, entry.connection.linger_reason()))
                .collect();
            for (token, linger_reason) in open {
                self.close(
                    token,
                    linger_reason.unwrap_or(CloseReason::DrainTimeout),
                    now,
                );
            }
        } else if now >= drain.read_deadline {
            for (_, entry) in &mut self.entries {
                entry.connection.stop_reading();
            }
            self.drive_all(now);
            self.schedule_sweep(drain.deadline);
        } else {
            self.schedule_sweep(drain.read_deadline);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::{self, ErrorKind, Read, Write};
    use std::iter;
    use std::num::NonZeroUsize;
    use std::rc::Rc;

    use super::*;
    use crate::connection::buffer::Buffer;
    use crate::handler::{Action, Echo};
    use crate::stats::Counters;
    use crate::work_queue::WorkQueue;

    const LIMITS: Limits = Limits {
        buffer_size: 4,
        budget: 2,
        idle_timeout: None,
        linger_timeout: 80,
        drain_timeout: 1000,
    };

    const READABLE: Readiness = Readiness {
        readable: true,
        writable: false,
        read_until_would_block: false,
    };

    /// The names of the streams that were read from, in order.
    type Log = Rc<RefCell<Vec<char>>>;

    /// A stream with `unread` bytes to read that accepts every byte written and logs its reads.
    struct Flood {
        name: char,
        unread: usize,
        log: Log,
    }

    impl Read for Flood {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            let count = self.unread.min(bytes.len());
            if count == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.log.borrow_mut().push(self.name);
            self.unread -= count;
            Ok(count)
        }
    }

    impl Write for Flood {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Stream for Flood {
        fn shutdown_write(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A table with its queue of new connections.
    struct Harness<H> {
        table: ConnectionTable<Flood, H>,
        queue: Option<WorkQueue<(Flood, Peer)>>,
        receiver: Receiver<(Flood, Peer)>,
        counters: Arc<Counters>,
        log: Log,
    }

    impl<H: Handler> Harness<H> {
        fn new(limits: Limits) -> Self {
            let counters = Arc::new(Counters::new(1));
            let (queue, mut receivers) = WorkQueue::bounded(NonZeroUsize::MIN, [()]);
            Self {
                table: ConnectionTable::new(limits, Arc::clone(&counters.workers[0]), 0),
                queue: Some(queue),
                receiver: receivers.remove(0),
                counters,
                log: Log::default(),
            }
        }

        /// Registers a new stream; `open` creates its handler.
        fn register(
            &mut self,
            now: Millis,
            name: char,
            unread: usize,
            mut open: impl FnMut(usize) -> Result<H, CloseReason>,
        ) {
            let log = Rc::clone(&self.log);
            let stream = Flood { name, unread, log };
            let queue = self.queue.as_ref().expect("not closed yet");
            queue.try_push((stream, Peer::Unix)).expect("room");
            self.counters.acceptor.accepted.add(1);
            let events = iter::once(Event::Wake);
            self.table
                .tick(now, events, &mut self.receiver, |_, _, token| open(token));
        }

        fn tick(&mut self, now: Millis, readable: &[usize]) {
            let events = readable.iter().map(|&token| Event::Ready(token, READABLE));
            self.table
                .tick(now, events, &mut self.receiver, |_, _, _| unreachable!());
        }

        fn reads(&self) -> String {
            self.log.borrow_mut().drain(..).collect()
        }

        fn closed(&self, reason: CloseReason) -> u64 {
            self.counters.snapshot().total().closed_for(reason)
        }
    }

    fn echoes(limits: Limits, clients: &str) -> Harness<Echo> {
        let mut harness = Harness::new(limits);
        for name in clients.chars() {
            harness.register(0, name, 1000, |_| Ok(Echo));
        }
        harness
    }

    #[test]
    fn connection_with_used_budget_moves_to_the_back() {
        let mut harness = echoes(LIMITS, "abc");
        assert_eq!(
            harness.table.poll_timeout(0),
            None,
            "no connection is known to be readable"
        );
        harness.tick(0, &[2, 0]);
        assert_eq!(harness.reads(), "ccaa", "one budget each");
        assert_eq!(
            harness.table.poll_timeout(0),
            Some(0),
            "the run queue is not empty"
        );
        harness.tick(0, &[1, 0]);
        assert_eq!(
            harness.reads(),
            "ccaabb",
            "run queue first; an event does not drive a queued connection"
        );
        harness.tick(0, &[]);
        assert_eq!(harness.reads(), "ccaabb");
        assert_eq!(harness.counters.snapshot().total().yields, 2 + 3 + 3);
    }

    #[test]
    fn quiet_connection_is_served_within_one_tick_of_a_flood() {
        let mut harness = echoes(LIMITS, "f");
        harness.register(0, 'q', 3, |_| Ok(Echo));
        harness.tick(0, &[0]);
        harness.tick(0, &[1]);
        assert_eq!(harness.reads(), "ffffq");
    }

    #[test]
    fn without_timeouts_the_worker_sleeps_until_an_event() {
        let mut harness = Harness::new(LIMITS);
        harness.register(0, 'a', 0, |_| Ok(Echo));
        harness.tick(0, &[0]);
        assert_eq!(harness.table.poll_timeout(0), None);
    }

    #[test]
    fn only_expired_connections_are_closed_by_a_sweep() {
        let idle_timeout = Some(800);
        let mut harness = Harness::new(Limits {
            idle_timeout,
            ..LIMITS
        });
        harness.register(0, 'a', 4, |_| Ok(Echo));
        harness.register(100, 'b', 0, |_| Ok(Echo));
        assert_eq!(harness.table.poll_timeout(100), Some(700));
        harness.tick(400, &[0]);
        harness.tick(799, &[]);
        harness.tick(800, &[]);
        assert_eq!(
            harness.table.poll_timeout(800),
            Some(100),
            "b is next, at 900"
        );
        harness.tick(899, &[]);
        assert_eq!(harness.table.entries[1].connection.linger_reason(), None);
        harness.tick(900, &[]);
        let linger_reason = |token: usize| harness.table.entries[token].connection.linger_reason();
        assert_eq!(
            (linger_reason(0), linger_reason(1)),
            (None, Some(CloseReason::IdleTimeout))
        );
        assert_eq!(harness.table.poll_timeout(900), Some(80), "b lingers");
        harness.tick(979, &[]);
        assert_eq!(harness.closed(CloseReason::IdleTimeout), 0);
        harness.tick(980, &[]);
        assert_eq!(harness.closed(CloseReason::IdleTimeout), 1);
        assert_eq!(
            harness.table.poll_timeout(980),
            Some(1200 - 980),
            "a was active at 400"
        );
    }

    #[test]
    fn sweeps_are_an_eighth_of_the_timeout_apart() {
        let idle_timeout = Some(800);
        let mut harness = Harness::new(Limits {
            idle_timeout,
            ..LIMITS
        });
        for at in 0..5 {
            harness.register(at, 'a', 0, |_| Ok(Echo));
        }
        harness.tick(800, &[]);
        // The first connection lingers until 880. The others expire from 801 on, but the next sweep is
        // an eighth of the timeout later.
        assert_eq!(harness.table.poll_timeout(800), Some(80));
        harness.tick(880, &[]);
        assert_eq!(harness.closed(CloseReason::IdleTimeout), 1);
        // That sweep has closed the others.
        assert_eq!(harness.table.poll_timeout(880), Some(80));
    }

    #[test]
    fn connection_that_cannot_be_opened_is_closed_with_its_reason() {
        let mut harness = Harness::new(LIMITS);
        harness.register(0, 'a', 0, |_| Err(CloseReason::Error));
        harness.register(0, 'b', 0, |_| panic!("deliberate panic"));
        assert_eq!(
            (
                harness.closed(CloseReason::Error),
                harness.closed(CloseReason::Panic)
            ),
            (1, 1)
        );
        assert!(harness.table.entries.is_empty());
        harness.register(0, 'c', 1, |token| {
            assert_eq!(token, 0, "the slots are free");
            Ok(Echo)
        });
        harness.tick(0, &[0]);
        assert_eq!(harness.reads(), "c");
        assert_eq!(harness.counters.snapshot().check_balance(), None);
    }

    #[test]
    fn closes_are_reported_once() {
        let mut harness = echoes(LIMITS, "a");
        assert!(!harness.table.take_closed());
        harness.register(0, 'b', 0, |_| Err(CloseReason::Error));
        assert!(harness.table.take_closed());
        assert!(!harness.table.take_closed());
        harness.table.close(0, CloseReason::DrainTimeout, 0);
        assert!(harness.table.take_closed());
    }

    #[test]
    fn the_table_grows_by_a_quarter() {
        let mut harness = Harness::new(LIMITS);
        let mut capacities = vec![0];
        for count in 1..=2000 {
            harness.register(0, 'a', 0, |_| Ok(Echo));
            let capacity = harness.table.entries.capacity();
            let spare = capacity - count;
            assert!(spare < 64 || spare <= count / 4, "{spare} of {count}");
            capacities.push(capacity);
        }
        capacities.dedup();
        assert!(
            capacities.len() < 20,
            "too many reallocations: {capacities:?}"
        );
    }

    #[test]
    fn event_with_a_stale_token_is_ignored() {
        let mut harness = echoes(LIMITS, "a");
        harness.tick(0, &[7, 0]);
        assert_eq!(harness.reads(), "aa");
    }

    /// Panics on input, and again when dropped.
    struct PanicOnDrop;

    impl Handler for PanicOnDrop {
        fn process(&mut self, input: &mut Buffer, _: &mut Buffer) -> Action {
            assert!(input.is_empty(), "deliberate panic");
            Action::Continue
        }
    }

    impl Drop for PanicOnDrop {
        fn drop(&mut self) {
            panic!("another deliberate panic");
        }
    }

    #[test]
    fn panics_close_only_their_own_connection() {
        let mut harness = Harness::new(LIMITS);
        for name in ['a', 'b'] {
            harness.register(0, name, 1, |_| Ok(PanicOnDrop));
        }
        harness.tick(0, &[0, 1]);
        assert_eq!(harness.closed(CloseReason::Panic), 0, "they linger");
        harness.tick(LIMITS.linger_timeout, &[]);
        assert_eq!(harness.closed(CloseReason::Panic), 2);
        assert!(harness.table.entries.is_empty());
        let stats = harness.counters.snapshot();
        assert_eq!(
            (stats.check_balance(), stats.total().total_discarded()),
            (None, 2)
        );
    }

    #[test]
    fn flood_is_read_for_half_of_the_drain_timeout() {
        let mut harness = Harness::new(LIMITS);
        harness.register(0, 'f', 100_000, |_| Ok(Echo));
        harness.table.entries[0].connection.add_readiness(READABLE);
        harness.queue = None;
        let events = iter::once(Event::Wake);
        harness
            .table
            .tick(7, events, &mut harness.receiver, |_, _, _| unreachable!());
        for now in 8..507 {
            // The client never stops sending.
            harness.tick(now, &[0]);
            assert_eq!(
                harness.table.entries[0].connection.linger_reason(),
                None,
                "{now}"
            );
            if now == 100 {
                assert_eq!(harness.table.poll_timeout(now), Some(0));
            }
        }
        harness.tick(507, &[]);
        assert_eq!(harness.table.poll_timeout(507), Some(0));
        harness.tick(507, &[]);
        assert_eq!(
            harness.table.entries[0].connection.linger_reason(),
            Some(CloseReason::Shutdown)
        );
    }

    #[test]
    fn durations_round_up() {
        assert_eq!(millis(Duration::ZERO), 0);
        assert_eq!(millis(Duration::from_nanos(1)), 1);
        assert_eq!(millis(Duration::from_millis(7)), 7);
        assert_eq!(millis(Duration::MAX), Millis::MAX);
    }
}
