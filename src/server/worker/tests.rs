use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::rc::Rc;

use super::*;
use crate::connection::handler::Echo;
use crate::connection::shared::Timeouts;
use crate::server::dispatcher::{CountingWaker, Dispatcher};
use crate::stats::{Counters, Stats};
use crate::system::Readiness;

const TIMEOUTS: Timeouts = Timeouts {
    idle: Some(8),
    answer: None,
    close: 8,
    linger: 8,
    stuck: 8,
    drain: 100,
};

/// What a client has sent and not yet been answered, and the names of the clients that were answered.
#[derive(Clone, Default)]
struct Client {
    name: u32,
    unread: Rc<RefCell<usize>>,
    answered: Rc<RefCell<Vec<u32>>>,
}

impl Read for Client {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.unread.take());
        match count {
            0 => Err(ErrorKind::WouldBlock.into()),
            _ => Ok(count),
        }
    }
}

impl Write for Client {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.answered.borrow_mut().push(self.name);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Client {
    fn shutdown_write(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn poll_delivery(&mut self) -> bool {
        true
    }

    fn unread(&self) -> u64 {
        0
    }

    fn reset_on_close(&mut self) {}
}

/// The results of the polls to come: events, and whether there may be more. Then there are none.
#[derive(Default)]
struct ScriptedPoller {
    script: VecDeque<(Vec<PollEvent>, bool)>,
    events: Vec<PollEvent>,
    timeouts: Vec<Option<Millis>>,
    registered: usize,
    max_events: usize,
    /// `register` fails.
    is_broken: bool,
    now: Millis,
    /// How long each tick takes.
    tick_length: Millis,
}

impl ScriptedPoller {
    fn then(&mut self, events: &[PollEvent], may_be_more: bool) -> &mut Self {
        self.script.push_back((events.to_vec(), may_be_more));
        self
    }
}

impl Poller<Client> for ScriptedPoller {
    fn poll(&mut self, timeout: Option<Millis>) -> io::Result<bool> {
        self.timeouts.push(timeout);
        let (events, may_be_more) = self.script.pop_front().unwrap_or_default();
        self.events = events;
        Ok(may_be_more)
    }

    fn max_events(&self) -> usize {
        self.max_events
    }

    fn events(&self) -> impl Iterator<Item = PollEvent> {
        self.events.iter().copied()
    }

    fn now(&self) -> Millis {
        self.now
    }

    fn elapsed(&self, since: Millis) -> Millis {
        self.now + self.tick_length - since
    }

    fn register(&mut self, _: &mut Client, _: usize) -> io::Result<()> {
        if self.is_broken {
            return Err(io::Error::other("broken"));
        }
        self.registered += 1;
        Ok(())
    }
}

struct Harness {
    worker: Worker<Client, Echo, CountingWaker>,
    poller: ScriptedPoller,
    dispatcher: Option<Dispatcher<Accepted<Client>, CountingWaker>>,
    control: Arc<Control<CountingWaker>>,
    /// Wakes the acceptor.
    waker: CountingWaker,
    counters: Arc<Counters>,
    answered: Rc<RefCell<Vec<u32>>>,
}

impl Harness {
    fn new() -> Self {
        let counters = Arc::new(Counters::new(1));
        let own = Arc::clone(&counters.workers[0]);
        let (dispatcher, mut receivers) = Dispatcher::new(1000, [CountingWaker::default()]);
        let waker = CountingWaker::default();
        let control = Arc::new(Control::new(1000, waker.clone(), []));
        let table = ConnectionTable::for_tests(TIMEOUTS, 16, &own);
        let receiver = receivers.remove(0);
        Self {
            worker: Worker::new(table, receiver, Arc::clone(&control), own),
            poller: ScriptedPoller {
                max_events: 1,
                ..ScriptedPoller::default()
            },
            dispatcher: Some(dispatcher),
            control,
            waker,
            counters,
            answered: Rc::default(),
        }
    }

    /// Dispatches a connection on which this many bytes have arrived.
    fn dispatch(&mut self, name: u32, unread: usize) {
        let client = Client {
            name,
            unread: Rc::new(RefCell::new(unread)),
            answered: Rc::clone(&self.answered),
        };
        let dispatcher = self.dispatcher.as_mut().expect("not dropped");
        let outcome = dispatcher.try_dispatch(Accepted {
            stream: client,
            peer: Peer::Unix,
            number: 1,
        });
        assert!(outcome.is_ok());
    }

    /// Runs one tick at `now`; returns how long the next one may sleep.
    fn tick(&mut self, now: Millis) -> Option<Millis> {
        self.poller.now = now;
        self.poller.timeouts.clear();
        self.worker
            .tick(&mut self.poller, &|_: &Client, _, _| Echo)
            .unwrap();
        self.worker.poll_timeout()
    }

    fn stats(&self) -> Stats {
        self.counters.snapshot()
    }

