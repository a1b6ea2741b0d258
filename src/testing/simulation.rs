//! One schedule: a server and its clients, all driven by one random number generator.
//!
//! Acceptor, workers, dispatcher and control are the real ones. Their threads are replaced by calls of
//! `tick`, which run one after the other or, from within system calls, inside each other.

use std::cell::{OnceCell, RefCell, RefMut};
use std::panic::resume_unwind;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::connection::{Seen, SimConnection};
use super::kernel::{ACCEPTOR, Kernel, Parameters, Shutdown, TickPhase};
use super::random::Rng;
use super::system::{
    Machine, Register, SimListener, SimPoller, SimStream, SimWaker, Threads, client_of,
};
use crate::connection::Resources;
use crate::connection::buffer::{OUT_OF_MEMORY, Pool};
use crate::connection::handler::{Action, Context, Event, Handler};
use crate::connection::shared::{Shared, Turns};
use crate::connection::waker::WakeQueue;
use crate::peer::Peer;
use crate::server::acceptor::Acceptor;
use crate::server::control::Control;
use crate::server::dispatcher::Dispatcher;
use crate::server::table::ConnectionTable;
use crate::server::worker::Worker;
use crate::stats::Counters;

/// What is simulated. One value is used for many seeds.
pub(super) struct Scenario<'a, H> {
    pub(super) handler: &'a (dyn Fn() -> H + Sync),
    pub(super) vocabulary: &'a [&'a [u8]],
    pub(super) model: &'a (dyn Fn(Seen<'_>) -> Vec<u8> + Sync),
    /// The least size of the buffers.
    pub(super) min_buffer_size: usize,
    /// Some schedules have buffers and inputs that are larger than the budget of a turn.
    pub(super) has_bulk: bool,
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

/// Ticks after which the server is considered to be in an endless loop, besides those that move bytes.
const MAX_TICKS: usize = 10_000;

/// How often a handler is woken again although nothing is seen of what it does. One with buffers of its own can use the
/// wake-ups all the same.
const MAX_QUIET_WAKES: usize = 8;

/// One schedule in this many has a crowd of clients that connect at once.
const CROWD_INTERVAL: usize = 400;

/// One schedule in this many is in bulk, where the scenario allows it.
const BULK_INTERVAL: usize = 400;

/// The scale in bulk: an input of 12 bytes becomes one of 240,000.
const BULK_SCALE: usize = 20_000;

impl<'a, H: Handler + 'a> Scenario<'a, H> {
    /// Runs the schedule with this seed.
    pub(super) fn run(&self, seed: u64, bounds: Bounds, trace: bool) -> Result<(), Failure> {
        let simulation = Simulation::new(self, seed, bounds, trace);
        let result = simulation.run();
        let mut kernel = simulation.machine.kernel.borrow_mut();
        let trace = kernel.trace.take().unwrap_or_default();
        result.map_err(|Failed| Failure {
            message: kernel.failure.take().unwrap_or_default(),
            trace,
        })
    }
}

/// A check failed; the kernel has recorded which one.
struct Failed;

type SimWorker<'a, H> = Worker<SimStream<'a>, ObservedHandler<'a, H>, SimWaker<'a>>;

/// The state of one thread.
enum Thread<'a, H> {
    Acceptor(Box<Acceptor<SimListener<'a>, SimWaker<'a>>>, SimPoller<'a>),
    /// A worker keeps its waker alive until it ends.
    Worker(
        Box<SimWorker<'a, H>>,
        SimPoller<'a>,
        #[allow(dead_code)] SimWaker<'a>,
    ),
    Ended,
}

struct Simulation<'a, H: Handler> {
    scenario: &'a Scenario<'a, H>,
    bounds: Bounds,
    machine: Rc<Machine<'a>>,
    control: Arc<Control<SimWaker<'a>>>,
    threads: Vec<RefCell<Thread<'a, H>>>,
}

/// A handler whose calls are recorded by the kernel.
struct ObservedHandler<'a, H> {
    handler: H,
    id: usize,
    machine: Rc<Machine<'a>>,
}

