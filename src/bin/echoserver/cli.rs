//! The command line: what can be said, and what is wrong with what was said, in one line.

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::time::Duration;

use bytesize::ByteSize;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, CommandFactory, Parser, ValueEnum};
use clap_complete::Shell;
use echoserver::{Address, Buffer, Config};
use log::LevelFilter;

use crate::serve::logging::Format;

/// A TCP echo server: every byte comes back, in order, from a pool of event-loop threads.
#[derive(Debug, Parser)]
#[command(name = "echoserver", version, max_term_width = 100)]
#[command(
    after_help = "Every option can also be set in the environment, as ECHOSERVER_ and its name: \
    ECHOSERVER_MAX_CONNECTIONS=1000. SIGTERM and SIGINT drain and exit 0; a second one exits at once. \
    For a man page: --generate man; for completions: --generate bash, zsh or fish."
)]
pub(crate) struct Options {
    /// Where to listen: IP:PORT, HOST:PORT, [V6]:PORT, :PORT or PORT (every interface), unix:PATH or
    /// unix:@NAME; port 0 picks a free one; repeatable [default: [::]:5555, IPv4 included]
    #[arg(
        short,
        long,
        value_name = "ADDR",
        env = "ECHOSERVER_LISTEN",
        value_delimiter = ','
    )]
    #[arg(help_heading = "Network", hide_env = true)]
    pub(crate) listen: Vec<Address>,

    /// Connections that wait in the kernel until they are accepted
    #[arg(
        long,
        value_name = "N",
        env = "ECHOSERVER_BACKLOG",
        default_value_t = 4096
    )]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(i32::MAX)))]
    #[arg(help_heading = "Network", hide_env = true)]
    backlog: u32,

    /// Permissions of a Unix-domain socket's file, in octal, as 0660 [default: the umask's]
    #[arg(long, value_name = "MODE", env = "ECHOSERVER_UNIX_MODE", value_parser = mode)]
    #[arg(help_heading = "Network", hide_env = true)]
    unix_mode: Option<u32>,

    /// Worker threads, 1 to 1024 [default: the CPUs available]
    #[arg(short, long, value_name = "N", env = "ECHOSERVER_WORKERS", value_parser = workers)]
    #[arg(
        help_heading = "Resources",
        hide_env = true,
        allow_negative_numbers = true
    )]
    workers: Option<NonZeroUsize>,

    /// Connections open at once; beyond it accepting pauses, and clients wait in the kernel's backlog
    /// [default: what the descriptor limit allows]
    #[arg(
        short = 'c',
        long,
        value_name = "N",
        env = "ECHOSERVER_MAX_CONNECTIONS",
        value_parser = count
    )]
    #[arg(
        help_heading = "Resources",
        hide_env = true,
        allow_negative_numbers = true
    )]
    pub(crate) max_connections: Option<NonZeroUsize>,

    /// Most bytes held for one connection in each direction, as 65536, 64KiB or 1MiB
    #[arg(
        long,
        value_name = "SIZE",
        env = "ECHOSERVER_BUFFER_SIZE",
        default_value = "64KiB"
    )]
    #[arg(value_parser = buffer_size, help_heading = "Resources", hide_env = true)]
    buffer_size: usize,

    /// Poll for this long before sleeping, as 50us: lower latency, at the price of up to one CPU per
    /// worker that is not quite idle [default: off]
    #[arg(long, value_name = "DURATION", env = "ECHOSERVER_BUSY_POLL", value_parser = duration)]
    #[arg(help_heading = "Resources", hide_env = true)]
    busy_poll: Option<Duration>,

    /// Close a connection that has moved no byte for this long, as 30s or 5m; 0s is never
    /// [default: never]
    #[arg(long, value_name = "DURATION", env = "ECHOSERVER_IDLE_TIMEOUT", value_parser = duration)]
    #[arg(help_heading = "Timeouts", hide_env = true)]
    idle_timeout: Option<Duration>,

    /// How long a shutdown may take; who is not done by then is cut off
    #[arg(
        long,
        value_name = "DURATION",
        env = "ECHOSERVER_DRAIN_TIMEOUT",
        default_value = "5s"
    )]
    #[arg(value_parser = duration, help_heading = "Timeouts", hide_env = true)]
    drain_timeout: Duration,

    /// Serve what was counted, for Prometheus at /metrics, and /healthz for load balancers
    #[arg(long, value_name = "ADDR", env = "ECHOSERVER_METRICS")]
    #[arg(help_heading = "Logging and metrics", hide_env = true)]
    pub(crate) metrics: Option<Address>,

    /// Log more: -v each connection at its end, -vv everything; RUST_LOG wins
    #[arg(short, long, action = ArgAction::Count, env = "ECHOSERVER_VERBOSE")]
    #[arg(help_heading = "Logging and metrics", hide_env = true)]
    verbose: u8,

    /// Log less: -q warnings, -qq errors, -qqq nothing
    #[arg(short, long, action = ArgAction::Count, env = "ECHOSERVER_QUIET")]
    #[arg(help_heading = "Logging and metrics", hide_env = true)]
    quiet: u8,

    /// How the log is written: text, for people, or json, one object a line
    #[arg(
        long,
        value_name = "FORMAT",
        env = "ECHOSERVER_LOG_FORMAT",
        value_enum,
        default_value = "text"
    )]
    // Listed one by one, they would turn the whole help into its long form.
    #[arg(hide_possible_values = true)]
    #[arg(help_heading = "Logging and metrics", hide_env = true)]
    pub(crate) log_format: Format,

    /// Log what was counted this often; SIGUSR1 logs it at once [default: only at the end]
    #[arg(long, value_name = "DURATION", env = "ECHOSERVER_STATS_INTERVAL", value_parser = interval)]
    #[arg(help_heading = "Logging and metrics", hide_env = true)]
    pub(crate) stats_interval: Option<Duration>,

    /// Print a man page or a shell's completions, and exit
    #[arg(long, value_name = "WHAT", value_enum, hide = true)]
    pub(crate) generate: Option<Page>,
}

