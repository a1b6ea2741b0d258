use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::rc::Rc;

use super::*;
use crate::server::dispatcher::{CountingWaker, Receiver};
use crate::stats::{CloseReason, Stats};
use crate::system::Readiness;

const BACKLOG: u32 = 300;

/// An error that is not of one client: it has no kind of its own.
fn no_descriptor() -> io::Error {
    io::Error::other("too many open files")
}

/// A client's number, and the numbers of all clients whose connection was reset.
#[derive(Debug)]
struct Client(u32, Rc<RefCell<Vec<u32>>>);

impl Read for Client {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        unreachable!()
    }
}

impl Write for Client {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        unreachable!()
    }

    fn flush(&mut self) -> io::Result<()> {
        unreachable!()
    }
}

impl Stream for Client {
    fn shutdown_write(&mut self) -> io::Result<()> {
        unreachable!()
    }

    fn poll_delivery(&mut self) -> bool {
        unreachable!()
    }

    fn unread(&self) -> u64 {
        unreachable!()
    }

    fn reset_on_close(&mut self) {
        self.1.borrow_mut().push(self.0);
    }
}

/// A listener with the results of its accepts, in order; then they would block.
#[derive(Clone, Default)]
struct Scripted {
    accepts: Rc<RefCell<VecDeque<io::Result<u32>>>>,
    calls: Rc<Cell<usize>>,
    resets: Rc<RefCell<Vec<u32>>>,
    can_stop_handshakes: Rc<Cell<bool>>,
    /// A worker closes a connection when the acceptor asks whether a client waits.
    closes_one: Rc<RefCell<Option<Arc<Control<CountingWaker>>>>>,
}

impl Scripted {
    fn then(&self, accept: io::Result<u32>) -> &Self {
        self.accepts.borrow_mut().push_back(accept);
        self
    }

    fn then_error(&self, error: impl Into<io::Error>) -> &Self {
        self.then(Err(error.into()))
    }

    fn then_clients(&self, clients: impl IntoIterator<Item = u32>) -> &Self {
        let clients = clients.into_iter().map(Ok);
        self.accepts.borrow_mut().extend(clients);
        self
    }
}

impl Listen for Scripted {
    type Stream = Client;

    fn accept(&self) -> io::Result<(Client, Peer)> {
        self.calls.set(self.calls.get() + 1);
        let accept = self.accepts.borrow_mut().pop_front();
        let client = accept.unwrap_or_else(|| Err(ErrorKind::WouldBlock.into()))?;
        Ok((Client(client, Rc::clone(&self.resets)), Peer::Unix))
    }

    fn has_waiting_client(&self) -> bool {
        if let Some(control) = self.closes_one.take() {
            control.free(1);
        }
        !self.accepts.borrow().is_empty()
    }

    fn stop_handshakes(&self) -> bool {
        self.can_stop_handshakes.get()
    }
}

/// A poll without sockets: events for the given listeners.
#[derive(Default)]
struct ScriptedPoller {
    ready: Vec<usize>,
    now: Millis,
}

impl Poller<Scripted> for ScriptedPoller {
    fn poll(&mut self, _: Option<Millis>) -> io::Result<bool> {
        Ok(false)
    }

    fn max_events(&self) -> usize {
        1
    }

    fn events(&self) -> impl Iterator<Item = PollEvent> {
        let event = |index: &usize| PollEvent::Ready(*index, Readiness::default());
        self.ready.iter().map(event)
    }

    fn now(&self) -> Millis {
        self.now
    }

    fn register(&mut self, _: &mut Scripted, _: usize) -> io::Result<()> {
        Ok(())
    }
}

/// An acceptor with scripted listeners and one worker.
struct Harness {
    acceptor: Acceptor<Scripted, CountingWaker>,
    listeners: Vec<Scripted>,
    receiver: Receiver<Accepted<Client>, CountingWaker>,
    /// Wakes the worker.
    worker_waker: CountingWaker,
    /// Wakes the acceptor.
    waker: CountingWaker,
    counters: Arc<Counters>,
}

