//! The command line, behind `cargo bench --`.

use std::time::Duration;

use clap::Parser;

/// Measures this echo server beside its peers, end to end over loopback, every byte checked.
///
/// Servers take turns, each sample in a process of its own. Shown are medians, their spread, and
/// ratios to the raw epoll loop of the same round.
#[derive(Debug, Parser)]
#[command(name = "cargo bench --", max_term_width = 100)]
pub(crate) struct Options {
    /// End within a minute: shorter samples, fewer rounds
    #[arg(long)]
    pub(crate) quick: bool,

    /// Samples of each server in each case [default: 5, or 3 if quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: Option<u32>,

    /// Length of a sample [default: 1, or 0.15 if quick]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) seconds: Option<Duration>,

    /// Only these measures; --list shows them
    #[arg(long, value_name = "MEASURE", value_delimiter = ',')]
    pub(crate) only: Vec<String>,

    /// Only these servers; --list shows them
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub(crate) servers: Vec<String>,

    /// Worker threads of every server [default: half the CPUs; the load has the others]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) workers: Option<u16>,

    /// Threads that make the load [default: as many as workers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) load_threads: Option<u16>,

    /// Also this server with --busy-poll
    #[arg(long, value_name = "DURATION", num_args = 0..=1, default_missing_value = "50us")]
    pub(crate) busy_poll: Option<String>,

    /// More arguments for this server, separated by blanks
    #[arg(
        long,
        value_name = "ARGUMENTS",
        allow_hyphen_values = true,
        default_value = ""
    )]
    pub(crate) server_args: String,

    /// Also another server on this machine: a shell command with {port} and, if it wants, {workers}
    #[arg(long, value_name = "NAME='COMMAND'", value_parser = peer)]
    pub(crate) peer: Vec<(String, String)>,

    /// Also a server that runs elsewhere; its CPU time and memory are not seen
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) target: Vec<String>,

    /// List the measures and the servers
    #[arg(long)]
    pub(crate) list: bool,

    /// Become a peer instead
    #[arg(long, value_name = "NAME", hide = true)]
    pub(crate) serve: Option<String>,

    /// What cargo adds to `cargo bench`, but not to `cargo test --benches`
    #[arg(long, hide = true)]
    pub(crate) bench: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected seconds, as 0.5")?;
    match seconds {
        0.01..=3600.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected 0.01 to 3600 seconds".to_owned()),
    }
}

fn peer(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, command)) if !name.is_empty() && command.contains("{port}") => {
            Ok((name.to_owned(), command.to_owned()))
        }
        _ => Err("expected NAME='COMMAND', with {port} in the command".to_owned()),
    }
}
