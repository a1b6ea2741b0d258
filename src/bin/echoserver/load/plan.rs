//! The options of `load`, and what follows from them.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Barrier, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use echoserver::Address;
use socket2::SockAddr;

use crate::figures::Count;
use crate::target::{self, Target};
use crate::values;

/// Size of a message, unless the user gives one.
const MESSAGE: usize = 64;
const FLOOD_MESSAGE: usize = 64 << 10;
/// Length of a run, unless the user gives one or a number of messages.
const DURATION: Duration = Duration::from_secs(10);
const MIN_TIMEOUT: Duration = Duration::from_millis(1);
const MAX_SWEEP_INTERVAL: Duration = Duration::from_millis(100);
/// After the end: how long nothing comes back until the load stops waiting.
const MAX_GRACE: Duration = Duration::from_secs(1);
const INTERVAL: Duration = Duration::from_secs(1);
const MIN_INTERVAL: Duration = Duration::from_millis(10);
/// Descriptors that are not connections: the standard streams and a few more.
const RESERVED: usize = 8;

/// Measure an echo server: throughput and round-trip times, with every byte verified
#[derive(Debug, Args)]
#[command(max_term_width = 100)]
#[command(after_help = "\
    Times are seconds, or have a unit: 5, 0.5, 500ms, 1m30s. RTT is the round-trip time of a message,\n\
    from its first byte sent to its last byte received; with --rate, from when it was due.\n\
    Ctrl-C ends the run with the summary.\n\
    A failed connection is opened again after about 1 s, except with --messages.\n\
    After the end, load waits until nothing has come back for 1 s, but at most for --timeout, and with\n\
    --rate at most for 1 s. A message without an answer by then is unanswered, and so is one that has\n\
    waited for 1 s when its connection fails; its age counts as its RTT, a lower bound.\n\
    Exit status: 0 success, 1 a wrong byte, a failed connection, an unanswered message or fewer\n\
    messages than wanted, 2 bad usage, 3 the server cannot be reached, 4 this\n\
    machine lacks descriptors, ports or memory.")]
#[allow(clippy::struct_excessive_bools, reason = "independent flags")]
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

    /// Expect a line first on each connection, and count how often each occurs
    #[arg(long, help_heading = "Load")]
    pub(crate) skip_greeting: bool,

    /// Print a line of figures this often [default: 1 on a terminal or without an end, else none]
    #[arg(long, value_name = "TIME", value_parser = values::time(MIN_INTERVAL))]
    pub(crate) interval: Option<Duration>,

    /// Print one JSON object at the end, with the whole histogram, instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

impl Options {
    /// # Errors
    ///
    /// There are not enough descriptors, or no message of `--rate` is due in the time.
    pub(crate) fn check(&self, limit: Option<u64>) -> Result<(), String> {
        let (connections, threads) = self.connections_and_threads();
        // With a connection for each message, the one before may still wait for its EOF.
        let sockets = connections * if self.connect { 2 } else { 1 };
        let needed = (sockets + threads + RESERVED) as u64;
        if let Some(limit) = limit.filter(|limit| *limit < needed) {
            let [count, needed, limit] = [connections as u64, needed, limit].map(Count);
            return Err(format!(
                "{count} connections: needs {needed} descriptors, limit {limit}"
            ));
        }
        let is_empty = self.rate.is_some() && self.messages_due() == Some(0);
        let error = || "--rate: no message is due in the time of --duration".to_owned();
        (!is_empty).then_some(()).ok_or_else(error)
    }