impl Harness {
    fn new(listeners: usize, max_connections: usize, capacity: usize) -> Self {
        let listeners: Vec<_> = (0..listeners).map(|_| Scripted::default()).collect();
        let counters = Arc::new(Counters::new(1));
        let (waker, worker_waker) = (CountingWaker::default(), CountingWaker::default());
        let (dispatcher, mut receivers) = Dispatcher::new(capacity, [worker_waker.clone()]);
        Self {
            acceptor: Acceptor::new(
                listeners.clone(),
                BACKLOG,
                dispatcher,
                Arc::clone(&counters),
                Arc::new(Control::new(
                    max_connections,
                    waker.clone(),
                    [worker_waker.clone()],
                )),
            ),
            listeners,
            receiver: receivers.remove(0),
            worker_waker,
            waker,
            counters,
        }
    }

    /// One tick at `now` with events for all listeners; returns how long the next one may sleep.
    fn ready_tick(&mut self, now: Millis) -> Option<Millis> {
        self.tick_with(now, (0..self.listeners.len()).collect())
    }

    fn tick(&mut self, now: Millis) -> Option<Millis> {
        self.tick_with(now, Vec::new())
    }

    fn tick_with(&mut self, now: Millis, ready: Vec<usize>) -> Option<Millis> {
        let mut poller = ScriptedPoller { ready, now };
        self.acceptor.tick(&mut poller).unwrap();
        self.acceptor.poll_timeout()
    }

    /// The clients that were dispatched since the last call.
    fn dispatched(&mut self) -> Vec<u32> {
        let taken = self.receiver.take(usize::MAX);
        taken.map(|accepted| accepted.stream.0).collect()
    }

    /// The numbers of the clients that were dispatched since the last call.
    fn numbers(&mut self) -> Vec<u64> {
        let taken = self.receiver.take(usize::MAX);
        taken.map(|accepted| accepted.number).collect()
    }

    fn stats(&self) -> Stats {
        self.counters.snapshot()
    }

    /// A worker closes a connection.
    fn close_one(&self) {
        self.counters.workers[0].closed[CloseReason::PeerClosed as usize].add(1);
        self.acceptor.control.free(1);
    }

    fn shut_down(&self, deadline: Millis) {
        self.acceptor.control.shut_down(deadline);
    }
}

#[test]
fn accepts_until_a_listener_would_block_then_waits_for_an_edge() {
    let mut harness = Harness::new(1, 10, 10);
    harness.listeners[0].then_clients([1, 2]);
    assert_eq!(harness.tick(0), None);
    assert_eq!(harness.listeners[0].calls.get(), 0, "no edge yet");
    assert_eq!(harness.ready_tick(0), None);
    assert_eq!(harness.dispatched(), [1, 2]);
    assert_eq!(harness.worker_waker.count(), 1, "one wake for the batch");
    assert_eq!(harness.tick(0), None);
    assert_eq!(harness.listeners[0].calls.get(), 3);
    harness.listeners[0].then_clients([3]);
    harness.ready_tick(0);
    assert_eq!(harness.dispatched(), [3]);
    assert_eq!(harness.stats().accept_errors, 0);
}

#[test]
fn connections_are_numbered_in_the_order_of_accepts() {
    let mut harness = Harness::new(2, 10, 10);
    harness.listeners[0]
        .then_clients([1])
        .then_error(no_descriptor());
    harness.listeners[1].then_clients([2]);
    harness.ready_tick(0);
    harness.ready_tick(1000);
    assert_eq!(harness.numbers(), [1, 2], "an error takes no number");
    harness.listeners[1].then_clients([3]);
    harness.shut_down(5000);
    harness.ready_tick(2000);
    assert_eq!(harness.numbers(), [3]);
}

