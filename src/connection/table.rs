//! One worker's connections: the table, the run queue, the budgets and the sweep of the idle.
//!
//! Everything of a worker but the poll call: time, readiness and new streams come in as arguments,
//! so the code that serves sockets is the code that a simulated kernel drives.
//!
//! A connection that is ready is run at once, up to a budget of bytes. Who has spent it goes to the
//! back of the run queue, which is gone through once a turn, before anyone else is run; while anyone is
//! in it, the worker must not sleep. So a flood costs its neighbours one budget's time and no more.
//!
//! Time is a count of milliseconds since any fixed moment. It is looked at once a turn, and nothing
//! is scheduled per message: a connection notes when it last moved a byte, and a sweep of the whole
//! table, a few times per timeout at most, finds those whose time is over.

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

/// Milliseconds since a moment that the caller fixed once.
pub(crate) type Millis = u64;

/// The bounds that every connection of a worker lives in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Most bytes a buffer holds; each connection has two.
    pub(crate) buffer_size: usize,
    /// Buffers a connection may read and send before others get their turn.
    pub(crate) rounds: u32,
    /// How long a connection may move no byte.
    pub(crate) idle_timeout: Option<Millis>,
    /// How long a client may take to end its stream once the server has ended its own.
    pub(crate) linger_timeout: Millis,
    /// How long a drain may take.
    pub(crate) drain_timeout: Millis,
}

/// A duration in whole milliseconds, rounded up: a deadline never comes early.
pub(crate) fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(Millis::MAX)
}

/// What a worker's poll can tell.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// There may be something in the mailbox.
    Wake,
    /// The stream with this token may be ready.
    Ready(usize, Readiness),
}

#[derive(Debug)]
struct Entry<S, H> {
    connection: Connection<S, H>,
    peer: Peer,
    opened: Millis,
    /// When it last moved a byte; or when its lingering began, which is bounded from its start,
    /// whatever still comes. (In a drain every byte counts: there the drain is the bound.)
    active: Millis,
    lingering: bool,
    queued: bool,
}

/// When the stages of a drain are over.
#[derive(Clone, Copy, Debug)]
struct Drain {
    /// From here on nothing more is read: who still sends would send for ever.
    read_deadline: Millis,
    /// From here on nobody is waited for.
    deadline: Millis,
}

#[derive(Debug)]
pub(crate) struct Connections<S, H> {
    table: Slab<Entry<S, H>>,
    /// Each at most once, as its entry's `queued` says.
    run_queue: VecDeque<usize>,
    pool: Pool,
    limits: Limits,
    next_sweep: Option<Millis>,
    drain: Option<Drain>,
    counters: Arc<CachePadded<WorkerCounters>>,
    /// A connection was closed since [`Connections::take_closed`] was asked.
    closed: bool,
    /// The worker's number, for the log.
    worker: usize,
}

