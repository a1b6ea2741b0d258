//! The queue of the log, and the thread that writes its lines.
//!
//! The queue is bounded in bytes. When it is full, lines are dropped. Their number is logged later, and so is that of lines
//! that could not be written.

use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::format::Style;
use crate::error::error_text;
use crate::platform;

/// Limit for queued lines, in bytes: room for about 7,000 lines, because a drain logs many at once.
const MAX_QUEUED_BYTES: usize = 1 << 20;

/// How long [`Log::finish`] waits while a pipe or a terminal takes no byte: it may have no reader.
const STALL_TIMEOUT: Duration = Duration::from_secs(3);

/// How soon to try again if stderr is non-blocking and full.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

enum Message {
    Line(String),
    Flush(Sender<()>),
}

/// The sending end of the queue.
#[derive(Clone)]
pub(crate) struct Log {
    style: Style,
    messages: Sender<Message>,
    state: Arc<State>,
}

/// What both ends of the queue know.
#[derive(Default)]
struct State {
    queued_bytes: AtomicUsize,
    written_bytes: AtomicU64,
    /// Lines that found the queue full, or could not be written completely.
    lost_lines: AtomicU64,
    /// The server has ended: only the last few lines follow, and none is dropped.
    is_ending: AtomicBool,
}

impl Log {
    /// Starts the thread that writes lines to `output`.
    pub(super) fn start(output: impl Write + Send + 'static, style: Style) -> io::Result<Self> {
        let (log, messages) = Self::new(style);
        let mut writer = Writer {
            output,
            log: log.clone(),
            is_partial: false,
            reported: 0,
            error: None,
        };
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || writer.run(&messages))?;
        Ok(log)
    }

    /// Creates a queue, and returns its sending and its receiving end.
    fn new(style: Style) -> (Self, Receiver<Message>) {
        // The sender enforces the bound, which is in bytes.
        let (messages, receiver) = unbounded();
        let log = Self {
            style,
            messages,
            state: Arc::default(),
        };
        (log, receiver)
    }

    /// Returns how many lines are missing.
    pub(crate) fn lost_lines(&self) -> u64 {
        self.state.lost_lines.load(Relaxed)
    }

    /// Drops no more lines. Called when the server has ended, and only a few lines follow.
    pub(crate) fn keep_all_lines(&self) {
        self.state.is_ending.store(true, Relaxed);
    }

    /// Writes an error that ends the process, independent of the level. It goes through the queue, because
    /// a direct write to stderr can block.
    pub(crate) fn error(&self, error: &io::Error) {
        self.send(self.style.error(&error.to_string()));
    }

    fn send(&self, line: String) {
        self.state.queued_bytes.fetch_add(line.len(), Relaxed);
        // The receiver lives as long as the process.
        let _sent = self.messages.send(Message::Line(line));
    }

    /// Queues a line, or drops it if the queue is full.
    fn push(&self, line: String) {
        // Concurrent threads can exceed the bound by one line each.
        let has_room = self.state.queued_bytes.load(Relaxed) + line.len() <= MAX_QUEUED_BYTES;
        if has_room || self.state.is_ending.load(Relaxed) {
            self.send(line);
        } else {
            self.state.lost_lines.fetch_add(1, Relaxed);
        }
    }

    /// Waits until all queued lines are written, for as long as stderr takes bytes and at most for `limit`.
    pub(crate) fn finish(&self, limit: Duration) {
        // A write to a regular file ends, however slow the disk is.
        let is_file = platform::is_stderr_file();
        let stall = if is_file { limit } else { STALL_TIMEOUT };
        let (done, written) = bounded(1);
        // The receiver lives as long as the process.
        let _sent = self.messages.send(Message::Flush(done));
        let deadline = Instant::now() + limit;
        let mut before = None;
        while before != Some(self.state.written_bytes.load(Relaxed)) && Instant::now() < deadline {
            before = Some(self.state.written_bytes.load(Relaxed));
            let timeout = stall.min(deadline.saturating_duration_since(Instant::now()));
            if written.recv_timeout(timeout).is_ok() {
                return;
            }
        }
    }
}

/// Each write is one line. env_logger holds a lock meanwhile: a write does not block, log or panic.
impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(String::from_utf8_lossy(line).into_owned());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread that writes queued lines.
struct Writer<W> {
    output: W,
    log: Log,
    /// The output ends with a part of a line.
    is_partial: bool,
    /// The lost lines that the output already reports.
    reported: u64,
    /// The error of the last write that failed since.
    error: Option<io::Error>,
}

impl<W: Write> Writer<W> {
    fn run(&mut self, messages: &Receiver<Message>) {
        for message in messages {
            match message {
                Message::Line(line) => {
                    let written = self.write(&line);
                    self.log.state.queued_bytes.fetch_sub(line.len(), Relaxed);
                    match written {
                        Ok(()) => self.report_lost_lines(),
                        Err(error) => {
                            self.log.state.lost_lines.fetch_add(1, Relaxed);
                            self.error = Some(error);
                        }
                    }
                }
                Message::Flush(done) => {
                    self.report_lost_lines();
                    let _unless_timed_out = done.try_send(());
                }
            }
        }
    }

    /// Writes a line. It ends a part of a line that was written before.
    fn write(&mut self, line: &str) -> io::Result<()> {
        let line = [if self.is_partial { "\n" } else { "" }, line].concat();
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match self.output.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.log
                        .state
                        .written_bytes
                        .fetch_add(count as u64, Relaxed);
                    self.is_partial = rest[count - 1] != b'\n';
                    rest = &rest[count..];
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Another process has made the pipe or terminal non-blocking.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    thread::sleep(RETRY_INTERVAL);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reports the lines that were lost since the last report, unless that fails as well.
    fn report_lost_lines(&mut self) {
        let lost = self.log.lost_lines();
        let reason = match &self.error {
            _ if lost == self.reported => return,
            Some(error) => error_text(error),
            None => "stderr was not read in time".to_owned(),
        };
        let line = self.log.style.lost_lines(lost - self.reported, &reason);
        if self.write(&line).is_ok() {
            (self.reported, self.error) = (lost, None);
        }
    }
}

#[cfg(test)]
mod tests;