#[test]
fn capacity_that_appears_while_a_pause_begins_is_used() {
    let mut harness = Harness::new(1, 1, 10);
    let listener = harness.listeners[0].clone();
    let control = Arc::clone(&harness.acceptor.control);
    listener
        .then_clients([1, 2])
        .closes_one
        .replace(Some(control));
    assert_eq!(harness.ready_tick(0), Some(0), "no pause");
    harness.tick(0);
    assert_eq!(harness.dispatched(), [1, 2]);
}

/// Rule 10 of the event loop.
#[test]
fn accept_pauses_without_descriptors_and_backs_off() {
    let mut harness = Harness::new(1, 10, 10);
    let listener = harness.listeners[0].clone();
    listener.then_clients([1]).then_error(no_descriptor());
    listener.then_error(no_descriptor()).then_clients([2]);
    assert_eq!(harness.ready_tick(0), Some(100));
    assert_eq!(harness.dispatched(), [1], "the worker is notified");

    assert_eq!(harness.ready_tick(25), Some(75));
    assert_eq!(listener.calls.get(), 2, "no accept in a pause");

    assert_eq!(harness.tick(100), Some(200), "still no descriptor");
    assert_eq!(harness.tick(300), None);
    assert_eq!(harness.dispatched(), [2], "without a new edge");
    let stats = harness.stats();
    assert_eq!((stats.accept_errors, stats.accept_pauses), (2, 2));
    assert_eq!(stats.accept_paused.as_millis(), 300);

    listener.then_error(no_descriptor()).then_clients([3]);
    assert_eq!(harness.ready_tick(300), Some(100), "an accept resets it");
}

#[test]
fn backoff_is_bounded() {
    let mut harness = Harness::new(1, 10, 10);
    let (mut now, mut waits) = (0, Vec::new());
    for _ in 0..6 {
        harness.listeners[0]
            .then_error(no_descriptor())
            .then_clients([1]);
        let wait = harness.ready_tick(now).unwrap();
        harness.listeners[0].accepts.borrow_mut().clear();
        waits.push(wait);
        now += wait;
    }
    assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
}

#[test]
fn error_without_a_waiting_client_is_no_pause() {
    let mut harness = Harness::new(1, 10, 10);
    harness.listeners[0]
        .then_clients([1])
        .then_error(no_descriptor());
    assert_eq!(harness.ready_tick(0), None);
    let stats = harness.stats();
    assert_eq!((stats.accept_errors, stats.accept_pauses), (1, 0));
    harness.listeners[0].then_clients([2]);
    harness.ready_tick(0);
    assert_eq!(harness.dispatched(), [1, 2]);
}

/// Rule 10 of the event loop.
#[test]
fn closed_connection_ends_the_pause_at_once() {
    let mut harness = Harness::new(1, 10, 10);
    let listener = harness.listeners[0].clone();
    listener
        .then_clients([1])
        .then_error(no_descriptor())
        .then_clients([2]);
    harness.ready_tick(0);
    assert_eq!(harness.waker.count(), 0);
    harness.close_one();
    assert_eq!(harness.waker.count(), 1);
    assert_eq!(harness.tick(1), None);
    assert_eq!(harness.dispatched(), [1, 2]);
    harness.close_one();
    assert_eq!(harness.waker.count(), 1, "no pause is in effect");
}

#[test]
fn unknown_errors_back_off() {
    for error in [io::Error::other("unknown"), io::Error::from_raw_os_error(9)] {
        let mut harness = Harness::new(1, 10, 10);
        harness.listeners[0].then_error(error).then_clients([1]);
        assert_eq!(harness.ready_tick(0), Some(MIN_BACKOFF));
        assert_eq!(harness.tick(MIN_BACKOFF), None);
        assert_eq!(harness.dispatched(), [1]);
    }
}