    pub(crate) fn plan(&self, target: &Target) -> Plan<'_> {
        let (connections, threads) = self.connections_and_threads();
        let max_messages = self.messages.unwrap_or(u64::MAX);
        let messages = max_messages.min(self.messages_due().unwrap_or(u64::MAX));
        // At a rate, each message has a whole interval, so that the rate is never exceeded.
        let scheduled = self.rate.filter(|_| messages < u64::MAX);
        let scheduled = scheduled.map(|rate| Duration::from_secs_f64(messages as f64 / rate));
        let length = self.length();
        Plan {
            options: self,
            address: target.address.clone(),
            is_unix: !target.is_tcp(),
            size: self.size() as u64,
            max_in_flight: self.max_in_flight().unwrap_or(u64::MAX),
            threads,
            connections,
            messages,
            length: length.map(|length| scheduled.map_or(length, |it| it.min(length))),
            min_length: scheduled.unwrap_or_default(),
            sweep_interval: (self.timeout / 4).min(MAX_SWEEP_INTERVAL),
            grace: self.timeout.min(MAX_GRACE),
            stop: Arc::default(),
            opened: Barrier::new(threads + 1),
            started: SystemTime::now(),
            start: OnceLock::new(),
        }
    }

    fn connections_and_threads(&self) -> (usize, usize) {
        let max_messages = self.messages.unwrap_or(u64::MAX);
        let connections = u64::from(self.connections).min(max_messages) as usize;
        (connections, usize::from(self.threads).min(connections))
    }

    /// Returns how long to send after the warm-up, if there is a limit.
    pub(crate) fn duration(&self) -> Option<Duration> {
        let default = self.messages.is_none().then_some(DURATION);
        self.duration.or(default).filter(|it| !it.is_zero())
    }

    fn length(&self) -> Option<Duration> {
        Some(self.duration()? + self.warm_up)
    }

    pub(crate) fn interval(&self) -> Duration {
        self.interval.unwrap_or(INTERVAL)
    }

    /// Returns how many messages are due at a rate, if there is a limit.
    fn messages_due(&self) -> Option<u64> {
        // A product such as 0.29 * 100 may be a little less than the whole number.
        let due = self.length()?.as_secs_f64() * self.rate? * (1.0 + 1e-12);
        Some(due as u64)
    }

    pub(crate) fn size(&self) -> usize {
        let default = if self.flood { FLOOD_MESSAGE } else { MESSAGE };
        self.size.unwrap_or(default)
    }

    /// Returns the maximum of unanswered messages per connection, if there is one.
    pub(crate) fn max_in_flight(&self) -> Option<u64> {
        let has_limit = self.connect || !self.flood && self.rate.is_none();
        self.in_flight.or(has_limit.then_some(1))
    }
}

/// What all threads do: the options, and what follows from them.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) options: &'a Options,
    pub(crate) address: SockAddr,
    pub(crate) is_unix: bool,
    pub(crate) size: u64,
    pub(crate) max_in_flight: u64,
    pub(crate) threads: usize,
    pub(crate) connections: usize,
    /// Messages in all, or the maximum of the type.
    pub(crate) messages: u64,
    /// How long to send, warm-up included, if there is a limit.
    pub(crate) length: Option<Duration>,
    /// At a rate, the last message has its interval, too.
    pub(crate) min_length: Duration,
    /// How often a thread looks for connections to open again or to give up, and whether it is to stop.
    pub(crate) sweep_interval: Duration,
    /// How long nothing comes back after the end until the load stops waiting. At a rate, it waits no longer in all.
    pub(crate) grace: Duration,
    /// Set by a signal: every phase ends at once.
    pub(crate) stop: Arc<AtomicBool>,
    /// Passed by all threads when their connections are open.
    pub(crate) opened: Barrier,
    pub(crate) started: SystemTime,
    start: OnceLock<Instant>,
}

impl Plan<'_> {
    /// Returns when the load started, which is at the first call.
    pub(crate) fn start(&self) -> Instant {
        *self.start.get_or_init(Instant::now)
    }

    /// Ends every phase at once.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Relaxed);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Whether only a signal ends the load.
    pub(crate) fn is_endless(&self) -> bool {
        self.length.is_none() && self.messages == u64::MAX
    }
}
