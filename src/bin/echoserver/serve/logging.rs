//! The log: a thread of its own writes it to stderr, so that a blocked stderr never blocks the
//! server.
//!
//! Lines wait in a queue that is bounded in bytes. When it is full, lines are dropped. Their number is
//! logged later, and so is that of lines that could not be written. A record's key-value pairs follow its
//! message as `key=value`; in JSON they are fields of the object.

use std::borrow::Cow;
use std::cell::Cell;
use std::env;
use std::fmt::{self, Display, Write as _};
use std::io::{self, ErrorKind, Write};
use std::panic::{self, PanicHookInfo};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clap::ValueEnum;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use echoserver::Stats;
use env_filter::{Filter, FilteredLog};
use log::kv::{self, Key, Source, Value, VisitSource};
use log::{Level, LevelFilter, Metadata, Record};

use crate::error::escape_control;
use crate::output::shorten;

/// The log target of records about the whole process.
pub(crate) const TARGET: &str = "echoserver";

/// The most characters of an error that ends the process.
const MAX_ERROR: usize = 1000;

/// Limit for queued lines, in bytes: room for about 7,000 lines, because a drain logs many at once.
const MAX_QUEUED_BYTES: usize = 1 << 20;

/// How long [`Log::finish`] waits at most after the drain.
pub(crate) const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

/// How long [`Log::finish`] waits while a pipe or a terminal takes no byte: it may have no reader.
const STALL_TIMEOUT: Duration = Duration::from_secs(3);

/// How soon to try again if stderr is non-blocking and full.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// The format of log records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Human-readable lines.
    Text,
    /// One JSON object per line.
    Json,
}

thread_local! {
    /// The server that this thread belongs to, unless it is the echo server.
    static SERVER: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Names the server that this thread belongs to. Its log records contain the name.
pub(crate) fn set_server(name: &'static str) {
    SERVER.set(Some(name));
}

/// How lines are written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    format: Format,
    /// Stderr is read by systemd's journal, which has timestamps of its own and takes a priority from the
    /// start of a line.
    is_journal: bool,
}

impl Style {
    pub(crate) fn new(format: Format) -> Self {
        Self {
            format,
            is_journal: is_journal(),
        }
    }

    /// Returns the line of a record.
    fn line(self, record: &Record<'_>) -> String {
        let mut line = String::new();
        // A write to a string does not fail.
        let _infallible = self.write(record, &mut line);
        line
    }

    fn write(self, record: &Record<'_>, line: &mut String) -> fmt::Result {
        let (now, level) = (SystemTime::now(), record.level());
        if self.is_journal {
            write!(line, "<{}>", priority(level))?;
        }
        if self.format == Format::Json {
            let time = humantime::format_rfc3339_millis(now);
            return write_json(record, &time.to_string(), line);
        }
        if !self.is_journal {
            let time = humantime::format_rfc3339_seconds(now);
            write!(line, "[{time} {level:<5} {}] ", record.target())?;
        }
        if let Some(server) = SERVER.get() {
            write!(line, "{server}: ")?;
        }
        write!(line, "{}", record.args())?;
        visit(record, |key, value| write!(line, " {key}={value}"))?;
        line.push('\n');
        Ok(())
    }

    /// Returns the line of an error that ends the process.
    pub(crate) fn error(self, error: &dyn Display) -> String {
        let error = shorten(&error.to_string(), MAX_ERROR);
        if self.format == Format::Text {
            let prefix = if self.is_journal { "<3>" } else { "" };
            return format!("{prefix}{TARGET}: {}\n", escape_control(&error));
        }
        let mut record = Record::builder();
        record.level(Level::Error).target(TARGET);
        self.line(&record.args(format_args!("{error}")).build())
    }

    /// Returns the line of a warning about lines that are missing in the log.
    fn missing_lines(self, count: u64, problem: &dyn Display) -> String {
        let mut record = Record::builder();
        record.level(Level::Warn).target(TARGET);
        let fields = [("lines", count)];
        if self.format == Format::Json {
            record.key_values(&fields);
        }
        let message = format!("{count} log lines were {problem}");
        self.line(&record.args(format_args!("{message}")).build())
    }
}

