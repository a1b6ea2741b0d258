//! Threads beside those of the server.

use std::io;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

use crate::error::with_context;

/// Makes a thread end.
type Stop = Box<dyn FnOnce()>;

/// A thread that is stopped and joined on drop.
pub(crate) struct BackgroundThread(Option<(Stop, JoinHandle<()>)>);

impl BackgroundThread {
    /// Starts a thread that executes `run`. On drop, `stop` must make `run` return.
    pub(crate) fn spawn(
        name: &str,
        run: impl FnOnce() + Send + 'static,
        stop: impl FnOnce() + 'static,
    ) -> io::Result<Self> {
        let spawned = thread::Builder::new().name(name.to_owned()).spawn(run);
        let thread = spawned
            .map_err(|error| with_context(&error, &format!("cannot start the thread '{name}'")))?;
        Ok(Self(Some((Box::new(stop), thread))))
    }

    /// Starts a thread that executes `step` once per `interval`.
    pub(crate) fn repeat(
        name: &str,
        interval: Duration,
        mut step: impl FnMut() + Send + 'static,
    ) -> io::Result<Self> {
        let (keep_running, stopped) = bounded::<()>(0);
        let run = move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                step();
            }
        };
        Self::spawn(name, run, move || drop(keep_running))
    }
}

impl Drop for BackgroundThread {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take() {
            stop();
            // The panic hook has logged any panic.
            let _panic = thread.join();
        }
    }
}
