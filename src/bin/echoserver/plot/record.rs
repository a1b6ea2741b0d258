//! The records of runs that `load --json` writes, as lines to draw.

use std::time::Duration;

use serde_json::Value;

use crate::error::{escape_control, excerpt};
use crate::figures::Count;

/// The version of the records that this program reads.
const SCHEMA: u64 = 1;

/// Lines that are not connected, each with its points.
pub(crate) type Lines = Vec<Vec<(f64, f64)>>;

/// A run, as it is drawn.
pub(crate) struct Run {
    /// For the legend: the name, the load, the result, and what went wrong.
    pub(crate) notes: Vec<String>,
    /// The time in nanoseconds that all messages but one of so many took at most: of 100 at the 99th percentile.
    pub(crate) times: Lines,
    /// Messages per second, and p99 in nanoseconds, by seconds since the start.
    pub(crate) rates: Lines,
    pub(crate) p99s: Lines,
}

impl Run {
    /// Parses the last record in a text, which may have other lines before it.
    pub(crate) fn parse(name: &str, text: &str) -> Result<Self, String> {
        let parse = |text: &str| {
            let record: Option<Value> = serde_json::from_str(text).ok();
            record.filter(|record| !record["schema"].is_null())
        };
        let record = text.lines().rev().find_map(parse).or_else(|| parse(text));
        let record = record.ok_or_else(|| no_record(text))?;
        if record["schema"] != SCHEMA {
            let schema = excerpt(&record["schema"].to_string());
            return Err(format!("its record has schema {schema}, not {SCHEMA}"));
        }
        let times = times(&record["rtt_ns"]["histogram"]);
        let times = times.ok_or("its record has no round-trip times to draw")?;
        let [rates, p99s] = series(&record["series"]).ok_or("its record has no series to draw")?;
        Ok(Self {
            notes: notes(name, &record),
            times,
            rates,
            p99s,
        })
    }
}

/// Returns why a text without a record has none: its last line, or a record of many lines, may end too early.
fn no_record(text: &str) -> String {
    let parts = text.lines().last().into_iter().chain([text]);
    let mut parts = parts.filter(|part| !part.trim().is_empty());
    let is_cut = |text| serde_json::from_str::<Value>(text).is_err_and(|error| error.is_eof());
    let what = match parts.any(is_cut) {
        true => "not a complete record",
        false => "it has no record",
    };
    format!("{what} of 'echoserver load --json'")
}

fn number(value: &Value) -> Option<f64> {
    value.as_f64().filter(|it| (0.0..=1e18).contains(it))
}

fn times(histogram: &Value) -> Option<Lines> {
    let (mut count, mut steps) = (0.0, Vec::new());
    for pair in histogram.as_array().filter(|pairs| !pairs.is_empty())? {
        let (time, start) = (number(&pair[0])?.max(1.0), count);
        count += number(&pair[1])?.max(1.0);
        steps.push([start, count, time]);
    }
    // The last message stands in the middle of its share.
    let place = |messages: f64| count / (count - messages).max(0.5);
    let step = |[start, end, time]: [f64; 3]| Some([place(start), place(end), time]);
    Some(join(&steps.into_iter().map(step).collect::<Vec<_>>()))
}

fn series(intervals: &Value) -> Option<[Lines; 2]> {
    let (mut rates, mut p99s) = (Vec::new(), Vec::new());
    let intervals = intervals.as_array()?;
    let length = number(&intervals.first()?["seconds"])?;
    for interval in intervals {
        let number = |name| number(&interval[name]);
        let (end, seconds) = (number("end")?, number("seconds")?.max(1e-9));
        // The rate of a short rest at the end is noise.
        if seconds >= length / 2.0 {
            let step = |height| [(end - seconds).max(0.0), end, height];
            rates.push(Some(step(number("messages")? / seconds)));
            p99s.push(number("p99_ns").map(|p99| step(p99.max(1.0))));
        }
    }
    Some([rates, p99s].map(|steps| join(&steps)))
}

/// Joins steps, each with its start, end and height. A line ends where there is none.
fn join(steps: &[Option<[f64; 3]>]) -> Lines {
    let ends = |[start, end, height]: &[f64; 3]| [(*start, *height), (*end, *height)];
    let line = |steps: &[Option<_>]| steps.iter().flatten().flat_map(ends).collect();
    steps.split(Option::is_none).map(line).collect()
}

fn notes(name: &str, record: &Value) -> Vec<String> {
    let text = |name: &str| record[name].as_str().map(escape_control);
    let option = |name| Some(format!(" --{name} {}", record["options"][name].as_f64()?));
    let options = ["connections", "size", "rate"].map(option);
    let options = options.into_iter().flatten().collect::<String>();
    let load = format!("load {}{options}", text("target").unwrap_or_default());
    // From the least age of an unanswered message on, a time is a lower bound.
    let bound = record["least_age_ns"].as_u64().unwrap_or(u64::MAX);
    let times = ["p50", "p99", "p99.9", "max"].map(|name| {
        let time = record["rtt_ns"][name].as_u64().unwrap_or_default();
        let sign = if time >= bound { "≥ " } else { "" };
        format!(" {name} {sign}{:.1?}", Duration::from_nanos(time))
    });
    let rate = match record["messages_per_second"].as_f64().unwrap_or_default() {
        few @ ..100.0 => format!("{few:.2}"),
        many => Count(many.round()).to_string(),
    };
    let result = format!("{rate} messages/s; RTT{}", times.join(","));
    let mut notes = vec![name.to_owned(), load, result];
    notes.extend(["failure", "own_fault"].into_iter().filter_map(text));
    notes
}
