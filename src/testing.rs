//! Tests a [`Handler`] with thousands of random schedules in a simulated kernel.
//!
//! A schedule is one run of a whole server, from its listeners to the end of its shutdown, without sockets,
//! threads or a real clock. A number, its seed, determines all of it:
//!
//! * the number of workers, the limits, the timeouts and the sizes of all buffers;
//! * how the input is split into pieces, and when they arrive;
//! * when each client acknowledges, reads, closes its side or resets the connection;
//! * when the acceptor and each worker run, also in the middle of a system call of another thread;
//! * which events come together, twice or without a cause, and which calls are interrupted or fail;
//! * when time passes or the process is stopped, and when the server shuts down.
//!
//! Acceptor, workers and everything between this kernel and the handler are the code that serves real
//! sockets.
//!
//! When a schedule fails, the simulation looks for a shorter version that still fails, then panics with the last
//! events, calls of handlers included, and the command that runs the schedule again. These commands run the
//! simulations, and each of them with a million schedules:
//!
//! ```text
//! cargo test --release --lib simulation
//! SIMULATION_SCHEDULES=1000000 cargo test --release --lib simulation
//! ```

mod checks;
mod clients;
mod connection;
#[doc(hidden)]
pub mod growth;
mod kernel;
mod random;
mod simulation;
mod system;
mod timeouts;

use std::cmp::Reverse;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{env, thread};

pub use self::connection::Seen;
use self::simulation::{Bounds, Failure, Scenario};
use crate::connection::handler::Handler;

/// One in this many seeds is the same in every run; the others are derived from the time.
const FIXED_SEED_INTERVAL: u64 = 4;

/// How many of the last events of a failing schedule are printed.
const MAX_TRACE: usize = 100;

/// Runs `schedules` schedules, with a new handler from `handler` for each connection.
///
/// Each client sends messages from `vocabulary`, chosen at random and sometimes cut off at the end. If
/// `vocabulary` is empty, clients send random bytes. Each message of the vocabulary is complete: of pieces that join to a longer
/// message, the length is not known. The simulated buffers are at least as large as
/// the largest message and the largest answer to one; [`simulate_with`] has smaller ones.
///
/// `model` maps an input to the whole output expected for it, where the second argument tells whether the client
/// has ended its half after it. A longer input must not change earlier output: the output for an input starts
/// with the output for every prefix of that input, and so does the output after the end.
///
/// Choose small limits: a client sends a dozen messages at most. Time is simulated: measure it with
/// [`Context::now`](crate::Context::now). Timers expire after any time, so an output whose bytes depend on time has no model.
/// A rate limit only delays its output, and has one: assert the rate in the handler.
/// `handler` is called for each connection of each schedule, on several threads. Connections that share state cannot be
/// simulated, because what a client must receive has to follow from what it has sent, in every order of events.
///
/// A handler that has asked for a [waker](crate::Context::waker) is woken at random times, and again until it no longer
/// returns [`Action::Pending`](crate::Action::Pending). A handler that hands work to other threads is therefore
/// simulated without them: its answers are ready when it is woken.
///
/// The simulation checks that
///
/// * what a client receives is always a prefix of the model's output;
/// * the output is complete when the server is idle, and when either side has closed the connection
///   without a reset;
/// * no connection stalls, is cut short or outlives its timeouts, and a shutdown keeps its deadline;
/// * the handler does not panic.
///
/// The environment variable `SIMULATION_SCHEDULES` overrides `schedules`. If `SIMULATION_SEED` is set,
/// only the schedule with that seed is run.
///
/// ```
/// use echoserver::testing::simulate;
/// use echoserver::{Action, Context, Event, Handler};
///
/// /// Answers each line with its length.
/// struct LineLength;
///
/// impl Handler for LineLength {
///     fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
///         while let Some(line) = context.input.line() {
///             let length = line.len();
///             if !context.output.push(format!("{}\n", length - 1).as_bytes()) {
///                 return Action::Flush;
///             }
///             context.input.consume(length);
///         }
///         Action::Continue
///     }
/// }
///
/// fn model(input: &[u8], _ended: bool) -> Vec<u8> {
///     let lines = input.split_inclusive(|&byte| byte == b'\n');
///     let whole = lines.filter(|line| line.ends_with(b"\n"));
///     whole.flat_map(|line| format!("{}\n", line.len() - 1).into_bytes()).collect()
/// }
///
/// simulate(|| LineLength, &[b"\n", b"hello\n", b"a longer line\n"], model, 1000);
/// ```
///
/// # Panics
///
/// Panics if a schedule fails. The message has the problem, the seed and the last events.
pub fn simulate<H: Handler>(
    handler: impl Fn() -> H + Sync,
    vocabulary: &[&[u8]],
    model: impl Fn(&[u8], bool) -> Vec<u8> + Sync,
    schedules: u64,
) {
    let options = Options {
        vocabulary,
        min_buffer_size: None,
        schedules,
    };
    simulate_with(handler, |seen| model(seen.input, seen.ended), options);
}

