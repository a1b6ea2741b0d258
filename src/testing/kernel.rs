//! The simulated kernel: one clock, listeners, connections, and a poller for each thread of the server.
//!
//! The kernel knows what each client will send and what it must receive, so it checks each call of the
//! server when it is made. A failed check does not panic, because the code under test catches panics.
//! The kernel records the first failure instead, and the simulation looks for it after each tick.
//!
//! Edges are those of Linux's epoll, and no others. A source enters the ready list of its poller when bytes,
//! EOF or a reset arrive, when a client connects, and when there is room again after a call would have
//! blocked. A poll takes the sources at the front of the list and reports their state of that moment.
//! Therefore a connection that stops reading before a read would block, without a short read as proof, gets
//! no second event for the same bytes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::connection::{Seen, SimConnection};
use super::random::Rng;
use crate::connection::MAX_ROUNDS;
use crate::connection::shared::{Timeouts, Turns};
use crate::stats::{CloseReason, Counters};
use crate::system::{Millis, PollEvent, Readiness};

/// The acceptor's thread; worker `w` is thread `w + 1`.
pub(super) const ACCEPTOR: usize = 0;

/// What a server is configured with, and how hard its environment is.
#[derive(Clone, Copy, Debug)]
// Each flag is a kind of fault that a schedule has or not.
#[allow(clippy::struct_excessive_bools)]
pub(super) struct Parameters {
    pub(super) workers: usize,
    pub(super) listeners: usize,
    pub(super) buffer_size: usize,
    /// Limit for the pairs of buffers of a worker.
    pub(super) max_pairs: usize,
    /// How often a client repeats its input, and by what factor the kernel's buffers are larger.
    pub(super) scale: usize,
    pub(super) queue_capacity: usize,
    pub(super) max_connections: usize,
    pub(super) backlog: u32,
    pub(super) timeouts: Timeouts,
    pub(super) turns: Turns,
    /// Events per poll.
    pub(super) max_events: usize,
    pub(super) max_descriptors: usize,
    /// Accepts and registrations can fail for reasons other than a lack of descriptors.
    pub(super) has_errors: bool,
    /// One system call in this many is interrupted, or something else happens first.
    pub(super) interrupt_interval: usize,
    /// One poll in this many is followed by a pause of the process.
    pub(super) pause_interval: usize,
    /// Allocations of buffers can fail.
    pub(super) lacks_memory: bool,
    /// Reads randomly return fewer bytes than have arrived, and
    /// [`Stream::short_read_means_drained`](crate::system::Stream::short_read_means_drained) is false.
    pub(super) short_reads_unreliable: bool,
    /// Each write takes one byte.
    pub(super) tiny_writes: bool,
}

impl Parameters {
    pub(super) fn random(rng: &mut Rng, min_buffer_size: usize) -> Self {
        let timeouts = Timeouts {
            idle: rng.one_in(2).then(|| rng.up_to(400) as u64),
            answer: rng.one_in(4).then(|| rng.up_to(400) as u64),
            close: rng.up_to(300) as u64,
            linger: rng.up_to(200) as u64,
            stuck: rng.up_to(200) as u64,
            drain: rng.choose(&[0, 10, 1000, 1000]),
        };
        Self {
            workers: rng.choose(&[1, 1, 1, 2, 3]),
            listeners: rng.choose(&[1, 1, 1, 2]),
            buffer_size: rng.choose(&[1, 2, 7, 16, 64, 200]).max(min_buffer_size),
            max_pairs: rng.choose(&[2, 3, 4, 1000, 1000, 1000, 1000, 1000]),
            scale: 1,
            queue_capacity: rng.choose(&[1, 1, 2, 8]),
            max_connections: rng.choose(&[1, 2, 4, 100]),
            backlog: rng.choose(&[2, 8]),
            timeouts,
            turns: random_turns(rng),
            max_events: rng.choose(&[1, 2, 4, 1024]),
            max_descriptors: rng.choose(&[2, 1000, 1000, 1000]),
            has_errors: rng.one_in(4),
            interrupt_interval: rng.choose(&[4, 16, 1000]),
            pause_interval: rng.choose(&[8, 64, 1000]),
            lacks_memory: rng.one_in(4),
            short_reads_unreliable: rng.one_in(8),
            tiny_writes: rng.one_in(8),
        }
    }
}

