use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind, Read, Write};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_utils::CachePadded;

use super::*;
use crate::connection::MAX_ROUNDS;
use crate::connection::buffer::Pool;
use crate::connection::handler::{Action, Context, Echo, Event};
use crate::connection::shared::Timeouts;
use crate::connection::waker::WakeQueue;
use crate::stats::Counters;
use crate::stats::WorkerCounters;
use crate::system::page_size;

const TIMEOUTS: Timeouts = Timeouts {
    idle: None,
    answer: None,
    close: 40,
    linger: 80,
    stuck: 1000,
    drain: 1000,
};

impl<S: Stream, H: Handler> ConnectionTable<S, H> {
    /// A table with buffers of this many bytes, whose wakers wake no worker.
    pub(crate) fn for_tests(
        timeouts: Timeouts,
        buffer_size: usize,
        counters: &Arc<CachePadded<WorkerCounters>>,
    ) -> Self {
        let (wakes, receiver) = WakeQueue::new(|| {});
        let pool = Pool::new(buffer_size).expect("memory for a test");
        let shared = Shared::new(timeouts, wakes, Arc::clone(counters));
        Self::new(Resources { pool, shared }, receiver, 0)
    }
}

/// The size of the buffers, and of each read.
const CHUNK: usize = 512;

/// More than all turns of a test read.
const LARGE: usize = 1 << 30;

/// Interactive turns for each bulk turn after the first.
const PER_BULK: usize = 64;

/// Reads in one turn.
const READS: usize = MAX_ROUNDS;

