//! The watchdog of the service manager: tells it regularly that all workers run.

use std::io;
use std::iter;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};
use echoserver::{Handle, Stats};

use crate::serve::{BackgroundThread, service};

/// Pings per timeout. The service manager acts if all but the first are missing.
const PINGS: u32 = 4;

/// Starts a thread that wakes all workers `PINGS` times per `timeout` and notifies the service manager each
/// time that all have run a tick.
pub(crate) fn start(timeout: Duration, server: Handle) -> io::Result<BackgroundThread> {
    let interval = (timeout / PINGS).max(Duration::from_millis(1));
    let (keep_running, stopped) = bounded::<()>(0);
    let run = move || {
        let mut before = server.stats();
        server.wake_workers();
        while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
            let now = server.stats();
            match stuck_worker(&before, &now) {
                // Workers end during a shutdown. It has a deadline.
                Some(worker) if !server.is_shut_down() => {
                    log::error!("worker {worker} is stuck: no tick within {interval:?}");
                }
                _ => service::notify_watchdog(),
            }
            before = now;
            server.wake_workers();
        }
    };
    BackgroundThread::spawn("watchdog", run, move || drop(keep_running))
}

/// Returns the first worker that has run no tick in between.
fn stuck_worker(before: &Stats, now: &Stats) -> Option<usize> {
    iter::zip(&before.workers, &now.workers).position(|(before, now)| before.ticks == now.ticks)
}