impl Parameters {
    /// When the server stops reading in a shutdown.
    pub(super) fn end_of_reading(&self, shutdown: Shutdown) -> Millis {
        shutdown.deadline.saturating_sub(self.timeouts.drain / 4)
    }
}

/// Chooses sizes of turns so that inputs of all lengths are bulk in some schedules.
fn random_turns(rng: &mut Rng) -> Turns {
    let real = Turns::DEFAULT;
    let budget = rng.choose(&[8, 64, 400, real.interactive_budget]);
    Turns {
        interactive_budget: budget,
        bulk_budget: 4 * budget,
        bulk_bytes: budget / 2,
        interactive_per_bulk: rng.choose(&[1, 2, real.interactive_per_bulk]),
    }
}

/// What a poll watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Waker,
    Listener(usize),
    Connection(usize),
}

/// A listener in the kernel.
#[derive(Debug)]
pub(super) struct Backlog {
    /// Clients that have connected and are not accepted.
    pub(super) waiting: VecDeque<usize>,
    pub(super) open: bool,
}

/// An event of a poll, with what the kernel knows besides.
#[derive(Clone, Copy, Debug)]
pub(super) struct SimEvent {
    pub(super) event: PollEvent,
    /// The connection, and what had arrived.
    pub(super) connection: Option<(usize, usize)>,
    /// The connection has input that the server can read now.
    pub(super) must_serve: bool,
}

/// The part of a tick that a worker is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum TickPhase {
    Events,
    #[default]
    AfterEvents,
    RunQueue,
}

/// Consecutive calls for one connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    pub(super) id: usize,
    calls: usize,
    reads: usize,
    bytes: usize,
}

/// A thread of the server and its poller.
#[derive(Debug, Default)]
pub(super) struct Poller {
    ready: VecDeque<Source>,
    /// Set when a connection of the worker is woken.
    pub(super) woken: Arc<AtomicBool>,
    /// When the poll that the thread waits in times out.
    pub(super) wake_at: Option<Millis>,
    pub(super) ended: bool,
    /// How much time has passed between the server's look at the clock in the last tick and its end.
    pub(super) tick_length: Millis,
    pub(super) ticks: u64,
    pub(super) tick_phase: TickPhase,
    /// The time of the tick, and the clients' actions before it.
    pub(super) now: Millis,
    pub(super) sequence: u64,
    pub(super) turn: Option<Turn>,
    /// The number of bulk turns at the start of the tick, and when the last one was noticed.
    pub(super) bulk_turns_before: u64,
    pub(super) bulk_turns: u64,
    /// Interactive connections with an event of the batch that the worker handles.
    pub(super) must_serve: Vec<usize>,
    /// Accepts or registrations in the tick.
    pub(super) new_connections: usize,
    /// Calls of handlers for a wake-up in the tick.
    pub(super) wakes: usize,
    /// The worker has ended a tick that saw the shutdown.
    pub(super) draining: bool,
    pub(super) sees_shutdown: bool,
    /// The time of the tick in which the worker has stopped reading in a shutdown.
    pub(super) stopped_reading: Option<Millis>,
    /// The numbers of closes at the last check, by reason.
    pub(super) closed: [u64; CloseReason::ALL.len()],
    /// A connection whose stream was dropped and whose close is not counted yet.
    pub(super) uncounted_drop: Option<usize>,
}

impl Poller {
    /// Whether the worker can have begun a shutdown: it does so at the end of a tick.
    pub(super) fn can_see_shutdown(&self) -> bool {
        self.sees_shutdown && self.tick_phase != TickPhase::Events
    }
}

/// A request to shut down.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shutdown {
    pub(super) deadline: Millis,
    /// The clients' actions before the request.
    pub(super) sequence: u64,
}

pub(super) struct Kernel<'a> {
    pub(super) rng: Rng,
    pub(super) now: Millis,
    /// Counts the actions of clients.
    pub(super) sequence: u64,
    pub(super) parameters: Parameters,
    pub(super) listeners: Vec<Backlog>,
    pub(super) connections: Vec<SimConnection>,
    pub(super) pollers: Vec<Poller>,
    /// The thread that runs.
    pub(super) current: usize,
    pub(super) shutdown: Option<Shutdown>,
    /// Every accept fails while a client waits.
    pub(super) accepts_denied: bool,
    pub(super) foreign_descriptors: usize,
    /// Accepted connections that are not dropped.
    pub(super) descriptors: usize,
    pub(super) bytes_read: u64,
    pub(super) bytes_written: u64,
    pub(super) counters: Arc<Counters>,
    pub(super) model: &'a dyn Fn(Seen<'_>) -> Vec<u8>,
    /// The first failed check.
    pub(super) failure: Option<String>,
    /// What happened so far, if it is to be recorded.
    pub(super) trace: Option<Vec<String>>,
    /// Counts transfers, connects, half-closes and resets. Unchanged means that nothing happened.
    pub(super) progress: usize,
}

