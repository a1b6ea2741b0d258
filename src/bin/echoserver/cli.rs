//! The command line: its options, the values they accept, and one-line error messages.

use std::env;
use std::ffi::OsString;
use std::iter;
use std::num::NonZeroUsize;
use std::time::Duration;

use bytesize::ByteSize;
use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};
use echoserver::{Address, Config};
use log::LevelFilter;

use crate::error::escape_control;
use crate::pages::GeneratedFile;
use crate::serve::greeting::Greeting;
use crate::serve::logging::Format;
use crate::{check, load};

/// Bounds of `TCP_KEEPIDLE` in Linux.
const MIN_KEEPALIVE: Duration = Duration::from_secs(1);
const MAX_KEEPALIVE: Duration = Duration::from_secs(32_767);

/// A TCP echo server that returns every byte, from a pool of event-loop threads.
#[derive(Debug, Parser)]
#[command(name = "echoserver", version, max_term_width = 100)]
#[command(mut_args(common_settings))]
#[command(
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true,
    propagate_version = true
)]
#[command(after_help = "\
    Times need a unit: 500ms, 30s, 5m. Sizes may have one: 4096, 64K, 1MiB.\n\
    Every option has an environment variable such as ECHOSERVER_MAX_CONNECTIONS.\n\
    Signals: SIGTERM, SIGINT or SIGHUP drains and exits 0; a second one exits at once.\n\
    Man pages: --generate man, man-check or man-load. Completions: --generate bash, zsh or fish.")]
pub(crate) struct Options {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    /// Address to listen on; repeat the option or separate with commas. Forms: IP:PORT, HOST:PORT,
    /// [V6]:PORT, :PORT or PORT (all interfaces, IPv6 and IPv4), unix:PATH, unix:@NAME. Port 0
    /// picks a free port [default: 5555]
    #[arg(short, long, value_name = "ADDR", help_heading = "Network")]
    #[arg(env = "ECHOSERVER_LISTEN", value_delimiter = ',')]
    pub(crate) listen: Vec<Address>,

    /// Maximum connections that wait in the kernel to be accepted
    #[arg(long, value_name = "N", help_heading = "Network")]
    #[arg(env = "ECHOSERVER_BACKLOG", default_value_t = 4096)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(i32::MAX)))]
    backlog: u32,

    /// Permissions of the files of Unix-domain sockets, --metrics included, in octal, for example
    /// 0660 [default: from the umask]
    #[arg(long, value_name = "MODE", help_heading = "Network")]
    #[arg(env = "ECHOSERVER_UNIX_MODE", value_parser = parse_mode)]
    pub(crate) unix_mode: Option<u32>,

    /// Text to send once when a client connects, with {hostname}, {peer}, {local} (the address that the
    /// client has connected to), {pid} and \n [default: none]
    #[arg(long, value_name = "TEXT", help_heading = "Network")]
    #[arg(env = "ECHOSERVER_GREETING")]
    pub(crate) greeting: Option<Greeting>,

    /// Worker threads, 1 to 1024 [default: number of CPUs]
    #[arg(short, long, value_name = "N", help_heading = "Resources")]
    #[arg(env = "ECHOSERVER_WORKERS", value_parser = parse_workers)]
    workers: Option<NonZeroUsize>,

    /// Maximum concurrent connections; at the limit, new clients wait in the kernel's backlog
    /// [default: as many as the descriptor limit allows]
    #[arg(short = 'c', long, value_name = "N", help_heading = "Resources")]
    #[arg(env = "ECHOSERVER_MAX_CONNECTIONS")]
    #[arg(value_parser = parse_count)]
    pub(crate) max_connections: Option<NonZeroUsize>,

    /// Buffer limit for each connection and direction
    #[arg(long, value_name = "SIZE", help_heading = "Resources")]
    #[arg(env = "ECHOSERVER_BUFFER_SIZE", default_value = "64KiB")]
    #[arg(value_parser = parse_buffer_size)]
    buffer_size: usize,

    /// How long a worker polls before it sleeps, for example 50us; lowers latency at the cost of up
    /// to one CPU per worker [default: off]
    #[arg(long, value_name = "TIME", help_heading = "Resources")]
    #[arg(env = "ECHOSERVER_BUSY_POLL", value_parser = parse_duration)]
    busy_poll: Option<Duration>,

    /// Close a connection that transfers no byte for this long; 0s means never [default: never]
    #[arg(long, value_name = "TIME", help_heading = "Timeouts")]
    #[arg(env = "ECHOSERVER_IDLE_TIMEOUT", value_parser = parse_duration)]
    idle_timeout: Option<Duration>,

