//! Signals: the first SIGTERM or SIGINT drains, the second one ends the process at once; SIGUSR1 logs
//! what was counted.

use std::io;
use std::process;
use std::thread::{self, JoinHandle};

use echoserver::Handle;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator;
use signal_hook::low_level::signal_name;

use crate::serve::logging::Log;
use crate::serve::service;

/// Signals that are caught, and obeyed once there is a server to obey them.
pub(crate) struct Signals(iterator::Signals);

/// The thread that obeys; it ends when this is dropped.
pub(crate) struct SignalThread {
    signals: iterator::Handle,
    thread: Option<JoinHandle<()>>,
}

impl Signals {
    /// Catches the signals from here on: one that comes before the server is up is not lost.
    pub(crate) fn catch() -> io::Result<Self> {
        iterator::Signals::new([SIGTERM, SIGINT, SIGUSR1]).map(Self)
    }

    /// Starts a thread that does what the signals say.
    pub(crate) fn obey(mut self, server: Handle, log: Log) -> io::Result<SignalThread> {
        let signals = self.0.handle();
        let obey = move || {
            let mut told = false;
            for signal in self.0.forever() {
                if signal == SIGUSR1 {
                    log.stats("stats", &server.stats());
                    continue;
                }
                let name = signal_name(signal).unwrap_or("signal");
                if told {
                    log::warn!("{name} again: ending at once, {}", server.stats());
                    log.finish();
                    process::exit(128 + signal);
                }
                told = true;
                log::info!("{name}: draining");
                service::stopping();
                server.shut_down();
            }
        };
        let thread = thread::Builder::new()
            .name("signals".to_owned())
            .spawn(obey)?;
        Ok(SignalThread {
            signals,
            thread: Some(thread),
        })
    }
}

impl Drop for SignalThread {
    fn drop(&mut self) {
        self.signals.close();
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, the panic hook has told of it.
            let _panic = thread.join();
        }
    }
}
