//! The acceptor: takes connections from the listeners, as many as there is room for, and deals them
//! to the workers.
//!
//! Where there is no room (at the connection limit, without descriptors) it pauses: clients wait in
//! the kernel's backlog. A listener announces an edge only, and none comes for clients that wait
//! already, so a listener stays noted as ready until an accept would block; and what ends a pause is
//! a connection that closes ([`AcceptorControl::notify_capacity`]), or a timer where another process may have used up
//! the descriptors.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token, Waker};

use crate::error::error_text;
use crate::net::listener::Listener;
use crate::net::stream::Socket;
use crate::peer::Peer;
use crate::stats::Counters;
use crate::work_queue::{Wake, WorkQueue};

/// The waker's token; listeners have the numbers of their places.
const WAKER: Token = Token(usize::MAX);

/// Accepts per turn: enough for one wake to serve many, few enough that a shutdown is seen soon.
const MAX_BATCH: usize = 128;

/// Batches taken in at the end, of those who were connected already.
const LAST_BATCHES: usize = 64;

/// How long a pause lasts if no connection closes meanwhile.
const RETRY: Duration = Duration::from_millis(100);

/// Pauses are logged at most this often.
const WARNING_INTERVAL: Duration = Duration::from_secs(1);

/// How others reach the acceptor: to end it, or to tell it of room.
#[derive(Debug)]
pub(crate) struct AcceptorControl {
    waker: Waker,
    shutdown: AtomicBool,
    paused: AtomicBool,
}

impl AcceptorControl {
    pub(crate) fn new(poll: &Poll) -> io::Result<Self> {
        let waker = Waker::new(poll.registry(), WAKER)?;
        Ok(Self {
            waker,
            shutdown: AtomicBool::new(false),
            paused: AtomicBool::new(false),
        })
    }

    /// Asks the acceptor to end. Any thread, any number of times.
    pub(crate) fn shut_down(&self) {
        self.shutdown.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn is_shut_down(&self) -> bool {
        self.shutdown.load(Ordering::SeqCst)
    }

    /// Tells that connections were closed. Costs next to nothing unless the acceptor waits for it.
    pub(crate) fn notify_capacity(&self) {
        // Pairs with the fence in `pause`: either the pause sees the close, or this sees the pause.
        fence(Ordering::SeqCst);
        if self.paused.load(Ordering::Relaxed) && self.paused.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    fn pause(&self) {
        self.paused.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            log::error!("cannot wake the acceptor: {error}");
        }
    }
}

/// Where connections come from.
pub(crate) trait Listen {
    type Stream;
    /// Takes the next connection; never blocks.
    fn accept(&self) -> io::Result<(Self::Stream, Peer)>;
}

impl Listen for Listener {
    type Stream = Socket;

