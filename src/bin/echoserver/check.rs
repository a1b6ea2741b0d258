//! `echoserver check`: tests any echo server from outside, and reports what it gets wrong.

mod cases;
mod client;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::{self, Builder, ScopedJoinHandle};
use std::time::{Duration, Instant};
use std::{iter, ptr};

use clap::Args;
use echoserver::Address;
use glob::Pattern;
use serde_json::{Value, json};

use self::cases::{CASES, Case, STRICT};
use self::client::TestedServer;
use crate::output::{Exit, FAILURE, NOT_RUN, print};
use crate::target::{self, Target};
use crate::values;

/// Test an echo server: which bytes, closes, resets and bursts it gets wrong
#[derive(Debug, Args)]
#[command(max_term_width = 100)]
#[command(after_help = "\
    Cases are required (a TCP stream comes back complete) or strict (urgent data and backpressure,\n\
    which many servers get wrong). A failed strict case counts only with --strict.\n\
    Exit status: 0 all passed, 1 a case failed, 2 bad usage, 3 the server cannot be reached,\n\
    4 a case was not run: this machine has too few descriptors, ports or threads.")]
#[expect(clippy::struct_excessive_bools, reason = "these options have no value")]
pub(crate) struct Options {
    #[arg(value_name = "HOST:PORT", help = target::FORMS, required_unless_present = "list")]
    address: Option<Address>,

    /// Also fail if a strict case fails
    #[arg(long)]
    strict: bool,

    /// Run only the cases whose name matches, for example 'half-close*'; repeatable
    #[arg(long, value_name = "GLOB", value_parser = parse_glob)]
    only: Vec<Pattern>,

    /// How long the server may do nothing before a case fails, and a fifth of how long a case may take
    #[arg(long, value_name = "TIME", default_value = "5s")]
    #[arg(value_parser = values::time(Duration::from_millis(1)))]
    patience: Duration,

    /// Cases that run at the same time
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = values::count::<u16>(1..=100))]
    jobs: u16,

    /// Take the first line that the server sends on each connection as a greeting
    #[arg(long)]
    skip_greeting: bool,

    /// Print one JSON object at the end instead of lines of text
    #[arg(long)]
    json: bool,

    /// List the cases and exit
    #[arg(long)]
    list: bool,
}

/// Parses a pattern for names, with hyphens or underscores.
fn parse_glob(text: &str) -> Result<Pattern, String> {
    let pattern = Pattern::new(&text.replace('_', "-")).map_err(|error| error.to_string())?;
    let is_known = CASES.iter().any(|case| pattern.matches(&case.name()));
    let error = || "no case matches; see --list".to_owned();
    is_known.then_some(pattern).ok_or_else(error)
}

/// How one case ended.
struct Outcome {
    case: &'static Case,
    /// `ok`, `FAIL`, `warn` if a failure does not count, `skip`, or `not run` because of this machine.
    status: &'static str,
    seconds: f64,
    error: Option<String>,
}

/// Runs the command.
///
/// # Errors
///
/// An exit status, and what to print on stderr.
pub(crate) fn run(options: &Options) -> Result<(), Exit> {
    let is_chosen = |case: &&Case| {
        let mut patterns = options.only.iter();
        options.only.is_empty() || patterns.any(|pattern| pattern.matches(&case.name()))
    };
    let chosen: Vec<_> = CASES.iter().filter(is_chosen).collect();
    let Some(address) = options.address.as_ref().filter(|_| !options.list) else {
        let lines = chosen.iter().map(|case| {
            let (name, class) = (case.name(), case.class);
            format!("{name:45} {class:9} {}\n", case.description)
        });
        return print(lines.collect::<String>());
    };
    let target = Target::find(address, options.patience)?;
    report(options, &target, &run_cases(options, &chosen, &target)?)
}