    /// Probe a client that has sent no packet for this long, and close the connection after 6 probes
    /// without an answer, 10 s apart; 0s means never
    #[arg(long, value_name = "TIME", help_heading = "Timeouts")]
    #[arg(env = "ECHOSERVER_TCP_KEEPALIVE", default_value = "5m", value_parser = parse_keepalive)]
    tcp_keepalive: Duration,

    /// How long to report "not ready" after a signal, and still accept, before the graceful shutdown
    #[arg(long, value_name = "TIME", help_heading = "Timeouts")]
    #[arg(env = "ECHOSERVER_DRAIN_DELAY", default_value = "0s", value_parser = parse_duration)]
    pub(crate) drain_delay: Duration,

    /// Time limit for a graceful shutdown; connections that are not done are then closed, and reset if
    /// bytes are lost
    #[arg(long, value_name = "TIME", help_heading = "Timeouts")]
    #[arg(env = "ECHOSERVER_DRAIN_TIMEOUT", default_value = "5s", value_parser = parse_duration)]
    drain_timeout: Duration,

    /// Address for HTTP: /metrics for Prometheus, /healthz, /livez and /readyz for load balancers
    /// [default: off]
    #[arg(long, value_name = "ADDR", help_heading = "Logging and metrics")]
    #[arg(env = "ECHOSERVER_METRICS")]
    pub(crate) metrics: Option<Address>,

    /// Log more: -v each connection when it closes, -vv also when it opens; takes precedence over
    /// RUST_LOG
    #[arg(short, long, action = ArgAction::Count, help_heading = "Logging and metrics")]
    #[arg(env = "ECHOSERVER_VERBOSE")]
    verbose: u8,

    /// Log less: -q warnings and errors, -qq errors, -qqq nothing
    #[arg(short, long, action = ArgAction::Count, help_heading = "Logging and metrics")]
    #[arg(env = "ECHOSERVER_QUIET")]
    quiet: u8,

    /// Log format: text, or json with one object per line
    #[arg(long, value_name = "FORMAT", help_heading = "Logging and metrics")]
    #[arg(env = "ECHOSERVER_LOG_FORMAT", value_enum, default_value = "text")]
    // A list of possible values switches clap's whole help to its long form.
    #[arg(hide_possible_values = true)]
    pub(crate) log_format: Format,

    /// Log counters at this interval; SIGUSR1 logs them immediately [default: only at exit]
    #[arg(long, value_name = "TIME", help_heading = "Logging and metrics")]
    #[arg(env = "ECHOSERVER_STATS_INTERVAL", value_parser = parse_interval)]
    pub(crate) stats_interval: Option<Duration>,

    /// Print a man page or shell completions, and exit
    #[arg(long, value_name = "WHAT", value_enum, hide = true)]
    pub(crate) generate: Option<GeneratedFile>,
}

/// What the program does instead of serving.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Check(check::Options),
    Load(load::Options),
}

impl Options {
    /// Checks what depends on several options.
    fn check(self) -> Result<Self, clap::Error> {
        #[cfg(unix)]
        if self.unix_mode.is_some()
            && !(self.listen.iter().chain(&self.metrics))
                .any(|address| matches!(address, Address::UnixPath(_)))
        {
            let mut error = Self::command().error(
                ErrorKind::ArgumentConflict,
                "--unix-mode needs a socket file: --listen unix:PATH or --metrics unix:PATH",
            );
            let option = ContextValue::String("--unix-mode".to_owned());
            error.insert(ContextKind::InvalidArg, option);
            return Err(error);
        }
        Ok(self)
    }

    /// Returns the server's configuration. If sockets are `inherited`, it has no default address.
    pub(crate) fn config(&self, max_connections: usize, inherited: bool) -> Config {
        let mut config = Config {
            max_connections,
            workers: self.workers(),
            buffer_size: self.buffer_size,
            backlog: self.backlog,
            unix_mode: self.unix_mode,
            idle_timeout: self.idle_timeout.filter(|timeout| !timeout.is_zero()),
            drain_timeout: self.drain_timeout,
            tcp_keepalive: Some(self.tcp_keepalive).filter(|time| !time.is_zero()),
            busy_poll: self.busy_poll.unwrap_or_default(),
            ..Config::default()
        };
        if inherited || !self.listen.is_empty() {
            config.listen.clone_from(&self.listen);
        }
        config
    }

    pub(crate) fn workers(&self) -> NonZeroUsize {
        self.workers.unwrap_or(Config::default().workers)
    }

