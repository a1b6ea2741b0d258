//! `echoserver load`: sends messages to any echo server, verifies every byte, and measures.

// Counts and times become figures to read: a float is wide enough for that.
#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss)]

mod connection;
mod driver;
mod flow;
mod plan;
mod report;
mod tally;

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{iter, mem, thread};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use socket2::Socket;

use self::driver::{Driver, Tallies};
pub(crate) use self::plan::Options;
use self::plan::Plan;
use self::tally::{Measured, Tally};
use crate::error::with_context;
use crate::output::{Exit, FAILURE, USAGE, print};
use crate::platform;
use crate::target::Target;

/// Intervals that are kept: a day of seconds.
const MAX_INTERVALS: usize = 86_400;

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<(), Exit> {
    let limit = platform::raise_descriptor_limit().ok().flatten();
    let checked = options.check(limit);
    checked.map_err(|error| Exit(USAGE, Some(error)))?;
    // This connection is one of the load: a server may accept a single client.
    let (target, first) = Target::connect(&options.address, options.timeout)?;
    let plan = options.plan(&target);
    // The first signal ends the run, a second one the process.
    let signals = [SIGINT, SIGTERM].into_iter();
    for signal in signals.filter(|signal| !platform::is_ignored_at_start(*signal)) {
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&plan.stop))?;
        flag::register(signal, Arc::clone(&plan.stop))?;
    }
    if !options.json {
        print(report::head(&target, &plan))?;
    }
    let measured = generate(&plan, first)?;
    print(if options.json {
        report::json(&target, &plan, &measured)
    } else {
        report::text(&plan, &measured)
    })?;
    let passed = report::failure(&plan, &measured).is_none();
    passed.then_some(()).ok_or(Exit(FAILURE, None))
}

/// Runs the threads until the end of the plan.
fn generate(plan: &Plan, first: (Socket, Duration)) -> Result<Measured, Exit> {
    let tallies: Vec<_> = (0..plan.threads).map(|_| Tallies::default()).collect();
    let mut first = Some(first);
    let drivers = (tallies.iter().enumerate())
        .map(|(index, tallies)| Driver::new(plan, index, tallies, first.take()))
        .collect::<io::Result<Vec<_>>>()?;
    let (running, ended) = mpsc::channel();
    // The threads start only if all of them can be started.
    let (start, started) = crossbeam_channel::bounded(plan.threads);
    let run = || {
        started
            .recv()
            .map_or(Ok(()), |(driver, running): (Driver, _)| driver.run(running))
    };
    let mut measured = thread::scope(|scope| {
        let spawn = |_| thread::Builder::new().spawn_scoped(scope, run);
        let threads: io::Result<Vec<_>> = (0..plan.threads).map(spawn).collect();
        // Dropped here, it ends the threads that have been started.
        let start = start;
        let threads = threads
            .map_err(|error| with_context(&error, "cannot start the threads of the load"))?;
        for driver in iter::zip(drivers, iter::repeat(running)) {
            start.send(driver).expect("each thread takes one");
        }
        let measured = measure(plan, &tallies, &ended).inspect_err(|_| plan.stop());
        for thread in threads {
            thread.join().expect("threads do not panic")?;
        }
        measured
    })?;
    let late = take(&tallies, 1);
    let (messages, bytes) = (measured.total.messages, measured.total.bytes);
    measured.after_end = late.messages;
    measured.total.add(&late);
    (measured.total.messages, measured.total.bytes) = (messages, bytes);
    Ok(measured)
}

/// Takes what the threads have counted until their end (0) or after it (1).
fn take(tallies: &[Tallies], part: usize) -> Tally {
    let mut sum = Tally::default();
    for tallies in tallies {
        sum.add(&mem::take(
            &mut tallies[part].lock().expect("no thread panics"),
        ));
    }
    sum
}

/// Collects what the threads count until their end, and prints a line for each interval. Each thread sends when it has ended.
fn measure(plan: &Plan, tallies: &[Tallies], ended: &Receiver<Instant>) -> Result<Measured, Exit> {
    let options = plan.options;
    let is_watched = io::stdout().is_terminal() || plan.is_endless();
    let is_shown = options.interval.is_some() || is_watched && !options.json;
    let take = || take(tallies, 0);
    plan.opened.wait();
    let (mut start, mut ends) = (plan.start(), None);
    let mut measured = Measured::default();
    if !options.warm_up.is_zero() {
        wait(start + options.warm_up, ended, &mut ends);
        (measured.total, start) = (take(), Instant::now());
        measured.warm_up_messages = mem::take(&mut measured.total.messages);
        measured.warm_up_bytes = mem::take(&mut measured.total.bytes);
        measured.total.rtt.0.reset();
    }
    let (cpu, mut previous) = (platform::cpu_time(), start);
    let end = plan.length.map(|length| plan.start() + length);
    let mut next = start + options.interval();
    loop {
        // The last interval is not a small rest.
        if end.is_some_and(|end| end < next + options.interval() / 2) {
            next += options.interval();
        }
        let is_running = wait(next, ended, &mut ends);
        let now = ends.filter(|_| !is_running).unwrap_or_else(Instant::now);
        let (tally, elapsed, length) = (take(), now - start, now - previous);
        measured.total.add(&tally);
        if options.json && measured.series.len() < MAX_INTERVALS {
            let interval = report::interval_json(elapsed, length, &tally);
            measured.series.push(interval);
        }
        if is_shown {
            print(match options.json {
                true => format!("{}\n", report::interval_json(elapsed, length, &tally)),
                false => report::interval_text(plan, elapsed, length, &tally),
            })?;
        }
        if !is_running {
            let used = platform::cpu_time().zip(cpu);
            measured.cpu = used.map(|(after, before)| after.saturating_sub(before));
            measured.elapsed = elapsed;
            return Ok(measured);
        }
        if plan.is_endless() && platform::is_stdout_closed() {
            plan.stop();
        }
        previous = now;
        while next <= now {
            next += options.interval();
        }
    }
}

/// Waits until `time`. Returns whether a thread runs then, and notes in `end` when the last one that does not has ended.
fn wait(time: Instant, ended: &Receiver<Instant>, end: &mut Option<Instant>) -> bool {
    loop {
        match ended.recv_timeout(time.saturating_duration_since(Instant::now())) {
            Ok(time) => *end = (*end).max(Some(time)),
            Err(error) => return error == RecvTimeoutError::Timeout,
        }
    }
}