    fn accept(&self) -> io::Result<(Socket, Peer)> {
        Listener::accept(self)
    }
}

/// A listener, and whether clients may be waiting at it.
#[derive(Debug)]
struct ListenerSlot<L> {
    listener: L,
    ready: bool,
}

#[derive(Debug)]
struct Pause {
    since: Instant,
    /// `None` where only a closing connection can end it.
    until: Option<Instant>,
}

#[derive(Debug)]
pub(crate) struct Acceptor<L: Listen, W: Wake> {
    listeners: Vec<ListenerSlot<L>>,
    next_listener: usize,
    queue: WorkQueue<(L::Stream, Peer), W>,
    max_connections: u64,
    /// Connections open at most: exact only when it reaches the limit, to save the summing up.
    open_at_most: u64,
    pause: Option<Pause>,
    last_warning: Option<Instant>,
    counters: Arc<Counters>,
    control: Arc<AcceptorControl>,
}

impl<W: Wake> Acceptor<Listener, W> {
    /// Accepts until asked to end. The listeners are closed by then, and so is the queue.
    pub(crate) fn run(mut self, mut poll: Poll) -> io::Result<()> {
        for (index, door) in self.listeners.iter_mut().enumerate() {
            door.listener.register(poll.registry(), Token(index))?;
        }
        let mut events = Events::with_capacity(self.listeners.len() + 1);
        let mut poll_timeout = None;
        while !self.control.is_shut_down() {
            match poll.poll(&mut events, poll_timeout) {
                Err(error) if error.kind() == ErrorKind::Interrupted => events.clear(),
                outcome => outcome?,
            }
            for event in events.iter().filter(|event| event.token() != WAKER) {
                self.notice(event.token().0);
            }
            poll_timeout = self.turn(Instant::now());
            // Where there are fewer CPUs than work, the workers go first: clients that come meanwhile
            // are then accepted in one batch, for one wake. Otherwise this costs next to nothing.
            thread::yield_now();
        }
        self.finish(Instant::now());
        Ok(())
    }
}

impl<L: Listen, W: Wake> Acceptor<L, W> {
    pub(crate) fn new(
        listeners: Vec<L>,
        queue: WorkQueue<(L::Stream, Peer), W>,
        max_connections: usize,
        counters: Arc<Counters>,
        control: Arc<AcceptorControl>,
    ) -> Self {
        Self {
            listeners: listeners
                .into_iter()
                .map(|listener| ListenerSlot {
                    listener,
                    ready: false,
                })
                .collect(),
            next_listener: 0,
            queue,
            max_connections: max_connections as u64,
            open_at_most: 0,
            pause: None,
            last_warning: None,
            counters,
            control,
        }
    }

    /// Notes that clients may be waiting at a listener.
    fn notice(&mut self, door: usize) {
        self.listeners[door].ready = true;
    }

    /// Accepts one batch, unless paused; says how long there is nothing to do.
    fn turn(&mut self, now: Instant) -> Option<Duration> {
        if self.pause_expired(now) {
            self.resume(now);
        }
        if self.pause.is_none() {
            self.accept_batch(now);
            self.queue.notify();
        }
        match &self.pause {
            Some(pause) => pause
                .until
                .map(|until| until.saturating_duration_since(now)),
            None => self
                .listeners
                .iter()
                .any(|door| door.ready)
                .then_some(Duration::ZERO),
        }
    }

    /// Takes in those who are connected already, as far as there is room, and ends: the listeners
    /// and the queue are dropped, which the workers take as the sign to drain.
    fn finish(mut self, now: Instant) {
        self.resume(now);
        for door in &mut self.listeners {
            door.ready = true;
        }
        // Bounded: clients that keep coming must not keep the server from ending.
        for _ in 0..LAST_BATCHES {
            self.accept_batch(now);
            self.queue.notify();
            if self.pause.is_some() && self.queue.has_room() {
                break;
            }
            if self.pause.is_some() {
                self.queue.wait_for_room(Some(RETRY));
                self.resume(now);
            }
        }
        self.resume(now);
    }

    fn accept_batch(&mut self, now: Instant) {
        for _ in 0..MAX_BATCH {
            let Some(door) = self.next_ready_listener() else {
                return;
            };
            if self.is_full() {
                return self.pause(
                    now,
                    None,
                    &format!("all {} connections are in use", self.max_connections),
                );
            }
            if !self.queue.has_room() {
                return self.pause(now, Some(RETRY), "the workers are too busy to take more");
            }
            match self.listeners[door].listener.accept() {
                Ok(connection) => self.deal(connection),
                Err(error) => {
                    if error.kind() == ErrorKind::WouldBlock {
                        self.listeners[door].ready = false;
                        continue;
                    }
                    self.counters.acceptor.errors.add(1);
                    if !is_transient(&error) {
                        return self.pause(now, Some(RETRY), &error_text(&error));
                    }
                }
            }
        }
    }

    fn deal(&mut self, connection: (L::Stream, Peer)) {
        self.counters.acceptor.accepted.add(1);
        self.open_at_most += 1;
        // There was room, and this is the only producer: only a worker's death can refuse it, which
        // ends the server.
        if let Err(refused) = self.queue.try_push_without_notify(connection) {
            log::error!("a connection is lost: {refused}");
        }
    }

