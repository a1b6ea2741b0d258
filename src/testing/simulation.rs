//! One schedule: clients, an acceptor, a worker and a clock, all driven by one random number generator.
//!
//! The worker here is the real one without its poll: all code that it calls serves real sockets.

use std::cell::{Cell, RefCell};
use std::num::NonZeroUsize;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use super::kernel::{Kernel, Rng, SimStream, record_handler_call};
use crate::connection::buffer::Buffer;
use crate::connection::table::{ConnectionTable, Event, Limits, Millis};
use crate::handler::{Action, Handler};
use crate::peer::Peer;
use crate::stats::Counters;
use crate::work_queue::{Receiver, Wake, WorkQueue};

/// What is simulated. One value is used for many seeds.
pub(super) struct Scenario<'a, H> {
    pub(super) handler: &'a (dyn Fn() -> H + Sync),
    pub(super) vocabulary: &'a [&'a [u8]],
    pub(super) model: &'a (dyn Fn(&[u8]) -> Vec<u8> + Sync),
    /// The smallest buffer that holds every message and its answer.
    pub(super) min_buffer_size: usize,
}

/// The size of a schedule; a smaller one is easier to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) max_steps: usize,
    pub(super) max_connections: usize,
}

impl Bounds {
    pub(super) const FULL: Self = Self {
        max_steps: 60,
        max_connections: 5,
    };
}

/// A failed check, and the events that led to it.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) message: String,
    pub(super) trace: Vec<String>,
}

/// Ticks after which a worker is considered to be in an endless loop.
const MAX_TICKS: usize = 20_000;

impl<H: Handler> Scenario<'_, H> {
    /// Runs the schedule with this seed.
    pub(super) fn run(&self, seed: u64, bounds: Bounds, trace: bool) -> Result<(), Failure> {
        let simulation = Simulation::new(self, seed, bounds, trace);
        let result = simulation.run();
        let mut kernel = simulation.kernel.borrow_mut();
        let trace = kernel.trace.take().unwrap_or_default();
        result.map_err(|Failed| Failure {
            message: kernel.failure.take().unwrap_or_default(),
            trace,
        })
    }
}

/// A check failed; the kernel has recorded which one.
struct Failed;

/// An accepted connection on its way to the worker.
type Accepted<'a> = (SimStream<'a>, Peer);

struct Simulation<'a, H: Handler> {
    scenario: &'a Scenario<'a, H>,
    bounds: Bounds,
    kernel: Rc<RefCell<Kernel<'a>>>,
    counters: Arc<Counters>,
    queue: RefCell<Option<WorkQueue<Accepted<'a>, SimWaker<'a, H>>>>,
    worker: RefCell<Worker<'a, H>>,
    wake_pending: Cell<bool>,
}

struct Worker<'a, H: Handler> {
    connections: ConnectionTable<SimStream<'a>, ObservedHandler<'a, H>>,
    receiver: Receiver<Accepted<'a>>,
}

/// Wakes the worker. Sometimes the worker runs before the wake call returns.
struct SimWaker<'a, H: Handler>(Weak<Simulation<'a, H>>);

impl<H: Handler> Wake for SimWaker<'_, H> {
    fn wake(&self) {
        if let Some(simulation) = self.0.upgrade() {
            simulation.wake_pending.set(true);
            if simulation.one_in(3) {
                simulation.tick(false);
            }
        }
    }
}

/// A handler whose calls are recorded by the kernel.
struct ObservedHandler<'a, H> {
    handler: H,
    id: usize,
    kernel: Rc<RefCell<Kernel<'a>>>,
}

impl<H: Handler> Handler for ObservedHandler<'_, H> {
    fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
        let action = self.handler.process(input, output);
        record_handler_call(&self.kernel, self.id, action == Action::Close);
        action
    }
}

