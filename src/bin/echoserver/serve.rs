//! Runs the library's server as a process: with signals, log, metrics and a service manager.

mod background;
mod faults;
mod greeting;
mod limits;
pub(crate) mod logging;
mod memory;
mod metrics;
mod options;
mod service;
mod signals;

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use bytesize::ByteSize;
use echoserver::{Address, Config, Echo, Handle, NewConnection, Server};
use log::Level;

use self::background::BackgroundThread;
use self::faults::{Faults, Faulty};
use self::greeting::GreetingHandler;
use self::logging::{FINISH_TIMEOUT, Log, TARGET, log_stats};
use self::metrics::Endpoint;
pub(crate) use self::options::Options;
use self::signals::SignalLink;
use crate::error::with_context;
use crate::output::{Exit, FAILURE};
use crate::platform::{self, Adopt, Signals};

/// What bounds the kernel's socket buffers of a TCP connection.
const SOCKET_BUFFERS: &str = if cfg!(target_os = "linux") {
    ": tcp_rmem and tcp_wmem bound them, and at most 128 KiB plus one send are unsent"
} else {
    ""
};

/// How long to wait for an address in use. A server that was just told to end closes its listeners within 100 ms.
const IN_USE_TIMEOUT: Duration = Duration::from_secs(1);
const IN_USE_INTERVAL: Duration = Duration::from_millis(20);

/// Serves until a signal shuts the server down. Reports an error itself.
pub(crate) fn run(options: &Options) -> Result<(), Exit> {
    let (inherited, signals, log) = prepare(options).map_err(|error| {
        logging::print_error(options.log_format, &error.to_string());
        Exit(FAILURE, None)
    })?;
    // Kept until the log has ended: a second signal can end the process.
    let mut signal_thread = None;
    let started = signals::start(signals, options.drain_delay, log.clone());
    let result = started.and_then(|(thread, link)| {
        signal_thread = thread;
        serve(options, inherited, link, &log)
    });
    if let Err(error) = &result {
        log.error(error);
    }
    log.finish(FINISH_TIMEOUT);
    drop(signal_thread);
    result.map_err(|_| Exit(FAILURE, None))
}

/// Takes the inherited sockets before any other file is opened, and registers the signals before any thread starts. A
/// signal from then on leads to a shutdown.
fn prepare(options: &Options) -> io::Result<(Vec<Adopt>, Option<Signals>, Log)> {
    let inherited = platform::inherited_sockets()?;
    let signals =
        Signals::register().map_err(|error| with_context(&error, "cannot handle signals"))?;
    let log = logging::start(options.log_level(), options.log_format)
        .map_err(|error| with_context(&error, "cannot start the log"))?;
    Ok((inherited, signals, log))
}

/// A server that is bound.
struct Bound {
    server: Server,
    config: Config,
    /// That of `--metrics`.
    http_server: Option<Server>,
}

fn bind(options: &Options, inherited: Vec<Adopt>) -> io::Result<Bound> {
    let mut config = options.config(!inherited.is_empty());
    let (requested, has_metrics) = (options.max_connections, options.metrics.is_some());
    config.max_connections = limits::max_connections(&config, requested, has_metrics)?;
    let available = memory::available();
    let default_limit = || memory::default_limit(&config, available);
    config.buffer_memory = options.buffer_memory.or_else(default_limit);
    let mut server = bind_when_free(|| Server::bind(config.clone()))?;
    for adopt in inherited {
        adopt(&mut server)?;
    }
    let bind_metrics =
        |address: &Address| bind_when_free(|| metrics::bind(address.clone(), &config));
    let http_server = options.metrics.as_ref().map(bind_metrics).transpose()?;
    memory::warn_if_insufficient(&config, available);
    Ok(Bound {
        server,
        config,
        http_server,
    })
}

/// Binds, and tries again for a while if an address is in use.
fn bind_when_free(bind: impl Fn() -> io::Result<Server>) -> io::Result<Server> {
    let deadline = Instant::now() + IN_USE_TIMEOUT;
    loop {
        match bind() {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                thread::sleep(IN_USE_INTERVAL);
            }
            result => return result,
        }
    }
}

/// What starts beside the server.
struct Startup<'a> {
    options: &'a Options,
    config: Config,
    server: Handle,
    addresses: Vec<Address>,
    http_server: Option<Server>,
    link: SignalLink,
    log: Log,
    faults: Option<Arc<Faults>>,
}