/// Prints an error that ends the process before the log thread runs.
pub(crate) fn print_error(format: Format, error: &str) {
    let line = Style::new(format).error(&error);
    let _closed = io::stderr().write_all(line.as_bytes());
}

/// Returns whether stderr is a stream to the journal, which systemd names by device and inode.
#[cfg(unix)]
fn is_journal() -> bool {
    use std::os::unix::fs::MetadataExt;

    let stream = env::var("JOURNAL_STREAM").unwrap_or_default();
    let stderr = stderr_metadata();
    stderr.is_some_and(|stderr| format!("{}:{}", stderr.dev(), stderr.ino()) == stream)
}

#[cfg(unix)]
fn stderr_metadata() -> Option<std::fs::Metadata> {
    use std::os::fd::AsFd;

    let stderr = io::stderr().as_fd().try_clone_to_owned();
    std::fs::File::from(stderr.ok()?).metadata().ok()
}

#[cfg(not(unix))]
fn is_journal() -> bool {
    false
}

#[cfg(not(unix))]
fn stderr_metadata() -> Option<std::fs::Metadata> {
    None
}

/// Returns the priority of syslog for a level.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// Calls `write` with each key-value pair of a record.
fn visit(
    record: &Record<'_>,
    write: impl FnMut(&Key<'_>, &Value<'_>) -> fmt::Result,
) -> fmt::Result {
    struct Visitor<F>(F);

    impl<'kvs, F: FnMut(&Key<'_>, &Value<'_>) -> fmt::Result> VisitSource<'kvs> for Visitor<F> {
        fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
            (self.0)(&key, &value).map_err(kv::Error::from)
        }
    }

    let visited = record.key_values().visit(&mut Visitor(write));
    visited.map_err(|_| fmt::Error)
}

/// Writes a record as a JSON object: time, level, target, message, then its key-value pairs.
fn write_json(record: &Record<'_>, time: &str, line: &mut String) -> fmt::Result {
    use serde_json::Value as Json;

    write!(line, "{{\"time\":{}", Json::from(time))?;
    let mut field = |name: &str, value: Json| write!(line, ",{}:{value}", Json::from(name));
    field("level", record.level().as_str().into())?;
    field("target", record.target().into())?;
    if let Some(server) = SERVER.get() {
        field("server", server.into())?;
    }
    field("message", record.args().to_string().into())?;
    visit(record, |key, value| {
        let number = value.to_i64().map(Json::from);
        let number = number.or_else(|| value.to_f64().map(Json::from));
        let value = number.unwrap_or_else(|| value.to_string().into());
        field(key.as_str(), value)
    })?;
    line.push_str("}\n");
    Ok(())
}

enum Message {
    Line(String),
    Flush(Sender<()>),
}

/// The sending end of the log's queue.
#[derive(Clone)]
pub(crate) struct Log {
    style: Style,
    queue: Sender<Message>,
    counters: Arc<Counters>,
}

/// Counters shared by both ends of the queue.
#[derive(Default)]
struct Counters {
    queued_bytes: AtomicUsize,
    written_bytes: AtomicU64,
    /// Lines that found the queue full.
    dropped_lines: AtomicU64,
    /// Lines that could not be written, or not completely.
    failed_lines: AtomicU64,
    /// The server has ended: only the last few lines follow, and none is dropped.
    is_ending: AtomicBool,
}

