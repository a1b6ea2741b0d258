//! One schedule: clients, an acceptor's batches, a worker and its clock, all moved by one seed.
//!
//! The worker here is the few lines of the real one with its poll replaced; everything that it
//! calls is the code that serves sockets.

use std::cell::{Cell, RefCell};
use std::num::NonZeroUsize;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use super::kernel::{Kernel, Random, SimulatedStream, note_handling};
use crate::connection::buffer::Buffer;
use crate::connection::table::{ConnectionTable, Event, Limits, Millis};
use crate::handler::{Action, Handler};
use crate::peer::Peer;
use crate::stats::Counters;
use crate::work_queue::{Receiver, Wake, WorkQueue};

/// What is simulated: made once, played under many seeds.
pub(super) struct Play<'a, H> {
    pub(super) handler: &'a (dyn Fn() -> H + Sync),
    pub(super) words: &'a [&'a [u8]],
    pub(super) model: &'a (dyn Fn(&[u8]) -> Vec<u8> + Sync),
    /// The smallest buffer that every word and its answer fit into.
    pub(super) buffer_min: usize,
}

/// How far a schedule goes; the smaller, the easier to read.
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

/// What is wrong, and how it came to it.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) what: String,
    pub(super) trace: Vec<String>,
}

/// Turns that a worker may take for what cannot need so many: it spins.
const MAX_TICKS: usize = 20_000;

impl<H: Handler> Play<'_, H> {
    /// Plays the schedule that `seed` stands for.
    pub(super) fn run(&self, seed: u64, bounds: Bounds, trace: bool) -> Result<(), Fault> {
        let world = World::new(self, seed, bounds, trace);
        let outcome = world.play();
        let mut kernel = world.kernel.borrow_mut();
        let trace = kernel.trace.take().unwrap_or_default();
        outcome.map_err(|Faulty| Fault {
            what: kernel.fault.take().unwrap_or_default(),
            trace,
        })
    }
}

/// The kernel has noted a fault.
struct Faulty;

type Dealt<'a> = (SimulatedStream<'a>, Peer);

struct World<'a, H: Handler> {
    play: &'a Play<'a, H>,
    bounds: Bounds,
    kernel: Rc<RefCell<Kernel<'a>>>,
    counters: Arc<Counters>,
    queue: RefCell<Option<WorkQueue<Dealt<'a>, Bell<'a, H>>>>,
    worker: RefCell<Worker<'a, H>>,
    rung: Cell<bool>,
}

struct Worker<'a, H: Handler> {
    connections: ConnectionTable<SimulatedStream<'a>, Watched<'a, H>>,
    receiver: Receiver<Dealt<'a>>,
}

/// Wakes the worker; sometimes it runs before the waking returns.
struct Bell<'a, H: Handler>(Weak<World<'a, H>>);

impl<H: Handler> Wake for Bell<'_, H> {
    fn wake(&self) {
        if let Some(world) = self.0.upgrade() {
            world.rung.set(true);
            let at_once = world.kernel.borrow_mut().random.one_in(3);
            if at_once {
                world.turn(false);
            }
        }
    }
}

/// A handler whose wish to close is noted.
struct Watched<'a, H> {
    handler: H,
    id: usize,
    kernel: Rc<RefCell<Kernel<'a>>>,
}

impl<H: Handler> Handler for Watched<'_, H> {
    fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
        let action = self.handler.process(input, output);
        note_handling(&self.kernel, self.id, action == Action::Close);
        action
    }
}