impl Startup<'_> {
    /// Starts the threads beside those of the server, which run, and reports that it serves.
    fn start(self) -> io::Result<Vec<BackgroundThread>> {
        let mut threads = Vec::new();
        let http_addresses = self.http_server.iter().flat_map(Server::addresses);
        let http_addresses: Vec<_> = http_addresses.cloned().collect();
        if let Some(faults) = &self.faults {
            log::warn!(target: TARGET, "the server misbehaves as requested: {}", faults.text);
        }
        if let Some(http_server) = self.http_server {
            let endpoint = Endpoint {
                server: self.server.clone(),
                max_connections: self.config.max_connections,
                max_buffer_memory: self.config.max_memory(),
                is_stopping: self.link.is_stopping,
                log: self.log,
                start: SystemTime::now(),
                faults: self.faults,
            };
            threads.push(metrics::start(http_server, endpoint)?);
        }
        if let Some(interval) = self.options.stats_interval {
            let server = self.server.clone();
            let report = move || log_stats(Level::Info, "stats", &server.stats());
            threads.push(BackgroundThread::repeat("reports", interval, report)?);
        }
        if let Some(timeout) = service::watchdog_timeout() {
            threads.push(service::start_watchdog(timeout, self.server.clone())?);
        }
        // Every thread runs: what is logged as listening serves.
        log_config(&self.addresses, &self.config);
        for address in http_addresses {
            log::info!("metrics: listening on {address}");
        }
        threads.extend(service::notify_ready(&self.addresses)?);
        // Its receiver has ended if the signals cannot be read.
        let _sent = self.link.handle_sender.send(self.server);
        Ok(threads)
    }
}

/// Serves until the server is shut down, then checks that the counters balance.
fn serve(options: &Options, inherited: Vec<Adopt>, link: SignalLink, log: &Log) -> io::Result<()> {
    let faults = options.faults.faults().map(Arc::new);
    let Bound {
        server,
        config,
        http_server,
    } = bind(options, inherited)?;
    let startup = Startup {
        options,
        config,
        server: server.handle(),
        addresses: server.addresses().to_vec(),
        http_server,
        link,
        log: log.clone(),
        faults: faults.clone(),
    };
    // Stopped and joined on drop.
    let mut threads = Vec::new();
    let start = || startup.start().map(|started| threads = started);
    let stats = match (&options.greeting, &faults) {
        (None, None) => server.run_with_start(start, |connection| {
            log_opened(connection);
            Echo
        }),
        (greeting, faults) => server.run_with_start(start, |connection| {
            log_opened(connection);
            let greeting = greeting.as_ref().map(|it| it.text(connection));
            let inner = faults.as_ref().map(|it| it.handler(connection.number()));
            GreetingHandler {
                unsent: greeting.unwrap_or_default(),
                inner: inner.unwrap_or(Faulty(None)),
            }
        }),
    }?;
    // The lines about the end are the last.
    drop(threads);
    log.keep_all_lines();
    log_stats(Level::Info, "ended", &stats);
    if let Some(problem) = stats.check_final_balance() {
        // The caller reports it.
        return Err(io::Error::other(format!(
            "counters do not balance: {problem}"
        )));
    }
    log::info!(target: TARGET, "counters balance: all connections and bytes accounted for");
    Ok(())
}

/// Logs the configuration in effect. What is 0 is off.
fn log_config(addresses: &[Address], config: &Config) {
    if let Some(pid) = platform::other_heir() {
        log::warn!(
            "the sockets of LISTEN_FDS are not taken: they are for process {pid} (LISTEN_PID)"
        );
    }
    for address in addresses {
        log::info!(target: TARGET, "listening on {address}");
    }
    let millis = |time: Option<Duration>| time.unwrap_or_default().as_millis() as u64;
    let (max_memory, spare) = (config.max_memory(), config.max_spare_memory());
    log::info!(
        target: TARGET,
        workers = config.workers,
        max_connections = config.max_connections,
        buffer_size = config.buffer_size,
        backlog = config.backlog,
        idle_timeout_ms = millis(config.idle_timeout),
        tcp_keepalive_ms = millis(config.tcp_keepalive),
        drain_timeout_ms = millis(Some(config.drain_timeout)),
        busy_poll_us = config.busy_poll.as_micros() as u64,
        max_buffer_bytes = max_memory,
        spare_buffer_bytes = spare;
        "configuration"
    );
    log::info!(target: TARGET, "buffer memory: at most {}", ByteSize(max_memory));
    log::debug!(
        target: TARGET,
        "two buffers of {} for each connection that holds bytes, and at most {} spare; \
         the kernel's socket buffers are not included{SOCKET_BUFFERS}",
        ByteSize(config.buffer_size as u64),
        ByteSize(spare),
    );
}

/// Logs a new connection with its local address, which costs a system call only if the line is logged.
fn log_opened(connection: &NewConnection<'_>) {
    const TARGET: &str = "echoserver::access";
    if log::log_enabled!(target: TARGET, Level::Trace)
        && let Ok(local) = connection.local_address()
    {
        log::trace!(target: TARGET, peer:% = connection.peer(), local:%; "opened");
    }
}
