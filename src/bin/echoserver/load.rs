//! `echoserver load`: sends messages to any echo server, verifies every byte, and measures.

// Counts and times become figures to read: a float is wide enough for that.
#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss)]

mod driver;
mod flow;
mod report;
mod tally;

use std::io::{self, IsTerminal};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};
use std::{iter, mem, thread};

use clap::Args;
use echoserver::Address;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use self::driver::{Driver, Plan};
use self::tally::Tally;

use crate::output::{FAILURE, Failure, UNREACHABLE, print};
use crate::platform;
use crate::target::{self, Target};
use crate::values;

/// Size of a message, unless the user gives one.
const MESSAGE: usize = 64;
const FLOOD_MESSAGE: usize = 64 << 10;
/// Length of a run, unless the user gives one or a number of messages.
const DURATION: Duration = Duration::from_secs(10);
const MIN_TIMEOUT: Duration = Duration::from_millis(1);
const MAX_SWEEP_INTERVAL: Duration = Duration::from_millis(100);

/// Measure an echo server: throughput and round-trip times, with every byte verified
#[derive(Debug, Args)]
#[command(max_term_width = 100)]
#[command(after_help = "\
    Times are seconds, or have a unit: 5, 0.5, 500ms, 1m30s. RTT is the round-trip time of a message,\n\
    from its first byte sent to its last byte received; with --rate, from when it was due.\n\
    Ctrl-C ends the run with the summary.\n\
    Exit status: 0 success, 1 a wrong byte, a failed connection or no answer, 2 bad usage,\n\
    3 the server cannot be reached.")]
pub(crate) struct Options {
    #[arg(value_name = "HOST:PORT", help = target::FORMS)]
    address: Address,

    /// Number of connections, at most the number of messages
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    #[arg(help_heading = "Load", value_parser = values::count::<u32>(1..=1_000_000))]
    connections: u32,

    /// Size of a message [default: 64, or 64KiB with --flood]
    #[arg(short, long, value_name = "SIZE", help_heading = "Load", value_parser = values::size)]
    size: Option<usize>,

    /// Maximum unanswered messages per connection [default: 1; no limit with --rate]
    #[arg(long, value_name = "N", help_heading = "Load")]
    #[arg(value_parser = values::count::<u64>(1..=1_000_000))]
    in_flight: Option<u64>,

    /// Send this many messages per second in all, whether or not earlier ones have come back
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = values::rate)]
    rate: Option<f64>,

    /// Send without waiting for replies
    #[arg(long, help_heading = "Load", conflicts_with_all = ["rate", "in_flight"])]
    flood: bool,

    /// Open a connection for each message; its time is part of the RTT
    #[arg(long, help_heading = "Load", conflicts_with_all = ["flood", "in_flight"])]
    connect: bool,

    /// Threads that send
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Load")]
    #[arg(value_parser = values::count::<u16>(1..=1024))]
    threads: u16,

    /// How long to send; 0 means until Ctrl-C [default: 10, or until all of --messages are done]
    #[arg(short, long, value_name = "TIME", help_heading = "Length", value_parser = values::time(Duration::ZERO))]
    duration: Option<Duration>,

    /// Messages in all; a failed connection is then not opened again
    #[arg(short = 'n', long, value_name = "N", help_heading = "Length")]
    #[arg(value_parser = values::count::<u64>(1..=usize::MAX))]
    messages: Option<u64>,

    /// How long to send before the measurement starts
    #[arg(long, value_name = "TIME", help_heading = "Length", value_parser = values::time(Duration::ZERO))]
    #[arg(default_value = "0", conflicts_with = "messages")]
    warm_up: Duration,

    /// Fail a connection that returns no byte for this long
    #[arg(long, value_name = "TIME", help_heading = "Length", value_parser = values::time(MIN_TIMEOUT))]
    #[arg(default_value = "10")]
    timeout: Duration,

    /// Print one JSON object at the end, with the whole histogram, instead of text
    #[arg(long)]
    json: bool,
}