    /// The next listener, in turn, at which clients may be waiting.
    fn next_ready_listener(&mut self) -> Option<usize> {
        let count = self.listeners.len();
        let door = (0..count)
            .map(|step| (self.next_listener + step) % count)
            .find(|&door| self.listeners[door].ready)?;
        self.next_listener = door + 1;
        Some(door)
    }

    fn is_full(&mut self) -> bool {
        if self.open_at_most >= self.max_connections {
            self.open_at_most = self.counters.open();
        }
        self.open_at_most >= self.max_connections
    }

    fn pause(&mut self, now: Instant, retry: Option<Duration>, why: &str) {
        self.counters.acceptor.pauses.add(1);
        self.pause = Some(Pause {
            since: now,
            until: retry.map(|retry| now + retry),
        });
        self.control.pause();
        // Connections may have closed before the control knew of the pause.
        if retry.is_none() && !self.is_full() {
            return self.resume(now);
        }
        if self
            .last_warning
            .is_none_or(|at| now - at >= WARNING_INTERVAL)
        {
            self.last_warning = Some(now);
            log::warn!("accepting is paused, clients wait in the backlog: {why}");
        }
    }

    /// Whether there is a pause, and it has lasted long enough.
    fn pause_expired(&self, now: Instant) -> bool {
        self.pause.as_ref().is_some_and(|pause| {
            !self.control.paused.load(Ordering::SeqCst)
                || pause.until.is_some_and(|until| now >= until)
        })
    }