/// Runs the cases on `--jobs` threads, and prints each as it ends. Returns them in the order of the table.
fn run_cases(
    options: &Options,
    cases: &[&'static Case],
    target: &Target,
) -> Result<Vec<Outcome>, Exit> {
    let next = AtomicUsize::new(0);
    let run = || -> Result<Vec<_>, Exit> {
        let cases = iter::from_fn(|| cases.get(next.fetch_add(1, Relaxed)));
        cases.map(|case| run_case(case, target, options)).collect()
    };
    let outcomes: Result<Vec<_>, Exit> = thread::scope(|scope| {
        // Fewer, if the system has no more threads.
        let spawn = |_| Builder::new().spawn_scoped(scope, run).ok();
        let threads: Vec<_> = (1..options.jobs).map_while(spawn).collect();
        let own = iter::once(run());
        let others = threads.into_iter().map(ScopedJoinHandle::join);
        own.chain(others.map(|result| result.expect("no panic")))
            .collect()
    });
    let mut outcomes: Vec<_> = outcomes?.into_iter().flatten().collect();
    // Their addresses have the order of the table.
    outcomes.sort_by_key(|outcome: &Outcome| ptr::from_ref(outcome.case));
    Ok(outcomes)
}

fn run_case(case: &'static Case, target: &Target, options: &Options) -> Result<Outcome, Exit> {
    let server = TestedServer {
        address: &target.address,
        patience: options.patience,
        start: Instant::now(),
        skip_greeting: options.skip_greeting,
        local_fault: OnceLock::new(),
    };
    let can_run = target.is_tcp() || !case.needs_tcp();
    let result = can_run.then(|| (case.run)(&server));
    let status = match &result {
        None => "skip",
        Some(Ok(())) => "ok",
        Some(Err(_)) if server.local_fault.get().is_some() => "not run",
        Some(Err(_)) if case.class == STRICT && !options.strict => "warn",
        Some(Err(_)) => "FAIL",
    };
    let seconds = server.start.elapsed().as_secs_f64();
    let failure = result.and_then(Result::err);
    let error = failure.map(|error| server.local_fault.into_inner().unwrap_or(error));
    if !options.json {
        let (name, error) = (case.name(), error.as_deref().unwrap_or_default());
        let line = format!("{status:7}  {name:45} {seconds:6.2} s  {error}");
        print(format!("{}\n", line.trim_end()))?;
    }
    Ok(Outcome {
        case,
        status,
        seconds,
        error,
    })
}

/// Prints all outcomes as JSON, or how many there are of each kind. Fails if a case has failed.
fn report(options: &Options, target: &Target, outcomes: &[Outcome]) -> Result<(), Exit> {
    let statuses = outcomes.iter().map(|outcome| outcome.status);
    let count = |status| statuses.clone().filter(|other| *other == status).count();
    let [passed, failed, warned, skipped, not_run] =
        ["ok", "FAIL", "warn", "skip", "not run"].map(count);
    let problems = [(failed, FAILURE), (not_run, NOT_RUN)];
    let problem = problems.iter().find(|(count, _)| *count > 0);
    let text = if options.json {
        let cases = outcomes.iter().map(|outcome| {
            json!({
                "name": outcome.case.name(),
                "class": outcome.case.class,
                "status": outcome.status.to_lowercase(),
                "seconds": outcome.seconds,
                "error": outcome.error,
            })
        });
        let report = json!({
            "target": target.name,
            "strict": options.strict,
            "passed": problem.is_none(),
            "cases": cases.collect::<Value>(),
        });
        report.to_string()
    } else {
        let note = |count, what: &str| match count {
            0 => String::new(),
            _ => format!(", {count} {what}"),
        };
        let warned = note(warned, "strict failed (not counted without --strict)");
        let skipped = note(skipped, "skipped (TCP only)");
        let skipped = skipped + &note(not_run, "not run, because of this machine");
        let all = outcomes.len();
        format!("{target}: {passed} of {all} cases passed, {failed} failed{warned}{skipped}")
    };
    print(format!("{text}\n"))?;
    problem.map_or(Ok(()), |(_, status)| Err(Exit(*status, None)))
}
