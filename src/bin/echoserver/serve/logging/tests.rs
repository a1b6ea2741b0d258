use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use env_logger::Logger;
use log::Log as _;

use super::*;

const TEXT: Style = Style {
    format: Format::Text,
    is_journal: false,
    is_coloured: false,
};
const JSON: Style = Style {
    format: Format::Json,
    ..TEXT
};
const JOURNAL: Style = Style {
    is_journal: true,
    ..TEXT
};

/// An output whose contents can be read.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A logger with its queue and its output.
fn start(style: Style) -> (Logger, super::Log, Output) {
    let output = Output::default();
    let log = super::Log::start(output.clone(), style).unwrap();
    let mut builder = builder(style, log.clone());
    set_filter(&mut builder, Some(LevelFilter::Info), "").unwrap();
    (builder.build(), log, output)
}

/// Returns the lines, without the time, that `style` has for the records that `log` logs.
fn lines(style: Style, log: impl FnOnce(&Logger)) -> Vec<String> {
    let (logger, queue, output) = start(style);
    log(&logger);
    queue.finish(Duration::from_secs(30));
    let text = String::from_utf8(output.0.lock().unwrap().clone()).unwrap();
    assert!(text.ends_with('\n'), "{text:?}");
    let without_time = |line: &str| {
        let is_part = |letter: char| letter.is_ascii_digit() || "TZ:-.".contains(letter);
        let time = line
            .split(['[', '"'])
            .find(|part| part.len() > 19 && part[..19].chars().all(is_part));
        let time = time.map(|part| part.split(' ').next().unwrap_or(part));
        time.map_or_else(|| line.to_owned(), |time| line.replace(time, "TIME"))
    };
    text.lines().map(without_time).collect()
}

fn log_one(logger: &Logger, target: &str, message: fmt::Arguments<'_>, fields: &[(&str, i64)]) {
    let mut record = Record::builder();
    record.level(Level::Info).target(target).key_values(&fields);
    logger.log(&record.args(message).build());
}

#[test]
fn every_format_has_message_and_fields() {
    let log = |logger: &Logger| {
        let fields = [("worker", 0), ("ms", 7)];
        log_one(
            logger,
            "echoserver::access",
            format_args!("closed"),
            &fields,
        );
        log_one(logger, TARGET, format_args!("a\nb"), &fields);
        log_one(logger, TARGET, format_args!("none"), &[("worker", 0)]);
    };
    assert_eq!(
        lines(TEXT, log),
        [
            "[TIME INFO  echoserver::access] closed worker=0 ms=7",
            r"[TIME INFO  echoserver] a\nb: ms=7",
            "[TIME INFO  echoserver] none",
        ]
    );
    assert_eq!(
        lines(JOURNAL, log),
        ["<6>closed worker=0 ms=7", r"<6>a\nb: ms=7", "<6>none"]
    );
    let object = |target, rest| {
        format!(r#"{{"time":"TIME","level":"INFO","target":"{target}","message":{rest}}}"#)
    };
    assert_eq!(
        lines(JSON, log),
        [
            object("echoserver::access", r#""closed","worker":0,"ms":7"#),
            object("echoserver", r#""a\nb","worker":0,"ms":7"#),
            object("echoserver", r#""none","worker":0"#),
        ]
    );
}

#[test]
fn level_is_coloured() {
    let style = Style {
        is_coloured: true,
        ..TEXT
    };
    let log = |logger: &Logger| log_one(logger, TARGET, format_args!("green"), &[]);
    let expected = "[TIME \x1b[32mINFO \x1b[0m echoserver] green";
    assert_eq!(lines(style, log), [expected]);
}

/// A value that writes a part of itself, and then fails or panics.
struct Unprintable {
    panics: bool,
}

impl fmt::Display for Unprintable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("half")?;
        assert!(!self.panics, "intended");
        Err(fmt::Error)
    }
}

/// Otherwise a part of a line would be the beginning of the next one, and JSON would be invalid.
#[test]
fn value_that_cannot_be_formatted_leaves_no_part_of_a_line() {
    for (style, failed, next) in [
        (
            TEXT,
            "[TIME INFO  echoserver] a log record cannot be formatted",
            "[TIME INFO  echoserver] next",
        ),
        (JOURNAL, "<6>a log record cannot be formatted", "<6>next"),
        (
            JSON,
            r#"{"time":"TIME","level":"INFO","target":"echoserver","message":"a log record cannot be formatted"}"#,
            r#"{"time":"TIME","level":"INFO","target":"echoserver","message":"next"}"#,
        ),
    ] {
        let log = |logger: &Logger| {
            let value = Unprintable { panics: false };
            log_one(logger, TARGET, format_args!("value: {value}"), &[]);
            let field = [("field", log::kv::Value::from_display(&value))];
            let mut record = Record::builder();
            record.level(Level::Info).target(TARGET).key_values(&field);
            logger.log(&record.args(format_args!("message")).build());
            log_one(logger, TARGET, format_args!("next"), &[]);
        };
        assert_eq!(lines(style, log), [failed, failed, next]);

        let log = |logger: &Logger| {
            let value = Unprintable { panics: true };
            let log = || log_one(logger, TARGET, format_args!("value: {value}"), &[]);
            catch_unwind(AssertUnwindSafe(log)).unwrap_err();
            log_one(logger, TARGET, format_args!("next"), &[]);
        };
        assert_eq!(lines(style, log), [next]);
    }
}

#[test]
fn level_takes_precedence_over_rust_log() {
    let (debug, info) = (LevelFilter::Debug, LevelFilter::Info);
    for (level, rust_log, filter, is_valid) in [
        (None, "", info, true),
        (None, " ", info, true),
        (None, "debug", debug, true),
        (None, "warn,echoserver::access=debug", debug, true),
        (None, "a=b=c", info, false),
        (None, "debug,echoserver=loud", info, false),
        (Some(debug), "a=b=c", debug, true),
        (Some(info), "trace", info, true),
    ] {
        let mut builder = Builder::new();
        let result = set_filter(&mut builder, level, rust_log);
        assert_eq!(result.is_ok(), is_valid, "{rust_log}: {result:?}");
        assert_eq!(builder.build().filter(), filter, "{rust_log}");
    }
}

#[test]
fn text_after_a_slash_in_rust_log_is_a_part_of_the_message() {
    let mut builder = Builder::new();
    set_filter(&mut builder, None, "info/a.c").unwrap();
    let logger = builder.build();
    let matches = |message| {
        let mut record = Record::builder();
        record.level(Level::Info);
        logger.matches(&record.args(format_args!("{message}")).build())
    };
    assert!(matches("xa.cx") && !matches("abc"));
}
