//! Signals: the first SIGTERM, SIGINT or SIGHUP drains, a second one exits at once, and SIGUSR1 logs the
//! counters.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use echoserver::Handle;
use log::Level;
use nix::sys::signal::SigSet;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use signal_hook::low_level::signal_name;

use crate::serve::logging::{Log, log_stats};
use crate::serve::{BackgroundThread, service};

/// A repeat of the same signal within this time is the same request: `timeout` signals a process first, and
/// then its group.
const REPEAT_INTERVAL: Duration = Duration::from_millis(200);

/// How long a signal during the startup waits for the server, before the process exits without one. The
/// resolver can need minutes.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(1);

/// How often to look for the server meanwhile.
const STARTUP_INTERVAL: Duration = Duration::from_millis(10);

/// How long to wait for the log after a second signal.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// Registered signals.
pub(crate) struct Signals(SignalDelivery<UnixStream, SignalOnly>);

impl Signals {
    /// Registers the signals. A signal that arrives before [`handle`](Self::handle) is called stays
    /// pending. Signals that the parent process has blocked are unblocked.
    ///
    /// Call it before any thread starts, because threads inherit the set of blocked signals.
    pub(crate) fn register() -> io::Result<Self> {
        // A signal that arrives between the steps of its own registration would be lost.
        SigSet::all().thread_block()?;
        // A write beyond the limit of a file's size fails then, instead of ending the process.
        flag::register(SIGXFSZ, Arc::default())?;
        let hangup = Some(SIGHUP).filter(|_| !is_hangup_ignored());
        let signals = [SIGTERM, SIGINT, SIGUSR1].into_iter().chain(hangup);
        let (read, write) = UnixStream::pair()?;
        let delivery = SignalDelivery::with_pipe(read, write, SignalOnly, signals)?;
        SigSet::empty().thread_set_mask()?;
        Ok(Self(delivery))
    }

    /// Starts a thread that handles the signals. Returns where to send the handle of the server once it is
    /// bound.
    pub(crate) fn handle(
        self,
        drain_delay: Duration,
        is_stopping: Arc<AtomicBool>,
        log: Log,
    ) -> io::Result<(BackgroundThread, Sender<Handle>)> {
        let (sender, bound) = bounded(1);
        let registration = self.0.handle();
        let mut thread = SignalThread {
            delivery: self.0,
            bound,
            server: None,
            has_failed: false,
            drain_delay,
            is_stopping,
            log,
            shutdown: None,
        };
        let stop = move || registration.close();
        let thread = BackgroundThread::spawn("signals", move || thread.run(), stop)?;
        Ok((thread, sender))
    }
}

/// Whether SIGHUP was ignored when the process started, as `nohup` does. Where /proc does not tell, it counts
/// as ignored, and keeps the effect that it had.
fn is_hangup_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    ignored.is_none_or(|set| set & 1 != 0)
}

/// A shutdown that a signal has requested.
struct Shutdown {
    signal: i32,
    requested: Instant,
    /// The drain has begun.
    is_draining: bool,
}

struct SignalThread {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    bound: Receiver<Handle>,
    server: Option<Handle>,
    /// The startup has failed, and the process is about to exit.
    has_failed: bool,
    drain_delay: Duration,
    is_stopping: Arc<AtomicBool>,
    log: Log,
    shutdown: Option<Shutdown>,
}

impl SignalThread {
    fn run(&mut self) {
        while !self.delivery.handle().is_closed() {
            let timeout = self.advance();
            let mut wait = |pipe: &mut UnixStream| wait_for_byte(pipe, timeout);
            match self.delivery.poll_pending(&mut wait) {
                Ok(pending) => pending
                    .into_iter()
                    .flatten()
                    .for_each(|signal| self.handle(signal)),
                Err(error) => return log::error!("cannot wait for signals: {error}"),
            }
        }
    }

    /// Begins the drain when it is due. Returns when to call this again, unless a signal arrives before.
    fn advance(&mut self) -> Option<Duration> {
        self.receive_server();
        let shutdown = self.shutdown.as_mut()?;
        if shutdown.is_draining || self.has_failed {
            return None;
        }
        let name = signal_name(shutdown.signal).unwrap_or("signal");
        let elapsed = shutdown.requested.elapsed();
        match &self.server {
            Some(server) if elapsed >= self.drain_delay => {
                log::info!("{name}: draining");
                service::notify_draining();
                server.shut_down();
                shutdown.is_draining = true;
                None
            }
            Some(_) => Some(self.drain_delay.saturating_sub(elapsed)),
            None if elapsed < STARTUP_TIMEOUT => Some(STARTUP_INTERVAL),
            None => {
                log::info!("{name}: exiting before the server has started");
                self.log.finish(FINISH_TIMEOUT);
                process::exit(0);
            }
        }
    }

    fn receive_server(&mut self) {
        if self.server.is_none() {
            match self.bound.try_recv() {
                Ok(server) => self.server = Some(server),
                Err(error) => self.has_failed = error.is_disconnected(),
            }
        }
    }

    fn handle(&mut self, signal: i32) {
        self.receive_server();
        if signal == SIGUSR1 {
            if let Some(server) = &self.server {
                log_stats(Level::Info, "stats", &server.stats());
            }
            return;
        }
        let name = signal_name(signal).unwrap_or("signal");
        let Some(shutdown) = &self.shutdown else {
            self.shutdown = Some(Shutdown {
                signal,
                requested: Instant::now(),
                is_draining: false,
            });
            self.is_stopping.store(true, Ordering::Relaxed);
            if !self.drain_delay.is_zero() {
                log::info!("{name}: not ready, draining in {:?}", self.drain_delay);
                service::notify_drain_delay(self.drain_delay);
            }
            return;
        };
        if signal == shutdown.signal && shutdown.requested.elapsed() < REPEAT_INTERVAL {
            return;
        }
        let message = format!("second {name}: exiting without draining");
        match &self.server {
            Some(server) => log_stats(Level::Warn, &message, &server.stats()),
            None => log::warn!("{message}"),
        }
        self.log.finish(FINISH_TIMEOUT);
        process::exit(128 + signal);
    }
}

/// Waits until a signal has put a byte into the pipe; returns whether one has.
fn wait_for_byte(pipe: &mut UnixStream, timeout: Option<Duration>) -> io::Result<bool> {
    // Zero would be an error.
    pipe.set_read_timeout(timeout.map(|timeout| timeout.max(Duration::from_millis(1))))?;
    match pipe.read(&mut [0]) {
        Ok(count) => Ok(count > 0),
        Err(error) => match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => Ok(false),
            _ => Err(error),
        },
    }
}
