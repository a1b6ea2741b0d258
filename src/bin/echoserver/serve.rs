//! Runs the library's server as a process: with signals, log, metrics and a service manager.

pub(crate) mod greeting;
pub(crate) mod limits;
pub(crate) mod logging;
pub(crate) mod memory;
pub(crate) mod metrics;
mod options;
pub(crate) mod reports;
pub(crate) mod service;
#[cfg(unix)]
pub(crate) mod signals;
#[cfg(unix)]
pub(crate) mod watchdog;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytesize::ByteSize;
use echoserver::{Config, Echo, NewConnection, Server};
use log::Level;

use self::logging::{FINISH_TIMEOUT, Log, TARGET, log_stats};
pub(crate) use self::options::Options;
use self::service::Inherited;
use crate::error::with_context;
use crate::output::{FAILURE, Failure};

/// What bounds the kernel's socket buffers of a TCP connection.
const SOCKET_BUFFERS: &str = if cfg!(any(target_os = "linux", target_os = "android")) {
    ": tcp_rmem and tcp_wmem bound them, and at most 128 KiB plus one send are unsent"
} else {
    ""
};

/// What the process takes from its environment before it opens anything else, and before any thread starts.
struct Environment {
    inherited: Inherited,
    #[cfg(unix)]
    signals: signals::Signals,
}

impl Environment {
    /// Takes the inherited sockets, and registers the signals. A signal from then on leads to a shutdown.
    fn take() -> io::Result<Self> {
        Ok(Self {
            inherited: Inherited::take()?,
            #[cfg(unix)]
            signals: signals::Signals::register()
                .map_err(|error| with_context(&error, "cannot handle signals"))?,
        })
    }
}

/// Serves until a signal shuts the server down. Reports an error itself.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let started = Environment::take().and_then(|environment| {
        let log = Log::start(options.log_level(), options.log_format)
            .map_err(|error| with_context(&error, "cannot start the log"))?;
        Ok((environment, log))
    });
    let (environment, log) = match started {
        Ok(started) => started,
        Err(error) => {
            logging::print_error(options.log_format, &error.to_string());
            return Err(Failure(FAILURE, None));
        }
    };
    let mut signals = None;
    let result = serve(options, &log, environment, &mut signals);
    if let Err(error) = &result {
        log.error(error);
    }
    log.finish(FINISH_TIMEOUT);
    // Until now a second signal could end the process.
    drop(signals);
    result.map_err(|_| Failure(FAILURE, None))
}

/// Serves until a signal shuts the server down, then checks that the counters balance. Sets the thread that
/// handles `signals`.
#[cfg_attr(not(unix), expect(unused_variables))]
fn serve(
    options: &Options,
    log: &Log,
    environment: Environment,
    signals: &mut Option<BackgroundThread>,
) -> io::Result<()> {
    let is_stopping = Arc::new(AtomicBool::new(false));
    let drain_delay = options.drain_delay;
    #[cfg(unix)]
    let (thread, bound) =
        (environment.signals).handle(drain_delay, Arc::clone(&is_stopping), log.clone())?;
    #[cfg(unix)]
    signals.replace(thread);
    let inherited = environment.inherited;
    let max_connections = limits::max_connections(options)?;
    let config = options.config(max_connections, !inherited.is_empty());
    let mut server = Server::bind(config.clone())?;
    inherited.adopt_into(&mut server)?;
    let bind_metrics = |address| metrics::bind(address, options.unix_mode);
    let http_server = options.metrics.clone().map(bind_metrics).transpose()?;
    // Everything is bound: what is logged as listening stays so.
    log_config(&server, &config);

    // The threads started here are stopped and joined when this function returns.
    let start_metrics = |http_server| {
        let observed = metrics::Observed {
            server: server.handle(),
            max_connections,
            is_stopping,
            log: log.clone(),
        };
        metrics::start(http_server, observed)
    };
    let _metrics = http_server.map(start_metrics).transpose()?;
    let start_reports = |interval| reports::start(interval, server.handle());
    let reports = options.stats_interval.map(start_reports).transpose()?;
    // Its receiver has ended if the signals cannot be read.
    #[cfg(unix)]
    let _sent = bound.send(server.handle());
    #[cfg(unix)]
    service::notify_ready(&server);
    #[cfg(unix)]
    let start_watchdog = |timeout| watchdog::start(timeout, server.handle());
    #[cfg(unix)]
    let _watchdog = service::watchdog_timeout()
        .map(start_watchdog)
        .transpose()?;

    let stats = match &options.greeting {
        Some(greeting) => server.run(|connection| {
            log_opened(connection);
            greeting.handler(connection)
        }),
        None => server.run(|connection| {
            log_opened(connection);
            Echo
        }),
    }?;

    // The lines about the end are the last.
    drop(reports);
    log.end();
    log_stats(Level::Info, "ended", &stats);
    if let Some(problem) = stats.check_final_balance() {
        let error = format!("counters do not balance: {problem}");
        log::error!(target: TARGET, "{error}");
        return Err(io::Error::other(error));
    }
    log::info!(target: TARGET, "counters balance: all connections and bytes accounted for");
    Ok(())
}

/// Logs the configuration in effect. What is 0 is off.
fn log_config(server: &Server, config: &Config) {
    for address in server.addresses() {
        log::info!(target: TARGET, "listening on {address}");
    }
    let millis = |time: Option<Duration>| time.unwrap_or_default().as_millis() as u64;
    let (max_memory, spare) = (config.max_memory(), config.max_spare_memory());
    log::info!(
        target: TARGET,
        workers = config.workers.get(),
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
    let of_connection = max_memory.saturating_sub(spare) / config.max_connections as u64;
    log::info!(
        target: TARGET,
        "buffer memory: at most {} ({} connections x {}, plus {} spare); \
         the kernel's socket buffers are not included{SOCKET_BUFFERS}",
        ByteSize(max_memory),
        config.max_connections,
        ByteSize(of_connection),
        ByteSize(spare),
    );
    memory::warn_if_insufficient(config);
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

/// A thread that is stopped and joined on drop.
pub(crate) struct BackgroundThread {
    stop: Option<Box<dyn FnOnce()>>,
    thread: Option<JoinHandle<()>>,
}

impl BackgroundThread {
    /// Starts a thread that executes `run`. On drop, `stop` must make `run` return.
    fn spawn(
        name: &str,
        run: impl FnOnce() + Send + 'static,
        stop: impl FnOnce() + 'static,
    ) -> io::Result<Self> {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(run);
        let thread = thread
            .map_err(|error| with_context(&error, &format!("cannot start the thread '{name}'")))?;
        Ok(Self {
            stop: Some(Box::new(stop)),
            thread: Some(thread),
        })
    }
}

impl Drop for BackgroundThread {
    fn drop(&mut self) {
        if let (Some(stop), Some(thread)) = (self.stop.take(), self.thread.take()) {
            stop();
            // The panic hook has logged any panic.
            let _panic = thread.join();
        }
    }
}