/// What can be made from the command line's own description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Page {
    Man,
    Bash,
    Zsh,
    Fish,
}

impl Page {
    /// Writes it out.
    pub(crate) fn write(self, out: &mut impl Write) -> io::Result<()> {
        let mut command = Options::command();
        let mut page = Vec::new();
        let mut complete =
            |shell: Shell| clap_complete::generate(shell, &mut command, "echoserver", &mut page);
        match self {
            Self::Man => clap_mangen::Man::new(command).render(&mut page)?,
            Self::Bash => complete(Shell::Bash),
            Self::Zsh => complete(Shell::Zsh),
            Self::Fish => complete(Shell::Fish),
        }
        out.write_all(&page)?;
        out.flush()
    }
}

impl Options {
    /// Reads the command line and the environment.
    ///
    /// # Errors
    ///
    /// What clap found, to be shown with [`one_line`]; `--help` and `--version` are errors too.
    pub(crate) fn read() -> Result<Self, clap::Error> {
        Self::try_parse()
    }

    /// What the library is to be told, for at most `max_connections` connections. Where sockets are
    /// `inherited`, they take the place of the default one.
    pub(crate) fn config(&self, max_connections: usize, inherited: bool) -> Config {
        let mut config = Config {
            max_connections,
            workers: self.workers(),
            buffer_size: self.buffer_size,
            backlog: self.backlog,
            unix_mode: self.unix_mode,
            idle_timeout: self.idle_timeout.filter(|timeout| !timeout.is_zero()),
            drain_timeout: self.drain_timeout,
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

    /// What is logged unless `RUST_LOG` says otherwise.
    pub(crate) fn log_level(&self) -> LevelFilter {
        let levels = [
            LevelFilter::Off,
            LevelFilter::Error,
            LevelFilter::Warn,
            LevelFilter::Info,
            LevelFilter::Debug,
            LevelFilter::Trace,
        ];
        let level = (3 + usize::from(self.verbose)).saturating_sub(usize::from(self.quiet));
        levels[level.min(levels.len() - 1)]
    }
}

fn workers(text: &str) -> Result<NonZeroUsize, String> {
    let bounds = || format!("expected a number from 1 to {}", Config::MAX_WORKERS);
    let workers = text.parse().map_err(|_| bounds())?;
    NonZeroUsize::new(workers)
        .filter(|workers| workers.get() <= Config::MAX_WORKERS)
        .ok_or_else(bounds)
}

fn count(text: &str) -> Result<NonZeroUsize, String> {
    text.parse()
        .map_err(|_| "expected a number of at least 1".to_owned())
}

fn buffer_size(text: &str) -> Result<usize, String> {
    let size: ByteSize = text
        .parse()
        .map_err(|_| "expected a size, as 65536, 64KiB or 1MiB")?;
    let size = usize::try_from(size.as_u64()).unwrap_or(usize::MAX);
    match size {
        1..=Buffer::MAX_CAPACITY => Ok(size),
        _ => Err("expected a size from 1B to 1GiB".to_owned()),
    }
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "expected permissions in octal, as 0660".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("expected a duration, as 500ms, 30s or 5m: {error}"))
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = duration(text)?;
    let bounds = "expected a duration of at least 1ms".to_owned();
    Some(interval)
        .filter(|interval| *interval >= Duration::from_millis(1))
        .ok_or(bounds)
}

/// An error of the command line as one line that names the culprit, and where it stands if that is
/// the environment.
pub(crate) fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    // Clap's first paragraph is the error; tips and usage follow.
    let first = text.split("\n\n").next().unwrap_or(&text);
    let line = first.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    match variable_of(error) {
        Some(variable) => format!("{line} (from {variable})"),
        None => line.to_owned(),
    }
}