    fn is_expired(&self) -> bool {
        self.stats().total().closed.get(CloseReason::IdleTimeout) > 0
    }
}

/// Rule 12 of the event loop.
#[test]
fn events_known_to_the_kernel_are_handled_before_a_connection_expires() {
    let mut harness = Harness::new();
    for name in 0..2 {
        harness.dispatch(name, 1);
    }
    harness.poller.then(&[PollEvent::Wake], false);
    assert_eq!(harness.tick(0), Some(8));
    // A pause: the poll was interrupted, and the events come one by one afterwards.
    harness.poller.then(&[], true);
    harness
        .poller
        .then(&[PollEvent::Ready(0, Readiness::READABLE)], true);
    harness
        .poller
        .then(&[PollEvent::Ready(1, Readiness::READABLE)], true);
    harness.tick(1000);
    assert_eq!(*harness.answered.borrow(), [0, 1]);
    assert_eq!(
        harness.poller.timeouts,
        [Some(8), Some(0), Some(0), Some(0)]
    );
    assert!(!harness.is_expired());
    harness.tick(1007);
    assert!(!harness.is_expired());
    harness.tick(1008);
    harness.tick(1016);
    assert!(harness.is_expired());
}

#[test]
fn number_of_polls_before_an_expiry_is_bounded() {
    let mut harness = Harness::new();
    harness.poller.max_events = 2;
    for name in 0..5 {
        harness.dispatch(name, 0);
    }
    harness.poller.then(&[PollEvent::Wake], false);
    harness.tick(0);
    for _ in 0..100 {
        harness.poller.then(&[], true);
    }
    harness.tick(8);
    assert_eq!(harness.poller.timeouts.len(), 1 + 3, "five connections");
}

#[test]
fn nothing_due_means_one_poll() {
    let mut harness = Harness::new();
    harness.dispatch(0, 0);
    harness.poller.then(&[PollEvent::Wake], true);
    harness.tick(0);
    harness.tick(7);
    assert_eq!(harness.poller.timeouts, [Some(8)]);
}

#[test]
fn longest_tick_is_kept() {
    let mut harness = Harness::new();
    let longest = |harness: &mut Harness, tick_length| {
        harness.poller.tick_length = tick_length;
        harness.tick(1000);
        harness.stats().workers[0].longest_tick.as_millis()
    };
    let longest: Vec<_> = [0, 7, 3, 12]
        .map(|length| longest(&mut harness, length))
        .into();
    assert_eq!(longest, [0, 7, 7, 12]);
}

#[test]
fn intake_per_tick_is_bounded_and_resumed_without_an_event() {
    let mut harness = Harness::new();
    let count = MAX_NEW_CONNECTIONS + 10;
    for name in 0..count {
        harness.dispatch(name as u32, 0);
    }
    assert_eq!(harness.tick(0), None, "not announced yet");
    harness.poller.then(&[PollEvent::Wake], false);
    assert_eq!(harness.tick(0), Some(0));
    assert_eq!(harness.poller.registered, MAX_NEW_CONNECTIONS);
    assert_eq!(harness.tick(0), Some(8));
    assert_eq!(harness.poller.registered, count);
}

#[test]
fn intake_and_closes_announce_capacity() {
    let mut harness = Harness::new();
    harness.control.watch_capacity();
    harness.poller.then(&[PollEvent::Wake], false);
    harness.tick(0);
    assert_eq!(harness.waker.count(), 0, "nothing has changed");
    harness.dispatch(0, 0);
    harness.poller.then(&[PollEvent::Wake], false);
    harness.tick(0);
    assert_eq!(harness.waker.count(), 1, "the queue has room");
    harness.control.watch_capacity();
    harness.tick(8);
    assert_eq!(harness.waker.count(), 1);
    harness.tick(16);
    assert_eq!(harness.waker.count(), 2, "a connection was closed");
}

#[test]
fn connection_that_cannot_be_registered_is_closed() {
    let mut harness = Harness::new();
    harness.dispatch(0, 0);
    harness.poller.is_broken = true;
    harness.poller.then(&[PollEvent::Wake], false);
    harness.tick(0);
    assert_eq!(harness.stats().total().closed.get(CloseReason::Error), 1);
}

#[test]
fn shutdown_ends_once_the_queue_is_closed_and_empty() {
    let mut harness = Harness::new();
    harness.dispatch(0, 3);
    harness.control.shut_down(100);
    harness.poller.then(&[PollEvent::Wake], false);
    assert_eq!(harness.tick(0), Some(8), "the client's EOF");
    assert_eq!(*harness.answered.borrow(), [0]);
    harness.tick(8);
    assert_eq!(harness.stats().total().closed.get(CloseReason::Shutdown), 1);
    assert!(!harness.worker.is_done(), "more may be dispatched");
    harness.dispatcher = None;
    harness.poller.then(&[PollEvent::Wake], false);
    harness.tick(9);
    assert!(harness.worker.is_done());
}

#[test]
fn closed_queue_without_a_shutdown_drains_and_ends_the_worker() {
    let mut harness = Harness::new();
    harness.dispatch(0, 3);
    harness.dispatcher = None;
    harness.poller.then(&[PollEvent::Wake], false);
    assert_eq!(harness.tick(0), Some(8), "the client's EOF");
    assert_eq!(*harness.answered.borrow(), [0]);
    harness.tick(8);
    assert_eq!(harness.stats().total().closed.get(CloseReason::Shutdown), 1);
    assert!(harness.worker.is_done());
}
