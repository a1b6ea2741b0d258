//! `echoserver check`: tests any echo server from outside, and reports what it gets wrong.

mod cases;
mod client;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use echoserver::Address;
use glob::Pattern;
use serde_json::json;

use self::cases::{CASES, Case, Class};
use self::client::{CaseResult, Endpoint};
use crate::figures::parse_time;
use crate::target::{self, Target, UNREACHABLE};
use crate::{FAILURE, Failure, USAGE, print};

/// Test an echo server: which bytes, closes, resets and bursts it gets wrong
#[derive(Debug, Args)]
#[command(max_term_width = 100)]
#[command(after_help = "\
    Cases are required (a TCP stream comes back complete) or strict (urgent data and backpressure,\n\
    which many servers get wrong). A failed strict case counts only with --strict.\n\
    Exit status: 0 all passed, 1 a case failed, 2 bad usage, 3 the server cannot be reached.")]
pub(crate) struct Options {
    #[arg(value_name = "HOST:PORT", help = target::FORMS, required_unless_present = "list")]
    address: Option<Address>,

    /// Also fail if a strict case fails
    #[arg(long)]
    strict: bool,

    /// Run only the cases whose name matches, for example 'half-close*'; repeatable
    #[arg(long, value_name = "GLOB")]
    only: Vec<Pattern>,

    /// How long the server may do nothing before a case fails; halved after each case that waits in
    /// vain, down to a tenth
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = parse_time)]
    patience: Duration,

    /// Cases that run at the same time
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=100))]
    jobs: u16,

    /// Print one JSON object at the end instead of lines of text
    #[arg(long)]
    json: bool,

    /// List the cases and exit
    #[arg(long)]
    list: bool,
}

/// How one case ended.
struct Outcome {
    case: &'static Case,
    seconds: f64,
    /// `None` if the case does not apply to this kind of socket.
    result: Option<CaseResult>,
}

/// Runs the command.
///
/// # Errors
///
/// An exit status, and what to print on stderr.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let chosen = chosen(&options.only)?;
    let Some(address) = options.address.as_ref().filter(|_| !options.list) else {
        let lines = chosen.iter().map(|case| {
            let class = case.class.name();
            format!("{:45} {class:9} {}\n", case.name(), case.description)
        });
        return print(&lines.collect::<String>());
    };
    // With a low limit, some cases report that they cannot connect.
    #[cfg(unix)]
    let _limit = rlimit::increase_nofile_limit(u64::MAX);
    let target = Target::find(address, options.patience)
        .map_err(|error| Failure(UNREACHABLE, Some(error)))?;

    let outcomes = run_cases(options, &chosen, &target)?;

    let count = |status| {
        let of_status = |outcome: &&Outcome| outcome.status(options.strict) == status;
        outcomes.iter().filter(of_status).count()
    };
    let [passed, failed, warned, skipped] = ["ok", "FAIL", "warn", "skip"].map(count);
    let total = outcomes.len();
    if options.json {
        print(&report(&target, &outcomes, options.strict))?;
    } else {
        let or_none = |count, text: String| if count == 0 { String::new() } else { text };
        let warned = or_none(
            warned,
            format!(", {warned} strict failed (not counted without --strict)"),
        );
        let skipped = or_none(skipped, format!(", {skipped} skipped (TCP only)"));
        print(&format!(
            "{target}: {passed} of {total} cases passed, {failed} failed{warned}{skipped}\n"
        ))?;
    }
    match failed {
        0 => Ok(()),
        _ => Err(Failure(FAILURE, None)),
    }
}

fn chosen(patterns: &[Pattern]) -> Result<Vec<&'static Case>, Failure> {
    let unknown = |pattern: &&Pattern| !CASES.iter().any(|case| case.matches(pattern));
    if let Some(pattern) = patterns.iter().find(unknown) {
        let error =
            format!("invalid value '{pattern}' for '--only <GLOB>': no case matches; see --list");
        return Err(Failure(USAGE, Some(error)));
    }
    let is_chosen =
        |case: &&Case| patterns.is_empty() || patterns.iter().any(|pattern| case.matches(pattern));
    Ok(CASES.iter().filter(is_chosen).collect())
}

