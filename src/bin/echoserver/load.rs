//! `echoserver load`: sends messages to any echo server, verifies every byte, and measures.

// Counts and times become figures to read: a float is wide enough for that.
#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss)]

mod driver;
mod flow;
mod plan;
mod report;
mod tally;

use std::io::{self, IsTerminal};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{iter, mem, thread};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use self::driver::Driver;
pub(crate) use self::plan::Options;
use self::plan::Plan;
use self::tally::{Measured, Tally};
use crate::error::with_context;
use crate::output::{Exit, FAILURE, print};
use crate::platform;
use crate::target::Target;

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<(), Exit> {
    let target = Target::find(&options.address, options.timeout)?;
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
    let measured = generate(&plan)?;
    print(if options.json {
        report::json(&target, &plan, &measured)
    } else {
        report::text(&plan, &measured)
    })?;
    let passed = measured.total.failed == 0 && measured.total.messages > 0;
    passed.then_some(()).ok_or(Exit(FAILURE, None))
}

/// Runs the threads until the end of the plan.
fn generate(plan: &Plan) -> Result<Measured, Exit> {
    let tallies: Vec<_> = (0..plan.threads).map(|_| Mutex::default()).collect();
    let drivers = (tallies.iter().enumerate())
        .map(|(index, tally)| Driver::new(plan, index, tally))
        .collect::<io::Result<Vec<_>>>()?;
    let (running, ended) = mpsc::channel();
    // The threads start only if all of them can be started.
    let (start, started) = crossbeam_channel::bounded(plan.threads);
    let run = || {
        started
            .recv()
            .map_or(Ok(()), |(driver, running): (Driver, _)| driver.run(running))
    };
    thread::scope(|scope| {
        let spawn = |_| thread::Builder::new().spawn_scoped(scope, run);
        let threads: io::Result<Vec<_>> = (0..plan.threads).map(spawn).collect();
        // Dropped here, it ends the threads that have been started.
        let start = start;
        let threads = threads
            .map_err(|error| with_context(&error, "cannot start the threads of the load"))?;
        for driver in iter::zip(drivers, iter::repeat(running)) {
            start.send(driver).expect("each thread takes one");
        }
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
fn measure(plan: &Plan, tallies: &[Mutex<Tally>], ended: &Receiver<()>) -> Result<Measured, Exit> {
    let show_progress = !plan.options.json && io::stdout().is_terminal();
    let runs_until = |time: Instant| {
        let timeout = time.saturating_duration_since(Instant::now());
        ended.recv_timeout(timeout) == Err(RecvTimeoutError::Timeout)
    };
    let take = || {
        let mut sum = Tally::default();
        for tally in tallies {
            sum.add(&mem::take(&mut tally.lock().expect("no thread panics")));
        }
        sum
    };
    plan.opened.wait();
    let (mut total, mut start) = (Tally::default(), Instant::now());
    if !plan.options.warm_up.is_zero() {
        runs_until(start + plan.options.warm_up);
        (total, start) = (take(), Instant::now());
    }
    let warm_up_messages = mem::take(&mut total.messages);
    let warm_up_bytes = mem::take(&mut total.bytes);
    total.rtt.0.reset();
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
            print(report::second((next - start).as_secs(), &tally))?;
        }
    }
}