/// What [`simulate_with`] simulates. The default: random bytes, buffers of a message, and 1000 schedules.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// The messages that clients send, or none for random bytes.
    pub vocabulary: &'a [&'a [u8]],
    /// The least size of the buffers, where `None` means the size of the largest message or answer. A handler that takes
    /// messages or gives answers in parts is to pass with 1, the hardest case.
    pub min_buffer_size: Option<usize>,
    /// How many schedules are run.
    pub schedules: u64,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            vocabulary: &[],
            min_buffer_size: None,
            schedules: 1000,
        }
    }
}

/// As [`simulate`], for buffers that are smaller than a message, and for handlers that say something else in a shutdown.
///
/// ```
/// use echoserver::testing::{Options, Seen, simulate_with};
/// use echoserver::{Action, Context, Echo, Event, Handler};
///
/// /// An echo that says goodbye.
/// struct Polite;
///
/// impl Handler for Polite {
///     fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
///         if event == Event::Shutdown {
///             // What has been read is echoed, but output can be pending, so there may be no room.
///             return if context.output.push(b".") { Action::Close } else { Action::Reset };
///         }
///         Echo.process(event, context)
///     }
/// }
///
/// let model = |seen: Seen<'_>| match seen.shutdown_at {
///     Some(read) => [&seen.input[..read], b"."].concat(),
///     None => seen.input.to_vec(),
/// };
/// let options = Options { min_buffer_size: Some(1), ..Options::default() };
/// simulate_with(|| Polite, model, options);
/// ```
///
/// # Panics
///
/// As [`simulate`].
pub fn simulate_with<H: Handler>(
    handler: impl Fn() -> H + Sync,
    model: impl Fn(Seen<'_>) -> Vec<u8> + Sync,
    options: Options<'_>,
) {
    let Options {
        vocabulary,
        min_buffer_size,
        schedules,
    } = options;
    let required_size = |&input: &&[u8]| {
        let answer = model(Seen {
            input,
            ended: true,
            shutdown_at: None,
        });
        input.len().max(answer.len())
    };
    let largest = || vocabulary.iter().map(required_size).max().unwrap_or(1);
    run_scenario(
        &Scenario {
            handler: &handler,
            vocabulary,
            model: &model,
            min_buffer_size: min_buffer_size.unwrap_or_else(largest),
            has_bulk: false,
        },
        schedules,
    );
}

/// Runs `schedules` schedules of a scenario, or what the environment asks for.
fn run_scenario<H: Handler>(scenario: &Scenario<'_, H>, schedules: u64) {
    if let Some(seed) = env_number("SIMULATION_SEED") {
        if run_schedule(scenario, seed, Bounds::FULL, false).is_err() {
            report(scenario, seed);
        }
        return;
    }
    let schedules = env_number("SIMULATION_SCHEDULES").unwrap_or(schedules);
    if let Some(seed) = find_failing_seed(scenario, schedules) {
        report(scenario, seed);
    }
}

/// Runs all schedules on all CPUs. Stops at the first failure and returns its seed.
fn find_failing_seed<H: Handler>(scenario: &Scenario<'_, H>, schedules: u64) -> Option<u64> {
    let time = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_nanos() as u64);
    let fixed_seeds = schedules / FIXED_SEED_INTERVAL;
    let (next, found) = (AtomicU64::new(0), AtomicBool::new(false));
    let search = || {
        while !found.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= schedules {
                break;
            }
            let seed = match index < fixed_seeds {
                true => index,
                false => time.wrapping_add(index),
            };
            if run_schedule(scenario, seed, Bounds::FULL, false).is_err() {
                found.store(true, Ordering::Relaxed);
                return Some(seed);
            }
        }
        None
    };
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    thread::scope(|scope| {
        let searches: Vec<_> = (0..threads).map(|_| scope.spawn(search)).collect();
        searches
            .into_iter()
            .filter_map(|thread| thread.join().ok().flatten())
            .min()
    })
}