impl<H: Handler> Handler for ObservedHandler<'_, H> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        self.machine
            .kernel
            .borrow_mut()
            .begin_call(self.id, event, context);
        let before = (context.input.len(), context.output.len());
        let action = self.handler.process(event, context);
        if self.machine.kernel.borrow_mut().panics(self.id) {
            // Without a report of the panic hook.
            resume_unwind(Box::new("simulated"));
        }
        let consumed = before.0 - context.input.len();
        let appended = context.output.len() - before.1;
        let mut kernel = self.machine.kernel.borrow_mut();
        kernel.end_call(self.id, event, context, action, (consumed, appended));
        action
    }
}

impl Kernel<'_> {
    /// Checks that a call of a handler is due, and what its buffers hold.
    fn begin_call(&mut self, id: usize, event: Event, context: &Context<'_>) {
        self.note_turn(id);
        let poller = &self.pollers[self.current];
        let (now, phase) = (poller.now, poller.tick_phase);
        let in_shutdown = poller.draining || poller.can_see_shutdown();
        self.check(context.now() == Duration::from_millis(now), || {
            format!("a handler is told another time than {now} ms")
        });
        let connection = &mut self.connections[id];
        let is_due = match event {
            Event::Open => connection.action.is_none(),
            Event::Input => connection.read > connection.consumed,
            Event::Sent => connection.action == Some(Action::Flush),
            Event::Eof => connection.ended,
            Event::Timer => connection.timer.take().is_some_and(|timer| timer <= now),
            Event::Wake => connection.waker.is_some(),
            Event::Shutdown => {
                let is_first = connection.shutdown_at.replace(connection.read).is_none();
                is_first && in_shutdown && connection.action.is_some()
            }
            Event::Resumed => {
                connection.action == Some(Action::Yield) && phase != TickPhase::Events
            }
        };
        if event == Event::Shutdown {
            connection.expected = (self.model)(connection.seen_at_end());
        }
        if event == Event::Wake {
            connection.is_woken = false;
            let poller = &mut self.pollers[self.current];
            poller.wakes += usize::from(poller.tick_phase != TickPhase::RunQueue);
        }
        let connection = &self.connections[id];
        let can_have_output = matches!(event, Event::Timer | Event::Wake | Event::Shutdown);
        let calls_handler = connection.calls_handler();
        let problem = if !calls_handler {
            "is closing"
        } else if !is_due {
            "has no reason for it"
        } else if !can_have_output && !context.output.is_empty() {
            "has pending output"
        } else {
            return;
        };
        self.fail(format!(
            "connection {id} {problem}, and its handler was called for {event:?}"
        ));
    }

    /// Decides whether the current call panics.
    fn panics(&mut self, id: usize) -> bool {
        let now = self.pollers[self.current].now;
        let connection = &mut self.connections[id];
        let Some(calls) = &mut connection.calls_before_panic else {
            return false;
        };
        if *calls > 0 {
            *calls -= 1;
            return false;
        }
        connection.has_panicked = true;
        connection.close_requested = Some(now);
        connection.quiet_since = now;
        self.record(|| format!("connection {id}: the handler panics"));
        true
    }

    /// Notes the result of a call.
    fn end_call(
        &mut self,
        id: usize,
        event: Event,
        context: &Context<'_>,
        action: Action,
        (consumed, appended): (usize, usize),
    ) {
        self.record(|| {
            format!(
                "connection {id}: {event:?}: the handler consumes {consumed}, appends {appended}: {action:?}"
            )
        });
        let now = self.pollers[self.current].now;
        self.progress += usize::from(consumed + appended > 0);
        let connection = &mut self.connections[id];
        let waited = connection.waits_after();
        let is_between = matches!(event, Event::Timer | Event::Wake | Event::Shutdown);
        let is_kept = match connection.action {
            Some(Action::Flush | Action::Yield) => true,
            Some(Action::Pending) => consumed + appended == 0,
            _ => false,
        };
        if action != Action::Continue || !is_between || !is_kept {
            connection.action = Some(action);
        }
        connection.consumed += consumed;
        connection.appended += appended;
        connection.end_handled |= event == Event::Eof;
        if let Some(extras) = context.extras.get() {
            connection.timer = extras.timer.get();
            connection.waker = extras.waker.get().cloned();
        }
        if action == Action::Close && !connection.end_handled {
            connection.close_requested = Some(now);
            connection.quiet_since = now;
        }
        self.note_call(id, waited);
    }
}