/// Rule 10 of the event loop.
#[test]
#[cfg(target_os = "linux")]
fn transient_errors_are_retried_at_once() {
    use rustix::io::Errno;

    let accepted = [
        Errno::INTR,
        Errno::PERM,
        Errno::PROTO,
        Errno::NETDOWN,
        Errno::NOPROTOOPT,
        Errno::HOSTDOWN,
        Errno::NONET,
        Errno::HOSTUNREACH,
        Errno::OPNOTSUPP,
        Errno::NETUNREACH,
        Errno::CONNABORTED,
        Errno::CONNRESET,
        Errno::TIMEDOUT,
    ];
    for error in accepted {
        let mut harness = Harness::new(1, 10, 10);
        harness.listeners[0].then_error(error).then_clients([1]);
        assert_eq!(harness.ready_tick(0), None, "{error}");
        assert_eq!(harness.dispatched(), [1], "{error}");
        let stats = harness.stats();
        assert_eq!((stats.accept_errors, stats.accept_pauses), (1, 0));
    }
}

/// Rule 10 of the event loop.
#[test]
fn aborted_connections_of_other_systems_are_retried_at_once() {
    for kind in [ErrorKind::NotConnected, ErrorKind::InvalidInput] {
        let mut harness = Harness::new(1, 10, 10);
        harness.listeners[0].then_error(kind).then_clients([1]);
        assert_eq!(harness.ready_tick(0), None, "{kind}");
        assert_eq!(harness.dispatched(), [1], "{kind}");
    }
}

#[test]
fn persistent_transient_error_backs_off() {
    let mut harness = Harness::new(1, 10, 10);
    for _ in 0..1000 {
        harness.listeners[0].then_error(ErrorKind::PermissionDenied);
    }
    let mut now = 0;
    for _ in 0..10 {
        now += harness.ready_tick(now).expect("a timer");
    }
    assert_eq!(harness.listeners[0].calls.get(), 10 * MAX_ERRORS);
    assert_eq!(harness.stats().accept_pauses, 10);
    assert!(now > 5000, "{now}");
}

#[test]
fn accept_pauses_at_the_limit_until_a_close() {
    let mut harness = Harness::new(1, 2, 10);
    harness.listeners[0].then_clients([1, 2, 3, 4]);
    assert_eq!(harness.ready_tick(0), None, "no timer: only a close helps");
    let calls = harness.listeners[0].calls.get();
    assert_eq!(calls, 2, "the other clients wait in the backlog");
    assert_eq!(harness.ready_tick(60_000), None);
    assert_eq!(harness.dispatched(), [1, 2]);
    let stats = harness.stats();
    assert_eq!(stats.is_accept_paused, 1);
    assert_eq!(stats.accept_paused.as_secs(), 0, "it has not ended");

    harness.close_one();
    assert_eq!(harness.waker.count(), 1);
    assert_eq!(harness.tick(60_000), None);
    assert_eq!(harness.dispatched(), [3]);
    let stats = harness.stats();
    assert_eq!((stats.accepted, stats.accept_pauses), (3, 2));
    assert_eq!(stats.accept_paused.as_secs(), 60);
    assert_eq!(stats.is_accept_paused, 1, "the next pause");
}

#[test]
fn full_server_without_waiting_clients_does_not_pause() {
    let mut harness = Harness::new(1, 2, 10);
    harness.listeners[0].then_clients([1, 2]);
    assert_eq!(harness.ready_tick(0), None);
    assert_eq!(harness.stats().accept_pauses, 0);
    harness.listeners[0].then_clients([3]);
    assert_eq!(harness.ready_tick(0), None);
    assert_eq!(harness.stats().accept_pauses, 1);
    harness.close_one();
    harness.tick(0);
    assert_eq!(harness.dispatched(), [1, 2, 3]);
}

#[test]
fn closes_before_the_limit_are_counted() {
    let mut harness = Harness::new(1, 2, 10);
    for client in 0..10 {
        harness.listeners[0].then_clients([client]);
        assert_eq!(harness.ready_tick(0), None);
        assert_eq!(harness.dispatched(), [client]);
        harness.close_one();
    }
    assert_eq!(harness.stats().accept_pauses, 0);
}