fn env_number(variable: &str) -> Option<u64> {
    let value = env::var(variable).ok()?;
    match value.parse() {
        Ok(number) => Some(number),
        Err(error) => panic!("{variable}={value}: {error}"),
    }
}

/// Runs one schedule. A panic is a failure too: the code under test must contain a handler's panics.
fn run_schedule<H: Handler>(
    scenario: &Scenario<'_, H>,
    seed: u64,
    bounds: Bounds,
    trace: bool,
) -> Result<(), Failure> {
    let run = || scenario.run(seed, bounds, trace);
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        Err(Failure {
            message: "the server panicked, see above".to_owned(),
            trace: Vec::new(),
        })
    })
}

/// Returns the smallest bounds within which `seed` still fails.
fn shrink<H: Handler>(scenario: &Scenario<'_, H>, seed: u64) -> Bounds {
    let mut bounds = Bounds::FULL;
    let fails = |bounds| run_schedule(scenario, seed, bounds, false).is_err();
    for max_connections in 1..bounds.max_connections {
        let smaller = Bounds {
            max_connections,
            ..bounds
        };
        if fails(smaller) {
            bounds = smaller;
            break;
        }
    }
    for max_steps in 0..bounds.max_steps {
        let smaller = Bounds {
            max_steps,
            ..bounds
        };
        if fails(smaller) {
            return smaller;
        }
    }
    bounds
}

/// Panics with the failure of `seed`.
fn report<H: Handler>(scenario: &Scenario<'_, H>, seed: u64) -> ! {
    let bounds = shrink(scenario, seed);
    let Err(Failure { message, trace }) = run_schedule(scenario, seed, bounds, true) else {
        panic!("seed {seed} fails only sometimes: does the handler or its model use randomness?");
    };
    let test = thread::current();
    let test = test.name().unwrap_or("simulation");
    let trace = fold_repeats(&trace);
    let skipped = trace.len().saturating_sub(MAX_TRACE);
    panic!(
        "{message}\n\nRun it again with:\nSIMULATION_SEED={seed} cargo test {test}\n\nLast events:\n{}\n",
        trace[skipped..].join("\n")
    );
}

/// Replaces repetitions of up to 8 lines by their number, whatever the times of the events are.
fn fold_repeats(trace: &[String]) -> Vec<String> {
    const MAX_PERIOD: usize = 8;
    let event = |index: usize| trace[index].split_once(" ms ").map(|(_, event)| event);
    let mut folded = Vec::new();
    let mut at = 0;
    while at < trace.len() {
        let repeats_of = |period: usize| {
            let same =
                (at + period..trace.len()).take_while(|&line| event(line) == event(line - period));
            same.count() / period
        };
        let best =
            (1..=MAX_PERIOD).max_by_key(|&period| (repeats_of(period) * period, Reverse(period)));
        let period = best.unwrap_or(1);
        let repeats = repeats_of(period);
        folded.extend_from_slice(&trace[at..(at + period).min(trace.len())]);
        if repeats > 1 {
            folded.push(format!(
                "           ... the last {period} lines {repeats} times more"
            ));
            at += repeats * period;
        }
        at += period;
    }
    folded
}

#[cfg(test)]
mod tests;
