//! The run: its options, the order of the samples, and where the results go.

mod cases;
mod charts;
mod peers;
mod report;
mod results;
mod servers;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

use self::cases::{Case, Effort, Figures};
use self::results::{Results, Sample};
use self::servers::Server;

/// An error is one line that says what could not be done.
type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Where published results are.
const RESULTS: &str = "benches/results";

/// Descriptors that a process needs for other things than connections.
const SPARE_DESCRIPTORS: u64 = 100;

/// Measures this echo server beside others, over loopback, with every byte verified.
#[derive(Debug, Parser)]
#[allow(clippy::struct_excessive_bools)] // one for each flag
#[command(name = "cargo bench --", max_term_width = 100)]
struct Options {
    /// End within a minute and a half: one round, shorter samples, fewer connections
    #[arg(long)]
    quick: bool,

    /// Samples of each server in each case [default: 5, or 1 if quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,

    /// Length of a sample [default: 1, or 0.2 if quick]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    seconds: Option<Duration>,

    /// Only these cases; --list shows them
    #[arg(long, value_name = "CASE", value_delimiter = ',')]
    only: Vec<String>,

    /// Only these servers; --list shows them
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    servers: Vec<String>,

    /// Threads of each server and of the load [default: half the CPUs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,

    /// Also another server: a shell command with {port} and, optionally, {workers}
    #[arg(long, value_name = "NAME='COMMAND'", value_parser = parse_peer)]
    peer: Vec<(String, String)>,

    /// Write the samples to benches/results, and their tables and charts into the documents
    #[arg(long, conflicts_with_all = ["quick", "only", "servers", "peer"])]
    publish: bool,

    /// Do not measure: write the tables and charts of the last published samples into the documents
    #[arg(long)]
    render: bool,

    /// List the cases and the servers
    #[arg(long)]
    list: bool,

    /// Serve as this server, on a free port
    #[arg(long, value_name = "NAME")]
    serve: Option<String>,

    /// An option that cargo adds to `cargo bench`, but not to `cargo test`
    #[arg(long, hide = true)]
    bench: bool,
}

fn parse_seconds(text: &str) -> Result<Duration, &'static str> {
    let seconds = text.parse().ok().filter(|it| (0.01..=3600.0).contains(it));
    let seconds = seconds.ok_or("expected 0.01 to 3600 seconds")?;
    Ok(Duration::from_secs_f64(seconds))
}

fn parse_peer(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((name, command)) if !name.is_empty() && command.contains("{port}") => {
            Ok((name.to_owned(), command.to_owned()))
        }
        _ => Err("expected NAME='COMMAND', with {port} in the command"),
    }
}