impl<S: Stream, H: Handler> Connections<S, H> {
    pub(crate) fn new(
        limits: Limits,
        counters: Arc<CachePadded<WorkerCounters>>,
        worker: usize,
    ) -> Self {
        Self {
            table: Slab::new(),
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

    /// One turn of the worker: first those who had spent their budget, then who is ready, then the
    /// new, then the clock.
    ///
    /// The new come after the events, so that a place notify_capacity by this batch of events isn't given to
    /// another connection while events for the old one may still be in it. `open` prepares a new
    /// stream to be noticed under the given token, and makes its handler.
    pub(crate) fn turn(
        &mut self,
        now: Millis,
        events: impl Iterator<Item = Event>,
        receiver: &mut Receiver<(S, Peer)>,
        mut open: impl FnMut(&mut S, &Peer, usize) -> Result<H, CloseReason>,
    ) {
        for _ in 0..self.run_queue.len() {
            if let Some(token) = self.run_queue.pop_front() {
                self.table[token].queued = false;
                self.run_on(token, now);
            }
        }
        let mut notified = false;
        for event in events {
            match event {
                Event::Wake => notified = true,
                Event::Ready(token, readiness) => self.run(token, readiness, now),
            }
        }
        if notified {
            for (stream, peer) in receiver.take_all() {
                self.register(stream, peer, now, &mut open);
            }
            if receiver.is_closed() && self.drain.is_none() {
                self.start_drain(now);
            }
        }
        self.run_timers(now);
    }

    /// How long the worker may sleep; `None` is until something happens.
    pub(crate) fn poll_timeout(&self, now: Millis) -> Option<Millis> {
        if !self.run_queue.is_empty() {
            return Some(0);
        }
        self.next_sweep.map(|at| at.saturating_sub(now))
    }

    /// Whether a connection was closed since this was last asked.
    pub(crate) fn take_closed(&mut self) -> bool {
        mem::take(&mut self.closed)
    }

    /// Whether the drain is over: nobody is left, and nobody can come.
    pub(crate) fn is_drained(&self) -> bool {
        self.drain.is_some() && self.table.is_empty()
    }

    fn register(
        &mut self,
        mut stream: S,
        peer: Peer,
        now: Millis,
        open: &mut impl FnMut(&mut S, &Peer, usize) -> Result<H, CloseReason>,
    ) {
        self.reserve_place();
        let counters = &self.counters;
        counters.taken.add(1);
        let place = self.table.vacant_entry();
        let token = place.key();
        // A panic in the maker of handlers is the same to others as one in a handler.
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
        place.insert(Entry {
            connection,
            peer,
            opened: now,
            active: now,
            lingering: false,
            queued: false,
        });
        if let Some(idle_timeout) = self.limits.idle_timeout {
            self.schedule_sweep(now.saturating_add(idle_timeout));
        }
        self.run_on(token, now);
    }

    /// Grows the table by a quarter where it is full: doubling would waste up to half of it.
    fn reserve_place(&mut self) {
        let len = self.table.len();
        if len == self.table.capacity() {
            self.table.reserve_exact((len / 4).max(64));
        }
    }

    /// Takes note of an event, runs its connection unless its turn comes anyhow, and does what its
    /// state then asks for. A token that nobody has belongs to one that ended within this batch.
    #[inline(always)]
    fn run(&mut self, token: usize, readiness: Readiness, now: Millis) {
        let Some(entry) = self.table.get_mut(token) else {
            return;
        };
        let connection = &mut entry.connection;
        connection.notice(readiness);
        if entry.queued {
            return;
        }
        let status = connection.run(&mut self.pool, self.limits.rounds, &self.counters);
        if connection.take_progress() && (!entry.lingering || self.drain.is_some()) {
            entry.active = now;
        }
        if status != Status::Idle || connection.linger_reason().is_some() {
            self.handle_status(token, status, now);
        }
    }

    /// What a connection's state asks for, where that is more than to wait.
    #[inline(never)]
    fn handle_status(&mut self, token: usize, status: Status, now: Millis) {
        let entry = &mut self.table[token];
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
            entry.active = now;
            self.schedule_sweep(now.saturating_add(self.limits.linger_timeout));
        }
    }

    /// Runs a connection without news of it.
    fn run_on(&mut self, token: usize, now: Millis) {
        self.run(token, Readiness::default(), now);
    }

    /// Runs all who are not about to run anyhow.
    fn drive_all(&mut self, now: Millis) {
        let waiting = self
            .table
            .iter()
            .filter(|(_, entry)| !entry.queued)
            .map(|(token, _)| token);
        for token in waiting.collect::<Vec<_>>() {
            self.run_on(token, now);
        }
    }

    fn close(&mut self, token: usize, reason: CloseReason, now: Millis) {
        let Entry {
            connection,
            peer,
            opened,
            queued,
            ..
        } = self.table.remove(token);
        if queued {
            self.run_queue.retain(|&runnable| runnable != token);
        }
        let counters = &self.counters;
        counters.buffered.shift(connection.buffered(), 0);
        counters.discarded[reason as usize].add(connection.buffered() as u64);
        log::debug!(
            target: "echoserver::access",
            peer:%, worker = self.worker, ms = now.saturating_sub(opened),
            bytes_in = connection.bytes_in(), bytes_out = connection.bytes_out(), reason:%;
            "closed"
        );
        // The handler is somebody else's code, its drop included. The panic hook has told of it.
        let _panic = catch_unwind(AssertUnwindSafe(|| drop(connection)));
        // Last: who reads that it is closed may rely on its descriptor being free.
        counters.closed[reason as usize].add(1);
        self.closed = true;
    }

    fn schedule_sweep(&mut self, at: Millis) {
        self.next_sweep = Some(self.next_sweep.map_or(at, |next| next.min(at)));
    }

    /// Sweeps, if it is time to.
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
        for (token, entry) in &self.table {
            let Some(timeout_of) = self.timeout_of(entry) else {
                continue;
            };
            let at = entry.active.saturating_add(timeout_of);
            if at <= now {
                expired.push(token);
            } else {
                // Rather an eighth too late than a sweep for each that becomes idle.
                let at = at.max(now.saturating_add(timeout_of / 8)).max(now + 1);
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

    /// How long a connection may go on without moving a byte.
    fn timeout_of(&self, entry: &Entry<S, H>) -> Option<Millis> {
        match entry.connection.linger_reason() {
            Some(_) => Some(self.limits.linger_timeout),
            None => self.limits.idle_timeout,
        }
    }

    /// Ends a connection whose time is over: in order if nothing is stuck, at once otherwise.
    fn expire(&mut self, token: usize, now: Millis) {
        let connection = &mut self.table[token].connection;
        if let Some(reason) = connection.linger_reason() {
            return self.close(token, reason, now);
        }
        connection.finish(CloseReason::IdleTimeout);
        self.run_on(token, now);
        if self
            .table
            .get(token)
            .is_some_and(|entry| entry.connection.linger_reason().is_none())
        {
            self.close(token, CloseReason::IdleTimeout, now);
        }
    }

    /// Answers what has arrived, then closes every connection; those that come from here on too.
    fn start_drain(&mut self, now: Millis) {
        let drain_timeout = self.limits.drain_timeout;
        self.drain = Some(Drain {
            read_deadline: now.saturating_add(drain_timeout / 2),
            deadline: now.saturating_add(drain_timeout),
        });
        for (_, entry) in &mut self.table {
            entry.connection.drain();
        }
        self.drive_all(now);
        self.schedule_sweep(now);
    }

    fn advance_drain(&mut self, drain: Drain, now: Millis) {
        if now >= drain.deadline {
            let everyone = self
                .table
                .iter()
                .map(|(token, entry)| (token, entry.connection.linger_reason()));
            for (token, done) in everyone.collect::<Vec<_>>() {
                self.close(token, done.unwrap_or(CloseReason::DrainTimeout), now);
            }
        } else if now >= drain.read_deadline {
            for (_, entry) in &mut self.table {
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
        rounds: 2,
        idle_timeout: None,
        linger_timeout: 80,
        drain_timeout: 1000,
    };

    const READABLE: Readiness = Readiness {
        readable: true,
        writable: false,
        read_until_would_block: false,
    };

    /// Who was read from, in order.
    type Log = Rc<RefCell<Vec<char>>>;

    /// Has `unread` bytes to read, takes every byte written, and notes its reads.
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
        fn end(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Connections with their mailbox.
    struct Scene<H> {
        connections: Connections<Flood, H>,
        queue: Option<WorkQueue<(Flood, Peer)>>,
        receiver: Receiver<(Flood, Peer)>,
        counters: Arc<Counters>,
        log: Log,
    }

    impl<H: Handler> Scene<H> {
        fn new(limits: Limits) -> Self {
            let counters = Arc::new(Counters::new(1));
            let (queue, mut receivers) = WorkQueue::bounded(NonZeroUsize::MIN, [()]);
            Self {
                connections: Connections::new(limits, Arc::clone(&counters.workers[0]), 0),
                queue: Some(queue),
                receiver: receivers.remove(0),
                counters,
                log: Log::default(),
            }
        }

        /// A stream arrives, and is given to `open`.
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
            self.connections
                .turn(now, events, &mut self.receiver, |_, _, token| open(token));
        }

        fn turn(&mut self, now: Millis, readable: &[usize]) {
            let events = readable.iter().map(|&token| Event::Ready(token, READABLE));
            self.connections
                .turn(now, events, &mut self.receiver, |_, _, _| unreachable!());
        }

        fn reads(&self) -> String {
            self.log.borrow_mut().drain(..).collect()
        }

        fn closed(&self, reason: CloseReason) -> u64 {
            self.counters.snapshot().total().closed_for(reason)
        }
    }

    fn echoes(limits: Limits, clients: &str) -> Scene<Echo> {
        let mut scene = Scene::new(limits);
        for name in clients.chars() {
            scene.register(0, name, 1000, |_| Ok(Echo));
        }
        scene
    }

    #[test]
    fn who_has_spent_the_budget_goes_to_the_back() {
        let mut scene = echoes(LIMITS, "abc");
        assert_eq!(
            scene.connections.poll_timeout(0),
            None,
            "nobody is known to be readable"
        );
        scene.turn(0, &[2, 0]);
        assert_eq!(scene.reads(), "ccaa", "a budget each");
        assert_eq!(
            scene.connections.poll_timeout(0),
            Some(0),
            "no sleep while there is work"
        );
        scene.turn(0, &[1, 0]);
        assert_eq!(
            scene.reads(),
            "ccaabb",
            "the queue first, and whoever is queued isn't run for an event"
        );
        scene.turn(0, &[]);
        assert_eq!(scene.reads(), "ccaabb");
        assert_eq!(scene.counters.snapshot().total().yields, 2 + 3 + 3);
    }

    #[test]
    fn a_quiet_neighbour_is_served_within_a_turn_of_a_flood() {
        let mut scene = echoes(LIMITS, "f");
        scene.register(0, 'q', 3, |_| Ok(Echo));
        scene.turn(0, &[0]);
        scene.turn(0, &[1]);
        assert_eq!(scene.reads(), "ffffq");
    }

    #[test]
    fn without_timeouts_it_sleeps_until_something_happens() {
        let mut scene = Scene::new(LIMITS);
        scene.register(0, 'a', 0, |_| Ok(Echo));
        scene.turn(0, &[0]);
        assert_eq!(scene.connections.poll_timeout(0), None);
    }

    #[test]
    fn the_idle_are_swept_when_their_time_is_over_and_others_are_not() {
        let idle_timeout = Some(800);
        let mut scene = Scene::new(Limits {
            idle_timeout,
            ..LIMITS
        });
        scene.register(0, 'a', 4, |_| Ok(Echo));
        scene.register(100, 'b', 0, |_| Ok(Echo));
        assert_eq!(scene.connections.poll_timeout(100), Some(700));
        scene.turn(400, &[0]);
        scene.turn(799, &[]);
        scene.turn(800, &[]);
        assert_eq!(
            scene.connections.poll_timeout(800),
            Some(100),
            "b is next, at 900"
        );
        scene.turn(899, &[]);
        assert_eq!(scene.connections.table[1].connection.linger_reason(), None);
        scene.turn(900, &[]);
        let linger_reason =
            |token: usize| scene.connections.table[token].connection.linger_reason();
        assert_eq!(
            (linger_reason(0), linger_reason(1)),
            (None, Some(CloseReason::IdleTimeout))
        );
        assert_eq!(
            scene.connections.poll_timeout(900),
            Some(80),
            "b's lingering"
        );
        scene.turn(979, &[]);
        assert_eq!(scene.closed(CloseReason::IdleTimeout), 0);
        scene.turn(980, &[]);
        assert_eq!(scene.closed(CloseReason::IdleTimeout), 1);
        assert_eq!(
            scene.connections.poll_timeout(980),
            Some(1200 - 980),
            "a, who moved at 400"
        );
    }

    #[test]
    fn sweeps_wait_for_an_eighth_of_the_timeout() {
        let idle_timeout = Some(800);
        let mut scene = Scene::new(Limits {
            idle_timeout,
            ..LIMITS
        });
        for at in 0..5 {
            scene.register(at, 'a', 0, |_| Ok(Echo));
        }
        scene.turn(800, &[]);
        // The first one's lingering ends at 880; the others are due from 801 on, but not looked at
        // before an eighth of their own timeout has passed.
        assert_eq!(scene.connections.poll_timeout(800), Some(80));
        scene.turn(880, &[]);
        assert_eq!(scene.closed(CloseReason::IdleTimeout), 1);
        // That sweep has found the others.
        assert_eq!(scene.connections.poll_timeout(880), Some(80));
    }

    #[test]
    fn who_cannot_be_opened_is_closed_for_the_reason_given() {
        let mut scene = Scene::new(LIMITS);
        scene.register(0, 'a', 0, |_| Err(CloseReason::Error));
        scene.register(0, 'b', 0, |_| panic!("a panic that a test wants"));
        assert_eq!(
            (
                scene.closed(CloseReason::Error),
                scene.closed(CloseReason::Panic)
            ),
            (1, 1)
        );
        assert!(scene.connections.table.is_empty());
        scene.register(0, 'c', 1, |token| {
            assert_eq!(token, 0, "the places are free");
            Ok(Echo)
        });
        scene.turn(0, &[0]);
        assert_eq!(scene.reads(), "c");
        assert_eq!(scene.counters.snapshot().check_balance(), None);
    }

    #[test]
    fn closes_are_told_of_once() {
        let mut scene = echoes(LIMITS, "a");
        assert!(!scene.connections.take_closed());
        scene.register(0, 'b', 0, |_| Err(CloseReason::Error));
        assert!(scene.connections.take_closed());
        assert!(!scene.connections.take_closed());
        scene.connections.close(0, CloseReason::DrainTimeout, 0);
        assert!(scene.connections.take_closed());
    }

    #[test]
    fn the_table_grows_by_a_quarter() {
        let mut scene = Scene::new(LIMITS);
        let mut capacities = vec![0];
        for count in 1..=2000 {
            scene.register(0, 'a', 0, |_| Ok(Echo));
            let capacity = scene.connections.table.capacity();
            let spare = capacity - count;
            assert!(spare < 64 || spare <= count / 4, "{spare} of {count}");
            capacities.push(capacity);
        }
        capacities.dedup();
        assert!(capacities.len() < 20, "it moves seldom: {capacities:?}");
    }

    #[test]
    fn an_event_for_nobody_is_ignored() {
        let mut scene = echoes(LIMITS, "a");
        scene.turn(0, &[7, 0]);
        assert_eq!(scene.reads(), "aa");
    }

    /// Panics when it is dropped, which happens once its client has sent a byte.
    struct Grudge;

    impl Handler for Grudge {
        fn process(&mut self, input: &mut Buffer, _: &mut Buffer) -> Action {
            assert!(input.is_empty(), "a panic that a test wants");
            Action::Continue
        }
    }

    impl Drop for Grudge {
        fn drop(&mut self) {
            panic!("another panic that a test wants");
        }
    }

    #[test]
    fn panics_end_their_own_connection_only() {
        let mut scene = Scene::new(LIMITS);
        for name in ['a', 'b'] {
            scene.register(0, name, 1, |_| Ok(Grudge));
        }
        scene.turn(0, &[0, 1]);
        assert_eq!(scene.closed(CloseReason::Panic), 0, "they linger");
        scene.turn(LIMITS.linger_timeout, &[]);
        assert_eq!(scene.closed(CloseReason::Panic), 2);
        assert!(scene.connections.table.is_empty());
        let stats = scene.counters.snapshot();
        assert_eq!(
            (stats.check_balance(), stats.total().total_discarded()),
            (None, 2)
        );
    }

    #[test]
    fn a_drain_gives_a_flood_half_its_time() {
        let mut scene = Scene::new(LIMITS);
        scene.register(0, 'f', 100_000, |_| Ok(Echo));
        scene.connections.table[0].connection.notice(READABLE);
        scene.queue = None;
        let events = iter::once(Event::Wake);
        scene
            .connections
            .turn(7, events, &mut scene.receiver, |_, _, _| unreachable!());
        for now in 8..507 {
            // A client that sends without end.
            scene.turn(now, &[0]);
            assert_eq!(
                scene.connections.table[0].connection.linger_reason(),
                None,
                "{now}"
            );
            if now == 100 {
                assert_eq!(scene.connections.poll_timeout(now), Some(0));
            }
        }
        scene.turn(507, &[]);
        assert_eq!(scene.connections.poll_timeout(507), Some(0));
        scene.turn(507, &[]);
        assert_eq!(
            scene.connections.table[0].connection.linger_reason(),
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
