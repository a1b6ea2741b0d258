//! The metrics in Prometheus' text format, version 0.0.4, which every scraper reads. What each means is in `help.txt`.

use std::fmt::{Display, Write};
use std::iter;

use echoserver::{CloseReason, Stats, WorkerStats};

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The name of each metric, and its description.
const HELP: &str = include_str!("help.txt");

/// Metrics as text.
#[derive(Default)]
pub(super) struct Exposition(pub(super) String);

impl Exposition {
    /// Adds one metric without labels.
    pub(super) fn value(&mut self, name: &str, value: impl Display) {
        self.family(name, [(String::new(), value)]);
    }

    /// Adds one metric with several sets of labels, whose values need no escapes. The name of a counter ends with
    /// `_total`.
    pub(super) fn family<V: Display>(
        &mut self,
        name: &str,
        series: impl IntoIterator<Item = (String, V)>,
    ) {
        let kind = if name.ends_with("_total") {
            "counter"
        } else {
            "gauge"
        };
        let mut help = HELP.lines().filter_map(|line| line.split_once(' '));
        let help = help.find_map(|(known, help)| (known == name).then_some(help));
        let help = help.expect("every metric is described");
        let text = &mut self.0;
        // A write to a string does not fail.
        let _infallible = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in series {
            let _infallible = writeln!(text, "{name}{labels} {value}");
        }
    }

    fn by_reason(&mut self, name: &str, values: [u64; CloseReason::ALL.len()]) {
        let labelled = |(reason, value)| (format!("{{reason=\"{reason}\"}}"), value);
        self.family(name, iter::zip(CloseReason::ALL, values).map(labelled));
    }

    fn by_worker<V: Display>(&mut self, name: &str, values: impl Iterator<Item = V>) {
        let labelled = |(worker, value)| (format!("{{worker=\"{worker}\"}}"), value);
        self.family(name, values.enumerate().map(labelled));
    }

    /// Adds the counters of a server. At rest, accepted = open + closed, and received + generated = sent + buffered +
    /// discarded.
    pub(super) fn counters(&mut self, stats: &Stats) {
        let total = stats.total();
        self.value("echoserver_connections_accepted_total", stats.accepted);
        self.value("echoserver_connections_open", stats.open());
        self.by_reason("echoserver_connections_closed_total", total.closed);
        self.value("echoserver_received_bytes_total", total.bytes_in);
        self.value("echoserver_generated_bytes_total", total.bytes_generated);
        self.value("echoserver_sent_bytes_total", total.bytes_out);
        self.value("echoserver_buffered_bytes", total.buffered);
        self.by_reason("echoserver_discarded_bytes_total", total.discarded);

        let paused = stats.accept_paused.as_secs_f64();
        self.value("echoserver_accept_errors_total", stats.accept_errors);
        self.value("echoserver_accept_paused", u8::from(stats.is_accept_paused));
        self.value("echoserver_accept_pauses_total", stats.accept_pauses);
        self.value("echoserver_accept_paused_seconds_total", paused);

        let workers = stats.workers.iter();
        let assigned = workers.clone().map(|worker| worker.assigned);
        self.by_worker("echoserver_worker_connections_assigned_total", assigned);
        let open = |worker: &WorkerStats| worker.assigned.saturating_sub(worker.total_closed());
        self.by_worker(
            "echoserver_worker_connections_open",
            workers.clone().map(open),
        );
        let ticks = workers.clone().map(|worker| worker.ticks);
        self.by_worker("echoserver_worker_ticks_total", ticks);
        let longest_tick = workers
            .clone()
            .map(|worker| worker.longest_tick.as_secs_f64());
        self.by_worker("echoserver_worker_longest_tick_seconds", longest_tick);
        let yields = workers.map(|worker| worker.yields);
        self.by_worker("echoserver_worker_yields_total", yields);
    }
}
