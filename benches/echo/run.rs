//! The run: which servers and measures, in which order, and until when.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::chart;
use crate::measures::{self, Case, Effort, Measure, Scale, Shape};
use crate::options::Options;
use crate::peers;
use crate::process::{Kind, Server};
use crate::report::{self, Results};

/// Descriptors that a process needs for other things than connections.
const SPARE: u64 = 100;

/// A quick run begins no sample later than this.
const QUICK_MAX: Duration = Duration::from_secs(52);

/// Cargo's `target`, whatever it is called.
const TARGET: &str = env!("CARGO_TARGET_TMPDIR");

pub(crate) fn run() -> Result<(), String> {
    let options = Options::parse();
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let workers = options.workers.map_or((cpus / 2).max(1), usize::from);
    // Servers inherit it.
    let limit = rlimit::increase_nofile_limit(u64::MAX).map_err(|error| error.to_string())?;
    if let Some(name) = &options.serve {
        return peers::serve(name, workers).map_err(|error| error.to_string());
    }
    if options.list {
        list(&options);
        return Ok(());
    }
    let plan = Plan::new(&options, workers, limit)?;
    plan.print();
    let mut progress = Progress::start(&plan)?;
    let mut all = Vec::new();
    for measure in &plan.measures {
        let results = plan.take(measure, &mut progress);
        progress.print(&report::tables(measure, &results));
        all.push(results);
        if progress.interrupted.load(Ordering::Relaxed) {
            break;
        }
    }
    progress.bar.finish_and_clear();
    print!("{}", report::noise(&all));
    plan.draw(&all)?;
    if progress.interrupted.load(Ordering::Relaxed) {
        return Err("interrupted".to_owned());
    }
    // What becomes of its peers is their affair; this server has no excuse.
    let is_ours = |fault: &&String| fault.starts_with("echoserver");
    let faults: Vec<String> = all.iter().flat_map(Results::faults).collect();
    match faults.iter().find(is_ours) {
        Some(fault) => Err(fault.clone()),
        None => Ok(()),
    }
}

fn list(options: &Options) {
    println!("Measures:");
    for (name, what) in measures::NAMES {
        println!("  {name:15} {what}");
    }
    println!("Servers:");
    for Server { name, .. } in servers(options) {
        let what = peers::PEERS.iter().find(|(known, _)| *known == name);
        println!("  {name:15} {}", what.map_or("", |(_, what)| *what));
    }
}

/// Every server there is, the reference first.
fn servers(options: &Options) -> Vec<Server> {
    let arguments: Vec<String> = options
        .server_args
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let own = |name: &str, arguments| Server {
        name: name.to_owned(),
        kind: Kind::Echoserver(arguments),
    };
    let mut servers: Vec<Server> = peers::PEERS
        .map(|(name, _)| Server {
            name: name.to_owned(),
            kind: Kind::Peer,
        })
        .into();
    servers.insert(1, own("echoserver", arguments.clone()));
    if let Some(duration) = &options.busy_poll {
        let polling = [arguments, vec![format!("--busy-poll={duration}")]].concat();
        servers.insert(2, own("busy-poll", polling));
    }
    servers.extend(options.peer.iter().map(|(name, command)| Server {
        name: name.clone(),
        kind: Kind::Command(command.clone()),
    }));
    servers.extend(options.target.iter().map(|address| Server {
        name: address.clone(),
        kind: Kind::Remote(address.clone()),
    }));
    servers
}

struct Plan {
    servers: Vec<Server>,
    measures: Vec<Measure>,
    rounds: u32,
    effort: Effort,
    workers: usize,
    deadline: Option<Instant>,
}

impl Plan {
    fn new(options: &Options, workers: usize, descriptors: u64) -> Result<Self, String> {
        // Without cargo's word for it this is a test: does all of it work?
        let (rounds, seconds, max_connections) = match (options.bench, options.quick) {
            (false, _) => (1, 0.1, 100),
            (true, true) => (3, 0.12, 4_000),
            (true, false) => (5, 1.0, 10_000),
        };
        let sample = options.seconds.unwrap_or(Duration::from_secs_f64(seconds));
        let room = usize::try_from(descriptors.saturating_sub(SPARE)).unwrap_or(usize::MAX);
        let scale = Scale {
            workers,
            max_connections: room.clamp(1, max_connections),
        };
        Ok(Self {
            servers: chosen(servers(options), &options.servers, |server| &server.name)?,
            measures: chosen(every_measure(scale), &options.only, |measure| measure.name)?,
            rounds: options.rounds.unwrap_or(rounds),
            effort: Effort {
                sample,
                warm_up: (sample / 4).min(Duration::from_millis(250)),
                threads: options.load_threads.map_or(workers, usize::from),
            },
            workers,
            deadline: options.quick.then(|| Instant::now() + QUICK_MAX),
        })
    }