impl Log {
    /// Starts the log thread, and logs at `level`, or else as `RUST_LOG` says. Panics are logged too.
    pub(crate) fn start(level: Option<LevelFilter>, format: Format) -> io::Result<Self> {
        let (log, messages) = Self::queue(Style::new(format));
        let mut writer = Writer::new(io::stderr(), log.style, Arc::clone(&log.counters));
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || writer.run(&messages))?;
        let (filter, error) = filter(level);
        let max_level = filter.filter();
        let logger = FilteredLog::new(log.clone(), filter);
        // This is the only logger.
        if log::set_boxed_logger(Box::new(logger)).is_ok() {
            log::set_max_level(max_level);
        }
        if let Some(error) = error {
            log::warn!("RUST_LOG is not used: {error}");
        }
        panic::set_hook(Box::new(log_panic));
        Ok(log)
    }

    /// Creates the queue, and returns its sending and its receiving end.
    fn queue(style: Style) -> (Self, Receiver<Message>) {
        // The sender enforces the bound, which is in bytes.
        let (queue, messages) = unbounded();
        let log = Self {
            style,
            queue,
            counters: Arc::default(),
        };
        (log, messages)
    }

    /// Logs the counters of a server.
    pub(crate) fn stats(&self, level: Level, message: &str, stats: &Stats) {
        if self.style.format == Format::Text {
            return log::log!(target: TARGET, level, "{message}: {stats}");
        }
        let fields = stats.fields();
        let fields: Vec<_> = fields
            .iter()
            .map(|(name, value)| (name.as_str(), *value))
            .collect();
        record(level, message, &fields.as_slice());
    }

    /// Logs a message whose numbers are `fields` as well in JSON.
    pub(crate) fn numbers(&self, message: &str, fields: &[(&str, u64)]) {
        match self.style.format {
            Format::Text => log::info!(target: TARGET, "{message}"),
            Format::Json => record(Level::Info, message, &fields),
        }
    }

    /// Returns how many lines are missing in the log, with the reason.
    pub(crate) fn lost_lines(&self) -> [(&'static str, u64); 2] {
        let count = |lines: &AtomicU64| lines.load(Relaxed);
        [
            ("queue_full", count(&self.counters.dropped_lines)),
            ("write_failed", count(&self.counters.failed_lines)),
        ]
    }

    /// Writes an error that ends the process, independent of the level. It goes through the queue, because
    /// a direct write to stderr can block.
    pub(crate) fn error(&self, error: &dyn Display) {
        self.send(self.style.error(error));
    }

    /// Drops no more lines. Called when the server has ended, and only a few lines follow.
    pub(crate) fn end(&self) {
        self.counters.is_ending.store(true, Relaxed);
    }

    /// Waits until all queued lines are written, for as long as stderr takes bytes and at most for `limit`.
    pub(crate) fn finish(&self, limit: Duration) {
        // A write to a regular file ends, however slow the disk is.
        let is_file = stderr_metadata().is_some_and(|stderr| stderr.is_file());
        let stall = if is_file {
            limit
        } else {
            STALL_TIMEOUT.min(limit)
        };
        let (done, written) = bounded(1);
        // The receiver lives as long as the process.
        let _sent = self.queue.send(Message::Flush(done));
        let deadline = Instant::now() + limit;
        loop {
            let before = self.counters.written_bytes.load(Relaxed);
            let rest = deadline.saturating_duration_since(Instant::now());
            let timed_out = written.recv_timeout(stall.min(rest)) == Err(RecvTimeoutError::Timeout);
            let stalled = self.counters.written_bytes.load(Relaxed) == before;
            if !timed_out || stalled || Instant::now() >= deadline {
                return;
            }
        }
    }

    fn send(&self, line: String) {
        self.counters.queued_bytes.fetch_add(line.len(), Relaxed);
        // The receiver lives as long as the process.
        let _sent = self.queue.send(Message::Line(line));
    }

    /// Queues a line, or drops it if the queue is full.
    fn push(&self, line: String) {
        let counters = &self.counters;
        // Concurrent threads can exceed the bound by one line each.
        let has_room = counters.queued_bytes.load(Relaxed) + line.len() <= MAX_QUEUED_BYTES;
        match has_room || counters.is_ending.load(Relaxed) {
            true => self.send(line),
            false => drop(counters.dropped_lines.fetch_add(1, Relaxed)),
        }
    }
}

