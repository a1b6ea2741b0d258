//! The result as text and as JSON.

use std::time::Duration;

use hdrhistogram::Histogram;
use humantime::format_rfc3339_millis;
use serde_json::{Value, json};

use crate::figures::Count;
use crate::load::plan::Plan;
use crate::load::tally::{Measured, Tally};
use crate::target::Target;

/// Version of the JSON object. It changes when a member changes its meaning or is left out.
const SCHEMA: u32 = 1;
const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

/// Width of the longest bar of the histogram.
const BAR: u64 = 40;

/// The share of its CPU time from which on the load itself is the limit.
const MAX_CPU: f64 = 0.95;
/// A shorter run contains little but its start.
const MIN_CPU_TIME: Duration = Duration::from_millis(100);

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

/// The line for an interval.
pub(crate) fn interval_text(plan: &Plan, end: Duration, length: Duration, tally: &Tally) -> String {
    let messages = rate(tally.messages as f64 / length.as_secs_f64().max(1e-9));
    let times = match tally.rtt.0.is_empty() {
        true => String::new(),
        false => format!("  p99 {:>9}", time(tally.rtt.0.value_at_quantile(0.99))),
    };
    let failed = match tally.failed {
        0 => String::new(),
        count => format!("  {count} connection(s) failed"),
    };
    let has_fraction = plan.options.interval().subsec_nanos() > 0;
    let digits = if has_fraction { 2 } else { 0 };
    let end = end.as_secs_f64();
    format!("{end:5.digits$} s  {messages:>10} messages/s{times}{failed}\n")
}

pub(crate) fn interval_json(end: Duration, length: Duration, tally: &Tally) -> Value {
    let rtt = &tally.rtt.0;
    let time = |nanos: u64| (!rtt.is_empty()).then_some(nanos);
    json!({
        "end": end.as_secs_f64(),
        "seconds": length.as_secs_f64(),
        "messages": tally.messages,
        "bytes": tally.bytes,
        "p50_ns": time(rtt.value_at_quantile(0.5)),
        "p99_ns": time(rtt.value_at_quantile(0.99)),
        "max_ns": time(rtt.max()),
        "errors": tally.failed,
    })
}

/// The summary.
pub(crate) fn text(plan: &Plan, measured: &Measured) -> String {
    let (total, seconds) = (&measured.total, measured.elapsed.as_secs_f64());
    let messages = rate(measured.per_second(total.messages));
    let megabytes = measured.per_second(total.bytes) / 1e6;
    let in_all = Count(total.messages);
    let after_end = match measured.after_end {
        0 => String::new(),
        count => format!(", and {} after the end", Count(count)),
    };
    let mut lines = vec![
        format!("throughput    {messages} messages/s, {megabytes:.2} MB/s each way"),
        format!("duration      {seconds:.2} s, {in_all} messages{after_end}"),
        format!("connections   {}", connections(plan, total)),
    ];
    if !total.never_answered.is_empty() {
        let addresses = total.never_answered.join(", ");
        lines.push(format!("no answer     to {addresses}"));
    }
    let age = total.least_age.unwrap_or_default().as_millis();
    let age = Duration::from_millis(age as u64);
    let late = format!("for at least {age:?}: their age counts as RTT, a lower bound");
    for (name, count, what) in [
        ("lost", total.lost, "in flight on failed connections"),
        ("unanswered", total.unanswered, &late),
    ] {
        if count > 0 {
            lines.push(format!("{name:13} {} messages {what}", Count(count)));
        }
    }
    if !total.greetings.is_empty() {
        lines.push(format!("greetings     {}", greetings(total)));
    }
    for (name, histogram) in [
        ("connect time", &total.connect.0),
        ("RTT", &total.rtt.0),
        ("own lateness", &total.lateness.0),
    ] {
        let times = quantiles(histogram);
        lines.extend(times.map(|times| format!("{name:13} {times}")));
    }
    lines.push(format!("verified      {} bytes", Count(total.bytes)));
    for (error, count) in &total.errors {
        lines.push(format!("error         {error} ({} times)", Count(*count)));
    }
    if total.rtt.0.len() > 1 {
        lines.push("histogram of RTT".to_owned());
        lines.extend(bars(&total.rtt.0));
    }
    lines.extend(own_fault(plan, measured).map(|fault| format!("own fault     {fault}")));
    lines.extend(failure(plan, measured).map(|failure| format!("FAILED        {failure}")));
    lines.join("\n") + "\n"
}

/// How many connections were opened or answered, and have failed.
fn connections(plan: &Plan, total: &Tally) -> String {
    let [all, attempts] = [plan.connections as u64, total.attempts].map(Count);
    let [opened, answered, failed] = [total.opened, total.answered, total.failed].map(Count);
    let answered = match plan.options.connect {
        true => format!("{opened} opened, "),
        false => format!("{answered} of {all} answered, "),
    };
    let failed = match total.failed {
        0 => "0 failed".to_owned(),
        _ => format!("{failed} failed of {attempts} attempts"),
    };
    answered + &failed
}