/// The environment variable that an invalid value comes from, if it isn't on the command line.
fn variable_of(error: &clap::Error) -> Option<String> {
    if !matches!(
        error.kind(),
        ErrorKind::ValueValidation | ErrorKind::InvalidValue
    ) {
        return None;
    }
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let long = argument.split_whitespace().next()?.trim_end_matches("...");
    let variable = format!(
        "ECHOSERVER_{}",
        long.trim_start_matches('-')
            .replace('-', "_")
            .to_uppercase()
    );
    let value = env::var_os(&variable)?;
    let value = value.to_string_lossy();
    // Every word ends with nothing; only an option could have been given it.
    let said = |word: OsString| match value.is_empty() {
        true => word.to_string_lossy().starts_with(long),
        false => word.to_string_lossy().ends_with(&*value),
    };
    (!env::args_os().skip(1).any(said)).then_some(variable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Options, String> {
        let words = ["echoserver"].iter().chain(words);
        Options::try_parse_from(words).map_err(|error| one_line(&error))
    }

    #[test]
    fn the_command_is_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn every_option_has_its_variable() {
        let command = Options::command();
        for argument in command
            .get_arguments()
            .filter(|argument| !argument.is_hide_set())
        {
            let long = argument.get_long().expect("every option has a long name");
            let variable = format!("ECHOSERVER_{}", long.replace('-', "_").to_uppercase());
            assert_eq!(argument.get_env(), Some(variable.as_ref()), "--{long}");
        }
    }

    #[test]
    fn values_arrive() {
        let options = parsed(&[
            "-w7",
            "--listen=:7",
            "-l",
            "127.0.0.1:0",
            "--buffer-size=1MiB",
            "--backlog=9",
            "--idle-timeout=90s",
            "--drain-timeout=1m",
        ])
        .unwrap();
        let config = options.config(3, false);
        assert_eq!(
            (config.workers.get(), config.max_connections, config.backlog),
            (7, 3, 9)
        );
        assert_eq!(
            config.listen,
            [Address::AnyInterface(7), "127.0.0.1:0".parse().unwrap()]
        );
        assert_eq!(config.buffer_size, 1 << 20);
        assert_eq!(config.idle_timeout, Some(Duration::from_secs(90)));
        assert_eq!(config.drain_timeout, Duration::from_secs(60));
        assert_eq!(
            parsed(&["--idle-timeout=0s"])
                .unwrap()
                .config(1, true)
                .idle_timeout,
            None
        );
    }

    #[test]
    fn levels_go_up_and_down_and_stay_in_bounds() {
        for (words, level) in [
            (&["-qqqqq"][..], LevelFilter::Off),
            (&["-q"], LevelFilter::Warn),
            (&[], LevelFilter::Info),
            (&["-v", "-q"], LevelFilter::Info),
            (&["-v"], LevelFilter::Debug),
            (&["-vvvv"], LevelFilter::Trace),
        ] {
            assert_eq!(parsed(words).unwrap().log_level(), level, "{words:?}");
        }
    }
}
