//! `echoserver plot`: a chart of runs, and one line about each file that is none.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::harness::{error_line, program, run};

/// Returns a record as `load --json` writes it: three round-trip times, and a second in which nothing came back.
fn record() -> Value {
    json!({
        "schema": 1,
        "target": "localhost:7",
        "options": { "connections": 50, "size": 64, "rate": 2.5 },
        "messages_per_second": 1.0,
        "least_age_ns": 2_000_000,
        "rtt_ns": {
            "p50": 50_000, "p99": 2_000_000, "p99.9": 2_000_000, "max": 2_000_000,
            "histogram": [[50_000, 2], [2_000_000, 1]],
        },
        "series": [
            { "end": 1.0, "seconds": 1.0, "messages": 2, "p99_ns": 50_000 },
            { "end": 2.0, "seconds": 1.0, "messages": 0, "p99_ns": null },
            { "end": 3.0, "seconds": 1.0, "messages": 1, "p99_ns": 2_000_000 },
            { "end": 3.1, "seconds": 0.1, "messages": 90, "p99_ns": 50_000 },
        ],
        "failure": "1 message <unanswered>",
        "own_fault": null,
    })
}

/// A folder with files.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    /// Draws runs, and returns the chart.
    fn plot(&self, runs: &[&Path]) -> String {
        let output = self.path("chart.svg");
        let ended = run(program().arg("plot").args(runs).arg("-o").arg(&output));
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && stderr.is_empty(), "{stderr}");
        assert_eq!(ended.stdout, b"");
        fs::read_to_string(output).unwrap()
    }

    /// Returns the error about a file with this text.
    fn error(&self, text: &str) -> String {
        let file = self.write("run.json", text);
        let output = self.path("none.svg");
        let error = error_line(program().arg("plot").arg(&file).arg("-o").arg(&output), 1);
        assert!(!output.exists(), "{error}");
        let start = format!("{}: ", file.display());
        error.strip_prefix(&start).expect("its name").to_owned()
    }
}

/// Returns the points of the lines in a chart that have this color.
fn lines<'a>(chart: &'a str, color: &str) -> Vec<Vec<&'a str>> {
    let stroke = format!("stroke=\"{color}\"");
    let lines = chart.lines().filter(|line| line.contains(&stroke));
    let points = |line: &'a str| {
        let points = line.split("points=\"").nth(1).expect("a line");
        let points = points.split('"').next().expect("a quote");
        points.split_whitespace().collect()
    };
    lines.map(points).collect()
}

#[test]
fn runs_are_drawn_over_each_other() {
    let files = Files::new();
    let first = files.write("before.json", &record().to_string());
    let mut faster = record();
    faster["rtt_ns"]["histogram"] = json!([[40_000, 3]]);
    (faster["failure"], faster["least_age_ns"]) = (Value::Null, Value::Null);
    // Only the last record of a file counts.
    let both = format!("{{\"end\":1.0}}\n{}\n{faster}\n", record());
    let second = files.write("after.json", &both);
    let chart = files.plot(&[&first, &second]);
    for text in [
        "before.json",
        "after.json",
        "load localhost:7 --connections 50 --size 64 --rate 2.5",
        "1.00 messages/s; RTT p50 50.0µs, p99 ≥ 2.0ms, p99.9 ≥ 2.0ms, max ≥ 2.0ms",
        "1.00 messages/s; RTT p50 50.0µs, p99 2.0ms, p99.9 2.0ms, max 2.0ms",
        "p99 of the messages that came back in each interval",
        "1 message &lt;unanswered&gt;",
        "90 %",
        "100µs",
    ] {
        assert!(chart.contains(text), "no {text} in {chart}");
    }
    assert_eq!(chart.matches("unanswered").count(), 1);
    let [blue, red] = ["#0A6AC2", "#C20A36"].map(|color| lines(&chart, color));
    // By percentile, the rate, and p99 before and after the gap. A time is a step with two ends, unless it is as long as
    // the one before.
    let lengths = |lines: &[Vec<&str>]| lines.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths(&blue), [4, 6, 2, 2], "{blue:?}");
    assert_eq!(lengths(&red), [2, 6, 2, 2], "{red:?}");
    assert_eq!(blue[1..], red[1..]);
}