/// The calls of all streams, in order.
#[derive(Clone, Default)]
struct Log(Rc<RefCell<Vec<(char, &'static str)>>>);

/// A stream with `unread` bytes to read that accepts up to `room` bytes.
struct Flood {
    name: char,
    unread: usize,
    room: Rc<RefCell<usize>>,
    log: Log,
}

impl Flood {
    fn log(&self, call: &'static str) {
        self.log.0.borrow_mut().push((self.name, call));
    }
}

impl Read for Flood {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.unread.min(bytes.len());
        if count == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.log("read");
        self.unread -= count;
        Ok(count)
    }
}

impl Write for Flood {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut room = self.room.borrow_mut();
        let count = bytes.len().min(*room);
        if count == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        *room -= count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Flood {
    fn shutdown_write(&mut self) -> io::Result<()> {
        self.log("shutdown");
        Ok(())
    }

    fn poll_delivery(&mut self) -> bool {
        *self.room.borrow() > 0
    }

    fn unread(&self) -> u64 {
        0
    }

    fn reset_on_close(&mut self) {
        self.log("abort");
    }
}

struct Harness<H> {
    table: ConnectionTable<Flood, H>,
    counters: Arc<Counters>,
    log: Log,
    /// How many more bytes all streams together accept.
    room: Rc<RefCell<usize>>,
}

impl<H: Handler> Harness<H> {
    fn new(timeouts: Timeouts) -> Self {
        let counters = Arc::new(Counters::new(1));
        Self {
            table: ConnectionTable::for_tests(timeouts, CHUNK, &counters.workers[0]),
            counters,
            log: Log::default(),
            room: Rc::new(RefCell::new(usize::MAX)),
        }
    }

    /// Registers a new stream; `open` creates its handler.
    fn register(
        &mut self,
        now: Millis,
        name: char,
        unread: usize,
        open: impl FnOnce(usize) -> Result<H, CloseReason>,
    ) {
        let stream = Flood {
            name,
            unread,
            room: Rc::clone(&self.room),
            log: self.log.clone(),
        };
        self.counters.acceptor.accepted.add(1);
        self.table.start_tick(now);
        self.table.add(stream, Peer::Unix, |_, token| open(token));
    }

    /// One tick with events for the given tokens.
    fn tick(&mut self, now: Millis, readable: &[usize]) {
        self.table.start_tick(now);
        for &token in readable {
            self.table.on_ready(token, Readiness::READABLE);
        }
        self.table.expire();
        self.table.run_queued();
    }

    fn shut_down(&mut self, deadline: Millis, now: Millis) {
        self.table.start_tick(now);
        self.table.shut_down(deadline);
    }

    /// Wakes a connection, whose handler is called.
    fn wake(&mut self, token: usize, now: Millis) {
        self.table.start_tick(now);
        self.table.entries[token].connection.woken();
        self.table.drive(token);
    }

    fn poll_timeout(&mut self, now: Millis) -> Option<Millis> {
        self.table.start_tick(now);
        self.table.poll_timeout()
    }

    /// The names of the streams that were read from, where repetitions in a row count once.
    fn reads(&self) -> String {
        let mut names: Vec<_> = self.calls("read");
        names.dedup();
        names.into_iter().collect()
    }

    /// The names of the streams of which this call was made.
    fn calls(&self, wanted: &str) -> Vec<char> {
        let log = self.log.0.borrow();
        let calls = log.iter().filter(|(_, call)| *call == wanted);
        calls.map(|(name, _)| *name).collect()
    }

    fn state(&self, token: usize) -> State {
        self.table.entries[token].connection.state
    }

    fn closed(&self, reason: CloseReason) -> u64 {
        self.counters.snapshot().total().closed.get(reason)
    }
}

fn echoes(timeouts: Timeouts, clients: &str) -> Harness<Echo> {
    let mut harness = Harness::new(timeouts);
    for name in clients.chars() {
        harness.register(0, name, LARGE, |_| Ok(Echo));
    }
    harness
}

/// Rule 2 of the event loop.
#[test]
fn floods_are_driven_in_turns_after_everything_else() {
    let mut harness = echoes(TIMEOUTS, "abc");
    assert_eq!(harness.poll_timeout(0), None, "none is readable");
    harness.tick(0, &[2, 0]);
    assert_eq!(harness.reads(), "cac", "at first both are interactive");
    assert_eq!(harness.calls("read").len(), 3 * READS, "one turn each");
    assert_eq!(harness.poll_timeout(0), Some(0), "two are ready");
    harness.tick(0, &[1, 0]);
    assert_eq!(harness.reads(), "cacba", "an event does not drive a flood");
    harness.tick(0, &[]);
    harness.tick(0, &[]);
    assert_eq!(harness.reads(), "cacbacb");
    let total = harness.counters.snapshot().total();
    assert_eq!((total.bulk_turns, total.bulk), (4, 3));
}

#[test]
fn small_message_is_handled_before_one_turn_of_a_flood() {
    let mut harness = echoes(TIMEOUTS, "fgh");
    harness.register(0, 'q', 3, |_| Ok(Echo));
    harness.tick(0, &[0, 1, 2]);
    harness.log.0.borrow_mut().clear();
    harness.tick(0, &[3]);
    assert_eq!(harness.reads(), "qg");
    assert_eq!(harness.calls("read").len(), 1 + READS);
}

#[test]
fn floods_get_a_turn_more_for_many_turns_of_others() {
    let mut harness = echoes(TIMEOUTS, "fgh");
    let many = 9 * PER_BULK;
    for _ in 0..many {
        harness.register(0, 'q', 0, |_| Ok(Echo));
    }
    harness.tick(0, &[0, 1, 2]);
    let mut bulk_turns = |count: usize| {
        let before = harness.counters.snapshot().total().bulk_turns;
        let quiet: Vec<_> = (3..3 + count).collect();
        harness.tick(0, &quiet);
        harness.counters.snapshot().total().bulk_turns - before
    };
    assert_eq!(bulk_turns(PER_BULK - 1), 1);
    assert_eq!(bulk_turns(PER_BULK), 2);
    assert_eq!(bulk_turns(many), 3, "no flood has two");
}

#[test]
fn connection_that_moves_little_is_interactive_again() {
    let mut harness = Harness::new(TIMEOUTS);
    harness.register(0, 'a', READS * CHUNK, |_| Ok(Echo));
    harness.tick(0, &[0]);
    assert!(!harness.table.entries[0].bulk, "nothing is left to read");
    let total = harness.counters.snapshot().total();
    assert_eq!((total.bulk_turns, total.bulk), (1, 0));
    harness.table.entries[0].connection.stream_mut().unread = 1;
    harness.log.0.borrow_mut().clear();
    harness.table.on_ready(0, Readiness::READABLE);
    assert_eq!(harness.reads(), "a", "at once");
}

#[test]
fn without_timeouts_the_worker_sleeps_until_an_event() {
    let mut harness = Harness::new(TIMEOUTS);
    harness.register(0, 'a', 0, |_| Ok(Echo));
    harness.tick(0, &[0]);
    assert_eq!(harness.poll_timeout(0), None);
    harness.table.start_tick(NEVER - 1);
    assert!(!harness.table.is_due());
}

fn with_idle_timeout(idle: Millis) -> Timeouts {
    Timeouts {
        idle: Some(idle),
        ..TIMEOUTS
    }
}

#[test]
fn only_expired_connections_are_closed() {
    let mut harness = Harness::new(with_idle_timeout(800));
    harness.register(0, 'a', CHUNK - 1, |_| Ok(Echo));
    harness.register(100, 'b', 0, |_| Ok(Echo));
    assert_eq!(harness.poll_timeout(100), Some(700));
    harness.tick(400, &[0]);
    harness.tick(799, &[]);
    assert_eq!(harness.poll_timeout(799), Some(1));
    harness.tick(800, &[]);
    assert_eq!(harness.poll_timeout(800), Some(100), "b expires");
    harness.tick(899, &[]);
    assert_eq!(harness.state(1), State::Reading);
    harness.tick(900, &[]);
    assert_eq!(harness.state(0), State::Reading, "active at 400");
    let lingering = State::Lingering(CloseReason::IdleTimeout);
    assert_eq!(harness.state(1), lingering);
    assert_eq!(harness.poll_timeout(900), Some(80), "b lingers");
    harness.tick(979, &[]);
    assert_eq!(harness.closed(CloseReason::IdleTimeout), 0);
    harness.tick(980, &[]);
    assert_eq!(harness.closed(CloseReason::IdleTimeout), 1);
    assert_eq!(harness.poll_timeout(980), Some(1200 - 980));
    assert_eq!(harness.calls("abort"), []);
}

/// Rule 13 of the event loop.
#[test]
fn deadlines_are_an_eighth_of_the_timeout_apart() {
    let mut harness = Harness::new(with_idle_timeout(800));
    for at in 0..=100 {
        harness.register(at, 'a', 0, |_| Ok(Echo));
    }
    let (mut now, mut wake_ups) = (100, 0);
    while let Some(timeout) = harness.poll_timeout(now) {
        now += timeout;
        harness.tick(now, &[]);
        wake_ups += 1;
    }
    assert_eq!(now, 980, "the last one lingers until then");
    assert_eq!(wake_ups, 4, "two for the deadlines, two for lingering");
}

/// Rule 13 of the event loop.
#[test]
fn progress_sets_no_timer() {
    let mut harness = echoes(with_idle_timeout(800), "a");
    for now in 0..1000 {
        harness.tick(now, &[0]);
    }
    let mut timers = 0;
    while harness.table.timers.pop_expired(NEVER).is_some() {
        timers += 1;
    }
    assert_eq!(timers, 1);
}

#[test]
fn timers_of_closed_connections_are_dropped() {
    let mut harness = Harness::new(with_idle_timeout(1_000_000));
    for _ in 0..10_000 {
        harness.register(0, 'a', 0, |_| Ok(Echo));
        harness.table.close(0, CloseReason::PeerClosed);
    }
    let mut timers = 0;
    while harness.table.timers.pop_expired(NEVER).is_some() {
        timers += 1;
    }
    assert!(timers < 100, "{timers}");
}

#[test]
fn runnable_connection_never_expires() {
    let mut harness = echoes(with_idle_timeout(80), "f");
    harness.tick(0, &[0]);
    harness.table.start_tick(1_000);
    harness.table.expire();
    assert_eq!(harness.state(0), State::Reading);
    assert!(harness.poll_timeout(1_000) == Some(0));
}

#[test]
fn stuck_connection_is_reset_when_it_expires() {
    let mut harness = echoes(with_idle_timeout(80), "s");
    *harness.room.borrow_mut() = 7;
    harness.tick(0, &[0]);
    assert_eq!(
        harness.counters.snapshot().total().buffered,
        CHUNK as u64 - 7
    );
    harness.tick(80, &[]);
    assert_eq!(harness.closed(CloseReason::IdleTimeout), 1);
    assert_eq!(harness.calls("abort"), ['s']);
    let total = harness.counters.snapshot().total();
    assert_eq!(
        total.discarded.get(CloseReason::IdleTimeout),
        CHUNK as u64 - 7
    );
    assert_eq!(harness.counters.snapshot().check_balance(), None);
}

#[test]
fn connection_about_to_expire_retries_its_send() {
    let mut harness = echoes(with_idle_timeout(80), "s");
    *harness.room.borrow_mut() = 0;
    harness.tick(0, &[0]);
    *harness.room.borrow_mut() = 1;
    harness.tick(80, &[]);
    assert_eq!(harness.state(0), State::Reading, "the kernel took a byte");
    harness.tick(159, &[]);
    assert_eq!(harness.closed(CloseReason::IdleTimeout), 0);
    harness.tick(160, &[]);
    assert_eq!(harness.closed(CloseReason::IdleTimeout), 1);
}

/// Answers and closes in its first call.
struct Refuse;

impl Handler for Refuse {
    fn process(&mut self, _: Event, context: &mut Context<'_>) -> Action {
        assert!(context.output.push(b"no"));
        Action::Close
    }
}

#[test]
fn flush_before_a_close_has_a_deadline() {
    let mut harness = Harness::new(TIMEOUTS);
    *harness.room.borrow_mut() = 0;
    harness.register(0, 'r', 0, |_| Ok(Refuse));
    assert_eq!(harness.state(0), State::Closing(CloseReason::Handler));
    assert_eq!(harness.poll_timeout(0), Some(40));
    harness.tick(40, &[]);
    assert_eq!(harness.closed(CloseReason::IdleTimeout), 1);
    assert_eq!(harness.calls("abort"), ['r']);
}

#[test]
fn connection_that_cannot_be_opened_is_closed_with_its_reason() {
    let mut harness = Harness::new(TIMEOUTS);
    harness.register(0, 'a', 0, |_| Err(CloseReason::Error));
    harness.register(0, 'b', 0, |_| panic!("deliberate panic"));
    let counts = (
        harness.closed(CloseReason::Error),
        harness.closed(CloseReason::Panic),
    );
    assert_eq!(counts, (1, 1));
    assert_eq!(harness.table.len(), 0);
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
    let mut harness = echoes(TIMEOUTS, "a");
    assert_eq!(harness.table.take_closed(), 0);
    harness.register(0, 'b', 0, |_| Err(CloseReason::Error));
    assert_eq!(harness.table.take_closed(), 1);
    assert_eq!(harness.table.take_closed(), 0);
    harness.table.close(0, CloseReason::DrainTimeout);
    assert_eq!(harness.table.take_closed(), 1);
}

#[test]
fn token_of_a_closed_runnable_connection_is_reused_safely() {
    let mut harness = echoes(TIMEOUTS, "ab");
    harness.tick(0, &[0, 1]);
    harness.table.close(0, CloseReason::Reset);
    harness.register(0, 'c', LARGE, |_| Ok(Echo));
    harness.log.0.borrow_mut().clear();
    harness.tick(0, &[0]);
    assert_eq!(harness.reads(), "cb", "the event, and the queue");
    harness.tick(0, &[]);
    harness.tick(0, &[]);
    assert_eq!(
        harness.reads(),
        "cbcb",
        "the stale ticket gives no connection a turn"
    );
}

#[test]
fn the_table_grows_by_a_quarter() {
    let mut harness = Harness::new(TIMEOUTS);
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

/// Rule 7 of the event loop.
#[test]
fn event_with_a_stale_token_is_ignored() {
    let mut harness = echoes(TIMEOUTS, "a");
    harness.tick(0, &[7, 0]);
    assert_eq!(harness.reads(), "a");
}

/// Panics on input, and again when dropped.
struct PanicOnDrop;

impl Handler for PanicOnDrop {
    fn process(&mut self, _: Event, context: &mut Context<'_>) -> Action {
        assert!(context.input.is_empty(), "deliberate panic");
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
    let mut harness = Harness::new(TIMEOUTS);
    for name in ['a', 'b'] {
        harness.register(0, name, 1, |_| Ok(PanicOnDrop));
    }
    harness.tick(0, &[0, 1]);
    assert_eq!(harness.closed(CloseReason::Panic), 0, "they linger");
    harness.tick(TIMEOUTS.linger, &[]);
    assert_eq!(harness.closed(CloseReason::Panic), 2);
    assert_eq!(harness.table.len(), 0);
    let stats = harness.counters.snapshot();
    assert_eq!(stats.check_balance(), None);
    assert_eq!(stats.total().discarded.total(), 2);
}

#[test]
fn flood_is_read_for_three_quarters_of_the_drain_timeout() {
    let mut harness = echoes(TIMEOUTS, "f");
    harness.table.entries[0]
        .connection
        .add_readiness(Readiness::READABLE);
    harness.shut_down(1007, 7);
    for now in 7..757 {
        harness.tick(now, &[0]);
        assert_eq!(harness.state(0), State::Reading, "{now}");
    }
    assert_eq!(harness.poll_timeout(100), Some(0));
    harness.tick(757, &[]);
    harness.tick(757, &[]);
    let lingering = State::Lingering(CloseReason::Shutdown);
    assert_eq!(harness.state(0), lingering);
}

#[test]
fn shutdown_waits_for_a_slow_reader_until_its_deadline() {
    let mut harness = echoes(with_idle_timeout(80), "s");
    *harness.room.borrow_mut() = 0;
    harness.tick(0, &[0]);
    harness.shut_down(1000, 0);
    harness.tick(500, &[]);
    harness.tick(999, &[]);
    assert_eq!(harness.table.len(), 1, "no idle timeout in a shutdown");
    assert_eq!(harness.poll_timeout(999), Some(1));
    harness.tick(1000, &[]);
    assert_eq!(harness.closed(CloseReason::DrainTimeout), 1);
    assert_eq!(harness.calls("abort"), ['s']);
}

#[test]
fn delivered_connection_lingers_in_a_shutdown_for_its_own_time() {
    let mut harness = echoes(TIMEOUTS, "");
    harness.register(0, 'a', 0, |_| Ok(Echo));
    harness.shut_down(1000, 0);
    assert_eq!(harness.calls("shutdown"), ['a']);
    harness.tick(TIMEOUTS.linger, &[]);
    assert_eq!(harness.closed(CloseReason::Shutdown), 1);
}

#[test]
fn connection_that_lingers_at_the_deadline_of_a_shutdown_is_closed_for_its_reason() {
    let mut harness = echoes(TIMEOUTS, "");
    harness.register(0, 'a', 0, |_| Ok(Echo));
    harness.shut_down(TIMEOUTS.linger / 2, 0);
    harness.tick(TIMEOUTS.linger / 2, &[]);
    assert_eq!(harness.closed(CloseReason::Shutdown), 1);
}

/// An earlier timer, of the idle timeout, does not end it.
#[test]
fn connection_refuses_for_its_own_time_and_then_closes() {
    let mut harness = echoes(with_idle_timeout(40), "s");
    *harness.room.borrow_mut() = 0;
    harness.tick(0, &[0]);
    harness.shut_down(1000, 20);
    let connection = &mut harness.table.entries[0].connection;
    (connection.state, connection.since) = (State::Refusing, 20);
    for now in [40, 83] {
        harness.tick(now, &[]);
        assert_eq!(harness.state(0), State::Refusing);
    }
    harness.tick(84, &[]);
    assert_eq!(harness.state(0), State::Closing(CloseReason::Shutdown));
}

#[test]
fn earlier_deadline_replaces_that_of_a_shutdown() {
    let mut harness = echoes(TIMEOUTS, "s");
    *harness.room.borrow_mut() = 0;
    harness.tick(0, &[0]);
    harness.shut_down(1000, 0);
    harness.shut_down(10, 10);
    harness.tick(10, &[]);
    assert_eq!(harness.closed(CloseReason::DrainTimeout), 1);
}

/// A table with this many pairs of buffers, whose clients have sent 10 bytes each and take nothing.
fn stuck_clients(max_pairs: usize, clients: &str) -> Harness<Echo> {
    let mut harness = Harness::new(TIMEOUTS);
    harness.table.resources.pool.max_pairs = max_pairs;
    *harness.room.borrow_mut() = 0;
    for name in clients.chars() {
        harness.register(0, name, 10, |_| Ok(Echo));
    }
    harness
}

#[test]
fn longest_stuck_connection_is_reset_at_the_limit() {
    let mut harness = stuck_clients(3, "abcd");
    harness.tick(0, &[1]);
    harness.tick(1, &[0]);
    assert_eq!(harness.table.held_memory(), 2 * 2 * page_size());
    harness.tick(TIMEOUTS.stuck, &[2]);
    assert_eq!(harness.calls("abort"), ['b']);
    harness.tick(TIMEOUTS.stuck, &[3]);
    assert_eq!(harness.calls("abort"), ['b', 'd'], "none is stuck");
    assert_eq!(harness.table.held_memory(), 2 * 2 * page_size());
    assert_eq!(harness.closed(CloseReason::BufferMemory), 2);
    let stats = harness.counters.snapshot();
    assert_eq!(stats.total().discarded.get(CloseReason::BufferMemory), 20);
    assert_eq!(stats.check_balance(), None);
}

#[test]
fn progress_makes_another_connection_the_longest_stuck() {
    let mut harness = stuck_clients(3, "abc");
    harness.tick(0, &[0]);
    harness.tick(1, &[1]);
    *harness.room.borrow_mut() = 1;
    harness.table.start_tick(2);
    harness.table.on_ready(0, Readiness::WRITABLE);
    harness.tick(TIMEOUTS.stuck + 2, &[2]);
    assert_eq!(harness.calls("abort"), ['b']);
}

/// The run queue still has a place of a connection that was closed, and a shutdown drives all.
#[test]
fn shutdown_goes_on_after_it_has_reset_a_connection_for_its_buffers() {
    let mut harness = stuck_clients(2, "abc");
    harness.tick(0, &[2]);
    for token in [0, 1] {
        let connection = &mut harness.table.entries[token].connection;
        connection.add_readiness(Readiness::READABLE);
    }
    harness.shut_down(5000, TIMEOUTS.stuck);
    assert_eq!(harness.calls("abort"), ['c', 'b']);
    assert_eq!(harness.table.len(), 1);
}

#[test]
fn holders_are_bounded_however_many_connections_come_and_go() {
    let mut harness = stuck_clients(usize::MAX, "");
    for count in 0..1000 {
        harness.register(count, 's', 10, |_| Ok(Echo));
        harness.tick(count, &[0]);
        assert_eq!(harness.table.len(), 1);
        harness.table.close(0, CloseReason::Reset);
        assert!(!harness.table.holders.needs_rebuild(2));
    }
    assert_eq!(harness.table.held_memory(), 0);
}

#[test]
fn closing_a_long_run_queue_takes_linear_time() {
    const COUNT: usize = 40_000;
    let mut harness = Harness::new(TIMEOUTS);
    for token in 0..COUNT {
        harness.register(0, 'a', 0, |_| Ok(Echo));
        harness.table.enqueue(token);
    }
    // With a search of the run queue per close this takes a minute.
    for token in (0..COUNT).rev() {
        harness.table.close(token, CloseReason::DrainTimeout);
    }
    assert_eq!(harness.table.run_queue.len(), COUNT);
    harness.table.run_queued();
    assert_eq!(harness.poll_timeout(0), None);
}

/// The events of a handler's calls, in order.
type Calls = Rc<RefCell<Vec<Event>>>;

/// Calls a function, and records the events except [`Event::Open`].
struct FnHandler<F>(F, Calls);

impl<F: FnMut(Event, &mut Context<'_>) -> Action> Handler for FnHandler<F> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        if event != Event::Open {
            self.1.borrow_mut().push(event);
        }
        (self.0)(event, context)
    }
}

/// A table with one connection whose handler does what `process` says.
fn with_handler<F: FnMut(Event, &mut Context<'_>) -> Action>(
    timeouts: Timeouts,
    process: F,
) -> (Harness<FnHandler<F>>, Calls) {
    let mut harness = Harness::new(timeouts);
    let calls = Calls::default();
    harness.register(0, 'h', 0, |_| Ok(FnHandler(process, Rc::clone(&calls))));
    (harness, calls)
}

#[test]
fn timer_of_a_handler_expires_on_time_and_once() {
    let (mut harness, calls) = with_handler(with_idle_timeout(800), |event, context| {
        if event == Event::Open {
            context.set_timer(Some(Duration::from_millis(50)));
        }
        Action::Continue
    });
    assert_eq!(harness.poll_timeout(0), Some(50));
    harness.tick(49, &[]);
    assert_eq!(*calls.borrow(), []);
    harness.tick(50, &[]);
    assert_eq!(*calls.borrow(), [Event::Timer]);
    assert_eq!(harness.poll_timeout(50), Some(750), "the idle timeout");
    harness.tick(799, &[]);
    assert_eq!(*calls.borrow(), [Event::Timer]);
    harness.tick(800, &[]);
    assert_eq!(harness.state(0), State::Lingering(CloseReason::IdleTimeout));
}

#[test]
fn timer_of_zero_expires_in_a_later_tick() {
    let mut limit = 0..10;
    let (mut harness, calls) = with_handler(TIMEOUTS, move |_, context| {
        limit.next().expect("the tick ends");
        context.set_timer(Some(Duration::ZERO));
        Action::Continue
    });
    assert_eq!(harness.poll_timeout(0), Some(1));
    harness.tick(1, &[]);
    assert_eq!(*calls.borrow(), [Event::Timer]);
    assert_eq!(harness.poll_timeout(1), Some(1));
}

#[test]
fn moving_the_timer_of_a_handler_sets_no_further_one() {
    let (mut harness, calls) = with_handler(TIMEOUTS, |_, context| {
        context.set_timer(Some(Duration::from_millis(50)));
        Action::Continue
    });
    for now in 1..40 {
        harness.wake(0, now);
    }
    calls.borrow_mut().clear();
    harness.tick(50, &[]);
    assert_eq!(*calls.borrow(), [], "it was moved to 89");
    assert_eq!(harness.poll_timeout(50), Some(39));
    harness.tick(89, &[]);
    assert_eq!(*calls.borrow(), [Event::Timer]);
    let mut timers = 0;
    while harness.table.timers.pop_expired(NEVER).is_some() {
        timers += 1;
    }
    assert_eq!(timers, 1);
}

#[test]
fn earlier_timer_of_a_handler_replaces_a_later_one() {
    let mut timeout = 100;
    let (mut harness, calls) = with_handler(TIMEOUTS, move |event, context| {
        if event != Event::Timer {
            context.set_timer(Some(Duration::from_millis(timeout)));
            timeout = 10;
        }
        Action::Continue
    });
    harness.wake(0, 0);
    harness.tick(10, &[]);
    harness.tick(100, &[]);
    assert_eq!(*calls.borrow(), [Event::Wake, Event::Timer]);
    assert_eq!(harness.poll_timeout(100), None);
}

#[test]
fn replaced_timers_of_a_handler_are_dropped() {
    // A short timer replaces a long one, again and again.
    let (mut harness, _) = with_handler(TIMEOUTS, |event, context| {
        let timeout = if event == Event::Wake { 1 } else { 1_000_000 };
        context.set_timer(Some(Duration::from_millis(timeout)));
        Action::Continue
    });
    for now in 0..1000 {
        harness.wake(0, now);
        harness.tick(now + 1, &[]);
    }
    let mut timers = 0;
    while harness.table.timers.pop_expired(NEVER).is_some() {
        timers += 1;
    }
    assert!(timers < 100, "{timers}");
}

#[test]
fn stopped_timer_of_a_handler_does_not_expire() {
    let (mut harness, calls) = with_handler(TIMEOUTS, |event, context| {
        let timeout = (event == Event::Open).then_some(Duration::from_millis(10));
        context.set_timer(timeout);
        Action::Continue
    });
    harness.wake(0, 0);
    harness.tick(10, &[]);
    assert_eq!(*calls.borrow(), [Event::Wake]);
    assert_eq!(harness.poll_timeout(10), None);
}

#[test]
fn idle_timeout_begins_when_the_answer_was_given() {
    let timeouts = with_idle_timeout(800);
    let (mut harness, _) = with_handler(timeouts, |event, context| match event {
        Event::Wake => {
            // An answer without a byte.
            context.input.consume(1);
            Action::Continue
        }
        _ => Action::Pending,
    });
    harness.table.entries[0].connection.stream_mut().unread = 1;
    harness.tick(0, &[0]);
    assert_eq!(harness.state(0), State::Pending);
    harness.tick(10_000, &[]);
    assert_eq!(harness.state(0), State::Pending);
    assert_eq!(harness.poll_timeout(10_000), None);
    harness.wake(0, 10_000);
    harness.tick(10_799, &[]);
    assert_eq!(harness.state(0), State::Reading);
    harness.tick(10_800, &[]);
    assert_eq!(harness.state(0), State::Lingering(CloseReason::IdleTimeout));
}

#[test]
fn idle_timeout_begins_when_input_has_brought_the_answer() {
    for answer in [None, Some(60_000)] {
        let timeouts = Timeouts {
            answer,
            ..with_idle_timeout(800)
        };
        let (mut harness, _) = with_handler(timeouts, |event, context| match event {
            Event::Input => Echo.process(event, context),
            _ => Action::Pending,
        });
        assert_eq!(harness.state(0), State::Pending);
        harness.table.entries[0].connection.stream_mut().unread = 1;
        harness.tick(10_000, &[0]);
        assert_eq!(harness.poll_timeout(10_000), Some(800));
    }
}

/// Neither input nor a call that announces the answer again starts the time again, but a part of the answer does.
#[test]
fn answer_that_does_not_come_is_a_reset() {
    let timeouts = Timeouts {
        answer: Some(800),
        ..with_idle_timeout(80)
    };
    let mut part: &[u8] = b"";
    let (mut harness, _) = with_handler(timeouts, move |event, context| {
        if event == Event::Wake {
            assert!(context.output.push(part));
            part = b"part";
        }
        Action::Pending
    });
    assert_eq!(harness.poll_timeout(0), Some(800));
    harness.table.entries[0].connection.stream_mut().unread = 1;
    harness.tick(100, &[0]);
    harness.wake(0, 200);
    harness.tick(799, &[]);
    assert_eq!(harness.poll_timeout(799), Some(1));
    harness.wake(0, 799);
    harness.tick(1599, &[]);
    assert_eq!(harness.state(0), State::Pending);
    harness.tick(1600, &[]);
    assert_eq!(harness.closed(CloseReason::AnswerTimeout), 1);
    assert_eq!(harness.calls("abort"), ['h']);
    let total = harness.counters.snapshot().total();
    assert_eq!(total.discarded.get(CloseReason::AnswerTimeout), 1);
}

/// A handler that yields gets its turns behind others, one for each tick, and does not expire.
#[test]
fn handler_that_yields_has_turns_in_the_run_queue() {
    let timeouts = with_idle_timeout(80);
    let mut slices = 4;
    let (mut harness, calls) = with_handler(timeouts, move |event, _| {
        slices -= i32::from(event != Event::Open);
        if event != Event::Open && slices > 0 {
            Action::Yield
        } else {
            Action::Continue
        }
    });
    harness.wake(0, 0);
    assert_eq!(harness.poll_timeout(0), Some(0));
    for now in [0, 100, 200] {
        harness.tick(now, &[0, 0]);
    }
    let resumed = [Event::Wake, Event::Resumed, Event::Resumed, Event::Resumed];
    assert_eq!(*calls.borrow(), resumed);
    assert_eq!(harness.counters.snapshot().total().bulk_turns, 3);
    assert_eq!(harness.poll_timeout(200), Some(80), "idle from now on");
}

#[test]
fn shutdown_has_no_timeout_for_an_answer() {
    let timeouts = Timeouts {
        answer: Some(80),
        ..TIMEOUTS
    };
    let (mut harness, _) = with_handler(timeouts, |_, _| Action::Pending);
    harness.shut_down(1000, 0);
    harness.tick(999, &[]);
    assert_eq!(harness.state(0), State::Pending);
    harness.tick(1000, &[]);
    assert_eq!(harness.closed(CloseReason::DrainTimeout), 1);
}

#[test]
fn pending_answer_whose_output_is_stuck_expires() {
    let (mut harness, _) = with_handler(with_idle_timeout(80), |event, context| {
        assert!(event == Event::Open || context.output.push(b"part"));
        Action::Pending
    });
    *harness.room.borrow_mut() = 0;
    harness.wake(0, 1000);
    assert_eq!(harness.poll_timeout(1000), Some(80));
    harness.tick(1080, &[]);
    assert_eq!(harness.closed(CloseReason::IdleTimeout), 1);
    assert_eq!(harness.calls("abort"), ['h']);
}

#[test]
fn wake_ups_per_tick_are_bounded() {
    const COUNT: usize = 3 * MAX_WAKES;
    let mut harness = Harness::new(TIMEOUTS);
    let calls = Calls::default();
    let wakers = Rc::new(RefCell::new(Vec::new()));
    for _ in 0..COUNT {
        let wakers = Rc::clone(&wakers);
        let process = move |event, context: &mut Context<'_>| {
            if event == Event::Open {
                wakers.borrow_mut().push(context.waker());
            }
            Action::Continue
        };
        let calls = Rc::clone(&calls);
        harness.register(0, 'w', 0, |_| Ok(FnHandler(process, calls)));
    }
    for waker in wakers.borrow().iter().rev() {
        waker.wake();
        waker.wake();
    }
    harness.table.on_wake();
    for tick in 1..=4 {
        harness.table.run_wakes();
        assert_eq!(calls.borrow().len(), COUNT.min(tick * MAX_WAKES));
        let is_done = tick == 4;
        let timeout = harness.poll_timeout(0);
        assert_eq!(timeout, (!is_done).then_some(0));
    }
}

/// Many small turns, one of which is not bulk, delay the events of sockets as a large one does.
#[test]
fn bytes_that_wake_ups_send_in_a_tick_are_bounded() {
    let mut harness = Harness::new(TIMEOUTS);
    harness.table.resources.shared.turns.bulk_budget = 32;
    let wakers = Rc::new(RefCell::new(Vec::new()));
    for _ in 0..12 {
        let wakers = Rc::clone(&wakers);
        let process = move |event, context: &mut Context<'_>| {
            match event {
                Event::Open => wakers.borrow_mut().push(context.waker()),
                _ => assert!(context.output.push(b"12345678")),
            }
            Action::Continue
        };
        harness.register(0, 'w', 0, |_| Ok(FnHandler(process, Calls::default())));
    }
    for waker in wakers.borrow().iter() {
        waker.wake();
    }
    harness.table.on_wake();
    for sent in [32, 64, 96] {
        harness.table.run_wakes();
        assert_eq!(harness.counters.workers[0].bytes_out.get(), sent);
    }
}

