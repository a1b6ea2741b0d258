//! Signals: the first SIGTERM, SIGINT or SIGHUP drains, a second one exits at once, and SIGUSR1 logs the
//! counters.

use std::io;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use echoserver::Handle;
use log::Level;
use signal_hook::low_level::signal_name;

use crate::platform::{SIGUSR1, Signals};
use crate::serve::background::BackgroundThread;
use crate::serve::logging::{Log, log_stats};
use crate::serve::service;

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

/// What the thread that handles signals exchanges with the server.
pub(crate) struct SignalLink {
    /// Takes the handle of the server once it is bound. Dropped without one, the startup has failed.
    pub(crate) bound: Sender<Handle>,
    /// A signal has requested a shutdown; the drain may not have begun.
    pub(crate) is_stopping: Arc<AtomicBool>,
}

/// Starts a thread that handles signals, if there are any.
pub(crate) fn start(
    signals: Option<Signals>,
    drain_delay: Duration,
    log: Log,
) -> io::Result<(Option<BackgroundThread>, SignalLink)> {
    let (sender, bound) = bounded(1);
    let is_stopping = Arc::new(AtomicBool::new(false));
    let mut handler = SignalHandler {
        bound,
        server: None,
        has_failed: false,
        drain_delay,
        is_stopping: Arc::clone(&is_stopping),
        log,
        request: None,
    };
    let spawn = |signals: Signals| {
        let close = signals.closer();
        BackgroundThread::spawn("signals", move || handler.run(signals), close)
    };
    let link = SignalLink {
        bound: sender,
        is_stopping,
    };
    Ok((signals.map(spawn).transpose()?, link))
}

/// A shutdown that a signal has requested.
struct Request {
    signal: i32,
    time: Instant,
    /// The drain has begun.
    is_draining: bool,
}

struct SignalHandler {
    bound: Receiver<Handle>,
    server: Option<Handle>,
    /// The startup has failed, and the process is about to exit.
    has_failed: bool,
    drain_delay: Duration,
    is_stopping: Arc<AtomicBool>,
    log: Log,
    request: Option<Request>,
}

impl SignalHandler {
    fn run(&mut self, mut signals: Signals) {
        loop {
            self.receive_server();
            let timeout = self.advance();
            match signals.wait(timeout) {
                Ok(Some(arrived)) => {
                    self.receive_server();
                    for signal in arrived {
                        self.handle(signal);
                    }
                }
                Ok(None) => return,
                Err(error) => return log::error!("cannot wait for signals: {error}"),
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

    /// Begins the drain when it is due. Returns when to call this again, unless a signal arrives before.
    fn advance(&mut self) -> Option<Duration> {
        let request = self.request.as_mut()?;
        if request.is_draining || self.has_failed {
            return None;
        }
        let (name, elapsed) = (name_of(request.signal), request.time.elapsed());
        match &self.server {
            Some(server) if elapsed >= self.drain_delay => {
                log::info!("{name}: draining");
                service::notify_draining();
                server.shut_down();
                request.is_draining = true;
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

    fn handle(&mut self, signal: i32) {
        let name = name_of(signal);
        match &self.request {
            _ if signal == SIGUSR1 => {
                if let Some(server) = &self.server {
                    log_stats(Level::Info, "stats", &server.stats());
                }
            }
            None => {
                self.request = Some(Request {
                    signal,
                    time: Instant::now(),
                    is_draining: false,
                });
                self.is_stopping.store(true, Relaxed);
                if !self.drain_delay.is_zero() {
                    log::info!("{name}: not ready, draining in {:?}", self.drain_delay);
                    service::notify_drain_delay(self.drain_delay);
                }
            }
            Some(first) if first.signal == signal && first.time.elapsed() < REPEAT_INTERVAL => {}
            Some(_) => {
                let message = format!("second {name}: exiting without draining");
                match &self.server {
                    Some(server) => log_stats(Level::Warn, &message, &server.stats()),
                    None => log::warn!("{message}"),
                }
                self.log.finish(FINISH_TIMEOUT);
                process::exit(128 + signal);
            }
        }
    }
}

fn name_of(signal: i32) -> &'static str {
    signal_name(signal).unwrap_or("signal")
}
