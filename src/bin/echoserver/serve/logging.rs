//! The log: to stderr, by a thread of its own, so that a reader who stalls can't stall the server.
//!
//! Lines wait in a bounded queue; what finds it full is dropped, counted, and told of later. What a
//! record says besides its message stands behind it as `key=value`, or in JSON as fields of its own.

use std::env;
use std::io::{self, Write};
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

/// What waits for a slow reader, in bytes: some seven thousand lines, as a drain may log at once.
const MAX_QUEUED_BYTES: usize = 1 << 20;

/// How long the end of the process waits for a reader who stalls, and for one who is slow.
const STALL_TIMEOUT: Duration = Duration::from_millis(200);
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// How a record is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

enum Message {
    Line(Vec<u8>),
    Flush(Sender<()>),
}

/// The log's end for writing.
#[derive(Clone)]
pub(crate) struct Log {
    format: Format,
    queue: Sender<Message>,
    counts: Arc<Counts>,
}

/// What both ends of the queue count.
#[derive(Default)]
struct Counts {
    queued_bytes: AtomicUsize,
    dropped: AtomicU64,
}

impl Log {
    /// Starts logging at `level`, or as `RUST_LOG` says.
    pub(crate) fn start(level: LevelFilter, format: Format) -> io::Result<Self> {
        let (log, lines) = Self::queue(format);
        let counts = Arc::clone(&log.counts);
        let notes = written_as(format, io::stderr())
            .filter_level(LevelFilter::Warn)
            .build();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || print(&lines, &counts, &notes))?;
        let mut logger = written_as(format, log.clone());
        let bad_filter = filter(&mut logger, level).err();
        logger.init();
        if let Some(error) = bad_filter {
            log::warn!("RUST_LOG is not used: {error}");
        }
        Ok(log)
    }

    /// A queue, and its end for reading.
    fn queue(format: Format) -> (Self, Receiver<Message>) {
        // Its bound is in bytes, and kept where lines are sent.
        let (queue, lines) = unbounded();
        let counts = Arc::default();
        let log = Self {
            format,
            queue,
            counts,
        };
        (log, lines)
    }

    /// Logs the numbers of a server.
    pub(crate) fn stats(&self, what: &str, stats: &Stats) {
        if self.format == Format::Text {
            return log::info!(target: "echoserver", "{what}: {stats}");
        }
        let fields = Fields(stats.fields());
        let mut record = Record::builder();
        record
            .level(Level::Info)
            .target("echoserver")
            .key_values(&fields);
        log::logger().log(&record.args(format_args!("{what}")).build());
    }

    /// Says a line as it is, whatever the level and the format. From the log's start on stderr is its
    /// thread's alone: to write there past a reader who stalls is to stall too.
    pub(crate) fn say(&self, line: &str) {
        self.send(format!("{line}\n").as_bytes());
    }

    /// Waits until what was logged is written, but not for long.
    pub(crate) fn finish(&self) {
        let (done, written) = bounded(1);
        // The thread that reads never ends.
        let _sent = self.queue.send(Message::Flush(done));
        let deadline = Instant::now() + FINISH_TIMEOUT;
        loop {
            let queued = self.queued_bytes();
            let late = written.recv_timeout(STALL_TIMEOUT) == Err(RecvTimeoutError::Timeout);
            // A reader who stalls has had its time; one who is slow gets more.
            if !late || self.queued_bytes() == queued || Instant::now() > deadline {
                return;
            }
        }
    }

    fn queued_bytes(&self) -> usize {
        self.counts.queued_bytes.load(Ordering::Relaxed)
    }

    fn send(&self, line: &[u8]) {
        self.counts
            .queued_bytes
            .fetch_add(line.len(), Ordering::Relaxed);
        // The thread that reads never ends.
        let _sent = self.queue.send(Message::Line(line.to_vec()));
    }
}

/// A logger that writes to `pipe` in this format.
fn written_as(format: Format, pipe: impl Write + Send + 'static) -> env_logger::Builder {
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

/// What is logged: as `RUST_LOG` says and nothing else, or else what this program says at `level`.
fn filter(logger: &mut env_logger::Builder, level: LevelFilter) -> Result<(), String> {
    let said = env::var_os("RUST_LOG").unwrap_or_default();
    let said = said.to_string_lossy();
    // The logger itself would tell stderr what it can't parse.
    let outcome = env_filter::Builder::new()
        .try_parse(&said)
        .map(drop)
        .map_err(|error| format!("'{said}': {error}"));
    match said.trim().is_empty() || outcome.is_err() {
        true => logger.filter_module("echoserver", level),
        false => logger.parse_filters(&said),
    };
    outcome
}

/// Takes whole lines only: the logger formats a record, then writes it at once.
impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Threads that pass here together overshoot by a line each.
        match self.queued_bytes() + line.len() <= MAX_QUEUED_BYTES {
            true => self.send(line),
            false => drop(self.counts.dropped.fetch_add(1, Ordering::Relaxed)),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The numbers of a server, each as a field of its own.
struct Fields(Vec<(String, i64)>);

impl Source for Fields {
    fn visit<'kvs>(&'kvs self, visitor: &mut dyn VisitSource<'kvs>) -> Result<(), kv::Error> {
        self.0.iter().try_for_each(|(name, value)| {
            visitor.visit_pair(Key::from_str(name), Value::from(*value))
        })
    }
}

/// A record as a JSON object: its own fields, then those it carries.
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
    // This visitor never fails.
    let _infallible = record.key_values().visit(&mut object);
    serde_json::Value::Object(object.0)
}

/// Writes lines as they come, and notes between them. Whether stderr takes them is not the server's
/// concern.
fn print(messages: &Receiver<Message>, counts: &Counts, notes: &impl log::Log) {
    let mut stderr = io::stderr();
    for message in messages {
        match message {
            Message::Line(line) => {
                drop(stderr.write_all(&line));
                counts.queued_bytes.fetch_sub(line.len(), Ordering::Relaxed);
            }
            Message::Flush(done) => drop(done.try_send(())),
        }
        let dropped = counts.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            notes.log(
                &Record::builder()
                    .level(Level::Warn)
                    .target("echoserver")
                    .args(format_args!(
                        "{dropped} log lines were dropped: nobody was reading"
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
    fn many_lines_wait_and_not_too_many() {
        let (mut log, lines) = Log::queue(Format::Text);
        let line = [b'x'; 150];
        for _ in 0..6_000 {
            log.write_all(&line).unwrap();
        }
        let dropped = || log.counts.dropped.load(Ordering::Relaxed);
        assert_eq!((lines.len(), dropped()), (6_000, 0));
        let mut writer = log.clone();
        while dropped() < 5 {
            writer.write_all(&line).unwrap();
        }
        assert_eq!(lines.len(), MAX_QUEUED_BYTES / line.len());
    }
}