impl<'a, H: Handler> Simulation<'a, H> {
    fn new(scenario: &'a Scenario<'a, H>, seed: u64, bounds: Bounds, trace: bool) -> Rc<Self> {
        let mut rng = Rng::new(seed);
        let buffer_size = rng.choose(&[1, 2, 7, 16, 64]).max(scenario.min_buffer_size);
        let limits = Limits {
            buffer_size,
            budget: rng.choose(&[1, 2, 3, 100]),
            idle_timeout: rng.one_in(3).then(|| rng.up_to(400) as u64),
            linger_timeout: rng.up_to(200) as u64,
            drain_timeout: rng.choose(&[0, 10, 1000]),
        };
        let counters = Arc::new(Counters::new(1));
        let capacity = NonZeroUsize::MIN.saturating_add(rng.below(4));
        let mut kernel = Kernel::new(rng, scenario.model, limits, Arc::clone(&counters), trace);
        kernel.record(|| format!("{limits:?}"));
        Rc::new_cyclic(|simulation: &Weak<Self>| {
            let waker = SimWaker(Weak::clone(simulation));
            let (queue, mut receivers) = WorkQueue::bounded(capacity, [waker]);
            Self {
                scenario,
                bounds,
                kernel: Rc::new(RefCell::new(kernel)),
                queue: RefCell::new(Some(queue)),
                worker: RefCell::new(Worker {
                    connections: ConnectionTable::new(limits, Arc::clone(&counters.workers[0]), 0),
                    receiver: receivers.remove(0),
                }),
                counters,
                wake_pending: Cell::new(false),
            }
        })
    }

    fn run(&self) -> Result<(), Failed> {
        let steps = self.below(self.bounds.max_steps + 1);
        for _ in 0..steps {
            self.step();
            self.check()?;
        }
        if !self.one_in(4) {
            self.run_until_idle(false)?;
            self.run_until_idle(true)?;
            self.kernel.borrow_mut().check_complete();
            self.check()?;
        }
        if self.one_in(2) {
            self.expire_timers()?;
        }
        self.drain()
    }

    fn step(&self) {
        match self.below(12) {
            0 => self.accept_batch(),
            1..6 => self.kernel.borrow_mut().run_random_client(),
            6..11 => self.tick(false),
            _ => self.advance_clock(),
        }
    }

    /// Connects clients and dispatches them as the acceptor does: one at a time, or as a batch.
    fn accept_batch(&self) {
        if self.one_in(2) {
            return self.connect(true);
        }
        for _ in 0..self.below(4) {
            self.connect(false);
        }
        if let Some(queue) = &*self.queue.borrow() {
            queue.notify();
        }
    }

    fn connect(&self, notify: bool) {
        let Some(queue) = &*self.queue.borrow() else {
            return;
        };
        let full = self.kernel.borrow().connections.len() >= self.bounds.max_connections;
        if full || !queue.has_room() {
            return;
        }
        let input = self.random_input();
        let id = self.kernel.borrow_mut().connect(input);
        let accepted = (SimStream::new(id, &self.kernel), Peer::Unix);
        self.counters.acceptor.accepted.add(1);
        let pushed = match notify {
            true => queue.try_push(accepted),
            false => queue.try_push_without_notify(accepted),
        };
        if pushed.is_err() {
            let message = format!("client {id} was rejected, although the mailbox had room");
            self.kernel.borrow_mut().fail(message);
        }
    }

    /// Returns what one client will send: messages of the vocabulary, sometimes cut off, or any bytes.
    fn random_input(&self) -> Vec<u8> {
        let rng = &mut self.kernel.borrow_mut().rng;
        let mut input = Vec::new();
        let vocabulary = self.scenario.vocabulary;
        if vocabulary.is_empty() {
            let len = rng.choose(&[0, 1, 10, 100, 400]);
            input.extend((0..len).map(|_| rng.below(256) as u8));
        } else {
            for _ in 0..rng.below(12) {
                input.extend_from_slice(rng.choose(vocabulary));
            }
            if rng.one_in(4) {
                input.truncate(rng.below(input.len() + 1));
            }
        }
        input
    }