/// A wake-up just after the last look into the queue must not be lost.
#[test]
fn wake_up_while_others_are_handled_notifies() {
    let mut harness = Harness::new(TIMEOUTS);
    let notifies = Rc::new(Cell::new(None));
    let seen = Rc::clone(&notifies);
    let process = move |event, context: &mut Context<'_>| {
        let waker = context.waker();
        match event {
            Event::Open => waker.wake(),
            _ => seen.set(Some(waker.notifies())),
        }
        Action::Continue
    };
    harness.register(0, 'w', 0, |_| Ok(FnHandler(process, Calls::default())));
    harness.table.on_wake();
    harness.table.run_wakes();
    assert_eq!(notifies.get(), Some(true));
}

#[test]
fn waker_of_an_earlier_connection_does_nothing() {
    let calls = Calls::default();
    let wakers = Rc::new(RefCell::new(Vec::new()));
    let mut harness = Harness::new(TIMEOUTS);
    for at in 0..2 {
        let wakers = Rc::clone(&wakers);
        let process = move |event, context: &mut Context<'_>| {
            if event == Event::Open {
                wakers.borrow_mut().push(context.waker());
            }
            Action::Continue
        };
        harness.register(at, 'w', 0, |token| {
            assert_eq!(token, 0, "the token is reused");
            Ok(FnHandler(process, Rc::clone(&calls)))
        });
        if at == 0 {
            harness.table.close(0, CloseReason::PeerClosed);
        }
    }
    let mut wake = |waker: usize| {
        wakers.borrow()[waker].wake();
        harness.table.on_wake();
        harness.table.run_wakes();
    };
    wake(0);
    assert_eq!(*calls.borrow(), []);
    wake(1);
    assert_eq!(*calls.borrow(), [Event::Wake], "of the new one");
}

#[test]
fn flood_that_has_arrived_is_handled_before_the_timer_of_its_handler() {
    let (mut harness, calls) = with_handler(TIMEOUTS, |event, context| {
        if event == Event::Open {
            context.set_timer(Some(Duration::from_millis(50)));
        }
        Echo.process(event, context)
    });
    harness.table.entries[0].connection.stream_mut().unread = LARGE;
    harness.tick(0, &[0]);
    assert_eq!(harness.poll_timeout(0), Some(0), "it waits for its turn");
    calls.borrow_mut().clear();
    harness.tick(50, &[]);
    let calls = calls.borrow();
    let timer = calls.iter().position(|event| *event == Event::Timer);
    assert_eq!(timer, Some(READS), "after one turn");
}

/// What has arrived before a worker takes a connection over raises no event in a shutdown that has begun.
#[test]
fn connection_taken_over_in_a_shutdown_reads_what_has_arrived() {
    let mut harness = echoes(TIMEOUTS, "");
    harness.shut_down(1000, 0);
    harness.register(0, 'a', 3, |_| Ok(Echo));
    assert_eq!(harness.counters.snapshot().total().bytes_out, 3);
    assert_eq!(harness.calls("shutdown"), ['a']);
}
