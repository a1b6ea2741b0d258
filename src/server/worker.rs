//! A worker: one thread, its poll, its mailbox and its clock; a thin shell round its connections.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use mio::{Events, Poll, Token, Waker};

use super::acceptor::AcceptorControl;
use crate::connection::table::{Connections, Event, Limits, Millis};
use crate::handler::Handler;
use crate::net::stream::{Socket, readiness};
use crate::peer::Peer;
use crate::stats::{CloseReason, WorkerCounters};
use crate::work_queue::Receiver;

/// The waker's token; connections have the numbers of their places in the table.
const WAKER: Token = Token(usize::MAX);

/// Events taken per poll. A small number adds latency when many connections are busy.
const MAX_EVENTS: usize = 1024;

/// A worker that has not started yet.
#[derive(Debug)]
pub(crate) struct Worker {
    poll: Poll,
    /// Held here too: a waker only delivers while it is alive, and the queue's last act is to wake.
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

    /// Serves connections until the mailbox is closed and all of them are drained.
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
        let mut connections = Connections::new(limits, Arc::clone(counters), self.index);
        let start = Instant::now();
        let mut now = 0;
        while !connections.is_drained() {
            let poll_timeout = connections.poll_timeout(now).map(Duration::from_millis);
            wait(&mut self.poll, &mut events, poll_timeout, busy_poll)?;
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
            connections.turn(now, events, &mut receiver, open);

            if connections.take_closed() {
                control.notify_capacity();
            }
        }
        Ok(())
    }
}

/// Waits for events: with `busy_poll`, first for that long without sleeping, which spares a busy
/// connection the time that falling asleep and being woken takes.
fn wait(
    poll: &mut Poll,
    events: &mut Events,
    poll_timeout: Option<Duration>,
    busy_poll: Duration,
) -> io::Result<()> {
    if !busy_poll.is_zero() {
        let timeout_of = poll_timeout.map_or(busy_poll, |poll_timeout| poll_timeout.min(busy_poll));
        let start = Instant::now();
        while start.elapsed() < timeout_of {
            poll_once(poll, events, Some(Duration::ZERO))?;
            if !events.is_empty() {
                return Ok(());
            }
        }
        let rest = poll_timeout.map(|poll_timeout| poll_timeout.saturating_sub(start.elapsed()));
        return poll_once(poll, events, rest);
    }
    poll_once(poll, events, poll_timeout)
}

/// A signal that interrupts the poll is no event: the turn that follows finds nothing to do.
fn poll_once(poll: &mut Poll, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
    match poll.poll(events, timeout) {
        Err(error) if error.kind() == ErrorKind::Interrupted => {
            events.clear();
            Ok(())
        }
        outcome => outcome,
    }
}