impl<'a, H: Handler + 'a> Threads for Simulation<'a, H> {
    fn tick(&self, thread: usize) {
        let Ok(mut running) = self.threads[thread].try_borrow_mut() else {
            return;
        };
        let outer = self.begin_tick(thread);
        OUT_OF_MEMORY.set(false);
        let (result, poll_timeout, is_done) = match &mut *running {
            Thread::Acceptor(acceptor, poller) => {
                let result = acceptor.tick(poller);
                (result, acceptor.poll_timeout(), acceptor.is_done())
            }
            Thread::Worker(worker, poller, _) => {
                let result = worker.tick(poller, &|_, peer, number| {
                    self.observe_handler(peer, number)
                });
                (result, worker.poll_timeout(), worker.is_done())
            }
            Thread::Ended => (Ok(()), None, true),
        };
        OUT_OF_MEMORY.set(false);
        if result.is_err() || is_done {
            *running = Thread::Ended;
        }
        let mut kernel = self.kernel();
        let now = kernel.now;
        let poller = &mut kernel.pollers[thread];
        poller.ended = is_done;
        poller.tick_length = now - poller.now;
        poller.wake_at = poll_timeout.map(|timeout| now + timeout);
        match thread {
            ACCEPTOR => kernel.check_acceptor_tick(),
            worker => match &*running {
                Thread::Worker(running, ..) => {
                    let table = running.table();
                    kernel.check_worker_tick(worker, table.share(), |token| table.inspect(token));
                }
                _ => kernel.check_last_close(worker),
            },
        }
        kernel.current = outer;
    }
}