    /// Runs one tick of the worker, with all pending events or some of them.
    fn tick(&self, all_events: bool) {
        // A tick is running already. The wake is handled in the next one.
        let Ok(mut worker) = self.worker.try_borrow_mut() else {
            return;
        };
        let Worker {
            connections,
            receiver,
        } = &mut *worker;
        let (now, mut batch) = {
            let mut kernel = self.kernel.borrow_mut();
            (kernel.now, kernel.poll(all_events))
        };
        if self.wake_pending.replace(false) {
            let at = self.below(batch.len() + 1);
            batch.insert(at, Event::Wake);
            if self.queue.borrow().is_none() {
                self.kernel.borrow_mut().record_drain_start();
            }
        }
        let taken = Cell::new(0);
        let events = batch.iter().map(|event| {
            taken.set(taken.get() + 1);
            *event
        });
        let open = |stream: &mut SimStream<'a>, _: &Peer, token| {
            let is_stale = |event: &Event| matches!(event, Event::Ready(of, _) if *of == token);
            if batch[taken.get()..].iter().any(is_stale) {
                let message =
                    format!("token {token} is reused while the batch still has events for it");
                self.kernel.borrow_mut().fail(message);
            }
            stream.register(token);
            // Another client can arrive while the worker empties its mailbox.
            if self.one_in(8) {
                self.connect(true);
            }
            Ok(ObservedHandler {
                handler: (self.scenario.handler)(),
                id: stream.id(),
                kernel: Rc::clone(&self.kernel),
            })
        };
        connections.tick(now, events, receiver, open);
        let may_sleep = connections.poll_timeout(now) != Some(0);
        self.kernel.borrow_mut().check_tick();
        if may_sleep && !self.has_pending_events() {
            self.check_idle();
        }
    }

    /// Checks what must hold when the worker would sleep now.
    fn check_idle(&self) {
        let mut kernel = self.kernel.borrow_mut();
        kernel.check_idle();
        let stats = self.counters.snapshot();
        let (accepted, assigned) = (stats.accepted, stats.total().assigned);
        if accepted != assigned {
            kernel.fail(format!(
                "{} connections wait in the mailbox, and no wake-up is pending",
                accepted - assigned
            ));
        }
    }

    /// Lets the clients and the worker do all they can, until nothing changes.
    fn run_until_idle(&self, include_late: bool) -> Result<(), Failed> {
        for _ in 0..MAX_TICKS {
            let before = self.kernel.borrow().progress;
            self.kernel.borrow_mut().run_all_clients(include_late);
            self.tick(true);
            self.check()?;
            let unchanged = self.kernel.borrow().progress == before;
            if unchanged && !self.has_pending_events() && self.poll_timeout() != Some(0) {
                return Ok(());
            }
        }
        self.fail("the worker does not become idle, although no client acts")
    }

    /// Lets the worker sleep until each of its timers has expired, while the clients do nothing.
    fn expire_timers(&self) -> Result<(), Failed> {
        for _ in 0..100 {
            self.tick(true);
            self.check()?;
            match self.poll_timeout() {
                Some(poll_timeout) => self.kernel.borrow_mut().now += poll_timeout,
                None if self.has_pending_events() => {}
                None => break,
            }
        }
        if self.poll_timeout().is_none() {
            // Without a timer, no connection may exceed a timeout later.
            self.kernel.borrow_mut().now += 100_000;
            self.kernel.borrow_mut().check_tick();
        }
        self.check()
    }

    /// Asks the server to shut down, and runs it until it has drained.
    fn drain(&self) -> Result<(), Failed> {
        self.kernel.borrow_mut().record_drain_request();
        let queue = self.queue.borrow_mut().take();
        drop(queue);
        for _ in 0..MAX_TICKS {
            self.check()?;
            if self.is_drained() {
                self.kernel.borrow_mut().check_drained();
                return self.check();
            }
            self.kernel.borrow_mut().run_random_client();
            if !self.has_pending_events() {
                match self.poll_timeout() {
                    Some(poll_timeout) => self.kernel.borrow_mut().now += poll_timeout,
                    None => return self.fail("the worker sleeps without a timeout in a drain"),
                }
            }
            self.tick(true);
        }
        self.fail("the drain does not end")
    }

    fn is_drained(&self) -> bool {
        self.worker.borrow().connections.is_drained()
    }

    /// Advances the clock by a random time, up to the worker's next timer.
    fn advance_clock(&self) {
        let max = match self.poll_timeout() {
            _ if self.has_pending_events() => 3,
            Some(poll_timeout) => poll_timeout + 1,
            None => 100,
        };
        let mut kernel = self.kernel.borrow_mut();
        kernel.now += kernel.rng.up_to(max as usize) as u64;
    }

    /// Returns whether a poll would return at once.
    fn has_pending_events(&self) -> bool {
        self.wake_pending.get() || self.kernel.borrow().has_pending_events()
    }

    fn poll_timeout(&self) -> Option<Millis> {
        let now = self.kernel.borrow().now;
        self.worker.borrow().connections.poll_timeout(now)
    }

    fn fail(&self, message: &str) -> Result<(), Failed> {
        self.kernel.borrow_mut().fail(message.to_owned());
        Err(Failed)
    }

    /// Returns an error if the kernel has recorded a failure.
    fn check(&self) -> Result<(), Failed> {
        match self.kernel.borrow().failure {
            Some(_) => Err(Failed),
            None => Ok(()),
        }
    }

    fn below(&self, bound: usize) -> usize {
        self.kernel.borrow_mut().rng.below(bound)
    }

    fn one_in(&self, count: usize) -> bool {
        self.kernel.borrow_mut().rng.one_in(count)
    }
}
