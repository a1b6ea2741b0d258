//! The options of the server.

use std::num::NonZeroUsize;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args};
use echoserver::{Address, Config};
use log::LevelFilter;

use crate::serve::faults;
use crate::serve::greeting::Greeting;
use crate::serve::limits;
use crate::serve::logging::Format;
use crate::values::{self, Addresses};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Address to listen on; repeat the option or separate with commas. Forms: IP:PORT, HOST:PORT,
    /// [V6]:PORT, :PORT or PORT (all interfaces, IPv6 and IPv4), unix:PATH (a comma in it as \,),
    /// unix:@NAME. Port 0 picks a free port [default: 5555]
    #[arg(short, long, value_name = "ADDR", help_heading = "Network")]
    #[arg(value_parser = values::addresses)]
    listen: Vec<Addresses>,

    /// Let another server listen on the same TCP addresses: a new one can start before the old one
    /// ends
    #[arg(long, help_heading = "Network", value_parser = BoolishValueParser::new())]
    pub(crate) reuse_port: bool,

    /// Maximum connections that wait in the kernel to be accepted
    #[arg(long, value_name = "N", help_heading = "Network")]
    #[arg(default_value_t = 4096, value_parser = values::count::<u32>(1..=i32::MAX as usize))]
    backlog: u32,

    /// Permissions of the files of Unix-domain sockets, --metrics included, in octal, for example
    /// 0660 [default: from the umask]
    #[arg(long, value_name = "MODE", help_heading = "Network", value_parser = values::mode)]
    pub(crate) unix_mode: Option<u32>,

    /// Text to send once when a client connects, with {hostname}, {peer}, {local} (the address that the
    /// client has connected to), {pid} and \n [default: none]
    #[arg(long, value_name = "TEXT", help_heading = "Network")]
    pub(crate) greeting: Option<Greeting>,

    /// Worker threads, 1 to 1024 [default: number of CPUs]
    #[arg(short, long, value_name = "N", help_heading = "Resources")]
    #[arg(value_parser = values::count::<usize>(1..=Config::MAX_WORKERS))]
    workers: Option<usize>,

    /// Maximum concurrent connections; at the limit, new clients wait in the kernel's backlog
    /// [default: as many as the descriptor limit allows]
    #[arg(short = 'c', long, value_name = "N", help_heading = "Resources")]
    #[arg(value_parser = values::count::<NonZeroUsize>(1..=usize::MAX))]
    pub(crate) max_connections: Option<NonZeroUsize>,

    /// Buffer limit for each connection and direction
    #[arg(long, value_name = "SIZE", help_heading = "Resources")]
    #[arg(default_value = "64KiB", value_parser = values::size)]
    buffer_size: usize,

    /// Limit for the memory of all buffers; at the limit, the connections that have been stuck longest
    /// are reset [default: half of the memory of the machine or the control group]
    #[arg(long, value_name = "SIZE", help_heading = "Resources", value_parser = values::memory)]
    pub(crate) buffer_memory: Option<u64>,

    /// How long a worker polls before it sleeps, for example 50us; lowers latency at the cost of up
    /// to one CPU per worker [default: off]
    #[arg(long, value_name = "TIME", help_heading = "Resources", value_parser = values::any_time)]
    busy_poll: Option<Duration>,

    /// Close a connection that transfers no byte for this long; 0s means never [default: never]
    #[arg(long, value_name = "TIME", help_heading = "Timeouts", value_parser = values::any_time)]
    idle_timeout: Option<Duration>,

    /// Probe a client that has sent no packet for this long, and close the connection after 6 probes
    /// without an answer, 10 s apart; 0s means never
    #[arg(long, value_name = "TIME", help_heading = "Timeouts")]
    #[arg(default_value = "5m", value_parser = values::keepalive)]
    tcp_keepalive: Duration,

    /// How long to report "not ready" after a signal, and still accept, before the graceful shutdown
    #[arg(long, value_name = "TIME", help_heading = "Timeouts")]
    #[arg(default_value = "0s", value_parser = values::any_time)]
    pub(crate) drain_delay: Duration,

    /// Time limit for a graceful shutdown; connections that are not done are then closed, and reset if
    /// bytes are lost
    #[arg(long, value_name = "TIME", help_heading = "Timeouts")]
    #[arg(default_value = "5s", value_parser = values::any_time)]
    drain_timeout: Duration,

    /// Address for HTTP: /metrics for Prometheus, /healthz, /livez and /readyz for load balancers
    /// [default: off]
    #[arg(long, value_name = "ADDR", help_heading = "Logging and metrics")]
    pub(crate) metrics: Option<Address>,

    /// Log more: -v each connection when it closes, -vv also when it opens; takes precedence over
    /// RUST_LOG
    #[arg(short, long, action = ArgAction::Count, help_heading = "Logging and metrics")]
    verbose: u8,

    /// Log less: -q warnings and errors, -qq errors, -qqq nothing
    #[arg(short, long, action = ArgAction::Count, help_heading = "Logging and metrics")]
    quiet: u8,

    /// Log format: text, or json with one object per line
    #[arg(long, value_name = "FORMAT", help_heading = "Logging and metrics")]
    // A list of possible values switches clap's whole help to its long form.
    #[arg(value_enum, default_value = "text", hide_possible_values = true)]
    pub(crate) log_format: Format,

    /// Log counters at this interval; SIGUSR1 logs them immediately [default: only at exit]
    #[arg(long, value_name = "TIME", help_heading = "Logging and metrics")]
    #[arg(value_parser = values::time(Duration::from_millis(1)))]
    pub(crate) stats_interval: Option<Duration>,

    #[command(flatten)]
    pub(crate) faults: faults::Options,
}

impl Options {
    /// Returns the addresses of `--listen`.
    pub(crate) fn listen(&self) -> Vec<Address> {
        let lists = self.listen.iter().map(|Addresses(list)| list.clone());
        lists.flatten().collect()
    }

    /// Returns the server's configuration. If sockets are `inherited`, it has no default address.
    pub(crate) fn config(&self, inherited: bool) -> Config {
        let mut listen = self.listen();
        if listen.is_empty() && !inherited {
            listen.push(Address::AnyInterface(5555));
        }
        Config {
            listen,
            workers: self.workers.unwrap_or(Config::default().workers),
            buffer_size: self.buffer_size,
            backlog: limits::backlog(self.backlog),
            reuse_port: self.reuse_port,
            unix_mode: self.unix_mode,
            idle_timeout: self.idle_timeout.filter(|timeout| !timeout.is_zero()),
            drain_timeout: self.drain_timeout,
            tcp_keepalive: Some(self.tcp_keepalive).filter(|time| !time.is_zero()),
            busy_poll: self.busy_poll.unwrap_or_default(),
            ..Config::default()
        }
    }

    /// Returns the log level, which takes precedence over `RUST_LOG`.
    pub(crate) fn log_level(&self) -> Option<LevelFilter> {
        if (self.verbose, self.quiet) == (0, 0) {
            return None;
        }
        let level = (LevelFilter::Info as usize + usize::from(self.verbose))
            .saturating_sub(usize::from(self.quiet));
        LevelFilter::iter().nth(level).or(Some(LevelFilter::Trace))
    }
}