    fn resume(&mut self, now: Instant) {
        self.control.paused.store(false, Ordering::SeqCst);
        if let Some(pause) = self.pause.take() {
            let paused = now.saturating_duration_since(pause.since);
            self.counters
                .acceptor
                .paused_us
                .add(paused.as_micros().try_into().unwrap_or(u64::MAX));
        }
    }
}

/// Whether an accept failed for this one client, or for this one moment: try again at once.
/// Everything else (no descriptors, no memory, or an error nobody has heard of) asks for timeout_of.
fn is_transient(error: &io::Error) -> bool {
    /// Those of accept(2) on Linux that have no kind: EPROTO, ENOPROTOOPT, EOPNOTSUPP, EHOSTDOWN, ENONET.
    const LINUX: [i32; 5] = [71, 92, 95, 112, 64];
    matches!(
        error.kind(),
        ErrorKind::Interrupted
            | ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::NetworkDown
            | ErrorKind::NetworkUnreachable
            | ErrorKind::HostUnreachable
            | ErrorKind::PermissionDenied
            | ErrorKind::TimedOut
    ) || (cfg!(target_os = "linux")
        && error
            .raw_os_error()
            .is_some_and(|code| LINUX.contains(&code)))
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::VecDeque;
    use std::num::NonZeroUsize;
    use std::rc::Rc;

    use super::*;
    use crate::stats::{CloseReason, Stats};
    use crate::work_queue::Receiver;

    const EMFILE: i32 = 24;

    /// What its accepts return, in order, before they would block.
    #[derive(Clone, Default)]
    struct Scripted {
        accepts: Rc<RefCell<VecDeque<io::Result<u32>>>>,
        calls: Rc<Cell<usize>>,
    }

    impl Scripted {
        fn then(&self, accept: io::Result<u32>) -> &Self {
            self.accepts.borrow_mut().push_back(accept);
            self
        }

        fn then_clients(&self, clients: impl IntoIterator<Item = u32>) -> &Self {
            self.accepts
                .borrow_mut()
                .extend(clients.into_iter().map(Ok));
            self
        }
    }

    impl Listen for Scripted {
        type Stream = u32;

        fn accept(&self) -> io::Result<(u32, Peer)> {
            self.calls.set(self.calls.get() + 1);
            let accept = self.accepts.borrow_mut().pop_front();
            let client = accept.unwrap_or_else(|| Err(ErrorKind::WouldBlock.into()))?;
            Ok((client, Peer::Unix))
        }
    }

    #[derive(Clone, Default)]
    struct Bell(Rc<Cell<usize>>);

    impl Wake for Bell {
        fn wake(&self) {
            self.0.set(self.0.get() + 1);
        }
    }

    /// An acceptor with `listeners` scripted ones and one worker.
    struct Scene {
        acceptor: Acceptor<Scripted, Bell>,
        listeners: Vec<Scripted>,
        receiver: Receiver<(u32, Peer)>,
        bell: Bell,
        counters: Arc<Counters>,
        poll: Poll,
        start: Instant,
    }

    impl Scene {
        fn new(listeners: usize, max_connections: usize, capacity: usize) -> Self {
            let listeners: Vec<_> = (0..listeners).map(|_| Scripted::default()).collect();
            let poll = Poll::new().unwrap();
            let counters = Arc::new(Counters::new(1));
            let bell = Bell::default();
            let capacity = NonZeroUsize::new(capacity).unwrap();
            let (queue, mut receivers) = WorkQueue::bounded(capacity, [bell.clone()]);
            Self {
                acceptor: Acceptor::new(
                    listeners.clone(),
                    queue,
                    max_connections,
                    Arc::clone(&counters),
                    Arc::new(AcceptorControl::new(&poll).unwrap()),
                ),
                listeners,
                receiver: receivers.remove(0),
                bell,
                counters,
                poll,
                start: Instant::now(),
            }
        }

        /// All listeners announce clients, and the acceptor takes its turn some time after the start.
        fn noticed_turn(&mut self, after: Duration) -> Option<Duration> {
            for door in 0..self.listeners.len() {
                self.acceptor.notice(door);
            }
            self.turn(after)
        }

        fn turn(&mut self, after: Duration) -> Option<Duration> {
            self.acceptor.turn(self.start + after)
        }

        fn dealt(&mut self) -> Vec<u32> {
            self.receiver.take_all().map(|(client, _)| client).collect()
        }

        fn stats(&self) -> Stats {
            self.counters.snapshot()
        }

        fn close_one(&self) {
            self.counters.workers[0].closed[CloseReason::PeerClosed as usize].add(1);
            self.acceptor.control.notify_capacity();
        }

        /// Whether the control has woken the acceptor since last asked.
        fn is_woken(&mut self) -> bool {
            let mut events = Events::with_capacity(4);
            self.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
            events.iter().any(|event| event.token() == WAKER)
        }
    }

    #[test]
    fn accepts_until_a_listener_would_block_and_not_again_before_its_next_edge() {
        let mut scene = Scene::new(1, 10, 10);
        scene.listeners[0].then_clients([1, 2]);
        assert_eq!(scene.turn(Duration::ZERO), None);
        assert_eq!(scene.listeners[0].calls.get(), 0, "nobody was announced");
        assert_eq!(scene.noticed_turn(Duration::ZERO), None);
        assert_eq!(scene.dealt(), [1, 2]);
        assert_eq!(scene.bell.0.get(), 1, "one wake for the batch");
        assert_eq!(scene.turn(Duration::ZERO), None);
        assert_eq!(scene.listeners[0].calls.get(), 3);
        scene.listeners[0].then_clients([3]);
        scene.noticed_turn(Duration::ZERO);
        assert_eq!(scene.dealt(), [3]);
        assert_eq!(scene.stats().accept_errors, 0);
    }

    #[test]
    fn without_descriptors_it_pauses_and_tries_again_by_itself() {
        let mut scene = Scene::new(1, 10, 10);
        let famine = || Err(io::Error::from_raw_os_error(EMFILE));
        scene.listeners[0]
            .then_clients([1])
            .then(famine())
            .then(famine())
            .then_clients([2]);
        assert_eq!(scene.noticed_turn(Duration::ZERO), Some(RETRY));
        assert_eq!(scene.dealt(), [1], "notified in spite of the pause");

        assert_eq!(scene.noticed_turn(RETRY / 4), Some(RETRY * 3 / 4));
        assert_eq!(scene.listeners[0].calls.get(), 2, "no accept in a pause");

        assert_eq!(scene.turn(RETRY), Some(RETRY), "still none");
        assert_eq!(scene.turn(2 * RETRY), None);
        assert_eq!(scene.dealt(), [2], "though no edge came for it");
        let stats = scene.stats();
        assert_eq!((stats.accept_errors, stats.accept_pauses), (2, 2));
        assert_eq!(stats.accept_paused, 2 * RETRY);
    }

    #[test]
    fn a_freed_descriptor_ends_the_pause_at_once() {
        let mut scene = Scene::new(1, 10, 10);
        let famine = Err(io::Error::from_raw_os_error(EMFILE));
        scene.listeners[0]
            .then_clients([1])
            .then(famine)
            .then_clients([2]);
        scene.noticed_turn(Duration::ZERO);
        assert!(!scene.is_woken());
        scene.close_one();
        assert!(scene.is_woken());
        assert_eq!(scene.turn(Duration::from_millis(1)), None);
        assert_eq!(scene.dealt(), [1, 2]);
        scene.close_one();
        assert!(!scene.is_woken(), "nobody waits for it");
    }

    #[test]
    fn an_error_nobody_has_heard_of_asks_for_patience() {
        for error in [
            io::Error::other("unheard of"),
            io::Error::from_raw_os_error(22),
        ] {
            let mut scene = Scene::new(1, 10, 10);
            scene.listeners[0].then(Err(error)).then_clients([1]);
            assert_eq!(scene.noticed_turn(Duration::ZERO), Some(RETRY));
            assert_eq!(scene.turn(RETRY), None);
            assert_eq!(scene.dealt(), [1]);
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn passing_errors_are_tried_again_at_once() {
        // EINTR, EPERM, EPROTO, ENETDOWN, ENOPROTOOPT, EHOSTDOWN, ENONET, EHOSTUNREACH, EOPNOTSUPP,
        // ENETUNREACH, ECONNABORTED, ECONNRESET, ETIMEDOUT.
        for code in [4, 1, 71, 100, 92, 112, 64, 113, 95, 101, 103, 104, 110] {
            let mut scene = Scene::new(1, 10, 10);
            let error = io::Error::from_raw_os_error(code);
            scene.listeners[0].then(Err(error)).then_clients([1]);
            assert_eq!(scene.noticed_turn(Duration::ZERO), None, "errno {code}");
            assert_eq!(scene.dealt(), [1], "errno {code}");
            let stats = scene.stats();
            assert_eq!((stats.accept_errors, stats.accept_pauses), (1, 0));
        }
    }

    #[test]
    fn at_the_limit_it_waits_for_a_close() {
        let mut scene = Scene::new(1, 2, 10);
        scene.listeners[0].then_clients([1, 2, 3, 4]);
        assert_eq!(
            scene.noticed_turn(Duration::ZERO),
            None,
            "no timer: only a close helps"
        );
        assert_eq!(
            scene.listeners[0].calls.get(),
            2,
            "the others wait in the backlog"
        );
        assert_eq!(scene.noticed_turn(Duration::from_secs(60)), None);
        assert_eq!(scene.dealt(), [1, 2]);

        scene.close_one();
        assert!(scene.is_woken());
        assert_eq!(scene.turn(Duration::from_secs(60)), None);
        assert_eq!(scene.dealt(), [3]);
        let stats = scene.stats();
        assert_eq!((stats.accepted, stats.accept_pauses), (3, 2));
        assert_eq!(stats.accept_paused, Duration::from_secs(60));
    }

    #[test]
    fn closes_before_the_limit_are_counted() {
        let mut scene = Scene::new(1, 2, 10);
        for client in 0..10 {
            scene.listeners[0].then_clients([client]);
            assert_eq!(scene.noticed_turn(Duration::ZERO), None);
            assert_eq!(scene.dealt(), [client]);
            scene.close_one();
        }
        assert_eq!(scene.stats().accept_pauses, 0);
    }

    #[test]
    fn full_mailboxes_take_no_more() {
        let mut scene = Scene::new(1, 10, 1);
        scene.listeners[0].then_clients([1, 2]);
        assert_eq!(scene.noticed_turn(Duration::ZERO), Some(RETRY));
        assert_eq!(scene.dealt(), [1]);
        scene.turn(RETRY);
        assert_eq!(scene.dealt(), [2]);
        assert_eq!(scene.stats().accepted, 2);
    }

    #[test]
    fn a_turn_is_bounded() {
        let mut scene = Scene::new(1, 1000, 1000);
        scene.listeners[0].then_clients(0..200);
        assert_eq!(scene.noticed_turn(Duration::ZERO), Some(Duration::ZERO));
        assert_eq!(scene.dealt().len(), MAX_BATCH);
        assert_eq!(scene.turn(Duration::ZERO), None);
        assert_eq!(scene.dealt().len(), 200 - MAX_BATCH);
    }

    #[test]
    fn listeners_take_turns() {
        let mut scene = Scene::new(3, 1000, 1000);
        scene.listeners[0].then_clients([0, 1, 2, 3]);
        scene.listeners[1].then_clients([10]);
        scene.listeners[2].then_clients([20, 21]);
        scene.noticed_turn(Duration::ZERO);
        assert_eq!(scene.dealt(), [0, 10, 20, 1, 21, 2, 3]);
    }

    #[test]
    fn at_the_end_it_takes_in_who_waits_and_closes_the_queue() {
        let mut scene = Scene::new(2, 1000, 1000);
        scene.listeners[0].then_clients(0..200);
        scene.listeners[1].then_clients([1000]);
        scene.acceptor.finish(scene.start);
        let dealt: Vec<u32> = scene
            .receiver
            .take_all()
            .map(|(client, _)| client)
            .collect();
        assert_eq!(dealt.len(), 201, "though no listener had announced them");
        assert!(scene.receiver.is_closed());
        assert_eq!(scene.bell.0.get(), 2, "one for the batch, one for the end");
    }

    #[test]
    fn at_the_end_a_pause_is_over_and_the_limit_holds() {
        let mut scene = Scene::new(1, 2, 10);
        let famine = Err(io::Error::from_raw_os_error(EMFILE));
        scene.listeners[0].then(famine).then_clients([1, 2, 3]);
        scene.noticed_turn(Duration::ZERO);
        scene
            .acceptor
            .finish(scene.start + Duration::from_millis(7));
        let dealt: Vec<u32> = scene
            .receiver
            .take_all()
            .map(|(client, _)| client)
            .collect();
        assert_eq!(dealt, [1, 2]);
        assert_eq!(
            scene.counters.snapshot().accept_paused,
            Duration::from_millis(7)
        );
    }

    #[test]
    fn at_the_end_clients_that_keep_coming_are_not_waited_for() {
        let mut scene = Scene::new(1, usize::MAX, 100_000);
        scene.listeners[0].then_clients(0..50_000);
        scene.acceptor.finish(scene.start);
        let dealt = scene.receiver.take_all().count();
        assert!((200..50_000).contains(&dealt), "{dealt}");
    }

    #[test]
    fn complains_at_most_once_a_second() {
        let mut scene = Scene::new(1, 10, 10);
        let complaint = |turns: &mut Scene, after| {
            let famine = Err(io::Error::from_raw_os_error(EMFILE));
            turns.listeners[0].then(famine);
            turns.noticed_turn(after);
            turns.acceptor.last_warning.map(|at| at - turns.start)
        };
        let (first, later) = (Duration::ZERO, WARNING_INTERVAL);
        assert_eq!(complaint(&mut scene, first), Some(first));
        assert_eq!(complaint(&mut scene, later / 2), Some(first));
        assert_eq!(complaint(&mut scene, later), Some(later));
        assert_eq!(scene.stats().accept_pauses, 3);
    }

    #[test]
    fn a_shutdown_wakes_it() {
        let mut scene = Scene::new(0, 10, 10);
        assert!(!scene.acceptor.control.is_shut_down());
        scene.acceptor.control.shut_down();
        assert!(scene.is_woken() && scene.acceptor.control.is_shut_down());
    }
}
