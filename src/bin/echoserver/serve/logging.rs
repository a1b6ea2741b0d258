//! The log: env_logger filters and formats records, and hands each line to a queue. A thread of its own writes the lines
//! to stderr, so that a blocked stderr never blocks the server.
//!
//! A record has a message and key-value pairs. There is one format for people, one with a JSON object for each line, and
//! one for systemd's journal.

mod format;
mod queue;

use std::env;
use std::io::{self, Write};
use std::panic::{self, PanicHookInfo};
use std::time::Duration;

use echoserver::Stats;
use env_logger::{Builder, Target};
use log::{Level, LevelFilter, Record};

use self::format::Style;
pub(crate) use self::format::{Format, TARGET, set_server};
pub(crate) use self::queue::Log;
use crate::error::panic_message;

/// How long [`Log::finish`] waits at most after the drain.
pub(crate) const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

/// Starts the log thread, and logs at `level`, or else as `RUST_LOG` says. Panics are logged too.
pub(crate) fn start(level: Option<LevelFilter>, format: Format) -> io::Result<Log> {
    let style = Style::new(format);
    let log = Log::start(io::stderr(), style)?;
    let mut builder = builder(style, log.clone());
    let rust_log = env::var_os("RUST_LOG").unwrap_or_default();
    let filtered = set_filter(&mut builder, level, &rust_log.to_string_lossy());
    builder.init();
    if let Err(problem) = filtered {
        log::warn!("RUST_LOG is not used: {problem}");
    }
    panic::set_hook(Box::new(log_panic));
    Ok(log)
}

/// Logs the counters of a server.
pub(crate) fn log_stats(level: Level, message: &str, stats: &Stats) {
    let fields = stats.fields();
    let mut record = Record::builder();
    record.level(level).target(TARGET).key_values(&fields);
    log::logger().log(&record.args(format_args!("{message}")).build());
}

/// Prints an error that ends the process without the log thread, which does not run yet or has nothing to say.
pub(crate) fn print_error(format: Format, error: &str) {
    let line = Style::new(format).error(error);
    let _closed = io::stderr().write_all(line.as_bytes());
}

/// Returns a logger that hands lines to `log`.
fn builder(style: Style, log: Log) -> Builder {
    let mut builder = Builder::new();
    builder
        // In one piece: the part of a line that was written before a failure would begin the next one.
        .format(move |formatter, record| formatter.write_all(style.line(record).as_bytes()))
        .target(Target::Pipe(Box::new(log)));
    builder
}

/// Sets the filter: this program's records at `level`, or else `rust_log`. Without both, or if `rust_log` is invalid, the
/// level is info.
fn set_filter(
    builder: &mut Builder,
    level: Option<LevelFilter>,
    rust_log: &str,
) -> Result<(), String> {
    let is_used = level.is_none() && !rust_log.trim().is_empty();
    // The builder itself prints what is invalid, and panics if stderr is full.
    let parsed = env_filter::Builder::new().try_parse(rust_log).map(drop);
    if is_used && parsed.is_ok() {
        builder.parse_filters(rust_log);
    } else {
        builder.filter_module(TARGET, level.unwrap_or(LevelFilter::Info));
    }
    match parsed {
        Err(problem) if is_used => Err(format!("'{rust_log}': {problem}")),
        _ => Ok(()),
    }
}

/// Logs a panic. The hook replaces Rust's own, which writes several lines to stderr.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let message = panic_message(panic.payload());
    let location =
        (panic.location()).map_or_else(|| "unknown location".to_owned(), ToString::to_string);
    log::error!(target: TARGET, "internal error: {message} (at {location})");
}

#[cfg(test)]
mod tests;