    /// Returns the log level, which takes precedence over `RUST_LOG`.
    pub(crate) fn log_level(&self) -> Option<LevelFilter> {
        if (self.verbose, self.quiet) == (0, 0) {
            return None;
        }
        let levels = [
            LevelFilter::Off,
            LevelFilter::Error,
            LevelFilter::Warn,
            LevelFilter::Info,
            LevelFilter::Debug,
            LevelFilter::Trace,
        ];
        let level = (3 + usize::from(self.verbose)).saturating_sub(usize::from(self.quiet));
        Some(levels[level.min(levels.len() - 1)])
    }
}

fn parse_workers(text: &str) -> Result<NonZeroUsize, String> {
    let bounds = || format!("expected a number from 1 to {}", Config::MAX_WORKERS);
    let workers = text.parse().map_err(|_| bounds())?;
    NonZeroUsize::new(workers)
        .filter(|workers| workers.get() <= Config::MAX_WORKERS)
        .ok_or_else(bounds)
}

fn parse_count(text: &str) -> Result<NonZeroUsize, String> {
    text.parse()
        .map_err(|_| "expected a number of at least 1".to_owned())
}

pub(crate) fn parse_buffer_size(text: &str) -> Result<usize, String> {
    // A lone letter means a power of 1024, as in other servers; `ByteSize` takes it for a power of 1000.
    let unit = if text.ends_with(|letter: char| "kmgKMG".contains(letter)) {
        "iB"
    } else {
        ""
    };
    let size: ByteSize = format!("{text}{unit}")
        .parse()
        .map_err(|_| "expected a size such as 65536, 64K or 1MiB")?;
    let size = usize::try_from(size.as_u64()).unwrap_or(usize::MAX);
    match size {
        1..=Config::MAX_BUFFER_SIZE => Ok(size),
        _ => Err("expected a size from 1B to 1GiB".to_owned()),
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "expected octal permissions such as 0660".to_owned())
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("expected a duration such as 500ms, 30s or 5m: {error}"))
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text)?;
    let bounds = "expected a duration of at least 1ms".to_owned();
    Some(interval)
        .filter(|interval| *interval >= Duration::from_millis(1))
        .ok_or(bounds)
}

/// Parses the idle time of TCP keepalive, within the bounds of the kernel. Zero turns it off.
fn parse_keepalive(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text)?;
    let bounds = MIN_KEEPALIVE..=MAX_KEEPALIVE;
    Some(time)
        .filter(|time| time.is_zero() || bounds.contains(time))
        .ok_or_else(|| {
            let (min, max) = bounds.into_inner();
            format!("expected 0s, or a duration from {min:?} to {max:?}")
        })
}

/// Parses the command line and the environment. An empty variable counts as unset, and commands do not read any.
pub(crate) fn parse() -> Result<Options, clap::Error> {
    let command = Options::command();
    let command = match is_command(&command) {
        true => without_environment(command),
        false => command.mut_args(|argument| {
            let value = argument.get_env().and_then(env::var_os);
            match value.is_some_and(|value| value.is_empty()) {
                true => argument.env(Resettable::Reset),
                false => argument,
            }
        }),
    };
    Options::from_arg_matches(&command.try_get_matches()?)?.check()
}

/// Whether the first argument is a command, such as `check`.
fn is_command(command: &clap::Command) -> bool {
    let first = env::args_os().nth(1);
    let mut names = command.get_subcommands().map(clap::Command::get_name);
    first.is_some_and(|first| names.any(|name| first == name))
}

/// Returns a warning for each variable whose name is nearly that of an option. Others are not worth one:
/// Kubernetes sets `ECHOSERVER_PORT` and more for a service called echoserver.
pub(crate) fn misspelled_variables(names: impl Iterator<Item = OsString>) -> Vec<String> {
    const MAX_EDITS: usize = 2;
    let command = Options::command();
    let variables = command.get_arguments().filter_map(Arg::get_env);
    let variables: Vec<_> = variables.filter_map(|name| name.to_str()).collect();
    let names = names.filter_map(|name| name.into_string().ok());
    names
        .filter(|name| name.starts_with("ECHOSERVER_") && !variables.contains(&name.as_str()))
        .filter_map(|name| {
            let edits = |variable: &&&str| strsim::levenshtein(&name, variable);
            let nearest = variables.iter().min_by_key(edits)?;
            let is_near = edits(&nearest) <= MAX_EDITS;
            is_near.then(|| format!("the variable {name} is unknown; did you mean {nearest}?"))
        })
        .collect()
}

