//! The log: to stderr, by a thread of its own, so that a reader who stalls can't stall the server.
//!
//! Lines wait in a bounded queue; what finds it full is dropped, counted, and told of later. What a
//! record says besides its message stands behind it as `key=value`, or in JSON as fields of its own.

use std::env;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use crossbeam_channel::{Receiver, Sender, bounded};
use echoserver::Stats;
use log::kv::{self, Key, Source, Value, VisitSource};
use log::{Level, LevelFilter, Record};
use serde_json::Map;

/// Lines that wait for a slow reader.
const LINES_MAX: usize = 1024;

/// How long the end of the process waits for a slow reader.
const FLUSH_MAX: Duration = Duration::from_millis(200);

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
    dropped: Arc<AtomicU64>,
}

impl Log {
    /// Starts logging at `level`, or as `RUST_LOG` says.
    pub(crate) fn start(level: LevelFilter, format: Format) -> io::Result<Self> {
        let (queue, lines) = bounded(LINES_MAX);
        let log = Self {
            format,
            queue,
            dropped: Arc::default(),
        };
        let dropped = Arc::clone(&log.dropped);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || print(&lines, &dropped))?;
        let mut logger = env_logger::Builder::new();
        let bad_filter = filter(&mut logger, level).err();
        logger.target(env_logger::Target::Pipe(Box::new(log.clone())));
        if format == Format::Json {
            logger.format(|line, record| {
                let time = line.timestamp_millis().to_string();
                writeln!(line, "{}", json(record, time))
            });
        }
        logger.init();
        if let Some(error) = bad_filter {
            log::warn!("RUST_LOG is not used: {error}");
        }
        Ok(log)
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
        let line = format!("{line}\n").into_bytes();
        let _late = self.queue.send_timeout(Message::Line(line), FLUSH_MAX);
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
        if self.queue.try_send(Message::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
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