/// Runs the cases on `--jobs` threads, and prints each as it ends. Returns them in the order of `cases`.
fn run_cases(
    options: &Options,
    cases: &[&'static Case],
    target: &Target,
) -> Result<Vec<Outcome>, Failure> {
    let pace = Mutex::new(Pace::new(options.patience));
    let next = AtomicUsize::new(0);
    let (sender, ended) = mpsc::channel();
    let mut outcomes = thread::scope(|scope| {
        for _ in 0..options.jobs {
            let (sender, next, pace) = (sender.clone(), &next, &pace);
            scope.spawn(move || {
                while let Some(case) = cases.get(next.fetch_add(1, Relaxed)) {
                    // An error means that printing has failed.
                    if sender.send(run_case(case, target, pace)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let mut outcomes = Vec::new();
        for outcome in ended {
            if !options.json {
                print(&outcome.line(options.strict))?;
            }
            outcomes.push(outcome);
        }
        Ok::<_, Failure>(outcomes)
    })?;
    outcomes.sort_by_key(|outcome| {
        cases
            .iter()
            .position(|case| std::ptr::eq(*case, outcome.case))
    });
    Ok(outcomes)
}

fn run_case(case: &'static Case, target: &Target, pace: &Mutex<Pace>) -> Outcome {
    let (start, current) = (Instant::now(), *lock(pace));
    let endpoint = Endpoint::new(&target.address, current.patience, current.limit);
    let is_exhausted = current.slow_cases >= MAX_SLOW_CASES;
    let result = (target.is_tcp() || !case.needs_tcp()).then(|| match is_exhausted {
        true => Err(format!(
            "not run: {MAX_SLOW_CASES} cases in a row took too long"
        )),
        false => (case.run)(&endpoint),
    });
    let elapsed = start.elapsed();
    match &result {
        Some(Err(_)) if !is_exhausted => lock(pace).shorten(current, elapsed),
        Some(Ok(())) => lock(pace).slow_cases = 0,
        _ => {}
    }
    Outcome {
        case,
        seconds: elapsed.as_secs_f64(),
        result,
    }
}

fn lock(pace: &Mutex<Pace>) -> std::sync::MutexGuard<'_, Pace> {
    pace.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// After this many cases in a row that took too long, the others are not run.
const MAX_SLOW_CASES: u32 = 5;

/// How long cases wait. A server that is broken in many ways would otherwise take minutes.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// For the server to do anything.
    patience: Duration,
    /// For a whole case.
    limit: Duration,
    min_patience: Duration,
    /// Cases in a row that took as long as their limit.
    slow_cases: u32,
}

impl Pace {
    fn new(patience: Duration) -> Self {
        Self {
            patience,
            limit: patience * 5,
            min_patience: patience / 10,
            slow_cases: 0,
        }
    }

    /// Adapts to a case that failed after `elapsed`, and ran at the pace `then`.
    fn shorten(&mut self, then: Self, elapsed: Duration) {
        let is_slow = elapsed >= then.limit;
        self.slow_cases = if is_slow { self.slow_cases + 1 } else { 0 };
        if is_slow {
            self.limit = self.limit.min(then.limit / 2).max(self.min_patience * 4);
        }
        if elapsed >= then.patience {
            self.patience = self.patience.min(then.patience / 2).max(self.min_patience);
        }
    }
}

impl Outcome {
    fn status(&self, strict: bool) -> &'static str {
        match (&self.result, self.case.class) {
            (None, _) => "skip",
            (Some(Ok(())), _) => "ok",
            (Some(Err(_)), Class::Strict) if !strict => "warn",
            (Some(Err(_)), _) => "FAIL",
        }
    }

    fn error(&self) -> Option<&String> {
        self.result.as_ref()?.as_ref().err()
    }

    fn line(&self, strict: bool) -> String {
        let (status, name) = (self.status(strict), self.case.name());
        let error = self.error().map_or("", String::as_str);
        let line = format!("{status:4}  {name:45} {:6.2} s  {error}", self.seconds);
        format!("{}\n", line.trim_end())
    }
}

fn report(target: &Target, outcomes: &[Outcome], strict: bool) -> String {
    let cases = outcomes.iter().map(|outcome| {
        json!({
            "name": outcome.case.name(),
            "class": outcome.case.class.name(),
            "status": outcome.status(strict).to_lowercase(),
            "seconds": outcome.seconds,
            "error": outcome.error(),
        })
    });
    let cases: Vec<_> = cases.collect();
    let failed = outcomes
        .iter()
        .any(|outcome| outcome.status(strict) == "FAIL");
    let report = json!({
        "target": target.name,
        "strict": strict,
        "passed": !failed,
        "cases": cases,
    });
    format!("{report}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_shrinks_only_after_cases_that_wait_in_vain() {
        let seconds = Duration::from_secs;
        let mut pace = Pace::new(seconds(10));
        pace.shorten(pace, seconds(9));
        assert_eq!((pace.patience, pace.limit), (seconds(10), seconds(50)));
        // Cases that ran at the same time shorten it only once.
        let then = pace;
        pace.shorten(then, seconds(10));
        pace.shorten(then, seconds(50));
        assert_eq!((pace.patience, pace.limit), (seconds(5), seconds(25)));
        assert_eq!(pace.slow_cases, 1);
        for _ in 0..10 {
            pace.shorten(pace, seconds(50));
        }
        assert_eq!((pace.patience, pace.limit), (seconds(1), seconds(4)));
        assert_eq!(pace.slow_cases, 11);
        pace.shorten(pace, seconds(3));
        assert_eq!(pace.slow_cases, 0);
    }
}
