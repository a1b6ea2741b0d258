//! Signals: the first SIGTERM or SIGINT drains, a second one exits at once, and SIGUSR1 logs the
//! counters.

use std::io;
use std::process;
use std::time::Duration;

use echoserver::Handle;
use log::Level;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator;
use signal_hook::low_level::signal_name;

use crate::serve::BackgroundThread;
use crate::serve::logging::Log;
use crate::serve::service;

/// How long to wait for the log after a second signal.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// Registered signals, to be handled once the server is bound.
pub(crate) struct Signals(iterator::Signals);

impl Signals {
    /// Registers the signals. A signal that arrives before [`handle`](Self::handle) is called stays
    /// pending.
    pub(crate) fn register() -> io::Result<Self> {
        iterator::Signals::new([SIGTERM, SIGINT, SIGUSR1]).map(Self)
    }

    /// Starts a thread that handles the signals.
    pub(crate) fn handle(mut self, server: Handle, log: Log) -> io::Result<BackgroundThread> {
        let registration = self.0.handle();
        let handle_signals = move || {
            let mut draining = false;
            for signal in self.0.forever() {
                if signal == SIGUSR1 {
                    log.stats(Level::Info, "stats", &server.stats());
                    continue;
                }
                let name = signal_name(signal).unwrap_or("signal");
                if draining {
                    let message = format!("second {name}: exiting without draining");
                    log.stats(Level::Warn, &message, &server.stats());
                    log.finish(FINISH_TIMEOUT);
                    process::exit(128 + signal);
                }
                draining = true;
                log::info!("{name}: draining");
                service::notify_stopping();
                server.shut_down();
            }
        };
        BackgroundThread::spawn("signals", handle_signals, move || registration.close())
    }
}
