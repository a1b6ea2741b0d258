//! `echoserver load`: sends messages to any echo server, verifies every byte, and measures.

// Counts and times become figures to read: a float is wide enough for that.
#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss)]

mod flow;
mod report;
mod tally;
mod worker;

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use clap::Args;
use echoserver::Address;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use self::tally::{Period, Tally};
use self::worker::{Plan, Worker};
use crate::cli::parse_buffer_size;
use crate::figures::parse_time;
use crate::target::{self, Target, UNREACHABLE};
use crate::{FAILURE, Failure, print};

/// Size of a message, unless the user gives one.
const MESSAGE: usize = 64;
const FLOOD_MESSAGE: usize = 64 << 10;

/// Measure an echo server: throughput and round-trip times, with every byte verified
#[derive(Debug, Args)]
#[command(max_term_width = 100)]
#[command(after_help = "\
    Times are seconds, or have a unit: 10, 0.5, 500ms, 5m. RTT is the round-trip time of a message,\n\
    from its first byte sent to its last byte received; with --rate, from when it was due.\n\
    Ctrl-C ends the run with the summary.\n\
    Exit status: 0 success, 1 a wrong byte, a failed connection or no answer, 2 bad usage,\n\
    3 the server cannot be reached.")]
pub(crate) struct Options {
    #[arg(value_name = "HOST:PORT", help = target::FORMS)]
    address: Address,

    /// Number of connections, at most the number of messages
    #[arg(
        short,
        long,
        value_name = "N",
        default_value_t = 1,
        help_heading = "Load"
    )]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    connections: u32,

    /// Size of a message [default: 64, or 64KiB with --flood]
    #[arg(short, long, value_name = "SIZE", help_heading = "Load", value_parser = parse_buffer_size)]
    size: Option<usize>,

    /// Maximum unanswered messages per connection [default: 1; no limit with --rate]
    #[arg(long, value_name = "N", help_heading = "Load")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    in_flight: Option<u64>,

    /// Send this many messages per second in all, whether or not earlier ones have come back
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = parse_rate)]
    rate: Option<f64>,

    /// Send without waiting for replies
    #[arg(long, help_heading = "Load", conflicts_with_all = ["rate", "in_flight"])]
    flood: bool,

    /// Open a connection for each message; its time is part of the RTT
    #[arg(long, help_heading = "Load", conflicts_with_all = ["flood", "in_flight"])]
    connect: bool,

    /// Threads that send
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Load")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,

    /// How long to send; 0 means until Ctrl-C [default: 10, or until all of --messages are done]
    #[arg(short, long, value_name = "TIME", help_heading = "Length", value_parser = parse_time_or_0)]
    duration: Option<Duration>,

    /// Messages in all; a failed connection is then not opened again
    #[arg(short = 'n', long, value_name = "N", help_heading = "Length")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..u64::MAX))]
    messages: Option<u64>,

    /// How long to send before the measurement starts
    #[arg(long, value_name = "TIME", help_heading = "Length", value_parser = parse_time_or_0)]
    #[arg(default_value = "0", conflicts_with = "messages")]
    warm_up: Duration,

    /// Fail a connection that returns no byte for this long
    #[arg(long, value_name = "TIME", help_heading = "Length", value_parser = parse_time)]
    #[arg(default_value = "10")]
    timeout: Duration,

    /// Print one JSON object at the end, with the whole histogram, instead of text
    #[arg(long)]
    json: bool,
}

fn parse_time_or_0(text: &str) -> Result<Duration, String> {
    match text.trim_matches('0') {
        "" | "." | "s" if !text.is_empty() => Ok(Duration::ZERO),
        _ => parse_time(text),
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (1e-6..=1e7).contains(rate));
    rate.ok_or_else(|| "expected messages per second such as 1, 0.1 or 50000".to_owned())
}