#[test]
fn accept_pauses_while_all_queues_are_full() {
    let mut harness = Harness::new(1, 10, 1);
    harness.listeners[0].then_clients([1, 2]);
    assert_eq!(harness.ready_tick(0), None, "no timer");
    assert_eq!(harness.dispatched(), [1]);
    harness.acceptor.control.free(0);
    assert_eq!(harness.waker.count(), 1);
    harness.tick(0);
    assert_eq!(harness.dispatched(), [2]);
    assert_eq!(harness.stats().accepted, 2);
}

#[test]
fn accepts_per_tick_are_bounded() {
    let mut harness = Harness::new(1, 1000, 1000);
    harness.listeners[0].then_clients(0..200);
    assert_eq!(harness.ready_tick(0), Some(0));
    assert_eq!(harness.dispatched().len(), MAX_BATCH);
    assert_eq!(harness.tick(0), None);
    assert_eq!(harness.dispatched().len(), 200 - MAX_BATCH);
}

#[test]
fn listeners_are_served_round_robin() {
    let mut harness = Harness::new(3, 1000, 1000);
    harness.listeners[0].then_clients([0, 1, 2, 3]);
    harness.listeners[1].then_clients([10]);
    harness.listeners[2].then_clients([20, 21]);
    harness.ready_tick(0);
    assert_eq!(harness.dispatched(), [0, 10, 20, 1, 21, 2, 3]);
}

#[test]
fn shutdown_accepts_the_backlog_and_wakes_the_workers() {
    let mut harness = Harness::new(2, 1000, 1000);
    harness.listeners[0].then_clients(0..200);
    harness.listeners[1]
        .then_error(ErrorKind::Interrupted)
        .then_clients([1000]);
    harness.shut_down(5000);
    assert_eq!(harness.waker.count(), 1);
    harness.tick(0);
    assert!(harness.acceptor.is_done());
    assert_eq!(harness.dispatched().len(), 201, "without any edge");
    assert_eq!(harness.stats().accept_errors, 1);
    assert!(harness.worker_waker.count() > 0);
    drop(harness.acceptor);
    assert_eq!(harness.receiver.take(1).count(), 0);
    assert!(harness.receiver.is_closed());
}

#[test]
fn shutdown_accepts_handshakes_in_progress_before_it_closes_a_listener() {
    let mut harness = Harness::new(2, 10, 10);
    let [own, adopted] = [0, 1].map(|index: usize| harness.listeners[index].clone());
    own.can_stop_handshakes.set(true);
    own.then_clients([1]);
    adopted.then_clients([10]);
    harness.shut_down(5000);
    assert_eq!(harness.tick(0), Some(HANDSHAKE_TIMEOUT));
    assert_eq!(harness.dispatched(), [10]);
    own.then_clients([2]);
    assert_eq!(harness.ready_tick(60), Some(HANDSHAKE_TIMEOUT - 60));
    assert_eq!(harness.dispatched(), [0; 0]);
    harness.tick(HANDSHAKE_TIMEOUT);
    assert_eq!(harness.dispatched(), [1, 2]);
    assert!(harness.acceptor.is_done());
}

/// With a reused port.
#[test]
fn workers_begin_after_the_listeners_are_closed() {
    let mut harness = Harness::new(1, 1, 10);
    harness.listeners[0].can_stop_handshakes.set(true);
    harness.listeners[0].then_clients([1, 2]);
    harness.acceptor.control.shut_down_acceptor(5000);
    harness.tick(0);
    let requested = |harness: &Harness| harness.acceptor.control.shutdown_deadline();
    assert_eq!(requested(&harness), None);
    harness.tick(HANDSHAKE_TIMEOUT);
    // Also while a client waits for the place of another one.
    assert_eq!(requested(&harness), Some(5000));
    assert_eq!(harness.dispatched(), [1]);
    assert!(!harness.acceptor.is_done());
}

