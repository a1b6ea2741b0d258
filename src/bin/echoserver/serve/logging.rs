//! The log: a thread of its own writes it to stderr, so that a blocked stderr never blocks the
//! server.
//!
//! Lines wait in a queue that is bounded in bytes. When it is full, lines are dropped, and their
//! number is logged later. A record's key-value pairs follow its message as `key=value`; in JSON
//! they are fields of the object.

use std::env;
use std::io::{self, Write};
use std::panic::{self, PanicHookInfo};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use echoserver::Stats;
use log::kv::{self, Key, Source, Value, VisitSource};
use log::{Level, LevelFilter, Record};
use serde_json::Map;

/// The log target of records about the whole process.
pub(crate) const TARGET: &str = "echoserver";

/// Limit for queued lines, in bytes: room for about 7,000 lines, because a drain logs many at once.
const MAX_QUEUED_BYTES: usize = 1 << 20;

/// How long [`Log::finish`] waits while nothing is written.
const STALL_TIMEOUT: Duration = Duration::from_secs(1);

/// How long [`Log::finish`] waits while lines are written slowly.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// The format of log records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Human-readable lines.
    Text,
    /// One JSON object per line.
    Json,
}

enum Message {
    Line(Vec<u8>),
    Flush(Sender<()>),
}

/// The sending end of the log's queue.
#[derive(Clone)]
pub(crate) struct Log {
    format: Format,
    queue: Sender<Message>,
    counters: Arc<Counters>,
}

/// Counters shared by both ends of the queue.
#[derive(Default)]
struct Counters {
    queued_bytes: AtomicUsize,
    dropped_lines: AtomicU64,
}

impl Log {
    /// Starts the log thread, and logs at `level` unless `RUST_LOG` is set. Panics are logged too.
    pub(crate) fn start(level: LevelFilter, format: Format) -> io::Result<Self> {
        let (log, messages) = Self::queue(format);
        let counters = Arc::clone(&log.counters);
        let warnings = new_logger(format, io::stderr())
            .filter_level(LevelFilter::Warn)
            .build();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_messages(&messages, &counters, &warnings))?;
        let mut logger = new_logger(format, log.clone());
        let filter_error = set_filter(&mut logger, level).err();
        logger.init();
        if let Some(error) = filter_error {
            log::warn!("RUST_LOG is not used: {error}");
        }
        panic::set_hook(Box::new(log_panic));
        Ok(log)
    }

    /// Creates the queue, and returns its sending and its receiving end.
    fn queue(format: Format) -> (Self, Receiver<Message>) {
        // The sender enforces the bound, which is in bytes.
        let (queue, messages) = unbounded();
        let log = Self {
            format,
            queue,
            counters: Arc::default(),
        };
        (log, messages)
    }

    /// Logs the counters of a server.
    pub(crate) fn stats(&self, message: &str, stats: &Stats) {
        if self.format == Format::Text {
            return log::info!(target: TARGET, "{message}: {stats}");
        }
        let fields = StatsFields(stats.fields());
        let mut record = Record::builder();
        record.level(Level::Info).target(TARGET).key_values(&fields);
        log::logger().log(&record.args(format_args!("{message}")).build());
    }

    /// Writes a line as it is, independent of level and format. It goes through the queue, because
    /// a direct write to stderr can block.
    pub(crate) fn write_line(&self, line: &str) {
        self.send(format!("{line}\n").as_bytes());
    }

    /// Waits for a limited time until all queued lines are written.
    pub(crate) fn finish(&self) {
        let (done, written) = bounded(1);
        // The receiver lives as long as the process.
        let _sent = self.queue.send(Message::Flush(done));
        let deadline = Instant::now() + FINISH_TIMEOUT;
        loop {
            let queued = self.queued_bytes();
            let timed_out = written.recv_timeout(STALL_TIMEOUT) == Err(RecvTimeoutError::Timeout);
            // A stalled reader gets one timeout; a slow one gets until the deadline.
            if !timed_out || self.queued_bytes() == queued || Instant::now() > deadline {
                return;
            }
        }
    }

    fn queued_bytes(&self) -> usize {
        self.counters.queued_bytes.load(Ordering::Relaxed)
    }

    fn send(&self, line: &[u8]) {
        self.counters
            .queued_bytes
            .fetch_add(line.len(), Ordering::Relaxed);
        // The receiver lives as long as the process.
        let _sent = self.queue.send(Message::Line(line.to_vec()));
    }
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