impl<'a, H: Handler + 'a> Simulation<'a, H> {
    fn new(scenario: &'a Scenario<'a, H>, seed: u64, bounds: Bounds, trace: bool) -> Rc<Self> {
        let mut rng = Rng::new(seed);
        let mut parameters = Parameters::random(&mut rng, scenario.min_buffer_size);
        let is_crowded = rng.one_in(CROWD_INTERVAL) && bounds.max_connections > 1;
        if is_crowded {
            parameters.workers = 1;
            parameters.max_connections = 1000;
            parameters.max_descriptors = 1000;
            parameters.queue_capacity = 1024;
            parameters.backlog = 1024;
        }
        if scenario.has_bulk && rng.one_in(BULK_INTERVAL) {
            parameters.scale = BULK_SCALE;
            parameters.buffer_size *= BULK_SCALE;
            parameters.tiny_writes = false;
            parameters.turns = Turns::DEFAULT;
        }
        let counters = Arc::new(Counters::new(parameters.workers));
        let shared = Arc::clone(&counters);
        let mut kernel = Kernel::new(rng, parameters, scenario.model, shared, trace);
        kernel.record(|| format!("{parameters:?}"));
        if is_crowded {
            for _ in 0..kernel.rng.below(600) {
                let mut input = random_input(&mut kernel.rng, scenario.vocabulary);
                input.truncate(1);
                kernel.connect(&input);
            }
        }
        let machine = Rc::new(Machine {
            kernel: RefCell::new(kernel),
            threads: OnceCell::new(),
        });
        let wakers: Vec<_> = (1..=parameters.workers)
            .map(|thread| SimWaker::new(thread, &machine))
            .collect();
        let control = Control::new(
            parameters.max_connections,
            SimWaker::new(ACCEPTOR, &machine),
            wakers.clone(),
        );
        // The acceptor and the workers share it as the threads of a server do.
        #[allow(clippy::arc_with_non_send_sync)]
        let control = Arc::new(control);
        let threads = new_threads(&machine, &control, wakers, &counters, parameters);
        let simulation = Rc::new(Self {
            scenario,
            bounds,
            machine,
            control,
            threads,
        });
        let threads: Weak<dyn Threads + 'a> = Rc::downgrade(&(Rc::clone(&simulation) as Rc<_>));
        let _first = simulation.machine.threads.set(threads);
        simulation
    }

    fn run(&self) -> Result<(), Failed> {
        let steps = self.below(self.bounds.max_steps + 1);
        for _ in 0..steps {
            self.step();
            self.check()?;
        }
        if !self.one_in(4) {
            self.kernel().calm_other_processes();
            self.run_until_rest(false)?;
            self.run_until_rest(true)?;
            self.kernel().check_complete();
            self.check()?;
        }
        if self.one_in(2) {
            self.expire_timers()?;
        }
        self.shut_down()
    }

    fn step(&self) {
        match self.below(16) {
            0 => self.connect(),
            1..7 => self.kernel().run_random_client(),
            7..14 => _ = self.tick_any(),
            14 if self.one_in(4) => self.kernel().run_other_processes(),
            _ => self.advance_clock(),
        }
    }

    fn connect(&self) {
        let mut kernel = self.kernel();
        if kernel.connections.len() < self.bounds.max_connections {
            let input = random_input(&mut kernel.rng, self.scenario.vocabulary);
            kernel.connect(&input);
        }
    }

    fn observe_handler(&self, peer: Peer, number: u64) -> ObservedHandler<'a, H> {
        let id = client_of(peer);
        self.kernel().check_number(id, number);
        ObservedHandler {
            handler: (self.scenario.handler)(),
            id,
            machine: Rc::clone(&self.machine),
        }
    }

    /// Prepares the kernel for a tick; returns the thread that runs it from within a call.
    fn begin_tick(&self, thread: usize) -> usize {
        let mut kernel = self.kernel();
        kernel.record(|| match thread {
            ACCEPTOR => "acceptor: tick".to_owned(),
            worker => format!("thread {worker}: tick"),
        });
        let requested = kernel.shutdown.is_some();
        let poller = &mut kernel.pollers[thread];
        poller.ticks += 1;
        poller.sees_shutdown = requested;
        std::mem::replace(&mut kernel.current, thread)
    }

    /// Runs a tick of a random thread whose poll returns, or is interrupted. Returns whether one was ready.
    fn tick_any(&self) -> bool {
        let thread = {
            let mut kernel = self.kernel();
            let count = kernel.pollers.len();
            let first = kernel.rng.below(count);
            let ready = (0..count)
                .map(|step| (first + step) % count)
                .find(|&thread| kernel.is_ready(thread));
            match ready {
                Some(_) if kernel.rng.one_in(16) && !kernel.pollers[first].ended => Some(first),
                None if kernel.rng.one_in(8) && !kernel.pollers[first].ended => Some(first),
                ready => ready,
            }
        };
        if let Some(thread) = thread {
            self.tick(thread);
            self.kernel().check_balance();
        }
        thread.is_some()
    }

    /// After how many ticks there is an endless loop. A client can send, and the server read and write, a byte at a time.
    fn max_ticks(&self) -> usize {
        let kernel = self.kernel();
        let bytes = |connection: &SimConnection| connection.input.len() + connection.expected.len();
        MAX_TICKS + 4 * kernel.connections.iter().map(bytes).sum::<usize>()
    }

    /// Runs every thread until none is ready.
    fn run_ready_threads(&self) -> Result<(), Failed> {
        for _ in 0..self.max_ticks() {
            let ready = {
                let kernel = self.kernel();
                (0..kernel.pollers.len()).find(|&thread| kernel.is_ready(thread))
            };
            let Some(thread) = ready else {
                self.kernel().check_rest();
                return self.check();
            };
            self.tick(thread);
            self.kernel().check_balance();
            self.check()?;
        }
        self.fail("the server does not come to rest, although no client acts")
    }

    /// Lets the clients and the server do all they can, until nothing changes.
    fn run_until_rest(&self, include_late: bool) -> Result<(), Failed> {
        let mut quiet_wakes = 0;
        for _ in 0..self.max_ticks() {
            let before = self.kernel().progress;
            self.kernel().run_all_clients(include_late);
            self.run_ready_threads()?;
            if self.kernel().progress != before {
                quiet_wakes = 0;
                continue;
            }
            let has_timer = self.kernel().wake_pending_handlers();
            self.run_ready_threads()?;
            quiet_wakes += 1;
            let is_pending = (self.kernel().connections.iter()).any(SimConnection::is_pending);
            let may_go_on = is_pending && quiet_wakes < MAX_QUIET_WAKES;
            if has_timer || may_go_on || self.kernel().progress != before {
                continue;
            }
            // Clients that wait for the end of a pause.
            let mut kernel = self.kernel();
            let mut backlogs = kernel.listeners.iter();
            let is_waiting =
                kernel.has_descriptor() && backlogs.any(|backlog| !backlog.waiting.is_empty());
            match kernel.pollers[ACCEPTOR].wake_at {
                Some(at) if is_waiting => kernel.now = kernel.now.max(at),
                _ => return Ok(()),
            }
        }
        self.fail("the clients do not come to rest")
    }

    /// Lets the threads sleep until each of their timers has expired, while the clients do nothing.
    fn expire_timers(&self) -> Result<(), Failed> {
        for _ in 0..30 {
            self.run_ready_threads()?;
            match self.next_wake() {
                Some(at) => self.kernel().now = at,
                None => break,
            }
        }
        Ok(())
    }

    /// When the first thread wakes up by itself.
    fn next_wake(&self) -> Option<u64> {
        let kernel = self.kernel();
        let alive = kernel.pollers.iter().filter(|poller| !poller.ended);
        alive.filter_map(|poller| poller.wake_at).min()
    }

    /// Asks the server to shut down, and runs it until it has ended.
    fn shut_down(&self) -> Result<(), Failed> {
        let parameters = self.kernel().parameters;
        self.request_shutdown(parameters.timeouts.drain);
        let actions_per_tick = self.kernel().rng.choose(&[1, 3, 20]);
        for _ in 0..self.max_ticks() {
            self.check()?;
            if self.is_ended() {
                self.kernel().check_ended();
                return self.check();
            }
            let now = self.kernel().now;
            if self.kernel().has_expired(now) {
                self.run_ready_threads()?;
                self.kernel().check_expired();
                if let Some(at) = self.next_wake() {
                    self.kernel().now = at;
                }
                continue;
            }
            if self.one_in(100) {
                self.request_shutdown(0);
            }
            for _ in 0..actions_per_tick {
                self.kernel().run_random_client();
            }
            if self.one_in(8) {
                self.step();
            } else if !self.tick_any() {
                self.kernel().check_rest();
                match self.next_wake() {
                    Some(at) => self.sleep_until(at),
                    None if self.is_ended() => {}
                    None => return self.fail("the server sleeps without a timeout in a shutdown"),
                }
            }
        }
        self.fail("the shutdown does not end")
    }

    fn is_ended(&self) -> bool {
        self.kernel().pollers.iter().all(|poller| poller.ended)
    }

    fn request_shutdown(&self, timeout: u64) {
        let record = || {
            let mut kernel = self.kernel();
            kernel.record(|| format!("a shutdown within {timeout} ms is requested"));
            let deadline = kernel.now + timeout;
            if let Some(shutdown) = &mut kernel.shutdown {
                shutdown.deadline = shutdown.deadline.min(deadline);
                return deadline;
            }
            let sequence = kernel.sequence;
            kernel.shutdown = Some(Shutdown { deadline, sequence });
            for connection in &mut kernel.connections {
                connection.arrived_before_drain = connection.arrived;
            }
            deadline
        };
        self.control.shut_down(record());
    }

    /// Advances the clock, sometimes by a part of the time only.
    fn sleep_until(&self, at: u64) {
        let mut kernel = self.kernel();
        let time = at.saturating_sub(kernel.now);
        let part = match kernel.rng.one_in(2) {
            true => time,
            false => time.div_ceil(8),
        };
        kernel.now += part;
    }

    /// Advances the clock by a random time, up to the next timer if every thread sleeps.
    fn advance_clock(&self) {
        let next_wake = self.next_wake();
        let mut kernel = self.kernel();
        let is_busy = (0..kernel.pollers.len()).any(|thread| kernel.is_ready(thread));
        let max = match next_wake {
            _ if is_busy => 3,
            Some(at) => at - kernel.now + 1,
            None => 100,
        };
        kernel.now += kernel.rng.up_to(max as usize) as u64;
    }

    fn fail(&self, message: &str) -> Result<(), Failed> {
        self.kernel().fail(message.to_owned());
        Err(Failed)
    }

    /// Returns an error if the kernel has recorded a failure.
    fn check(&self) -> Result<(), Failed> {
        match self.kernel().failure {
            Some(_) => Err(Failed),
            None => Ok(()),
        }
    }

    fn kernel(&self) -> RefMut<'_, Kernel<'a>> {
        self.machine.kernel.borrow_mut()
    }

    fn below(&self, bound: usize) -> usize {
        self.kernel().rng.below(bound)
    }

    fn one_in(&self, count: usize) -> bool {
        self.kernel().rng.one_in(count)
    }
}