impl Options {
    fn plan(&self, target: &Target) -> Plan<'_> {
        let most = self.messages.unwrap_or(u64::MAX);
        let connections = u64::from(self.connections).min(most);
        let threads = u64::from(self.threads).min(connections) as usize;
        let size = if self.flood { FLOOD_MESSAGE } else { MESSAGE };
        let max_in_flight = match self.in_flight {
            Some(limit) => limit,
            None if self.connect => 1,
            None if self.flood || self.rate.is_some() => u64::MAX,
            None => 1,
        };
        let default = self
            .messages
            .map_or(Duration::from_secs(10), |_| Duration::ZERO);
        let duration = self.duration.unwrap_or(default);
        Plan {
            options: self,
            address: target.address.clone(),
            size: self.size.unwrap_or(size) as u64,
            max_in_flight,
            duration: Some(duration).filter(|duration| !duration.is_zero()),
            threads,
            connections: connections as usize,
            stop: Arc::default(),
            opened: Barrier::new(threads),
        }
    }
}

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    // With a low limit, connections fail with an error that says so.
    #[cfg(unix)]
    let _limit = rlimit::increase_nofile_limit(u64::MAX);
    let target = Target::find(&options.address, options.timeout)
        .map_err(|error| Failure(UNREACHABLE, Some(error)))?;
    let plan = options.plan(&target);
    stop_on_signals(&plan.stop)?;

    let show_progress = !options.json && io::stdout().is_terminal();
    if !options.json {
        print(&report::head(&target, &plan))?;
    }
    let (warm_up, total) = generate(&plan, show_progress)?;

    print(&match options.json {
        true => report::json(&target, &plan, &warm_up, &total),
        false => report::text(&plan, &total),
    })?;
    match total.failed + warm_up.failed == 0 && total.messages > 0 {
        true => Ok(()),
        false => Err(Failure(FAILURE, None)),
    }
}

/// The first signal ends the run, a second one the process.
fn stop_on_signals(stop: &Arc<AtomicBool>) -> io::Result<()> {
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(stop))?;
        flag::register(signal, Arc::clone(stop))?;
    }
    Ok(())
}

/// Runs the threads. Returns what they counted in the warm-up, and afterwards.
fn generate(plan: &Plan, show_progress: bool) -> Result<(Tally, Tally), Failure> {
    let workers: io::Result<Vec<_>> = (0..plan.threads)
        .map(|index| Worker::new(plan, index))
        .collect();
    let workers = workers?;
    let (sender, reports) = mpsc::channel();
    thread::scope(|scope| {
        let threads: Vec<_> = workers
            .into_iter()
            .map(|worker| {
                let sender = sender.clone();
                scope.spawn(move || worker.run(&sender))
            })
            .collect();
        drop(sender);
        let collected = collect(plan, &reports, show_progress);
        drop(reports);
        if collected.is_err() {
            plan.stop.store(true, Relaxed);
        }
        for thread in threads {
            thread.join().expect("threads do not panic")?;
        }
        collected
    })
}

/// Adds up what the threads report, and prints a line for each second.
fn collect(
    plan: &Plan,
    reports: &Receiver<(Period, Tally)>,
    show_progress: bool,
) -> Result<(Tally, Tally), Failure> {
    let (mut warm_up, mut total) = (Tally::new(), Tally::new());
    // Seconds that not all threads have reported yet.
    let mut incomplete: BTreeMap<u64, (usize, Tally)> = BTreeMap::new();
    for (period, tally) in reports {
        let Period::Second(second) = period else {
            warm_up.add(&tally);
            continue;
        };
        total.add(&tally);
        if !show_progress {
            continue;
        }
        let (count, sum) = incomplete
            .entry(second)
            .or_insert_with(|| (0, Tally::new()));
        *count += 1;
        sum.add(&tally);
        // The last, shorter period is part of the summary only.
        if *count == plan.threads && sum.elapsed.is_zero() {
            print(&report::second(second, sum))?;
            incomplete.remove(&second);
        }
    }
    Ok((warm_up, total))
}
