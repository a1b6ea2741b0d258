//! The result as text and as JSON.

use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::json;

use crate::figures::Count;
use crate::load::tally::Tally;
use crate::load::worker::Plan;
use crate::target::Target;

const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

/// Width of the longest bar of the histogram.
const BAR: usize = 40;

/// What is going to be done.
pub(crate) fn head(target: &Target, plan: &Plan) -> String {
    let pace = match plan.options.rate {
        Some(rate) => format!("{rate} messages/s"),
        None if plan.options.flood => "without waiting".to_owned(),
        None if plan.options.connect => "a connection for each message".to_owned(),
        None => format!("{} in flight on each", plan.max_in_flight),
    };
    let (connections, size) = (Count(plan.connections as u64), Count(plan.size));
    format!("{target}: {connections} connection(s), messages of {size} B, {pace}\n")
}

/// The line for one second.
pub(crate) fn second(second: u64, tally: &Tally) -> String {
    let mut line = format!("{second:5} s  {:>10} messages/s", Count(tally.messages));
    if !tally.rtt.is_empty() {
        let _ = write!(line, "  p99 {:>8}", time(tally.rtt.value_at_quantile(0.99)));
    }
    if tally.failed > 0 {
        let _ = write!(line, "  {} connection(s) failed", tally.failed);
    }
    line + "\n"
}

fn rate(count: u64, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64().max(1e-9)
}

/// The summary.
pub(crate) fn text(plan: &Plan, total: &Tally) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:13} {value}");
    };
    let megabytes = rate(total.bytes, total.elapsed) / 1e6;
    let messages = match rate(total.messages, total.elapsed) {
        few @ ..100.0 => format!("{few:.2}"),
        many => Count(many as u64).to_string(),
    };
    line(
        "throughput",
        format!("{messages} messages/s, {megabytes:.2} MB/s each way"),
    );
    line(
        "duration",
        format!(
            "{:.2} s, {} messages",
            total.elapsed.as_secs_f64(),
            Count(total.messages)
        ),
    );
    let answered = match plan.options.connect {
        true => String::new(),
        false => format!(
            "{} of {} answered, ",
            Count(total.answered),
            Count(plan.connections as u64)
        ),
    };
    line(
        "connections",
        format!("{answered}{} failed", Count(total.failed)),
    );
    if total.lost > 0 {
        line(
            "lost",
            format!(
                "{} messages in flight on failed connections",
                Count(total.lost)
            ),
        );
    }
    if total.unanswered > 0 {
        line(
            "unanswered",
            format!("{} messages that were due", Count(total.unanswered)),
        );
    }
    for (name, histogram) in [("connect time", &total.connect), ("RTT", &total.rtt)] {
        if !histogram.is_empty() {
            let values = QUANTILES.map(|(name, quantile)| {
                format!("{name} {}", time(histogram.value_at_quantile(quantile)))
            });
            line(
                name,
                format!("{}, max {}", values.join(", "), time(histogram.max())),
            );
        }
    }
    line("verified", format!("{} bytes", Count(total.bytes)));
    for (error, count) in &total.errors {
        line("error", format!("{error} ({} times)", Count(*count)));
    }
    text + &bars(&total.rtt)
}

/// The histogram of round-trip times: a line for each factor of two.
fn bars(histogram: &Histogram<u64>) -> String {
    if histogram.len() < 2 {
        return String::new();
    }
    let first = histogram.min().max(1).ilog2();
    let last = histogram.max().max(1).ilog2();
    let counts: Vec<u64> = (first..=last)
        .map(|power| histogram.count_between(1 << power, (2 << power) - 1))
        .collect();
    let most = counts.iter().copied().max().unwrap_or(1).max(1);
    let lines = (first..=last).zip(&counts).map(|(power, count)| {
        let bar = "#".repeat((count * BAR as u64).div_ceil(most) as usize);
        let share = *count as f64 * 100.0 / histogram.len() as f64;
        format!("  up to {:>8}  {share:6.2} %  {bar}\n", time(2 << power))
    });
    format!(
        "histogram of RTT\n{}",
        lines.collect::<String>().replace("  \n", "\n")
    )
}

/// Everything, in one line.
pub(crate) fn json(target: &Target, plan: &Plan, warm_up: &Tally, total: &Tally) -> String {
    // Apart from what is measured, the warm-up counts as well.
    let mut all = warm_up.clone();
    all.add(total);
    let report = json!({
        "target": target.name,
        "connections": plan.connections,
        "message_size": plan.size,
        "rate": plan.options.rate,
        "seconds": total.elapsed.as_secs_f64(),
        "messages": total.messages,
        "messages_per_second": rate(total.messages, total.elapsed),
        "bytes_verified": total.bytes,
        "warm_up": { "messages": warm_up.messages, "bytes_verified": warm_up.bytes },
        "opened": all.opened,
        "answered": total.answered,
        "failed": all.failed,
        "lost": all.lost,
        "unanswered": total.unanswered,
        "errors": all.errors,
        "connect_ns": figures(&all.connect),
        "rtt_ns": figures(&total.rtt),
    });
    format!("{report}\n")
}

/// Quantiles, and the histogram as pairs of a time and how often it occurred.
fn figures(histogram: &Histogram<u64>) -> serde_json::Value {
    if histogram.is_empty() {
        return serde_json::Value::Null;
    }
    let mut figures = json!({
        "min": histogram.min(),
        "mean": histogram.mean(),
        "max": histogram.max(),
        "histogram": histogram
            .iter_recorded()
            .map(|step| (step.value_iterated_to(), step.count_at_value()))
            .collect::<Vec<_>>(),
    });
    for (name, quantile) in QUANTILES {
        figures[name] = histogram.value_at_quantile(quantile).into();
    }
    figures
}

/// Nanoseconds, in the unit that suits them.
fn time(nanos: u64) -> String {
    let nanos = nanos as f64;
    let (value, unit) = match nanos {
        1e9.. => (nanos / 1e9, "s"),
        1e6.. => (nanos / 1e6, "ms"),
        1e3.. => (nanos / 1e3, "us"),
        _ => (nanos, "ns"),
    };
    let digits = match value {
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    format!("{value:.digits$} {unit}")
}
