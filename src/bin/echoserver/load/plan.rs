//! The options of `load`, and what follows from them.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use clap::Args;
use echoserver::Address;
use socket2::SockAddr;

use crate::target::{self, Target};
use crate::values;

/// Size of a message, unless the user gives one.
const MESSAGE: usize = 64;
const FLOOD_MESSAGE: usize = 64 << 10;
/// Length of a run, unless the user gives one or a number of messages.
const DURATION: Duration = Duration::from_secs(10);
const MIN_TIMEOUT: Duration = Duration::from_millis(1);
const MAX_SWEEP_INTERVAL: Duration = Duration::from_millis(100);

/// Measure an echo server: throughput and round-trip times, with every byte verified
#[derive(Debug, Args)]
#[command(max_term_width = 100)]
#[command(after_help = "\
    Times are seconds, or have a unit: 5, 0.5, 500ms, 1m30s. RTT is the round-trip time of a message,\n\
    from its first byte sent to its last byte received; with --rate, from when it was due.\n\
    Ctrl-C ends the run with the summary.\n\
    Exit status: 0 success, 1 a wrong byte, a failed connection or no answer, 2 bad usage,\n\
    3 the server cannot be reached.")]
pub(crate) struct Options {
    #[arg(value_name = "HOST:PORT", help = target::FORMS)]
    pub(crate) address: Address,

    /// Number of connections, at most the number of messages
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    #[arg(help_heading = "Load", value_parser = values::count::<u32>(1..=1_000_000))]
    pub(crate) connections: u32,

    /// Size of a message [default: 64, or 64KiB with --flood]
    #[arg(short, long, value_name = "SIZE", help_heading = "Load", value_parser = values::size)]
    pub(crate) size: Option<usize>,

    /// Maximum unanswered messages per connection [default: 1; no limit with --rate]
    #[arg(long, value_name = "N", help_heading = "Load")]
    #[arg(value_parser = values::count::<u64>(1..=1_000_000))]
    pub(crate) in_flight: Option<u64>,

    /// Send this many messages per second in all, whether or not earlier ones have come back
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = values::rate)]
    pub(crate) rate: Option<f64>,

    /// Send without waiting for replies
    #[arg(long, help_heading = "Load", conflicts_with_all = ["rate", "in_flight"])]
    pub(crate) flood: bool,

    /// Open a connection for each message; its time is part of the RTT
    #[arg(long, help_heading = "Load", conflicts_with_all = ["flood", "in_flight"])]
    pub(crate) connect: bool,

    /// Threads that send
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Load")]
    #[arg(value_parser = values::count::<u16>(1..=1024))]
    pub(crate) threads: u16,

    /// How long to send; 0 means until Ctrl-C [default: 10, or until all of --messages are done]
    #[arg(short, long, value_name = "TIME", help_heading = "Length", value_parser = values::any_time)]
    pub(crate) duration: Option<Duration>,

    /// Messages in all; a failed connection is then not opened again
    #[arg(short = 'n', long, value_name = "N", help_heading = "Length")]
    #[arg(value_parser = values::count::<u64>(1..=usize::MAX))]
    pub(crate) messages: Option<u64>,

    /// How long to send before the measurement starts
    #[arg(long, value_name = "TIME", help_heading = "Length", value_parser = values::any_time)]
    #[arg(default_value = "0", conflicts_with = "messages")]
    pub(crate) warm_up: Duration,

    /// Fail a connection that returns no byte for this long
    #[arg(long, value_name = "TIME", help_heading = "Length", value_parser = values::time(MIN_TIMEOUT))]
    #[arg(default_value = "10")]
    pub(crate) timeout: Duration,

    /// Print one JSON object at the end, with the whole histogram, instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

impl Options {
    pub(crate) fn plan(&self, target: &Target) -> Plan<'_> {
        let max_messages = self.messages.unwrap_or(u64::MAX);
        let connections = u64::from(self.connections).min(max_messages) as usize;
        let threads = usize::from(self.threads).min(connections);
        let default_size = if self.flood { FLOOD_MESSAGE } else { MESSAGE };
        let has_limit = self.connect || !self.flood && self.rate.is_none();
        let default_in_flight = if has_limit { 1 } else { u64::MAX };
        Plan {
            options: self,
            address: target.address.clone(),
            size: self.size.unwrap_or(default_size) as u64,
            max_in_flight: self.in_flight.unwrap_or(default_in_flight),
            threads,
            connections,
            sweep_interval: (self.timeout / 4).min(MAX_SWEEP_INTERVAL),
            stop: Arc::default(),
            opened: Barrier::new(threads + 1),
        }
    }

    /// Returns how long to send, if there is a limit.
    pub(crate) fn duration(&self) -> Option<Duration> {
        let default = self.messages.is_none().then_some(DURATION);
        self.duration.or(default).filter(|it| !it.is_zero())
    }
}

/// What all threads do: the options, and what follows from them.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) options: &'a Options,
    pub(crate) address: SockAddr,
    pub(crate) size: u64,
    pub(crate) max_in_flight: u64,
    pub(crate) threads: usize,
    pub(crate) connections: usize,
    /// How often a thread looks for connections to open again or to give up, and whether it is to stop.
    pub(crate) sweep_interval: Duration,
    pub(crate) stop: Arc<AtomicBool>,
    /// Passed by all threads when their connections are open.
    pub(crate) opened: Barrier,
}