#[test]
fn logarithmic_axes_have_whole_decades() {
    let files = Files::new();
    for (times, labels) in [
        ([20_000, 210_000], vec!["10µs", "100µs", "1ms"]),
        ([200_000, 300_000], vec!["100µs", "1ms"]),
        ([100_000, 100_000], vec!["100µs", "1ms"]),
    ] {
        let mut run = record();
        run["rtt_ns"]["histogram"] = json!([[times[0], 1], [times[1], 1]]);
        for (index, time) in [0, 2, 3].into_iter().zip(times.into_iter().cycle()) {
            run["series"][index]["p99_ns"] = json!(time);
        }
        let chart = files.plot(&[&files.write("run.json", &run.to_string())]);
        // Both by percentile and over time.
        for label in labels {
            assert_eq!(chart.matches(&format!("\n{label}\n")).count(), 2, "{label}");
        }
    }
}

#[test]
fn file_that_is_no_run_is_one_line() {
    let files = Files::new();
    let no_record = "it has no record of 'echoserver load --json'";
    let cut = "not a complete record of 'echoserver load --json'";
    let record = record();
    let (whole, pretty) = (record.to_string(), format!("{record:#}"));
    let mut other = record.clone();
    other["schema"] = json!(2);
    let mut no_series = record.clone();
    no_series["series"] = json!([]);
    let mut no_times = record.clone();
    no_times["rtt_ns"] = Value::Null;
    let mut invalid = record.clone();
    invalid["series"][1]["end"] = json!(-1);
    for (text, expected) in [
        (String::new(), no_record),
        ("not JSON".to_owned(), no_record),
        ("{\"messages\":1}".to_owned(), no_record),
        (whole[1..].to_owned(), no_record),
        (whole[..whole.len() - 1].to_owned(), cut),
        (format!("{{\"end\":1.0}}\n{}", &whole[..1]), cut),
        (pretty[..pretty.len() / 2].to_owned(), cut),
        (other.to_string(), "its record has schema 2, not 1"),
        (no_series.to_string(), "its record has no series to draw"),
        (
            no_times.to_string(),
            "its record has no round-trip times to draw",
        ),
        (invalid.to_string(), "its record has no series to draw"),
    ] {
        assert_eq!(files.error(&text), expected, "{text}");
    }
}

#[test]
fn file_that_cannot_be_read_or_written_is_one_line() {
    let files = Files::new();
    let run = files.write("run.json", &record().to_string());
    let missing = files.path("missing.json");
    let folder = files.path("missing/chart.svg");
    let error = |run: &Path, output: &Path, status| {
        let mut program = program();
        error_line(program.arg("plot").arg(run).arg("-o").arg(output), status)
    };
    let text = error(&missing, &files.path("chart.svg"), 1);
    let expected = format!(
        "cannot read {}: no such file or directory",
        missing.display()
    );
    assert_eq!(text, expected);
    let text = error(&run, &folder, 1);
    let expected = format!(
        "cannot write {}: no such file or directory",
        folder.display()
    );
    assert_eq!(text, expected);
    // An option without its value must not overwrite a run.
    let text = error(&missing, &run, 2);
    assert!(
        text.ends_with("expected a name that ends with .svg"),
        "{text}"
    );
    assert_eq!(fs::read_to_string(run).unwrap(), record().to_string());
}

/// Numbers of any size end in a chart, in bounded time.
#[test]
fn extreme_numbers_are_drawn() {
    let files = Files::new();
    for (histogram, interval) in [
        (
            json!([[0, 0]]),
            json!({ "end": 0, "seconds": 0, "messages": 0 }),
        ),
        (
            json!([[1e18, 1e18], [1, 1]]),
            json!({ "end": 1e18, "seconds": 1e-300, "messages": 1e18, "p99_ns": 1e18 }),
        ),
    ] {
        let mut run = record();
        run["rtt_ns"]["histogram"] = histogram;
        run["series"] = json!([interval]);
        let run = files.write("run.json", &run.to_string());
        assert!(files.plot(&[&run]).ends_with("</svg>\n"));
    }
}
