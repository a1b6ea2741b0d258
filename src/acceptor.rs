//! The acceptor: takes connections from the listeners, as many as there is room for, and deals them
//! to the workers.
//!
//! Where there is no room (at the connection limit, without descriptors) it pauses: clients wait in
//! the kernel's backlog. A listener announces an edge only, and none comes for clients that wait
//! already, so a listener stays noted as ready until an accept would block; and what ends a pause is
//! a connection that closes ([`Gate::freed`]), or a timer where another process may have used up
//! the descriptors.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token, Waker};

use crate::socket::{Listener, Peer, Socket, reason_of};
use crate::stats::Counters;
use crate::work_queue::{Wake, WorkQueue};

/// The waker's token; listeners have the numbers of their places.
const WAKER: Token = Token(usize::MAX);

/// Accepts per turn: enough for one wake to serve many, few enough that a shutdown is seen soon.
const BATCH_MAX: usize = 128;

/// How long a pause lasts if no connection closes meanwhile.
const RETRY: Duration = Duration::from_millis(100);

/// Pauses are logged at most this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(1);

/// How others reach the acceptor: to end it, or to tell it of room.
#[derive(Debug)]
pub(crate) struct Gate {
    waker: Waker,
    shutdown: AtomicBool,
    paused: AtomicBool,
}

impl Gate {
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
    pub(crate) fn freed(&self) {
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
struct Door<L> {
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
    doors: Vec<Door<L>>,
    next_door: usize,
    queue: WorkQueue<(L::Stream, Peer), W>,
    connections_max: u64,
    /// Connections open at most: exact only when it reaches the limit, to save the summing up.
    open_at_most: u64,
    pause: Option<Pause>,
    complained: Option<Instant>,
    counters: Arc<Counters>,
    gate: Arc<Gate>,
}

impl<W: Wake> Acceptor<Listener, W> {
    /// Accepts until asked to end. The listeners are closed by then, and so is the queue.
    pub(crate) fn run(mut self, mut poll: Poll) -> io::Result<()> {
        for (index, door) in self.doors.iter_mut().enumerate() {
            door.listener.register(poll.registry(), Token(index))?;
        }
        let mut events = Events::with_capacity(self.doors.len() + 1);
        let mut sleep_max = None;
        while !self.gate.is_shut_down() {
            match poll.poll(&mut events, sleep_max) {
                Err(error) if error.kind() == ErrorKind::Interrupted => events.clear(),
                outcome => outcome?,
            }
            for event in events.iter().filter(|event| event.token() != WAKER) {
                self.notice(event.token().0);
            }
            sleep_max = self.turn(Instant::now());
        }
        self.finish(Instant::now());
        Ok(())
    }
}

impl<L: Listen, W: Wake> Acceptor<L, W> {
    pub(crate) fn new(
        listeners: Vec<L>,
        queue: WorkQueue<(L::Stream, Peer), W>,
        connections_max: usize,
        counters: Arc<Counters>,
        gate: Arc<Gate>,
    ) -> Self {
        Self {
            doors: listeners
                .into_iter()
                .map(|listener| Door {
                    listener,
                    ready: false,
                })
                .collect(),
            next_door: 0,
            queue,
            connections_max: connections_max as u64,
            open_at_most: 0,
            pause: None,
            complained: None,
            counters,
            gate,
        }
    }

    /// Notes that clients may be waiting at a listener.
    fn notice(&mut self, door: usize) {
        self.doors[door].ready = true;
    }

    /// Accepts one batch, unless paused; says how long there is nothing to do.
    fn turn(&mut self, now: Instant) -> Option<Duration> {
        if self.is_over(now) {
            self.resume(now);
        }
        if self.pause.is_none() {
            self.accept_batch(now);
            self.queue.rouse();
        }
        match &self.pause {
            Some(pause) => pause
                .until
                .map(|until| until.saturating_duration_since(now)),
            None => self
                .doors
                .iter()
                .any(|door| door.ready)
                .then_some(Duration::ZERO),
        }
    }

    /// Takes in those who are connected already, as far as there is room, and ends: the listeners
    /// and the queue are dropped, which the workers take as the sign to drain.
    fn finish(mut self, now: Instant) {
        self.resume(now);
        for door in &mut self.doors {
            door.ready = true;
        }
        // Bounded: clients that keep coming must not keep the server from ending.
        for _ in 0..64 {
            self.accept_batch(now);
            self.queue.rouse();
        }
        self.resume(now);
    }

    fn accept_batch(&mut self, now: Instant) {
        for _ in 0..BATCH_MAX {
            let Some(door) = self.ready_door() else {
                return;
            };
            if self.is_full() {
                return self.pause(
                    now,
                    None,
                    &format!("all {} connections are in use", self.connections_max),
                );
            }
            if !self.queue.has_room() {
                return self.pause(now, Some(RETRY), "the workers are too busy to take more");
            }
            match self.doors[door].listener.accept() {
                Ok(connection) => self.deal(connection),
                Err(error) => {
                    if error.kind() == ErrorKind::WouldBlock {
                        self.doors[door].ready = false;
                        continue;
                    }
                    self.counters.acceptor.errors.add(1);
                    if !is_passing(&error) {
                        return self.pause(now, Some(RETRY), &reason_of(&error));
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
        if let Err(refused) = self.queue.try_push_quietly(connection) {
            log::error!("a connection is lost: {refused}");
        }
    }

    /// The next listener, in turn, at which clients may be waiting.
    fn ready_door(&mut self) -> Option<usize> {
        let count = self.doors.len();
        let door = (0..count)
            .map(|step| (self.next_door + step) % count)
            .find(|&door| self.doors[door].ready)?;
        self.next_door = door + 1;
        Some(door)
    }

    fn is_full(&mut self) -> bool {
        if self.open_at_most >= self.connections_max {
            self.open_at_most = self.counters.open();
        }
        self.open_at_most >= self.connections_max
    }

    fn pause(&mut self, now: Instant, retry: Option<Duration>, why: &str) {
        self.counters.acceptor.pauses.add(1);
        self.pause = Some(Pause {
            since: now,
            until: retry.map(|retry| now + retry),
        });
        self.gate.pause();
        // Connections may have closed before the gate knew of the pause.
        if retry.is_none() && !self.is_full() {
            return self.resume(now);
        }
        if self
            .complained
            .is_none_or(|at| now - at >= COMPLAINT_INTERVAL)
        {
            self.complained = Some(now);
            log::warn!("accepting is paused, clients wait in the backlog: {why}");
        }
    }

    /// Whether there is a pause, and it has lasted long enough.
    fn is_over(&self, now: Instant) -> bool {
        self.pause.as_ref().is_some_and(|pause| {
            !self.gate.paused.load(Ordering::SeqCst)
                || pause.until.is_some_and(|until| now >= until)
        })
    }

    fn resume(&mut self, now: Instant) {
        self.gate.paused.store(false, Ordering::SeqCst);
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
/// Everything else (no descriptors, no memory, or an error nobody has heard of) asks for patience.
fn is_passing(error: &io::Error) -> bool {
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