impl<'a> Kernel<'a> {
    pub(super) fn new(
        rng: Rng,
        parameters: Parameters,
        model: &'a dyn Fn(Seen<'_>) -> Vec<u8>,
        counters: Arc<Counters>,
        trace: bool,
    ) -> Self {
        let backlog = || Backlog {
            waiting: VecDeque::new(),
            open: true,
        };
        Self {
            rng,
            now: 0,
            sequence: 0,
            listeners: (0..parameters.listeners).map(|_| backlog()).collect(),
            connections: Vec::new(),
            pollers: (0..=parameters.workers)
                .map(|_| Poller::default())
                .collect(),
            parameters,
            current: ACCEPTOR,
            shutdown: None,
            accepts_denied: false,
            foreign_descriptors: 0,
            descriptors: 0,
            bytes_read: 0,
            bytes_written: 0,
            counters,
            model,
            failure: None,
            trace: trace.then(Vec::new),
            progress: 0,
        }
    }

    /// Appends a line to the trace.
    pub(super) fn record(&mut self, event: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace
            && self.failure.is_none()
        {
            trace.push(format!("{:>6} ms  {}", self.now, event()));
        }
    }

    #[cold]
    pub(super) fn fail(&mut self, message: String) {
        self.record(|| format!("FAILURE: {message}"));
        self.failure.get_or_insert(message);
    }

    pub(super) fn check(&mut self, condition: bool, message: impl FnOnce() -> String) {
        if !condition {
            self.fail(message());
        }
    }

    /// Puts a source into the ready list of its poller, unless it is in the list already.
    pub(super) fn raise(&mut self, source: Source) {
        let poller = match source {
            Source::Connection(id) => {
                let connection = &mut self.connections[id];
                match connection.registered {
                    Some((poller, _)) if connection.is_open() && !connection.in_ready_list => {
                        connection.in_ready_list = true;
                        poller
                    }
                    _ => return,
                }
            }
            Source::Listener(_) => match self.pollers[ACCEPTOR].ready.contains(&source) {
                true => return,
                false => ACCEPTOR,
            },
            Source::Waker => return self.wake(self.current),
        };
        self.pollers[poller].ready.push_back(source);
    }

    /// Raises the event of a thread's waker.
    pub(super) fn wake(&mut self, thread: usize) {
        let ready = &mut self.pollers[thread].ready;
        if !ready.contains(&Source::Waker) {
            ready.push_back(Source::Waker);
        }
    }

    /// Removes a source that no longer exists.
    pub(super) fn deregister(&mut self, thread: usize, source: Source) {
        self.pollers[thread].ready.retain(|ready| *ready != source);
    }

    /// Whether a thread's poll would return at once.
    pub(super) fn is_ready(&self, thread: usize) -> bool {
        let poller = &self.pollers[thread];
        let timed_out = poller.wake_at.is_some_and(|at| at <= self.now);
        let woken = poller.woken.load(Ordering::Relaxed);
        !poller.ended && (timed_out || woken || !poller.ready.is_empty())
    }

    /// Runs a poll of a thread that does not sleep any longer. Returns whether more events may be pending.
    pub(super) fn poll(
        &mut self,
        thread: usize,
        timeout: Option<Millis>,
        batch: &mut Vec<SimEvent>,
    ) -> bool {
        batch.clear();
        self.pollers[thread].new_connections = 0;
        if self.pollers[thread].woken.swap(false, Ordering::Relaxed) {
            self.wake(thread);
        }
        if !self.is_ready(thread) && timeout != Some(0) {
            // On Linux, only a poll that sleeps is interrupted.
            self.record(|| format!("thread {thread}: poll is interrupted"));
            if self.rng.one_in(2) {
                self.pause();
            }
            return true;
        }
        let mut taken = 0;
        while taken < self.parameters.max_events
            && let Some(source) = self.pollers[thread].ready.pop_front()
        {
            taken += 1;
            self.take_event(thread, source, batch);
        }
        if self.rng.one_in(16) {
            self.add_spurious_event(thread, batch);
        }
        if self.rng.one_in(self.parameters.pause_interval) {
            self.pause();
        }
        taken == self.parameters.max_events
    }

    /// Appends the event of a ready source: sometimes twice, or in two parts as from kqueue.
    fn take_event(&mut self, thread: usize, source: Source, batch: &mut Vec<SimEvent>) {
        let mut must_serve = false;
        let (token, readiness, connection) = match source {
            Source::Waker => {
                self.record(|| format!("thread {thread}: event of the waker"));
                return batch.push(SimEvent {
                    event: PollEvent::Wake,
                    connection: None,
                    must_serve: false,
                });
            }
            Source::Listener(index) => (index, Readiness::default(), None),
            Source::Connection(id) => {
                let connection = &mut self.connections[id];
                connection.in_ready_list = false;
                // As in Linux, an event that does not report room arms the edge that does.
                let readiness = connection.readiness();
                connection.awaits_writable = !readiness.writable;
                must_serve = readiness.readable && !connection.blocked;
                let token = connection.registered.map_or(0, |(_, token)| token);
                (token, readiness, Some((id, connection.arrived)))
            }
        };
        self.record(|| format!("thread {thread}: event of {source:?}: {readiness:?}"));
        let mut push = |readiness| {
            batch.push(SimEvent {
                event: PollEvent::Ready(token, readiness),
                connection,
                must_serve,
            });
        };
        match self.rng.below(8) {
            0 if readiness.readable => {
                push(Readiness {
                    writable: false,
                    ..readiness
                });
                push(Readiness {
                    readable: false,
                    ..readiness
                });
            }
            1 => {
                push(readiness);
                push(readiness);
            }
            _ => push(readiness),
        }
    }

    /// Inserts an event without a cause: of the waker, a token in use or one that was never in use.
    fn add_spurious_event(&mut self, thread: usize, batch: &mut Vec<SimEvent>) {
        let at = self.rng.below(batch.len() + 1);
        let readiness = Readiness {
            readable: self.rng.one_in(2),
            writable: self.rng.one_in(2),
            read_until_would_block: self.rng.one_in(2),
        };
        let token = self.rng.below(8);
        let event = match self.rng.one_in(8) {
            true => PollEvent::Wake,
            false => PollEvent::Ready(token, readiness),
        };
        self.record(|| format!("thread {thread}: spurious event {event:?}"));
        batch.insert(
            at,
            SimEvent {
                event,
                connection: None,
                must_serve: false,
            },
        );
    }

    /// A worker takes the next event of its batch, which starts a turn.
    pub(super) fn start_turn(&mut self, thread: usize, event: Option<SimEvent>) {
        let poller = &mut self.pollers[thread];
        if event.is_none() {
            for id in std::mem::take(&mut poller.must_serve) {
                let is_closed = !self.connections[id].is_open();
                self.check(is_closed, || {
                    format!("connection {id} has a small message and was not served at once")
                });
            }
        }
        let poller = &mut self.pollers[thread];
        poller.turn = None;
        poller.tick_phase = match event {
            Some(_) => TickPhase::Events,
            None => TickPhase::AfterEvents,
        };
        let tick = poller.ticks;
        if let Some(event) = event
            && let PollEvent::Ready(_, readiness) = event.event
            && let Some((id, arrived)) = event.connection
            && readiness.readable
        {
            let buffer_size = self.parameters.buffer_size;
            let connection = &mut self.connections[id];
            connection.reported = connection.reported.max(arrived);
            // A handler that has announced an answer can leave its input unread.
            let is_limited = connection
                .read_limit
                .is_some_and(|limit| limit <= connection.read);
            let may_wait =
                connection.is_pending() && (is_limited || connection.is_full(buffer_size));
            if event.must_serve && connection.is_readable() && !connection.blocked && !may_wait {
                connection.is_unserved = true;
                let is_interactive = !connection.is_bulk && connection.last_turn_tick != tick;
                self.pollers[thread]
                    .must_serve
                    .extend(is_interactive.then_some(id));
            }
        }
    }

    /// Accounts for a call of the server that has moved `read` and `sent` bytes of a connection, and checks
    /// that its turn stays within the budget.
    pub(super) fn account(&mut self, id: usize, read: usize, sent: usize) {
        self.note_turn(id);
        let connection = &mut self.connections[id];
        connection.is_unserved = false;
        connection.found_delivered = false;
        connection.found_empty = false;
        if read + sent > 0 {
            self.progress += 1;
            self.note_transfer(id, sent);
        }
        let poller = &mut self.pollers[self.current];
        let phase = poller.tick_phase;
        let Some(turn) = &mut poller.turn else { return };
        turn.reads += usize::from(read > 0);
        turn.bytes += read + sent;
        let turn = *turn;
        let turns = self.parameters.turns;
        let budget = match phase {
            TickPhase::RunQueue => turns.bulk_budget,
            _ => turns.interactive_budget,
        } as usize;
        let connection = &mut self.connections[id];
        connection.used_budget = turn.reads >= MAX_ROUNDS || turn.bytes >= budget;
        connection.moved_much = turn.bytes as u64 >= turns.bulk_bytes
            || connection.used_budget
            || turn.calls >= MAX_ROUNDS;
        // The write after the last read can be as large as the budget. A connection that ends its half in this
        // turn starts to count again, for what it discards.
        let restarts = usize::from(connection.write_shutdown.is_some());
        let max_reads = MAX_ROUNDS * (1 + restarts);
        let max_bytes = budget * (2 + restarts);
        let exceeded = turn.reads > max_reads || turn.bytes > max_bytes;
        self.check(!exceeded || phase == TickPhase::AfterEvents, || {
            format!("connection {id} has exceeded its budget: {turn:?}")
        });
    }

    /// Notes a call of the server for a connection or its handler, which may be the first of a turn.
    pub(super) fn note_turn(&mut self, id: usize) {
        if self.current == ACCEPTOR {
            return;
        }
        let bulk_turns = self.counters.workers[self.current - 1].bulk_turns.get();
        let poller = &mut self.pollers[self.current];
        poller.must_serve.retain(|served| *served != id);
        let is_bulk_turn = bulk_turns > poller.bulk_turns;
        let is_after_unseen = bulk_turns > poller.bulk_turns + 1;
        let is_new = is_bulk_turn || poller.turn.is_none_or(|turn| turn.id != id);
        poller.bulk_turns = bulk_turns;
        if !is_new {
            if let Some(turn) = &mut poller.turn {
                turn.calls += 1;
            }
            return;
        }
        let (phase, tick) = (poller.tick_phase, poller.ticks);
        poller.turn = Some(Turn {
            id,
            calls: 1,
            reads: 0,
            bytes: 0,
        });
        // A turn of any kind takes the connection from the run queue.
        self.connections[id].is_queued = false;
        if is_bulk_turn {
            poller.tick_phase = TickPhase::RunQueue;
            self.note_bulk_turn(id, tick, is_after_unseen);
        }
        let connection = &mut self.connections[id];
        let was_driven = connection.last_turn_tick == tick;
        connection.last_turn_tick = tick;
        connection.waits_behind.clear();
        let is_misplaced = match phase {
            _ if is_bulk_turn => false,
            TickPhase::RunQueue => true,
            TickPhase::Events => connection.is_bulk && !was_driven,
            TickPhase::AfterEvents => false,
        };
        self.check(!is_misplaced, || {
            format!("connection {id} was driven although it was not its turn: {phase:?}")
        });
    }

    /// Checks that each bulk connection gets a turn after at most one of each other. After a turn without a call, where output
    /// is stuck or a handler has announced an answer, it is not known whose it was, and the count starts again.
    fn note_bulk_turn(&mut self, id: usize, tick: u64, is_after_unseen: bool) {
        let is_second = self.connections[id].bulk_turn_tick == tick;
        self.check(!is_second, || {
            format!("connection {id} has two turns in the run queue")
        });
        self.connections[id].bulk_turn_tick = tick;
        let thread = self.current;
        for waiting in 0..self.connections.len() {
            let connection = &mut self.connections[waiting];
            let is_here = connection.registered.is_some_and(|(of, _)| of == thread);
            if !is_here || !connection.is_open() || !connection.is_queued {
                continue;
            }
            if is_after_unseen {
                connection.waits_behind.clear();
            }
            let is_overtaken = connection.waits_behind.contains(&id);
            connection.waits_behind.push(id);
            self.check(!is_overtaken, || {
                format!(
                    "connection {id} has a second turn while connection {waiting} waits for one"
                )
            });
        }
    }
}