/// Returns the log format that the command line or the environment requests, even if they are invalid
/// otherwise.
pub(crate) fn log_format() -> Format {
    if is_command(&Options::command()) {
        return Format::Text;
    }
    let mut format = env::var_os("ECHOSERVER_LOG_FORMAT");
    let mut arguments = env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--log-format" {
            format = arguments.next();
        } else if let Some(value) = argument.to_string_lossy().strip_prefix("--log-format=") {
            format = Some(value.into());
        }
    }
    match format.is_some_and(|format| format == "json") {
        true => Format::Json,
        false => Format::Text,
    }
}

/// Settings of every option.
fn common_settings(argument: Arg) -> Arg {
    // A value that starts with a hyphen is then reported as an invalid value of its option.
    let takes_values = argument.get_action().takes_values();
    argument.hide_env(true).allow_hyphen_values(takes_values)
}

/// Formats an error of the command line as one line, with clap's suggestions. The line names the environment
/// variable that an invalid value comes from.
pub(crate) fn one_line(mut error: clap::Error) -> String {
    if error.kind() == ErrorKind::InvalidUtf8 {
        return format!("invalid UTF-8 in {}", invalid_utf8());
    }
    for (kind, text) in error.context().map(escaped_text).collect::<Vec<_>>() {
        error.insert(kind, text);
    }
    let text = error.to_string();
    // The first paragraph is the error; suggestions and usage follow.
    let first = text.split("\n\n").next().unwrap_or(&text);
    let line = first.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    let suggestions = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("tip: "));
    let variable = variable_of(&error).map(|variable| format!("from {variable}"));
    let notes = suggestions
        .map(str::to_owned)
        .chain(comma_hint(&error))
        .chain(variable);
    let notes = notes.map(|note| format!("({note})"));
    iter::once(line.to_owned())
        .chain(notes)
        .collect::<Vec<_>>()
        .join(" ")
}

fn escaped_text((kind, value): (ContextKind, &ContextValue)) -> (ContextKind, ContextValue) {
    let value = match value {
        ContextValue::String(text) => ContextValue::String(escape_control(text)),
        other => other.clone(),
    };
    (kind, value)
}

/// Returns the first argument, or the name of the first variable, that is not valid UTF-8.
fn invalid_utf8() -> String {
    let argument = env::args_os().find(|argument| argument.to_str().is_none());
    let is_invalid = |(name, value): &(OsString, OsString)| {
        name.to_string_lossy().starts_with("ECHOSERVER_") && value.to_str().is_none()
    };
    let variable = || env::vars_os().find(is_invalid).map(|(name, _)| name);
    let culprit = argument.or_else(variable).unwrap_or_default();
    escape_control(&format!("'{}'", culprit.to_string_lossy()))
}

/// Returns the environment variable that an invalid value comes from, unless it comes from the command line.
///
/// Clap does not report the source of an invalid value, so this parses the command line without the environment.
fn variable_of(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let option = argument.split_whitespace().next()?.trim_end_matches("...");
    let command = without_environment(Options::command());
    let matches = command.try_get_matches_from(env::args_os()).ok()?;
    let id = option.trim_start_matches('-').replace('-', "_");
    let is_argument = matches.ids().any(|given| given.as_str() == id)
        && matches.value_source(&id) == Some(ValueSource::CommandLine);
    let variable = variable_name(option);
    (!is_argument && env::var_os(&variable).is_some()).then_some(variable)
}

/// Returns a hint if an unexpected argument follows one that ends with a comma, as in `-l :1, :2`.
fn comma_hint(error: &clap::Error) -> Option<String> {
    let unexpected = [ContextKind::InvalidArg, ContextKind::InvalidSubcommand];
    let unexpected = unexpected
        .iter()
        .find_map(|kind| error.get(*kind))?
        .to_string();
    let arguments: Vec<_> = env::args_os().collect();
    let follows_comma = arguments.windows(2).any(|pair| {
        pair[0].to_string_lossy().ends_with(',') && pair[1].to_string_lossy() == unexpected
    });
    follows_comma.then(|| "no blank is allowed after a comma".to_owned())
}

fn without_environment(command: clap::Command) -> clap::Command {
    command
        .mut_args(|argument| argument.env(Resettable::Reset))
        .mut_subcommands(without_environment)
}

/// Returns the environment variable of an option such as `--max-connections`.
fn variable_name(option: &str) -> String {
    let name = option.trim_start_matches('-').replace('-', "_");
    format!("ECHOSERVER_{}", name.to_uppercase())
}

#[cfg(test)]
mod tests;
