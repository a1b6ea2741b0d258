//! The metrics in Prometheus' text format, version 0.0.4, which every scraper reads.

use std::fmt::{Display, Write};
use std::iter;

use echoserver::{CloseReason, Stats, WorkerStats};

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Metrics as text.
#[derive(Default)]
pub(super) struct Exposition(pub(super) String);

impl Exposition {
    /// Adds one metric without labels.
    pub(super) fn value(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, help, [(String::new(), value)]);
    }

    /// Adds one metric with several sets of labels, whose values need no escapes. The name of a counter ends with
    /// `_total`.
    fn family<V: Display>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (String, V)>,
    ) {
        let is_counter = name.ends_with("_total");
        let kind = if is_counter { "counter" } else { "gauge" };
        let text = &mut self.0;
        // A write to a string does not fail.
        let _infallible = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in series {
            let _infallible = writeln!(text, "{name}{labels} {value}");
        }
    }

    fn by_reason(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (&'static str, u64)>,
    ) {
        let labelled = |(reason, value)| (format!("{{reason=\"{reason}\"}}"), value);
        self.family(name, help, values.into_iter().map(labelled));
    }

    fn by_close_reason(&mut self, name: &str, help: &str, values: [u64; CloseReason::ALL.len()]) {
        let names = CloseReason::ALL.map(CloseReason::name);
        self.by_reason(name, help, iter::zip(names, values));
    }

    fn by_worker<V: Display>(
        &mut self,
        name: &str,
        help: &str,
        workers: &[WorkerStats],
        value: impl Fn(&WorkerStats) -> V,
    ) {
        let labelled = |(index, worker)| (format!("{{worker=\"{index}\"}}"), value(worker));
        self.family(name, help, workers.iter().enumerate().map(labelled));
    }

    /// Adds the connections and bytes of the whole server. At rest, accepted = open + closed, and received +
    /// generated = sent + buffered + discarded.
    pub(super) fn totals(&mut self, stats: &Stats) {
        let total = stats.total();
        let name = "echoserver_connections_accepted_total";
        self.value(name, "Connections accepted.", stats.accepted);
        let name = "echoserver_connections_open";
        self.value(name, "Open connections.", stats.open());
        let name = "echoserver_connections_closed_total";
        self.by_close_reason(name, "Connections closed, by reason.", total.closed);
        let name = "echoserver_received_bytes_total";
        self.value(name, "Bytes received.", total.bytes_in);
        let name = "echoserver_generated_bytes_total";
        let help = "Bytes sent or to be sent that were not received, such as greetings.";
        self.value(name, help, total.bytes_generated);
        let name = "echoserver_sent_bytes_total";
        self.value(name, "Bytes sent.", total.bytes_out);
        let name = "echoserver_buffered_bytes";
        let help = "Bytes in the buffers of open connections.";
        self.value(name, help, total.buffered);
        let name = "echoserver_discarded_bytes_total";
        let help = "Bytes discarded when their connection was closed, by reason.";
        self.by_close_reason(name, help, total.discarded);
    }

    /// Adds the state of the acceptor.
    pub(super) fn acceptor(&mut self, stats: &Stats) {
        let name = "echoserver_accept_errors_total";
        let help = "Failed accept calls, including transient errors.";
        self.value(name, help, stats.accept_errors);
        let name = "echoserver_accept_paused";
        let help = "Whether accepting is paused: new clients wait in the backlog.";
        self.value(name, help, u8::from(stats.is_accept_paused));
        let name = "echoserver_accept_pauses_total";
        let help = "Accept pauses: at the connection limit, without descriptors, or after errors.";
        self.value(name, help, stats.accept_pauses);
        let name = "echoserver_accept_paused_seconds_total";
        let help = "Time in accept pauses, including one that lasts.";
        self.value(name, help, stats.accept_paused.as_secs_f64());
    }

    /// Adds what each worker does.
    pub(super) fn workers(&mut self, workers: &[WorkerStats]) {
        let name = "echoserver_worker_connections_assigned_total";
        let help = "Connections assigned to the worker.";
        self.by_worker(name, help, workers, |worker| worker.assigned);
        let name = "echoserver_worker_connections_open";
        let help = "Open connections of the worker.";
        self.by_worker(name, help, workers, |worker| {
            worker.assigned.saturating_sub(worker.total_closed())
        });
        let name = "echoserver_worker_ticks_total";
        let help = "Ticks of the worker's event loop, each with one wait for events.";
        self.by_worker(name, help, workers, |worker| worker.ticks);
        let name = "echoserver_worker_longest_tick_seconds";
        let help = "Longest tick since the start: how long other connections have waited at most.";
        self.by_worker(name, help, workers, |worker| {
            worker.longest_tick.as_secs_f64()
        });
        let name = "echoserver_worker_yields_total";
        let help = "Times a connection used its budget and yielded.";
        self.by_worker(name, help, workers, |worker| worker.yields);
    }

    /// Adds the lines that are missing in the log.
    pub(super) fn log(&mut self, lost_lines: u64) {
        let name = "echoserver_log_lines_lost_total";
        let help =
            "Lines missing in the log: stderr was not read in time, or could not be written.";
        self.value(name, help, lost_lines);
    }

    /// Adds what does not change while the server runs.
    pub(super) fn constants(&mut self, max_connections: usize) {
        let name = "echoserver_max_connections";
        let help = "Maximum concurrent connections.";
        self.value(name, help, max_connections);
        let labels = format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
        let help = "The version of the program.";
        self.family("echoserver_build_info", help, [(labels, 1)]);
    }
}