    fn print(&self) {
        println!(
            "{} rounds of {:?} after {:?} of warm-up; {} worker(s), {} load thread(s), {} CPU(s)\n",
            self.rounds,
            self.effort.sample,
            self.effort.warm_up,
            self.workers,
            self.effort.threads,
            thread::available_parallelism().map_or(0, usize::from),
        );
    }

    fn samples(&self) -> u64 {
        let of = |measure: &Measure| self.rounds_of(measure) as usize * measure.cases.len();
        let rounds: usize = self.measures.iter().map(of).sum();
        (rounds * self.servers.len()) as u64
    }

    /// In a hurry one round is enough for what varies little, or for what is only an outline.
    fn rounds_of(&self, measure: &Measure) -> u32 {
        match self.deadline {
            Some(_) if measure.shape != Shape::Rate => 1,
            _ => self.rounds,
        }
    }

    /// Takes all samples of a measure: for each round each case, for each case each server.
    fn take(&self, measure: &Measure, progress: &mut Progress) -> Results {
        let mut results = Results::new(measure, &self.servers);
        for round in 1..=self.rounds_of(measure) {
            for (case_index, case) in measure.cases.iter().enumerate() {
                for (server_index, server) in self.servers.iter().enumerate() {
                    progress.next(measure, case, server, round);
                    let entry = &mut results.entries[case_index][server_index];
                    if entry.fault.is_some() || !self.goes_on(progress) {
                        continue;
                    }
                    match measures::sample(case, server, self.effort) {
                        Ok(sample) => entry.samples.push((round, sample)),
                        Err(fault) => entry.fault = Some(fault),
                    }
                }
            }
        }
        results
    }

    fn goes_on(&self, progress: &Progress) -> bool {
        !progress.interrupted.load(Ordering::Relaxed)
            && self
                .deadline
                .is_none_or(|deadline| Instant::now() < deadline)
    }

    fn draw(&self, all: &[Results]) -> Result<(), String> {
        let target = Path::new(TARGET).parent().unwrap_or(Path::new(TARGET));
        let path = target.join("echo-bench.svg");
        let svg = chart::draw(&self.measures, all);
        fs::write(&path, svg)
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        println!("chart: {}", path.display());
        Ok(())
    }
}

fn every_measure(scale: Scale) -> Vec<Measure> {
    let names = measures::NAMES.iter().map(|(name, _)| name);
    names
        .filter_map(|name| measures::measure(name, scale))
        .collect()
}

/// Those that were asked for, or all.
fn chosen<T>(all: Vec<T>, wanted: &[String], name: impl Fn(&T) -> &str) -> Result<Vec<T>, String> {
    if let Some(unknown) = wanted
        .iter()
        .find(|wanted| !all.iter().any(|one| name(one) == **wanted))
    {
        let known: Vec<_> = all.iter().map(name).collect();
        return Err(format!(
            "nothing is called {unknown}; there are: {}",
            known.join(", ")
        ));
    }
    let is_wanted = |one: &T| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name(one));
    Ok(all.into_iter().filter(is_wanted).collect())
}

/// What is being done, and whether anybody wants it no more.
struct Progress {
    bar: ProgressBar,
    interrupted: Arc<AtomicBool>,
}

impl Progress {
    fn start(plan: &Plan) -> Result<Self, String> {
        let template = "{bar:30} {pos}/{len} {elapsed}, {eta} left: {msg}";
        let style = ProgressStyle::with_template(template).map_err(|error| error.to_string())?;
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // Servers have to be killed first: samples are short, so it is looked at between them.
            signal_hook::flag::register(signal, Arc::clone(&interrupted))
                .map_err(|error| error.to_string())?;
        }
        Ok(Self {
            bar: ProgressBar::new(plan.samples()).with_style(style),
            interrupted,
        })
    }

    fn next(&mut self, measure: &Measure, case: &Case, server: &Server, round: u32) {
        let (name, label) = (measure.name, &case.label);
        let message = format!("{name} {label} {}, round {round}", server.name);
        self.bar.set_message(message);
        self.bar.inc(1);
    }

    fn print(&self, text: &str) {
        self.bar.suspend(|| print!("{text}"));
    }
}