impl log::Log for Log {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        self.push(self.style.line(record));
    }

    fn flush(&self) {}
}

/// Logs a record about the whole process.
fn record(level: Level, message: &str, fields: &dyn Source) {
    let mut record = Record::builder();
    record.level(level).target(TARGET).key_values(fields);
    log::logger().log(&record.args(format_args!("{message}")).build());
}

/// Logs a panic. The hook replaces Rust's own, which writes several lines to stderr.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let payload = panic.payload();
    let message = payload.downcast_ref::<&str>().copied();
    let message = message.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let message = message.unwrap_or("no message").replace('\n', " ");
    let location = panic.location().map(ToString::to_string);
    let location = location.as_deref().unwrap_or("unknown location");
    log::error!(target: TARGET, "internal error: {message} (at {location})");
}

/// Returns the filter: this program's records at `level`, or else `RUST_LOG`. Without both, or if
/// `RUST_LOG` is invalid, which is returned as well, the level is info.
fn filter(level: Option<LevelFilter>) -> (Filter, Option<String>) {
    let mut filter = env_filter::Builder::new();
    let filters = env::var_os("RUST_LOG").unwrap_or_default();
    let filters = filters.to_string_lossy();
    let mut error = None;
    if level.is_none() && !filters.trim().is_empty() {
        match filter.try_parse(&filters) {
            Ok(filter) => return (filter.build(), None),
            Err(problem) => error = Some(format!("'{filters}': {problem}")),
        }
    }
    filter = env_filter::Builder::new();
    filter.filter_module(TARGET, level.unwrap_or(LevelFilter::Info));
    (filter.build(), error)
}

/// The thread that writes queued lines.
struct Writer<W> {
    output: W,
    style: Style,
    counters: Arc<Counters>,
    /// The output ends with a part of a line.
    is_partial: bool,
    /// The dropped and the failed lines that the output already reports.
    reported: [u64; 2],
    last_error: Option<io::Error>,
}

impl<W: Write> Writer<W> {
    fn new(output: W, style: Style, counters: Arc<Counters>) -> Self {
        Self {
            output,
            style,
            counters,
            is_partial: false,
            reported: [0; 2],
            last_error: None,
        }
    }

    fn run(&mut self, messages: &Receiver<Message>) {
        for message in messages {
            match message {
                Message::Line(line) => {
                    let written = self.write(&line);
                    self.counters.queued_bytes.fetch_sub(line.len(), Relaxed);
                    match written {
                        Ok(()) => self.report_missing_lines(),
                        Err(error) => {
                            self.counters.failed_lines.fetch_add(1, Relaxed);
                            self.last_error = Some(error);
                        }
                    }
                }
                Message::Flush(done) => {
                    self.report_missing_lines();
                    let _unless_timed_out = done.try_send(());
                }
            }
        }
    }

    /// Writes a line. It ends a part of a line that was written before.
    fn write(&mut self, line: &str) -> io::Result<()> {
        let line = match self.is_partial {
            true => Cow::Owned(format!("\n{line}")),
            false => Cow::Borrowed(line),
        };
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match self.output.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.counters.written_bytes.fetch_add(count as u64, Relaxed);
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

    /// Reports the lines that were dropped or failed since the last report, unless that fails as well.
    fn report_missing_lines(&mut self) {
        let counters = &self.counters;
        let totals = [&counters.dropped_lines, &counters.failed_lines];
        let totals = totals.map(|lines| lines.load(Relaxed));
        let error = self.last_error.as_ref().map(ToString::to_string);
        let problems = [
            "dropped: stderr was not read in time".to_owned(),
            format!("not written: {}", error.unwrap_or_default()),
        ];
        for (index, problem) in problems.iter().enumerate() {
            let count = totals[index] - self.reported[index];
            if count > 0
                && self
                    .write(&self.style.missing_lines(count, problem))
                    .is_ok()
            {
                self.reported[index] = totals[index];
            }
        }
    }
}

#[cfg(test)]
mod tests;
