//! One worker's connections: the table, the run queue, the budgets and the sweep of the idle.
//!
//! Everything of a worker but the poll call: time, readiness and new streams come in as arguments,
//! so the code that serves sockets is the code that a simulated kernel drives.
//!
//! A connection that is ready is run at once, up to a budget of bytes. Who has spent it goes to the
//! back of the run queue, which is gone through once a turn; while anyone is in it, the worker must
//! not sleep. So a flood costs its neighbours one budget's time and no more.
//!
//! Time is a count of milliseconds since any fixed moment. It is looked at once a turn, and nothing
//! is scheduled per message: a connection notes when it last moved a byte, and a sweep of the whole
//! table, at most eight times per timeout, finds those whose time is over.

use std::collections::VecDeque;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_utils::CachePadded;
use slab::Slab;

use crate::buffer::Pool;
use crate::connection::{Connection, Readiness, Status, Stream};
use crate::handler::Handler;
use crate::socket::Peer;
use crate::stats::{Reason, WorkerCounters};
use crate::work_queue::Inbox;

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
    pub(crate) idle_max: Option<Millis>,
    /// How long a client may take to end its stream once the server has ended its own.
    pub(crate) linger_max: Millis,
    /// How long a drain may take.
    pub(crate) drain_max: Millis,
}

impl Limits {
    /// How far apart two sweeps are at least.
    fn sweep_interval(&self) -> Millis {
        (self
            .idle_max
            .unwrap_or(self.linger_max)
            .min(self.linger_max)
            / 8)
        .max(1)
    }
}

/// A duration in whole milliseconds, rounded up: a deadline never comes early.
pub(crate) fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(Millis::MAX)
}

