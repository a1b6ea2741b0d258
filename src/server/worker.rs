//! A worker: an event loop that serves connections, and the queue of its new ones.

use std::io;
use std::sync::Arc;

use crossbeam_utils::CachePadded;

use crate::connection::handler::Handler;
use crate::peer::Peer;
use crate::server::acceptor::Accepted;
use crate::server::control::Control;
use crate::server::dispatcher::Receiver;
use crate::server::table::ConnectionTable;
use crate::stats::{CloseReason, WorkerCounters};
use crate::system::{Millis, PollEvent, Poller, Stream, Wake};

/// New connections per tick, so that many at once do not delay the events of the others.
const MAX_NEW_CONNECTIONS: usize = 128;

/// The state of a worker thread.
#[derive(Debug)]
pub(crate) struct Worker<S, H, W: Wake> {
    table: ConnectionTable<S, H>,
    receiver: Receiver<Accepted<S>, W>,
    /// The queue may hold connections: the worker was woken, for whatever reason, or has not taken all.
    may_have_new: bool,
    control: Arc<Control<W>>,
    counters: Arc<CachePadded<WorkerCounters>>,
}

impl<S: Stream, H: Handler, W: Wake> Worker<S, H, W> {
    pub(crate) fn new(
        table: ConnectionTable<S, H>,
        receiver: Receiver<Accepted<S>, W>,
        control: Arc<Control<W>>,
        counters: Arc<CachePadded<WorkerCounters>>,
    ) -> Self {
        Self {
            table,
            receiver,
            may_have_new: false,
            control,
            counters,
        }
    }

    /// Serves connections until the server has shut down.
    pub(crate) fn run<P: Poller<S>>(
        &mut self,
        poller: &mut P,
        new_handler: &impl Fn(&S, Peer, u64) -> H,
    ) -> io::Result<()> {
        while !self.is_done() {
            self.tick(poller, new_handler)?;
        }
        Ok(())
    }

    /// Whether no connection is open, and none can arrive.
    pub(crate) fn is_done(&self) -> bool {
        self.receiver.is_closed() && self.table.len() == 0
    }

    /// For the simulation.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn table(&self) -> &ConnectionTable<S, H> {
        &self.table
    }

    /// How long the next tick may sleep; `None` means until an event.
    pub(crate) fn poll_timeout(&self) -> Option<Millis> {
        if self.may_have_new {
            Some(0)
        } else {
            self.table.poll_timeout()
        }
    }

    /// Runs one tick: waits for events, then drives the interactive connections with an event, those that were woken and
    /// new ones, expires those whose deadline has passed, and gives the bulk connections their share of turns.
    ///
    /// Before a timer expires, the events that the kernel already holds are handled, so time for which the process was
    /// stopped or busy does not count against a client. A shutdown deadline that has passed when it is requested or
    /// moved takes effect in the same tick.
    pub(crate) fn tick<P: Poller<S>>(
        &mut self,
        poller: &mut P,
        new_handler: &impl Fn(&S, Peer, u64) -> H,
    ) -> io::Result<()> {
        poller.poll(self.poll_timeout())?;
        let now = poller.now();
        self.table.start_tick(now);
        self.counters.ticks.add(1);
        self.handle_events(poller);
        let mut is_due = self.table.is_due();
        if is_due {
            // Enough batches for one event of each connection, but bounded, because events keep arriving.
            for _ in 0..=self.table.len() / poller.max_events() {
                let may_be_more = poller.poll(Some(0))?;
                self.handle_events(poller);
                if !may_be_more {
                    break;
                }
            }
        }
        self.table.run_wakes();
        // New connections follow the events, because their tokens may have just been freed.
        let took_any = self.may_have_new && self.take_new(poller, new_handler);
        if let Some(deadline) = self.shutdown_deadline() {
            self.table.shut_down(deadline);
            // A deadline of the shutdown that has passed takes effect in this tick: it goes by the clock, whatever the clients
            // have sent.
            is_due |= self.table.is_due();
        }
        if is_due {
            self.table.expire();
        }
        self.table.run_queued();
        let closed = self.table.take_closed();
        // New connections that were taken have left room in the queue.
        if closed > 0 || took_any {
            self.control.free(closed);
        }
        self.counters.buffer_memory.set(self.table.held_memory());
        self.counters.longest_tick.raise(poller.elapsed(now));
        Ok(())
    }

    // Not inlined, because `.ci/instructions` counts the instructions of this symbol.
    #[inline(never)]
    fn handle_events<P: Poller<S>>(&mut self, poller: &P) {
        for event in poller.events() {
            match event {
                PollEvent::Wake => {
                    self.may_have_new = true;
                    self.table.on_wake();
                }
                PollEvent::Ready(token, readiness) => {
                    self.table.on_ready(token, readiness);
                }
            }
        }
    }

    /// Adds a bounded number of new connections; returns whether there were any.
    fn take_new<P: Poller<S>>(
        &mut self,
        poller: &mut P,
        new_handler: &impl Fn(&S, Peer, u64) -> H,
    ) -> bool {
        let mut count = 0;
        for accepted in self.receiver.take(MAX_NEW_CONNECTIONS) {
            let Accepted {
                stream,
                peer,
                number,
            } = accepted;
            count += 1;
            let open = |stream: &mut S, token| match poller.register(stream, token) {
                Ok(()) => Ok(new_handler(stream, peer, number)),
                Err(error) => {
                    log::warn!("cannot register a connection: {error}");
                    Err(CloseReason::Error)
                }
            };
            self.table.add(stream, peer, open);
        }
        self.may_have_new = count == MAX_NEW_CONNECTIONS;
        count > 0
    }

    /// The deadline of a shutdown. A closed queue without one means that the acceptor has failed: then the
    /// worker drains by itself; the table keeps the deadline of the first call.
    fn shutdown_deadline(&self) -> Option<Millis> {
        let requested = self.control.shutdown_deadline();
        requested.or_else(|| {
            let deadline = self.table.now().saturating_add(self.table.drain_timeout());
            self.receiver.is_closed().then_some(deadline)
        })
    }
}

#[cfg(test)]
mod tests;
