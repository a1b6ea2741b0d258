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
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

use self::cases::{CASES, Case};
use self::results::{Results, Sample};
use self::servers::Server;

/// An error is one line that says what could not be done.
type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Where published results are.
const RESULTS: &str = "benches/results";

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
    seconds: Option<f64>,

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
    #[arg(long, value_name = "NAME='COMMAND'", value_parser = Server::parse)]
    peer: Vec<Server>,

    /// Write the samples to benches/results, and their tables and charts into the documents
    #[arg(long, conflicts_with_all = ["quick", "only", "servers", "peer"])]
    publish: bool,

    /// Do not measure: write the tables and charts of the last published samples into the documents
    #[arg(long)]
    render: bool,

    /// List the cases and the servers
    #[arg(long)]
    list: bool,

    /// Serve as this server
    #[arg(long, value_name = "NAME")]
    serve: Option<String>,

    /// Port of --serve; 0 is a free one
    #[arg(long, value_name = "PORT", default_value_t = 0, requires = "serve")]
    port: u16,

    /// An option that cargo adds to `cargo bench`, but not to `cargo test`
    #[arg(long, hide = true)]
    bench: bool,
}

fn parse_seconds(text: &str) -> Result<f64, &'static str> {
    let seconds = text.parse().ok().filter(|it| (0.01..=3600.0).contains(it));
    seconds.ok_or("expected 0.01 to 3600 seconds")
}

pub(crate) fn run() -> Result<()> {
    let options = Options::parse();
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let workers = options.workers.map_or((cpus / 2).max(1), usize::from);
    // The servers inherit the limit. Connections leave some descriptors for other things.
    let max_descriptors = rlimit::increase_nofile_limit(u64::MAX)?.saturating_sub(100);
    if let Some(name) = &options.serve {
        return Ok(peers::serve(name, options.port, workers)?);
    }
    if options.render {
        return update_documents(false);
    }
    let servers = [Server::built_in(), options.peer.clone()].concat();
    let servers = select(&servers, &options.servers, |it| &it.name)?;
    let cases = select(&CASES, &options.only, |it| it.0)?;
    if options.list {
        let names: Vec<_> = cases.iter().map(|case| case.0).collect();
        println!("cases: {}", names.join(", "));
        for server in &servers {
            println!("{:11} {}", server.name, server.description);
        }
        return Ok(());
    }

    // Without `--bench` this is a test: one short sample of everything.
    let (rounds, seconds, max_connections) = match (options.bench, options.quick) {
        (false, _) => (1, 0.1, 50),
        (true, true) => (1, 0.2, 1_000),
        (true, false) => (5, 1.0, 10_000),
    };
    let mut results = Results {
        workers,
        rounds: options.rounds.unwrap_or(rounds),
        sample_seconds: options.seconds.unwrap_or(seconds),
        max_connections: max_descriptors.clamp(1, max_connections) as usize,
        ..Results::describe()
    };
    take_samples(&mut results, &cases, servers)?;
    print!("{}", report::text(&results));
    match (options.bench, options.publish) {
        (false, _) => {
            cases::test_unmeasured_flood()?;
            Results::from_json(&results.to_json())?;
            update_documents(true)?;
        }
        (true, true) => {
            let name = results.date.replace(':', "");
            write_file(&Path::new(RESULTS).join(name + ".json"), &results.to_json())?;
            update_documents(false)?;
        }
        (true, false) => {
            let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
            let json = target.with_file_name("echo-bench.json");
            write_file(&json, &results.to_json())?;
            for (name, svg) in charts::all(&results) {
                write_file(&target.with_file_name(name), &svg)?;
            }
        }
    }
    // Other servers may fail.
    let mut samples = results.samples.iter();
    let failed = samples.find(|sample| sample.server == "echoserver" && sample.error.is_some());
    match failed {
        Some(Sample { case, error, .. }) => Err(format!("echoserver, {case}: {error:?}").into()),
        None => Ok(()),
    }
}

/// Takes all samples: in each round each case, for each case each server. Each round starts with another server.
fn take_samples(results: &mut Results, cases: &[Case], mut servers: Vec<Server>) -> Result<()> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // Servers must be killed first; samples are short, so the flag is read between them.
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    let count = results.rounds as usize * cases.len() * servers.len();
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} left: {msg}")?;
    let bar = ProgressBar::new(count as u64).with_style(style);
    for round in 1..=results.rounds {
        for case in cases {
            for server in &servers {
                if interrupted.load(Ordering::Relaxed) {
                    return Err("interrupted".into());
                }
                bar.set_message(format!("round {round}, {}, {}", case.0, server.name));
                let figures = case.sample(server, results);
                results.samples.push(Sample {
                    case: case.0.to_owned(),
                    server: server.name.clone(),
                    round,
                    error: figures.as_ref().err().map(ToString::to_string),
                    figures: figures.unwrap_or_default(),
                });
                bar.inc(1);
            }
        }
        servers.rotate_left(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Writes the newest published results into the documents and charts, or with `check` only compares them.
fn update_documents(check: bool) -> Result<()> {
    let results = Results::newest(RESULTS)?;
    let charts = charts::all(&results).map(|(name, svg)| (Path::new("benches").join(name), svg));
    let mut files = Vec::from(charts);
    let path = PathBuf::from("benches/README.md");
    let document = report::embed(&fs::read_to_string(&path)?, &results);
    files.push((path, document.ok_or("a table without an end")?));
    for (path, text) in files {
        if !check {
            write_file(&path, &text)?;
        } else if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
            let path = path.display();
            return Err(format!("{path} does not show the newest results; see --render").into());
        }
    }
    Ok(())
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    println!("writing {}", path.display());
    Ok(fs::write(path, text)?)
}

/// The items that are named in `names`, or all if there are none.
fn select<T: Clone>(all: &[T], names: &[String], name: impl Fn(&T) -> &str) -> Result<Vec<T>> {
    let known: Vec<_> = all.iter().map(&name).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        let known = known.join(", ");
        return Err(format!("there is no {unknown}; there are {known}").into());
    }
    let is_selected = |item: &&T| names.is_empty() || names.iter().any(|it| it == name(item));
    Ok(all.iter().filter(is_selected).cloned().collect())
}
