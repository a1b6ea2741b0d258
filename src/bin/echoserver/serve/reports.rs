//! What was counted, logged regularly.

use std::io;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use echoserver::Handle;

use crate::serve::logging::Log;

/// The thread that logs; it ends when this is dropped.
pub(crate) struct Reports {
    running: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Reports {
    /// Logs what `server` has counted, once per `interval`.
    pub(crate) fn start(interval: Duration, server: Handle, log: Log) -> io::Result<Self> {
        let (running, ended) = bounded::<()>(0);
        let report = move || {
            while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                log.stats("stats", &server.stats());
            }
        };
        let thread = thread::Builder::new()
            .name("reports".to_owned())
            .spawn(report)?;
        Ok(Self {
            running: Some(running),
            thread: Some(thread),
        })
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        drop(self.running.take());
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, the panic hook has told of it.
            let _panic = thread.join();
        }
    }
}
