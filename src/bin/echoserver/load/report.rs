//! The result as text and as JSON.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::json;

use crate::figures::Count;
use crate::load::plan::Plan;
use crate::load::tally::{Measured, Tally};
use crate::target::Target;

const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

/// Width of the longest bar of the histogram.
const BAR: u64 = 40;

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
    let messages = Count(tally.messages);
    let p99 = match tally.rtt.0.value_at_quantile(0.99) {
        0 => String::new(),
        nanos => format!("  p99 {:>9}", time(nanos)),
    };
    let failed = match tally.failed {
        0 => String::new(),
        count => format!("  {count} connection(s) failed"),
    };
    format!("{second:5} s  {messages:>10} messages/s{p99}{failed}\n")
}

/// The summary.
pub(crate) fn text(plan: &Plan, measured: &Measured) -> String {
    let (total, seconds) = (&measured.total, measured.elapsed.as_secs_f64());
    let messages = match measured.per_second(total.messages) {
        few @ ..100.0 => format!("{few:.2}"),
        many => Count(many as u64).to_string(),
    };
    let megabytes = measured.per_second(total.bytes) / 1e6;
    let (answered, connections) = (Count(total.answered), Count(plan.connections as u64));
    let answered = if plan.options.connect {
        String::new()
    } else {
        format!("{answered} of {connections} answered, ")
    };
    let (messages_in_all, failed) = (Count(total.messages), Count(total.failed));
    let mut lines = vec![
        format!("throughput    {messages} messages/s, {megabytes:.2} MB/s each way"),
        format!("duration      {seconds:.2} s, {messages_in_all} messages"),
        format!("connections   {answered}{failed} failed"),
    ];
    let missing = [
        ("lost", total.lost, "in flight on failed connections"),
        ("unanswered", measured.unanswered(), "that were due"),
    ];
    for (name, count, what) in missing {
        if count > 0 {
            lines.push(format!("{name:13} {} messages {what}", Count(count)));
        }
    }
    for (name, histogram) in [("connect time", &total.connect.0), ("RTT", &total.rtt.0)] {
        if !histogram.is_empty() {
            let quantile =
                |(name, share)| format!("{name} {}, ", time(histogram.value_at_quantile(share)));
            let (quantiles, max) = (QUANTILES.map(quantile).concat(), time(histogram.max()));
            lines.push(format!("{name:13} {quantiles}max {max}"));
        }
    }
    lines.push(format!("verified      {} bytes", Count(total.bytes)));
    for (error, count) in &total.errors {
        lines.push(format!("error         {error} ({} times)", Count(*count)));
    }
    if total.rtt.0.len() > 1 {
        lines.push("histogram of RTT".to_owned());
        lines.extend(bars(&total.rtt.0));
    }
    lines.join("\n") + "\n"
}

/// A line for each factor of two.
fn bars(histogram: &Histogram<u64>) -> Vec<String> {
    let powers = histogram.min().ilog2()..=histogram.max().ilog2();
    let count = |power| histogram.count_between(1_u64 << power, (2_u64 << power) - 1);
    let most = powers.clone().map(count).max().unwrap_or(1);
    let line = |power| {
        let share = count(power) as f64 * 100.0 / histogram.len() as f64;
        let bar = "#".repeat((count(power) * BAR).div_ceil(most) as usize);
        let line = format!("  up to {:>8}  {share:6.2} %  {bar}", time(2_u64 << power));
        line.trim_end().to_owned()
    };
    powers.map(line).collect()
}

/// Everything, in one line.
pub(crate) fn json(target: &Target, plan: &Plan, measured: &Measured) -> String {
    let total = &measured.total;
    let report = json!({
        "target": target.name,
        "connections": plan.connections,
        "message_size": plan.size,
        "rate": plan.options.rate,
        "seconds": measured.elapsed.as_secs_f64(),
        "messages": total.messages,
        "messages_per_second": measured.per_second(total.messages),
        "bytes_verified": total.bytes,
        "warm_up": {
            "messages": measured.warm_up_messages,
            "bytes_verified": measured.warm_up_bytes,
        },
        "opened": total.opened,
        "answered": total.answered,
        "failed": total.failed,
        "lost": total.lost,
        "unanswered": measured.unanswered(),
        "errors": total.errors,
        "connect_ns": figures(&total.connect.0),
        "rtt_ns": figures(&total.rtt.0),
    });
    format!("{report}\n")
}

/// Quantiles, and the histogram as pairs of a time and how often it occurred.
fn figures(histogram: &Histogram<u64>) -> Option<serde_json::Value> {
    let steps = histogram.iter_recorded();
    let pairs = steps.map(|step| (step.value_iterated_to(), step.count_at_value()));
    let mut figures = json!({
        "min": histogram.min(),
        "mean": histogram.mean(),
        "max": histogram.max(),
        "histogram": pairs.collect::<Vec<_>>(),
    });
    for (name, quantile) in QUANTILES {
        figures[name] = histogram.value_at_quantile(quantile).into();
    }
    Some(figures).filter(|_| !histogram.is_empty())
}

fn time(nanos: u64) -> String {
    format!("{:.2?}", Duration::from_nanos(nanos))
}