pub(crate) fn run() -> ExitCode {
    match run_with(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_with(options: &Options) -> Result<()> {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let workers = options.workers.map_or((cpus / 2).max(1), usize::from);
    // The servers inherit the limit.
    let descriptors = rlimit::increase_nofile_limit(u64::MAX)?;
    if let Some(name) = &options.serve {
        return Ok(peers::serve(name, workers)?);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if options.render {
        return render(root);
    }
    let plan = Plan::new(options, workers, descriptors)?;
    if options.list {
        plan.list();
        return Ok(());
    }
    let results = plan.run()?;
    print!("{}", report::text(&results));
    match options.bench {
        true => write(root, &results, options.publish)?,
        false => check_published(root)?,
    }
    // Other servers may fail.
    let mut samples = results.samples.iter();
    let failed = samples.find(|sample| sample.server == "echoserver" && sample.error.is_some());
    match failed {
        Some(Sample { case, error, .. }) => Err(format!("echoserver, {case}: {error:?}").into()),
        None => Ok(()),
    }
}

/// Writes the samples, and with `publish` the documents.
fn write(root: &Path, results: &Results, publish: bool) -> Result<()> {
    if !publish {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .parent()
            .unwrap_or(root);
        write_file(&target.join("echo-bench.json"), &results.to_json())?;
        for (name, svg) in report::charts(results) {
            write_file(&target.join(name), &svg)?;
        }
        return Ok(());
    }
    let name = results.date.replace(':', "");
    let path = root.join(RESULTS).join(format!("{name}.json"));
    write_file(&path, &results.to_json())?;
    render(root)
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    println!("writing {}", path.display());
    Ok(fs::write(path, text)?)
}

/// The documents and charts, by path, as the last published results determine them.
fn published(root: &Path) -> Result<Vec<(PathBuf, String)>> {
    let results = Results::newest(&root.join(RESULTS))?;
    let mut files = Vec::new();
    for path in ["README.md", "benches/README.md"].map(|name| root.join(name)) {
        let document = fs::read_to_string(&path)?;
        files.push((path, report::embed(&document, &results)));
    }
    let charts = report::charts(&results);
    files.extend(charts.map(|(name, svg)| (root.join("benches").join(name), svg)));
    Ok(files)
}

fn render(root: &Path) -> Result<()> {
    let files = published(root)?;
    files
        .iter()
        .try_for_each(|(path, text)| write_file(path, text))
}

/// Checks that the documents and charts show the last published results.
fn check_published(root: &Path) -> Result<()> {
    let is_old =
        |(path, text): &(PathBuf, String)| fs::read_to_string(path).ok().as_ref() != Some(text);
    match published(root)?.into_iter().find(is_old) {
        None => Ok(()),
        Some((path, _)) => {
            let path = path.display();
            Err(format!("{path} does not show the last published results; see --render").into())
        }
    }
}

struct Plan {
    servers: Vec<Server>,
    cases: Vec<Case>,
    rounds: u32,
    effort: Effort,
}

impl Plan {
    fn new(options: &Options, workers: usize, descriptors: u64) -> Result<Self> {
        // Without `--bench` this is a test: one short sample of everything.
        let (rounds, seconds, max_connections) = match (options.bench, options.quick) {
            (false, _) => (1, 0.1, 50),
            (true, true) => (1, 0.2, 1_000),
            (true, false) => (5, 1.0, 10_000),
        };
        let sample = options.seconds.unwrap_or(Duration::from_secs_f64(seconds));
        let max_connections = max_connections.min(descriptors.saturating_sub(SPARE_DESCRIPTORS));
        let cases = cases::cases(max_connections.max(1) as usize);
        Ok(Self {
            servers: select(Server::all(&options.peer), &options.servers, |it| &it.name)?,
            cases: select(cases, &options.only, |it| it.name)?,
            rounds: options.rounds.unwrap_or(rounds),
            effort: Effort {
                sample,
                warm_up: (sample / 4).min(Duration::from_millis(250)),
                workers,
            },
        })
    }

    fn list(&self) {
        let names: Vec<_> = self.cases.iter().map(|case| case.name).collect();
        println!("cases: {}", names.join(", "));
        for server in &self.servers {
            println!("{:11} {}", server.name, server.description);
        }
    }

    /// Takes all samples: in each round each case, for each case each server. Each round starts with another server.
    fn run(&self) -> Result<Results> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // Servers must be killed first; samples are short, so the flag is read between them.
            signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
        }
        let mut results = Results {
            workers: self.effort.workers,
            rounds: self.rounds,
            sample_seconds: self.effort.sample.as_secs_f64(),
            ..Results::describe()
        };
        let count = self.rounds as usize * self.cases.len() * self.servers.len();
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} left: {msg}")?;
        let bar = ProgressBar::new(count as u64).with_style(style);
        for round in 1..=self.rounds {
            for case in &self.cases {
                let servers = self.servers.iter().cycle();
                let servers = servers.skip(round as usize - 1).take(self.servers.len());
                for server in servers {
                    if interrupted.load(Ordering::Relaxed) {
                        return Err("interrupted".into());
                    }
                    bar.set_message(format!("round {round}, {}, {}", case.name, server.name));
                    let (figures, error) =
                        match cases::sample(*case, server, self.effort, results.capacity()) {
                            Ok(figures) => (figures, None),
                            Err(error) => (Figures::new(), Some(error.to_string())),
                        };
                    results.samples.push(Sample {
                        case: case.name.to_owned(),
                        server: server.name.clone(),
                        round,
                        figures,
                        error,
                    });
                    bar.inc(1);
                }
            }
        }
        bar.finish_and_clear();
        Ok(results)
    }
}

/// The items that are named in `names`, or all if there are none.
fn select<T>(all: Vec<T>, names: &[String], name: impl Fn(&T) -> &str) -> Result<Vec<T>> {
    let known: Vec<_> = all.iter().map(|item| name(item).to_owned()).collect();
    if let Some(unknown) = names.iter().find(|wanted| !known.contains(wanted)) {
        let known = known.join(", ");
        return Err(format!("there is no {unknown}; there are {known}").into());
    }
    let is_selected =
        |item: &T| names.is_empty() || names.iter().any(|wanted| wanted == name(item));
    Ok(all.into_iter().filter(is_selected).collect())
}