/// Creates the threads as `Server::run` does.
fn new_threads<'a, H: Handler>(
    machine: &Rc<Machine<'a>>,
    control: &Arc<Control<SimWaker<'a>>>,
    wakers: Vec<SimWaker<'a>>,
    counters: &Arc<Counters>,
    parameters: Parameters,
) -> Vec<RefCell<Thread<'a, H>>> {
    let (dispatcher, receivers) = Dispatcher::new(parameters.queue_capacity, wakers.clone());
    let listeners: Vec<_> = (0..parameters.listeners)
        .map(|index| {
            let mut listener = SimListener::new(index, machine);
            let registered = listener.register(ACCEPTOR, index);
            registered.expect("the simulation registers listeners");
            listener
        })
        .collect();
    let acceptor = Acceptor::new(
        listeners,
        parameters.backlog,
        dispatcher,
        Arc::clone(counters),
        Arc::clone(control),
    );
    let poller = SimPoller::new(ACCEPTOR, machine);
    let mut threads = vec![RefCell::new(Thread::Acceptor(Box::new(acceptor), poller))];
    for (index, (receiver, waker)) in receivers.into_iter().zip(wakers).enumerate() {
        let counters = &counters.workers[index];
        let mut pool = Pool::new(parameters.buffer_size).expect("memory for a worker");
        pool.max_pairs = parameters.max_pairs;
        let woken = Arc::clone(&machine.kernel.borrow().pollers[index + 1].woken);
        let notify = move || woken.store(true, Ordering::Relaxed);
        let (wake_queue, wake_ups) = WakeQueue::new(notify);
        let mut shared = Shared::new(parameters.timeouts, wake_queue, Arc::clone(counters));
        shared.turns = parameters.turns;
        let table = ConnectionTable::new(Resources { pool, shared }, wake_ups, index);
        let worker = Worker::new(table, receiver, Arc::clone(control), Arc::clone(counters));
        let poller = SimPoller::new(index + 1, machine);
        let thread = Thread::Worker(Box::new(worker), poller, waker);
        threads.push(RefCell::new(thread));
    }
    threads
}

/// Returns what one client will send: messages of the vocabulary, sometimes cut off, or any bytes.
fn random_input(rng: &mut Rng, vocabulary: &[&[u8]]) -> Vec<u8> {
    let mut input = Vec::new();
    if vocabulary.is_empty() {
        let len = rng.choose(&[0, 1, 10, 100, 100, 400]);
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