impl<'a, H: Handler> World<'a, H> {
    fn new(play: &'a Play<'a, H>, seed: u64, bounds: Bounds, trace: bool) -> Rc<Self> {
        let mut random = Random::new(seed);
        let buffer_size = random.pick(&[1, 2, 7, 16, 64]).max(play.buffer_min);
        let limits = Limits {
            buffer_size,
            budget: random.pick(&[1, 2, 3, 100]),
            idle_timeout: random.one_in(3).then(|| random.up_to(400) as u64),
            linger_timeout: random.up_to(200) as u64,
            drain_timeout: random.pick(&[0, 10, 1000]),
        };
        let counters = Arc::new(Counters::new(1));
        let capacity = NonZeroUsize::MIN.saturating_add(random.below(4));
        let mut kernel = Kernel::new(random, play.model, limits, Arc::clone(&counters), trace);
        kernel.note(|| format!("{limits:?}"));
        Rc::new_cyclic(|world: &Weak<Self>| {
            let (queue, mut receivers) = WorkQueue::bounded(capacity, [Bell(Weak::clone(world))]);
            Self {
                play,
                bounds,
                kernel: Rc::new(RefCell::new(kernel)),
                queue: RefCell::new(Some(queue)),
                worker: RefCell::new(Worker {
                    connections: ConnectionTable::new(limits, Arc::clone(&counters.workers[0]), 0),
                    receiver: receivers.remove(0),
                }),
                counters,
                rung: Cell::new(false),
            }
        })
    }

    fn play(&self) -> Result<(), Faulty> {
        let steps = self.below(self.bounds.max_steps + 1);
        for _ in 0..steps {
            self.step();
            self.fault()?;
        }
        if !self.one_in(4) {
            self.settle(false)?;
            self.settle(true)?;
            self.kernel.borrow_mut().check_completeness();
            self.fault()?;
        }
        if self.one_in(2) {
            self.sleep_on()?;
        }
        self.drain()
    }

    fn step(&self) {
        match self.below(12) {
            0 => self.accept_batch(),
            1..6 => self.kernel.borrow_mut().anybody_acts(),
            6..11 => self.turn(false),
            _ => self.let_time_pass(),
        }
    }

