//! `--stats-interval`: logs the counters periodically.

use std::io;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};
use echoserver::Handle;
use log::Level;

use crate::serve::BackgroundThread;
use crate::serve::logging::log_stats;

/// Starts a thread that logs the counters of `server` once per `interval`.
pub(crate) fn start(interval: Duration, server: Handle) -> io::Result<BackgroundThread> {
    let (keep_running, stopped) = bounded::<()>(0);
    BackgroundThread::spawn(
        "reports",
        move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                log_stats(Level::Info, "stats", &server.stats());
            }
        },
        move || drop(keep_running),
    )
}
