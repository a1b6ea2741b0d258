//! A worker thread: a poll, a queue of new connections, a clock, and its connection table.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use mio::{Events, Poll, Token, Waker};

use super::acceptor::AcceptorControl;
use crate::connection::table::{ConnectionTable, Event, Limits, Millis};
use crate::handler::Handler;
use crate::net::stream::{Socket, readiness};
use crate::peer::Peer;
use crate::stats::{CloseReason, WorkerCounters};
use crate::work_queue::Receiver;

/// The waker's token. A connection's token is its index in the table.
const WAKER: Token = Token(usize::MAX);

/// Events per poll. A smaller number adds latency when many connections are busy.
const MAX_EVENTS: usize = 1024;

/// A worker whose thread has not started yet.
#[derive(Debug)]
pub(crate) struct Worker {
    poll: Poll,
    /// Shared with the queue. A waker delivers only while it is alive, and the queue wakes the worker when it
    /// is dropped, so the worker keeps the waker alive.
    waker: Arc<Waker>,
    index: usize,
}

impl Worker {
    pub(crate) fn new(index: usize) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        Ok(Self { poll, waker, index })
    }

    pub(crate) fn waker(&self) -> Arc<Waker> {
        Arc::clone(&self.waker)
    }

    /// Serves connections until the queue is closed and all connections are drained.
    pub(crate) fn run<H: Handler>(
        mut self,
        mut receiver: Receiver<(Socket, Peer)>,
        limits: Limits,
        busy_poll: Duration,
        counters: &Arc<CachePadded<WorkerCounters>>,
        control: &AcceptorControl,
        handler: impl Fn(&Peer) -> H,
    ) -> io::Result<()> {
        let mut events = Events::with_capacity(MAX_EVENTS);
        let mut table = ConnectionTable::new(limits, Arc::clone(counters), self.index);
        let start = Instant::now();
        let mut now = 0;
        while !table.is_drained() {
            let timeout = table.poll_timeout(now).map(Duration::from_millis);
            wait(&mut self.poll, &mut events, timeout, busy_poll)?;
            now = start.elapsed().as_millis() as Millis;
            counters.wakes.add(1);

            let registry = self.poll.registry();
            let open = |socket: &mut Socket, peer: &Peer, token| {
                socket
                    .register(registry, Token(token))
                    .map_err(|_| CloseReason::Error)?;
                Ok(handler(peer))
            };
            let events = events.iter().map(|event| match event.token() {
                WAKER => Event::Wake,
                Token(token) => Event::Ready(token, readiness(event)),
            });
            table.tick(now, events, &mut receiver, open);

            if table.take_closed() {
                control.notify_capacity();
            }
        }
        Ok(())
    }
}

/// Waits for events. With `busy_poll`, polls without sleeping for that long first, which saves the
/// latency of going to sleep and being woken.
fn wait(
    poll: &mut Poll,
    events: &mut Events,
    timeout: Option<Duration>,
    busy_poll: Duration,
) -> io::Result<()> {
    if busy_poll.is_zero() {
        return poll_once(poll, events, timeout);
    }
    let spin = timeout.map_or(busy_poll, |timeout| timeout.min(busy_poll));
    let start = Instant::now();
    while start.elapsed() < spin {
        poll_once(poll, events, Some(Duration::ZERO))?;
        if !events.is_empty() {
            return Ok(());
        }
    }
    let rest = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
    poll_once(poll, events, rest)
}

/// Polls once. A poll that a signal interrupts reports no events.
fn poll_once(poll: &mut Poll, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
    match poll.poll(events, timeout) {
        Err(error) if error.kind() == ErrorKind::Interrupted => {
            events.clear();
            Ok(())
        }
        outcome => outcome,
    }
}