#[test]
fn handshakes_get_a_quarter_of_a_short_shutdown() {
    for (deadline, timeout) in [(40, 10), (0, 0)] {
        let mut harness = Harness::new(1, 10, 10);
        harness.listeners[0].can_stop_handshakes.set(true);
        harness.shut_down(deadline);
        if timeout > 0 {
            assert_eq!(harness.tick(0), Some(timeout));
        }
        harness.tick(timeout);
        assert!(harness.acceptor.is_done());
    }
}

#[test]
fn shutdown_accepts_no_more_than_the_backlog() {
    let mut harness = Harness::new(1, 100_000, 100_000);
    harness.listeners[0].then_clients(0..50_000);
    harness.shut_down(5000);
    harness.tick(0);
    assert!(harness.acceptor.is_done());
    assert_eq!(harness.dispatched().len(), BACKLOG as usize + 1);
}

#[test]
fn shutdown_ends_a_pause_and_keeps_clients_beyond_the_limit_waiting() {
    let mut harness = Harness::new(1, 2, 10);
    let listener = harness.listeners[0].clone();
    listener
        .then_error(no_descriptor())
        .then_clients([1, 2, 3, 4]);
    harness.ready_tick(0);
    harness.shut_down(5000);
    assert_eq!(harness.tick(7), Some(4993));
    assert_eq!(harness.dispatched(), [1, 2]);
    assert_eq!(harness.stats().accept_paused.as_millis(), 7);
    harness.close_one();
    assert_eq!(harness.waker.count(), 2, "the shutdown, and the capacity");
    assert_eq!(harness.tick(8), Some(4992));
    assert_eq!(harness.dispatched(), [3]);
    assert!(!harness.acceptor.is_done());
    harness.tick(5000);
    assert!(harness.acceptor.is_done());
    assert_eq!(*listener.resets.borrow(), [4]);
    let stats = harness.stats();
    assert_eq!((stats.accepted, stats.expired), (4, 1));
    assert_eq!(stats.total().closed.get(CloseReason::DrainTimeout), 1);
}

#[test]
fn shutdown_waits_for_free_descriptors() {
    let mut harness = Harness::new(1, 10, 10);
    let listener = harness.listeners[0].clone();
    listener
        .then_clients([1])
        .then_error(no_descriptor())
        .then_clients([2]);
    harness.shut_down(5000);
    assert_eq!(harness.tick(0), Some(MIN_BACKOFF));
    assert!(!harness.acceptor.is_done());
    harness.close_one();
    harness.tick(1);
    assert!(harness.acceptor.is_done());
    assert_eq!(harness.dispatched(), [1, 2]);
}

#[test]
fn deadline_that_moves_wakes_the_workers_again() {
    let mut harness = Harness::new(1, 1, 10);
    harness.listeners[0].then_clients([1, 2]);
    harness.shut_down(5000);
    harness.tick(0);
    let before = harness.worker_waker.count();
    harness.tick(1);
    assert_eq!(harness.worker_waker.count(), before);
    harness.shut_down(2);
    harness.tick(2);
    assert!(harness.acceptor.is_done());
    assert_eq!(harness.worker_waker.count(), before + 1);
}

#[test]
fn pauses_are_logged_at_most_once_a_second() {
    let mut harness = Harness::new(1, 10, 10);
    let warning = |harness: &mut Harness, now| {
        harness.listeners[0]
            .then_error(no_descriptor())
            .then_clients([1]);
        harness.ready_tick(now);
        harness.listeners[0].accepts.borrow_mut().clear();
        harness.acceptor.control.free(0);
        harness.acceptor.last_warning
    };
    assert_eq!(warning(&mut harness, 10), Some(10));
    assert_eq!(warning(&mut harness, 1009), Some(10));
    assert_eq!(warning(&mut harness, 1010), Some(1010));
    assert_eq!(harness.stats().accept_pauses, 3);
}
