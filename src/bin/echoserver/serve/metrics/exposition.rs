//! The metrics in Prometheus' text format, version 0.0.4, which every scraper reads.

use std::fmt::{Display, Write};

use echoserver::{CloseReason, Stats, Value, WorkerStats};

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Metrics as text.
#[derive(Default)]
pub(super) struct Exposition(pub(super) String);

impl Exposition {
    /// Adds one metric without labels.
    pub(super) fn value(&mut self, name: &str, help: &str, value: impl Display) {
        self.begin(name, help);
        self.sample(name, "", value);
    }

    /// Begins a metric. The name of a counter ends with `_total`.
    pub(super) fn begin(&mut self, name: &str, help: &str) {
        let is_counter = name.ends_with("_total");
        let kind = if is_counter { "counter" } else { "gauge" };
        // A write to a string does not fail.
        let _infallible = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// Adds a value with its labels in braces, which need no escapes.
    pub(super) fn sample(&mut self, name: &str, labels: &str, value: impl Display) {
        let _infallible = writeln!(self.0, "{name}{labels} {value}");
    }

    /// Adds the counters of a server. At rest, accepted = open + closed, and received + generated = sent + buffered +
    /// discarded.
    pub(super) fn counters(&mut self, stats: &Stats) {
        let name = "echoserver_connections_open";
        self.value(name, "Open connections.", stats.open());
        let workers: Vec<_> = (stats.workers.iter()).map(WorkerStats::numbers).collect();
        let label = |worker: usize| format!("{{worker=\"{worker}\"}}");
        for number in [stats.numbers(), stats.total().numbers()].concat() {
            let name = format!("echoserver_{}", number.metric);
            self.begin(&name, number.help);
            if !number.metric.starts_with("worker_") {
                self.samples(&name, "", number.value);
                continue;
            }
            for (worker, numbers) in workers.iter().enumerate() {
                let own = numbers.iter().filter(|own| own.metric == number.metric);
                own.for_each(|own| self.samples(&name, &label(worker), own.value));
            }
        }
        let name = "echoserver_worker_connections_open";
        self.begin(name, "Open connections of the worker.");
        for (index, worker) in stats.workers.iter().enumerate() {
            let open = worker.assigned.saturating_sub(worker.closed.total());
            self.sample(name, &label(index), open);
        }
    }

    /// Adds the value of a number, or one for each reason.
    fn samples(&mut self, name: &str, labels: &str, value: Value) {
        match value {
            Value::Count(count) => self.sample(name, labels, count),
            Value::Net(net) => self.sample(name, labels, net),
            Value::Time(time) => self.sample(name, labels, time.as_secs_f64()),
            Value::ByReason(counts) => {
                for reason in CloseReason::ALL {
                    let count = counts.get(*reason);
                    self.sample(name, &format!("{{reason=\"{reason}\"}}"), count);
                }
            }
            _ => {}
        }
    }
}