/// What a worker's poll can tell.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// There may be something in the mailbox.
    Roused,
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
    deaf_at: Millis,
    /// From here on nobody is waited for.
    cut_at: Millis,
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

    /// One turn of the worker: first what is ready, then those who had spent their budget, then the
    /// new, then the clock.
    ///
    /// The new come after the events, so that a place freed by this batch of events isn't given to
    /// another connection while events for the old one may still be in it. `open` prepares a new
    /// stream to be noticed under the given token, and makes its handler.
    pub(crate) fn turn(
        &mut self,
        now: Millis,
        events: impl Iterator<Item = Event>,
        inbox: &mut Inbox<(S, Peer)>,
        mut open: impl FnMut(&mut S, &Peer, usize) -> Result<H, Reason>,
    ) {
        let mut roused = false;
        for event in events {
            match event {
                Event::Roused => roused = true,
                Event::Ready(token, readiness) => self.run(token, readiness, now),
            }
        }
        for _ in 0..self.run_queue.len() {
            if let Some(token) = self.run_queue.pop_front() {
                self.table[token].queued = false;
                self.run_on(token, now);
            }
        }
        if roused {
            for (stream, peer) in inbox.take_all() {
                self.admit(stream, peer, now, &mut open);
            }
            if inbox.is_closed() && self.drain.is_none() {
                self.start_drain(now);
            }
        }
        self.keep_time(now);
    }

    /// How long the worker may sleep; `None` is until something happens.
    pub(crate) fn sleep_max(&self, now: Millis) -> Option<Millis> {
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

    fn admit(
        &mut self,
        mut stream: S,
        peer: Peer,
        now: Millis,
        open: &mut impl FnMut(&mut S, &Peer, usize) -> Result<H, Reason>,
    ) {
        self.reserve_place();
        let counters = &self.counters;
        counters.taken.add(1);
        let place = self.table.vacant_entry();
        let token = place.key();
        // A panic in the maker of handlers is the same to others as one in a handler.
        let opened = catch_unwind(AssertUnwindSafe(|| open(&mut stream, &peer, token)));
        let handler = match opened.unwrap_or(Err(Reason::Panic)) {
            Ok(handler) => handler,
            Err(reason) => {
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
        if let Some(idle_max) = self.limits.idle_max {
            self.sweep_by(now.saturating_add(idle_max));
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
        if connection.take_active() && (!entry.lingering || self.drain.is_some()) {
            entry.active = now;
        }
        if status != Status::Idle || connection.lingers().is_some() {
            self.follow_up(token, status, now);
        }
    }

    /// What a connection's state asks for, where that is more than to wait.
    #[inline(never)]
    fn follow_up(&mut self, token: usize, status: Status, now: Millis) {
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
        if entry.connection.lingers().is_some() && !entry.lingering {
            entry.lingering = true;
            entry.active = now;
            self.sweep_by(now.saturating_add(self.limits.linger_max));
        }
    }

    /// Runs a connection without news of it.
    fn run_on(&mut self, token: usize, now: Millis) {
        self.run(token, Readiness::default(), now);
    }

    /// Runs all who are not about to run anyhow.
    fn run_everyone(&mut self, now: Millis) {
        let waiting = self
            .table
            .iter()
            .filter(|(_, entry)| !entry.queued)
            .map(|(token, _)| token);
        for token in waiting.collect::<Vec<_>>() {
            self.run_on(token, now);
        }
    }

    fn close(&mut self, token: usize, reason: Reason, now: Millis) {
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

    fn sweep_by(&mut self, at: Millis) {
        self.next_sweep = Some(self.next_sweep.map_or(at, |next| next.min(at)));
    }

    /// Sweeps, if it is time to.
    fn keep_time(&mut self, now: Millis) {
        if self.next_sweep.is_none_or(|at| now < at) {
            return;
        }
        self.next_sweep = None;
        if let Some(drain) = self.drain {
            self.keep_drain_time(drain, now);
        }
        let mut expired = Vec::new();
        let mut earliest = None;
        for (token, entry) in &self.table {
            let Some(at) = self.expiry(entry) else {
                continue;
            };
            if at <= now {
                expired.push(token);
            } else {
                earliest = Some(earliest.map_or(at, |earliest: Millis| earliest.min(at)));
            }
        }
        if let Some(at) = earliest {
            self.sweep_by(at.max(now + self.limits.sweep_interval()));
        }
        for token in expired {
            self.expire(token, now);
        }
    }

    fn expiry(&self, entry: &Entry<S, H>) -> Option<Millis> {
        let patience = match entry.connection.lingers() {
            Some(_) => Some(self.limits.linger_max),
            None => self.limits.idle_max,
        };
        Some(entry.active.saturating_add(patience?))
    }

    /// Ends a connection whose time is over: in order if nothing is stuck, at once otherwise.
    fn expire(&mut self, token: usize, now: Millis) {
        let connection = &mut self.table[token].connection;
        if let Some(reason) = connection.lingers() {
            return self.close(token, reason, now);
        }
        connection.finish(Reason::Idle);
        self.run_on(token, now);
        if self
            .table
            .get(token)
            .is_some_and(|entry| entry.connection.lingers().is_none())
        {
            self.close(token, Reason::Idle, now);
        }
    }

    /// Answers what has arrived, then closes every connection; those that come from here on too.
    fn start_drain(&mut self, now: Millis) {
        let drain_max = self.limits.drain_max;
        self.drain = Some(Drain {
            deaf_at: now.saturating_add(drain_max / 2),
            cut_at: now.saturating_add(drain_max),
        });
        for (_, entry) in &mut self.table {
            entry.connection.drain();
        }
        self.run_everyone(now);
        self.sweep_by(now);
    }

    fn keep_drain_time(&mut self, drain: Drain, now: Millis) {
        if now >= drain.cut_at {
            let everyone = self
                .table
                .iter()
                .map(|(token, entry)| (token, entry.connection.lingers()));
            for (token, done) in everyone.collect::<Vec<_>>() {
                self.close(token, done.unwrap_or(Reason::Cut), now);
            }
        } else if now >= drain.deaf_at {
            for (_, entry) in &mut self.table {
                entry.connection.deafen();
            }
            self.run_everyone(now);
            self.sweep_by(drain.cut_at);
        } else {
            self.sweep_by(drain.deaf_at);
        }
    }
}
