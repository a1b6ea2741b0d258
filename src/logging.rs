//! The log: to stderr, by a thread of its own, so that a reader who stalls can't stall the server.
//!
//! Lines wait in a bounded queue; what finds it full is dropped, counted, and told of later.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use log::LevelFilter;

/// Lines that wait for a slow reader.
const LINES_MAX: usize = 1024;

/// How long the end of the process waits for a slow reader.
const FLUSH_MAX: Duration = Duration::from_millis(200);

enum Message {
    Line(Vec<u8>),
    Flush(Sender<()>),
}

/// The log's end for writing.
#[derive(Clone)]
pub(crate) struct Log {
    queue: Sender<Message>,
    dropped: Arc<AtomicU64>,
}

impl Log {
    /// Starts logging at `level`, or as `RUST_LOG` says.
    pub(crate) fn start(level: LevelFilter) -> io::Result<Self> {
        let (queue, lines) = bounded(LINES_MAX);
        let log = Self {
            queue,
            dropped: Arc::default(),
        };
        let dropped = Arc::clone(&log.dropped);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || print(&lines, &dropped))?;
        env_logger::Builder::new()
            .filter_module("echoserver", level)
            .parse_default_env()
            .target(env_logger::Target::Pipe(Box::new(log.clone())))
            .init();
        Ok(log)
    }

    /// Waits until what was logged is written, but not for long.
    pub(crate) fn finish(&self) {
        let (done, written) = bounded(1);
        if self
            .queue
            .send_timeout(Message::Flush(done), FLUSH_MAX)
            .is_ok()
        {
            // A reader who stalls now has had its time.
            let _late = written.recv_timeout(FLUSH_MAX);
        }
    }
}

/// Takes whole lines only: the logger formats a record, then writes it at once.
impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Message::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes lines as they come. Whether stderr takes them is not the server's concern.
fn print(messages: &Receiver<Message>, dropped: &AtomicU64) {
    let mut stderr = io::stderr();
    for message in messages {
        match message {
            Message::Line(line) => drop(stderr.write_all(&line)),
            Message::Flush(done) => drop(done.try_send(())),
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            drop(writeln!(
                stderr,
                "[{lost} log lines were dropped here: nobody was reading]"
            ));
        }
    }
}