/// Returns why the load itself may be the limit. At a rate it polls, so that its CPU time tells nothing.
fn own_fault(plan: &Plan, measured: &Measured) -> Option<String> {
    let total = &measured.total;
    if plan.options.rate.is_some() {
        let times = [&total.lateness.0, &total.rtt.0];
        let p99 = times.map(|times| times.value_at_quantile(0.99));
        let [late, rtt] = p99.map(time);
        return (p99[0] > p99[1] / 4)
            .then(|| format!("the load was late: p99 {late}, p99 of the RTT {rtt}"));
    }
    let seconds = measured.elapsed.as_secs_f64() * plan.threads as f64;
    let share = measured.cpu?.as_secs_f64() / seconds.max(1e-9);
    let percent = (share * 100.0).min(100.0);
    let is_busy = share >= MAX_CPU && measured.elapsed >= MIN_CPU_TIME;
    is_busy.then(|| format!("the load used {percent:.0} % of its CPU time"))
}

/// Everything, in one line.
pub(crate) fn json(target: &Target, plan: &Plan, measured: &Measured) -> String {
    let total = &measured.total;
    let report = json!({
        "schema": SCHEMA,
        "version": env!("CARGO_PKG_VERSION"),
        "started": format_rfc3339_millis(plan.started).to_string(),
        "host": gethostname::gethostname().to_string_lossy(),
        "target": target.name,
        "address": target.address_text(),
        "options": options(plan),
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
        "after_end": measured.after_end,
        "attempts": total.attempts,
        "opened": total.opened,
        "answered": total.answered,
        "failed": total.failed,
        "lost": total.lost,
        "unanswered": total.unanswered,
        "least_age_ns": total.least_age.map(|age| age.as_nanos() as u64),
        "never_answered": total.never_answered,
        "greetings": total.greetings,
        "errors": total.errors,
        "cpu_seconds": measured.cpu.map(|cpu| cpu.as_secs_f64()),
        "lateness_ns": figures(&total.lateness.0),
        "connect_ns": figures(&total.connect.0),
        "rtt_ns": figures(&total.rtt.0),
        "series": measured.series,
        "own_fault": own_fault(plan, measured),
        "failure": failure(plan, measured),
    });
    format!("{report}\n")
}

/// All options, with their defaults.
fn options(plan: &Plan) -> Value {
    let options = plan.options;
    let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
    json!({
        "connections": options.connections,
        "size": options.size(),
        "in_flight": options.max_in_flight(),
        "rate": options.rate,
        "flood": options.flood,
        "connect": options.connect,
        "skip_greeting": options.skip_greeting,
        "threads": options.threads,
        "duration": seconds(options.duration()),
        "messages": options.messages,
        "warm_up": options.warm_up.as_secs_f64(),
        "timeout": options.timeout.as_secs_f64(),
        "interval": options.interval().as_secs_f64(),
    })
}

/// Returns why the run is a failure, in one line.
pub(crate) fn failure(plan: &Plan, measured: &Measured) -> Option<String> {
    let total = &measured.total;
    let mut reasons = Vec::new();
    if total.failed > 0 {
        let (failed, attempts) = (Count(total.failed), Count(total.attempts));
        reasons.push(format!("{failed} of {attempts} connections failed"));
    }
    if total.unanswered > 0 {
        reasons.push(format!("{} messages unanswered", Count(total.unanswered)));
    }
    let messages = total.messages + measured.after_end;
    let wanted = plan.options.messages.unwrap_or(0);
    if messages < wanted {
        let [messages, wanted] = [messages, wanted].map(Count);
        reasons.push(format!("{messages} of {wanted} messages were complete"));
    } else if messages == 0 {
        reasons.push("no message was complete".to_owned());
    }
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

/// Returns which share of the connections got which first line.
fn greetings(total: &Tally) -> String {
    let all: u64 = total.greetings.values().sum();
    let share = |(line, count): (&String, &u64)| {
        let percent = *count as f64 * 100.0 / all as f64;
        format!("{line} {percent:.0} % ({})", Count(*count))
    };
    let shares: Vec<_> = total.greetings.iter().map(share).collect();
    shares.join(", ")
}

/// Returns the quantiles of times, or the only time.
fn quantiles(histogram: &Histogram<u64>) -> Option<String> {
    let max = time(histogram.max());
    if histogram.len() < 2 {
        return (!histogram.is_empty()).then_some(max);
    }
    let quantile = |(name, share)| format!("{name} {}, ", time(histogram.value_at_quantile(share)));
    Some(format!("{}max {max}", QUANTILES.map(quantile).concat()))
}

/// Few messages per second with a fraction, many without.
fn rate(per_second: f64) -> String {
    match per_second {
        few @ ..10.0 => format!("{few:.2}"),
        many => Count(many.round() as u64).to_string(),
    }
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

#[cfg(test)]
mod tests;
