//! Formats of log records. Each is one line, also if a value cannot be formatted.

use std::cell::Cell;
use std::env;
use std::fmt::{self, Display, Write};
use std::io::{self, IsTerminal};
use std::time::SystemTime;

use clap::ValueEnum;
use humantime::{format_rfc3339_millis, format_rfc3339_seconds};
use log::kv::{self, Key, Value, VisitSource};
use log::{Level, Record};
use serde_json::Value as Json;

use crate::error::escape_control;
use crate::output::shorten;
use crate::platform;

/// The log target of records about the whole process.
pub(crate) const TARGET: &str = "echoserver";

/// The most characters of an error that ends the process.
const MAX_ERROR: usize = 1000;

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
    pub(super) format: Format,
    /// Stderr is read by systemd's journal, which has timestamps of its own and takes a priority from the
    /// start of a line.
    pub(super) is_journal: bool,
    pub(super) is_coloured: bool,
}

impl Style {
    pub(crate) fn new(format: Format) -> Self {
        let no_color = env::var_os("NO_COLOR").unwrap_or_default();
        let is_dumb = env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
        Self {
            format,
            is_journal: platform::is_journal(),
            is_coloured: no_color.is_empty() && !is_dumb && io::stderr().is_terminal(),
        }
    }

    /// Returns the line of a record.
    pub(super) fn line(self, record: &Record<'_>) -> String {
        self.try_line(record).unwrap_or_else(|_| {
            let mut other = Record::builder();
            other.metadata(record.metadata().clone());
            let message = format_args!("a log record cannot be formatted");
            self.try_line(&other.args(message).build())
                .expect("a text can be written to a string")
        })
    }

    fn try_line(self, record: &Record<'_>) -> Result<String, fmt::Error> {
        let mut line = String::new();
        let (priority, colour) = priority_and_colour(record.level());
        if self.is_journal {
            write!(line, "<{priority}>")?;
        } else if self.format == Format::Text {
            let time = format_rfc3339_seconds(SystemTime::now());
            let [start, end] = [colour, "\x1b[0m"].map(|it| if self.is_coloured { it } else { "" });
            let (level, target) = (record.level(), record.target());
            write!(line, "[{time} {start}{level:<5}{end} {target}] ")?;
        }
        match self.format {
            Format::Json => write_json(record, &mut line)?,
            Format::Text => write_message(record, &mut line)?,
        }
        line.push('\n');
        Ok(line)
    }

    /// Returns the line of an error that ends the process.
    pub(super) fn error(self, error: &str) -> String {
        let error = shorten(error, MAX_ERROR);
        if self.format == Format::Text {
            let prefix = if self.is_journal { "<3>" } else { "" };
            return format!("{prefix}{TARGET}: {}\n", escape_control(&error));
        }
        let mut record = Record::builder();
        record.level(Level::Error).target(TARGET);
        self.line(&record.args(format_args!("{error}")).build())
    }

    /// Returns the line of a warning about `count` lines that are missing in the log.
    pub(super) fn lost_lines(self, count: u64, reason: &str) -> String {
        let mut record = Record::builder();
        let fields = [("lines", Value::from(count)), ("reason", reason.into())];
        record.level(Level::Warn).target(TARGET).key_values(&fields);
        let message = format_args!("log lines were dropped");
        self.line(&record.args(message).build())
    }
}

/// Returns the priority of a level in syslog, and its colour in env_logger.
fn priority_and_colour(level: Level) -> (u8, &'static str) {
    match level {
        Level::Error => (3, "\x1b[1;31m"),
        Level::Warn => (4, "\x1b[33m"),
        Level::Info => (6, "\x1b[32m"),
        Level::Debug => (7, "\x1b[34m"),
        Level::Trace => (7, "\x1b[36m"),
    }
}

/// Writes the message of a record and its key-value pairs. Those of a record about the process are listed after a colon,
/// without those that are zero, because most counters are.
fn write_message(record: &Record<'_>, line: &mut String) -> fmt::Result {
    if let Some(server) = SERVER.get() {
        write!(line, "{server}: ")?;
    }
    let mut message = to_text(record.args())?;
    let is_list = record.target() == TARGET;
    let mut separator = if is_list { ": " } else { " " };
    visit(record, |key, value| {
        if is_list && value.to_i64() == Some(0) {
            return Ok(());
        }
        write!(message, "{separator}{key}={value}")?;
        separator = " ";
        Ok(())
    })?;
    line.push_str(&escape_control(&message));
    Ok(())
}

/// Writes a record as a JSON object: time, level, target, message, then its key-value pairs.
fn write_json(record: &Record<'_>, line: &mut String) -> fmt::Result {
    let time = format_rfc3339_millis(SystemTime::now());
    write!(line, "{{\"time\":\"{time}\"")?;
    let mut field = |name: &str, value: Json| write!(line, ",{}:{value}", Json::from(name));
    field("level", record.level().as_str().into())?;
    field("target", record.target().into())?;
    if let Some(server) = SERVER.get() {
        field("server", server.into())?;
    }
    field("message", to_text(record.args())?.into())?;
    visit(record, |key, value| {
        let number = (value.to_i64().map(Json::from)).or_else(|| value.to_f64().map(Json::from));
        field(
            key.as_str(),
            number.map_or_else(|| to_text(value).map(Json::from), Ok)?,
        )
    })?;
    line.push('}');
    Ok(())
}

/// Formats a value. `to_string` panics if that fails.
fn to_text(value: &impl Display) -> Result<String, fmt::Error> {
    let mut text = String::new();
    write!(text, "{value}")?;
    Ok(text)
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