/// Returns a logger that writes records to `pipe`.
fn new_logger(format: Format, pipe: impl Write + Send + 'static) -> env_logger::Builder {
    let mut logger = env_logger::Builder::new();
    logger.target(env_logger::Target::Pipe(Box::new(pipe)));
    if format == Format::Json {
        logger.format(|line, record| {
            let time = line.timestamp_millis().to_string();
            writeln!(line, "{}", json(record, time))
        });
    }
    logger
}

/// Sets the filter: `RUST_LOG`, or this program's records at `level` if it is unset or invalid.
fn set_filter(logger: &mut env_logger::Builder, level: LevelFilter) -> Result<(), String> {
    let filters = env::var_os("RUST_LOG").unwrap_or_default();
    let filters = filters.to_string_lossy();
    // Parse it here first, because the logger prints parse errors to stderr.
    let result = env_filter::Builder::new()
        .try_parse(&filters)
        .map(drop)
        .map_err(|error| format!("'{filters}': {error}"));
    match filters.trim().is_empty() || result.is_err() {
        true => logger.filter_module("echoserver", level),
        false => logger.parse_filters(&filters),
    };
    result
}

/// The logger writes each record in one call, so every write is a whole line.
impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Concurrent threads can exceed the bound by one line each.
        match self.queued_bytes() + line.len() <= MAX_QUEUED_BYTES {
            true => self.send(line),
            false => drop(self.counters.dropped_lines.fetch_add(1, Ordering::Relaxed)),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The counters of a server as key-value pairs.
struct StatsFields(Vec<(String, i64)>);

impl Source for StatsFields {
    fn visit<'kvs>(&'kvs self, visitor: &mut dyn VisitSource<'kvs>) -> Result<(), kv::Error> {
        self.0.iter().try_for_each(|(name, value)| {
            visitor.visit_pair(Key::from_str(name), Value::from(*value))
        })
    }
}

/// Returns a record as a JSON object: time, level, target and message, then its key-value pairs.
fn json(record: &Record<'_>, time: String) -> serde_json::Value {
    struct Object(Map<String, serde_json::Value>);

    impl<'kvs> VisitSource<'kvs> for Object {
        fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
            let number = value.to_i64().map(serde_json::Value::from);
            let value = number.unwrap_or_else(|| value.to_string().into());
            self.0.insert(key.to_string(), value);
            Ok(())
        }
    }

    let mut object = Object(Map::new());
    for (name, value) in [
        ("time", time),
        ("level", record.level().to_string()),
        ("target", record.target().to_owned()),
        ("message", record.args().to_string()),
    ] {
        object.0.insert(name.to_owned(), value.into());
    }
    // This visitor returns no error.
    let _infallible = record.key_values().visit(&mut object);
    serde_json::Value::Object(object.0)
}

/// Writes queued lines to stderr, and logs how many were dropped to `warnings`. Write errors are
/// ignored, because a closed stderr must not stop the server.
fn write_messages(messages: &Receiver<Message>, counters: &Counters, warnings: &impl log::Log) {
    let mut stderr = io::stderr();
    for message in messages {
        match message {
            Message::Line(line) => {
                drop(stderr.write_all(&line));
                counters
                    .queued_bytes
                    .fetch_sub(line.len(), Ordering::Relaxed);
            }
            Message::Flush(done) => drop(done.try_send(())),
        }
        let dropped = counters.dropped_lines.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            warnings.log(
                &Record::builder()
                    .level(Level::Warn)
                    .target(TARGET)
                    .args(format_args!(
                        "{dropped} log lines were dropped: stderr was not read in time"
                    ))
                    .build(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_is_bounded_in_bytes() {
        let (mut log, messages) = Log::queue(Format::Text);
        let line = [b'x'; 150];
        for _ in 0..6_000 {
            log.write_all(&line).unwrap();
        }
        let dropped = || log.counters.dropped_lines.load(Ordering::Relaxed);
        assert_eq!((messages.len(), dropped()), (6_000, 0));
        let mut writer = log.clone();
        while dropped() < 5 {
            writer.write_all(&line).unwrap();
        }
        assert_eq!(messages.len(), MAX_QUEUED_BYTES / line.len());
    }
}