    /// Clients connect, and are dealt as an acceptor deals them.
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
        let full = self.kernel.borrow().wires.len() >= self.bounds.max_connections;
        if full || !queue.has_room() {
            return;
        }
        let input = self.input();
        let id = self.kernel.borrow_mut().connect(input);
        let dealt = (SimulatedStream::new(id, &self.kernel), Peer::Unix);
        self.counters.acceptor.accepted.add(1);
        let placed = match notify {
            true => queue.try_push(dealt),
            false => queue.try_push_without_notify(dealt),
        };
        if placed.is_err() {
            let fault = format!("client {id} is refused, though there was room");
            self.kernel.borrow_mut().fail(fault);
        }
    }

    /// What one client means to say: words, the last one perhaps cut short; or anything at all.
    fn input(&self) -> Vec<u8> {
        let random = &mut self.kernel.borrow_mut().random;
        let mut input = Vec::new();
        let words = self.play.words;
        if words.is_empty() {
            let len = random.pick(&[0, 1, 10, 100, 400]);
            input.extend((0..len).map(|_| random.below(256) as u8));
        } else {
            for _ in 0..random.below(12) {
                input.extend_from_slice(random.pick(words));
            }
            if random.one_in(4) {
                input.truncate(random.below(input.len() + 1));
            }
        }
        input
    }

    /// One turn of the worker, with some of what is pending, or all of it.
    fn turn(&self, everyone: bool) {
        // Somebody is taking a turn already: the bell is heard in the next one.
        let Ok(mut worker) = self.worker.try_borrow_mut() else {
            return;
        };
        let Worker {
            connections,
            receiver,
        } = &mut *worker;
        let (now, mut batch) = {
            let mut kernel = self.kernel.borrow_mut();
            (kernel.now, kernel.poll(everyone))
        };
        let notified = self.rung.replace(false);
        if notified {
            let at = self.below(batch.len() + 1);
            batch.insert(at, Event::Wake);
            if self.queue.borrow().is_none() {
                self.kernel.borrow_mut().start_drain();
            }
        }
        let taken = Cell::new(0);
        let events = batch.iter().map(|event| {
            taken.set(taken.get() + 1);
            *event
        });
        let open = |stream: &mut SimulatedStream<'a>, _: &Peer, token| {
            let is_stale = |event: &Event| matches!(event, Event::Ready(of, _) if *of == token);
            if batch[taken.get()..].iter().any(is_stale) {
                let fault =
                    format!("token {token} is given away while events for it are in the batch");
                self.kernel.borrow_mut().fail(fault);
            }
            stream.register(token);
            // Others arrive while the mailbox is being emptied.
            if self.one_in(8) {
                self.connect(true);
            }
            Ok(Watched {
                handler: (self.play.handler)(),
                id: stream.id(),
                kernel: Rc::clone(&self.kernel),
            })
        };
        connections.tick(now, events, receiver, open);
        let may_sleep = connections.poll_timeout(now) != Some(0);
        self.kernel.borrow_mut().check_turn();
        if may_sleep && !self.is_notified() {
            self.check_rest();
        }
    }

    /// What must hold when the worker would sleep now.
    fn check_rest(&self) {
        let mut kernel = self.kernel.borrow_mut();
        kernel.check_rest();
        let stats = self.counters.snapshot();
        let (accepted, taken) = (stats.accepted, stats.total().assigned);
        if accepted != taken {
            kernel.fail(format!(
                "{} connections are forgotten in the mailbox, and nobody will wake the worker",
                accepted - taken
            ));
        }
    }

    /// Clients and worker do all they can, until nothing moves.
    fn settle(&self, late_ones_too: bool) -> Result<(), Faulty> {
        for _ in 0..MAX_TICKS {
            let before = self.kernel.borrow().moves;
            self.kernel.borrow_mut().everybody_acts(late_ones_too);
            self.turn(true);
            self.fault()?;
            let moved = self.kernel.borrow().moves != before;
            if !moved && !self.is_notified() && self.poll_timeout() != Some(0) {
                return Ok(());
            }
        }
        self.spins("though no client moves")
    }

    /// The worker sleeps as long as it may, again and again; nothing else happens.
    fn sleep_on(&self) -> Result<(), Faulty> {
        for _ in 0..100 {
            self.turn(true);
            self.fault()?;
            match self.poll_timeout() {
                Some(poll_timeout) => self.kernel.borrow_mut().now += poll_timeout,
                None if self.is_notified() => {}
                None => break,
            }
        }
        if self.poll_timeout().is_none() {
            // Nobody's time is counted, so nobody's may run out.
            self.kernel.borrow_mut().now += 100_000;
            self.kernel.borrow_mut().check_turn();
        }
        self.fault()
    }

    /// The server is asked to end.
    fn drain(&self) -> Result<(), Faulty> {
        self.kernel.borrow_mut().note_what_a_drain_owes();
        let queue = self.queue.borrow_mut().take();
        drop(queue);
        for _ in 0..MAX_TICKS {
            self.fault()?;
            if self.is_drained() {
                self.kernel.borrow_mut().check_end();
                return self.fault();
            }
            self.kernel.borrow_mut().anybody_acts();
            if !self.is_notified() {
                match self.poll_timeout() {
                    Some(poll_timeout) => self.kernel.borrow_mut().now += poll_timeout,
                    None => return self.spins("asleep for ever in the drain"),
                }
            }
            self.turn(true);
        }
        self.spins("and the drain does not end")
    }

    fn is_drained(&self) -> bool {
        self.worker.borrow().connections.is_drained()
    }

    fn spins(&self, how: &str) -> Result<(), Faulty> {
        let fault = format!("the worker never comes to rest, {how}");
        self.kernel.borrow_mut().fail(fault);
        Err(Faulty)
    }

    fn let_time_pass(&self) {
        let most = match self.poll_timeout() {
            _ if self.is_notified() => 3,
            Some(poll_timeout) => poll_timeout + 1,
            None => 100,
        };
        let mut kernel = self.kernel.borrow_mut();
        kernel.now += kernel.random.up_to(most as usize) as u64;
    }

    /// Whether a poll would return at once.
    fn is_notified(&self) -> bool {
        self.rung.get() || self.kernel.borrow().is_anyone_pending()
    }

    fn poll_timeout(&self) -> Option<Millis> {
        let now = self.kernel.borrow().now;
        self.worker.borrow().connections.poll_timeout(now)
    }

    fn fault(&self) -> Result<(), Faulty> {
        match self.kernel.borrow().fault {
            Some(_) => Err(Faulty),
            None => Ok(()),
        }
    }

    fn below(&self, bound: usize) -> usize {
        self.kernel.borrow_mut().random.below(bound)
    }

    fn one_in(&self, count: usize) -> bool {
        self.kernel.borrow_mut().random.one_in(count)
    }
}