impl Options {
    fn plan(&self, target: &Target) -> Plan<'_> {
        let max_messages = self.messages.unwrap_or(u64::MAX);
        let connections = u64::from(self.connections).min(max_messages) as usize;
        let threads = usize::from(self.threads).min(connections);
        let default_size = if self.flood { FLOOD_MESSAGE } else { MESSAGE };
        let has_limit = self.connect || !self.flood && self.rate.is_none();
        let default_in_flight = if has_limit { 1 } else { u64::MAX };
        Plan {
            options: self,
            address: target.address.clone(),
            size: self.size.unwrap_or(default_size) as u64,
            max_in_flight: self.in_flight.unwrap_or(default_in_flight),
            threads,
            connections,
            sweep_interval: (self.timeout / 4).min(MAX_SWEEP_INTERVAL),
            stop: Arc::default(),
            opened: Barrier::new(threads + 1),
        }
    }

    /// Returns how long to send, if there is a limit.
    fn duration(&self) -> Option<Duration> {
        let default = self.messages.is_none().then_some(DURATION);
        self.duration.or(default).filter(|it| !it.is_zero())
    }
}

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    // With a low limit, connections fail with an error that says so.
    let _limit = platform::raise_descriptor_limit();
    let target = Target::find(&options.address, options.timeout)
        .map_err(|error| Failure(UNREACHABLE, Some(error)))?;
    let plan = options.plan(&target);
    // The first signal ends the run, a second one the process.
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&plan.stop))?;
        flag::register(signal, Arc::clone(&plan.stop))?;
    }
    if !options.json {
        print(&report::head(&target, &plan))?;
    }
    let measured = generate(&plan)?;
    print(&if options.json {
        report::json(&target, &plan, &measured)
    } else {
        report::text(&plan, &measured)
    })?;
    if measured.total.failed == 0 && measured.total.messages > 0 {
        Ok(())
    } else {
        Err(Failure(FAILURE, None))
    }
}

/// What all threads have counted.
struct Measured {
    /// Without the messages of the warm-up.
    total: Tally,
    warm_up_messages: u64,
    warm_up_bytes: u64,
    elapsed: Duration,
}

impl Measured {
    /// Returns the messages that were due and have not come back, lost ones apart.
    fn unanswered(&self) -> u64 {
        let done = self.warm_up_messages + self.total.messages + self.total.lost;
        self.total.due.saturating_sub(done)
    }

    fn per_second(&self, count: u64) -> f64 {
        count as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Runs the threads until the end of the plan.
fn generate(plan: &Plan) -> Result<Measured, Failure> {
    let new_tally = |_| Mutex::new(Tally::new());
    let tallies: Vec<_> = (0..plan.threads).map(new_tally).collect();
    let drivers = (tallies.iter().enumerate())
        .map(|(index, tally)| Driver::new(plan, index, tally))
        .collect::<io::Result<Vec<_>>>()?;
    let (running, ended) = mpsc::channel();
    thread::scope(|scope| {
        let threads: Vec<_> = iter::zip(drivers, iter::repeat(running))
            .map(|(driver, running)| scope.spawn(|| driver.run(running)))
            .collect();
        let measured = measure(plan, &tallies, &ended);
        plan.stop.store(true, Relaxed);
        for thread in threads {
            thread.join().expect("threads do not panic")?;
        }
        measured
    })
}

/// Collects what the threads count, and prints a line for each second on a terminal. `ended` is disconnected when all
/// threads have ended.
fn measure(
    plan: &Plan,
    tallies: &[Mutex<Tally>],
    ended: &Receiver<()>,
) -> Result<Measured, Failure> {
    let show_progress = !plan.options.json && io::stdout().is_terminal();
    let runs_until = |time: Instant| {
        let timeout = time.saturating_duration_since(Instant::now());
        ended.recv_timeout(timeout) == Err(RecvTimeoutError::Timeout)
    };
    let take = || {
        let mut sum = Tally::new();
        for tally in tallies {
            let mut tally = tally.lock().expect("no thread panics");
            sum.add(&mem::replace(&mut tally, Tally::new()));
        }
        sum
    };
    plan.opened.wait();
    let (mut total, mut start) = (Tally::new(), Instant::now());
    if !plan.options.warm_up.is_zero() {
        runs_until(start + plan.options.warm_up);
        (total, start) = (take(), Instant::now());
    }
    let warm_up_messages = mem::take(&mut total.messages);
    let warm_up_bytes = mem::take(&mut total.bytes);
    total.rtt.reset();
    let end = plan.options.duration().map(|duration| start + duration);
    let mut next = start;
    loop {
        next += Duration::from_secs(1);
        let is_running = runs_until(end.map_or(next, |end| end.min(next)));
        let (tally, elapsed) = (take(), start.elapsed());
        total.add(&tally);
        if !is_running || end.is_some_and(|end| start + elapsed >= end) {
            return Ok(Measured {
                total,
                warm_up_messages,
                warm_up_bytes,
                elapsed,
            });
        }
        if show_progress {
            print(&report::second((next - start).as_secs(), &tally))?;
        }
    }
}
