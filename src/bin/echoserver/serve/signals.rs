//! Signals: the first SIGTERM, SIGINT or SIGHUP drains, a second one exits at once, and SIGUSR1 logs the
//! counters.

use std::io;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
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

/// How long to wait for the log before an exit without a drain.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// What the thread that handles signals exchanges with the server.
pub(crate) struct SignalLink {
    /// Takes the handle of the server once it is bound. Dropped without one, the startup has failed.
    pub(crate) handle_sender: Sender<Handle>,
    /// A signal has requested a shutdown; the drain may not have begun.
    pub(crate) is_stopping: Arc<AtomicBool>,
}

/// Starts a thread that handles signals, if there are any.
pub(crate) fn start(
    signals: Option<Signals>,
    drain_delay: Duration,
    log: Log,
) -> io::Result<(Option<BackgroundThread>, SignalLink)> {
    let (handle_sender, handle_receiver) = bounded(1);
    let link = SignalLink {
        handle_sender,
        is_stopping: Arc::default(),
    };
    let mut handler = SignalHandler {
        handle_receiver,
        server: Err(TryRecvError::Empty),
        drain_delay,
        is_stopping: Arc::clone(&link.is_stopping),
        log,
        request: None,
    };
    let spawn = |signals: Signals| {
        let close = signals.closer();
        BackgroundThread::spawn("signals", move || handler.run(signals), close)
    };
    Ok((signals.map(spawn).transpose()?, link))
}

struct SignalHandler {
    handle_receiver: Receiver<Handle>,
    /// What was last received from `handle_receiver`. If that is disconnected, the process is about to exit.
    server: Result<Handle, TryRecvError>,
    drain_delay: Duration,
    is_stopping: Arc<AtomicBool>,
    log: Log,
    /// The signal that has requested a shutdown, and when.
    request: Option<(i32, Instant)>,
}

impl SignalHandler {
    fn run(&mut self, mut signals: Signals) {
        let mut arrived = Vec::new();
        loop {
            if self.server.is_err() {
                self.server = self.handle_receiver.try_recv();
            }
            for signal in arrived {
                self.handle(signal);
            }
            arrived = match signals.wait(self.advance()) {
                Ok(Some(arrived)) => arrived,
                Ok(None) => return,
                Err(error) => return log::error!("cannot wait for signals: {error}"),
            }
        }
    }

    /// Begins the drain when it is due. Returns when to call this again, unless a signal arrives before.
    fn advance(&self) -> Option<Duration> {
        let (signal, time) = self.request?;
        let (name, elapsed) = (name_of(signal), time.elapsed());
        match &self.server {
            Ok(server) if server.is_shutting_down() => None,
            Ok(server) if elapsed >= self.drain_delay => {
                log::info!("{name}: draining");
                service::notify("STOPPING=1\nSTATUS=draining\n");
                server.shut_down();
                None
            }
            Ok(_) => Some(self.drain_delay.saturating_sub(elapsed)),
            Err(TryRecvError::Disconnected) => None,
            Err(TryRecvError::Empty) if elapsed < STARTUP_TIMEOUT => Some(STARTUP_INTERVAL),
            Err(TryRecvError::Empty) => {
                log::info!("{name}: exiting before the server has started");
                self.exit(0)
            }
        }
    }

    fn handle(&mut self, signal: i32) {
        let name = name_of(signal);
        match self.request {
            _ if signal == SIGUSR1 => {
                if let Ok(server) = &self.server {
                    log_stats(Level::Info, "stats", &server.stats());
                }
            }
            None => {
                self.request = Some((signal, Instant::now()));
                self.is_stopping.store(true, Relaxed);
                if !self.drain_delay.is_zero() {
                    let delay = self.drain_delay;
                    log::info!("{name}: not ready, draining in {delay:?}");
                    service::notify(&format!("STOPPING=1\nSTATUS=draining in {delay:?}\n"));
                }
            }
            Some((first, time)) if first == signal && time.elapsed() < REPEAT_INTERVAL => {}
            Some(_) => {
                let message = format!("second {name}: exiting without draining");
                match &self.server {
                    Ok(server) => log_stats(Level::Warn, &message, &server.stats()),
                    Err(_) => log::warn!("{message}"),
                }
                self.exit(128 + signal);
            }
        }
    }

    fn exit(&self, status: i32) -> ! {
        self.log.finish(EXIT_TIMEOUT);
        process::exit(status)
    }
}

fn name_of(signal: i32) -> &'static str {
    signal_name(signal).unwrap_or("signal")
}
