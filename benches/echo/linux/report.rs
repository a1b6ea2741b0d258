//! Tables and charts of the results: for the terminal, and for the documents.

use std::fmt::Write;
use std::iter;

use plotters::style::RGBColor;

use super::results::{Results, Spread};

/// The servers in the charts and in the summary, each with its color: this one stands out, the reference is dark.
pub(crate) const MAIN: [(&str, RGBColor); 5] = [
    ("echoserver", RGBColor(0xd1, 0x49, 0x5b)),
    ("epoll", RGBColor(0x4a, 0x4a, 0x4a)),
    ("tokio-64k", RGBColor(0x2e, 0x86, 0xab)),
    ("tokio-16k", RGBColor(0x8f, 0xc1, 0xd9)),
    ("threads", RGBColor(0xb8, 0xb0, 0xa0)),
];

/// The rows of all tables and the panels of all charts: tables and charts, name, case and figure. `figure / server` is
/// the ratio to the figure of that server in the same round. [`rows`] adds the figure where it is missing.
const ROWS: &str = "
round-trip time | p99 RTT, 1 connection beside 1 that floods | beside-1 | rtt_p99_ns
round-trip time, summary, latency.svg | p99 RTT, 1 connection beside 20 that flood | beside-20 | rtt_p99_ns
round-trip time, summary, latency.svg | p99 RTT, 1 connection beside 200 that flood | beside-200 | rtt_p99_ns
round-trip time, summary, latency.svg | p99 RTT, 50 connections beside 100 that flood | 50-beside-100 | rtt_p99_ns
summary | messages, 50 connections beside 100 that flood | 50-beside-100 | messages_per_second
summary | throughput, 100 connections that flood beside 50 | 50-beside-100 | flood_bytes_per_second / epoll
round-trip time | p99 RTT, 500 connections beside 50 that flood | 500-beside-50 | rtt_p99_ns
round-trip time | p50 RTT, 1 connection, 64 B | 1x64 | rtt_p50_ns
round-trip time | p99 RTT, 1 connection, 64 B | 1x64 | rtt_p99_ns
round-trip time | p50 RTT, 500 connections, 512 B | 500x512 | rtt_p50_ns
round-trip time, summary, latency.svg | p99 RTT, 500 connections, 512 B | 500x512 | rtt_p99_ns
round-trip time | p99 RTT, 50 connections at 50 % of the rate of `epoll` | rate-50 | rtt_p99_ns

throughput, throughput.svg | 50 connections beside 100 that flood | 50-beside-100
throughput, throughput.svg | 100 connections that flood beside 50 | 50-beside-100 | flood_bytes_per_second / epoll
throughput | 500 connections beside 50 that flood | 500-beside-50
throughput | 50 connections that flood beside 500 | 500-beside-50 | flood_bytes_per_second / epoll
throughput | 20 connections that flood beside 1 | beside-20 | flood_bytes_per_second / epoll

memory, summary, latency.svg | server memory for each of 10,000 idle connections | idle | bytes_per_connection
memory | server memory for 4,000 clients that never read | peak | peak_bytes
memory, summary, latency.svg | server memory kept after 4,000 clients that never read | peak | kept_bytes

summary | throughput, 50 connections that flood | flood
summary | throughput, 50 connections, 64 B | 50x64
summary | connect, one echo, close: connections per second | connect
summary | connect, one echo, close: server CPU time | connect | cpu_ns_per_message / epoll

throughput, server CPU time | 1 connection, 64 B | 1x64
throughput, server CPU time, throughput.svg | 50 connections, 64 B | 50x64
throughput, server CPU time | 500 connections, 512 B | 500x512
throughput, server CPU time, throughput.svg | 50 connections, 64 KiB | 50x64k
throughput, server CPU time | 50 connections, 64 B, 16 in flight | 50x64x16
throughput, server CPU time, throughput.svg | 50 connections that flood | flood
throughput, server CPU time, throughput.svg | connect, one echo, close | connect

active connections | 1 | 1x64 | messages_per_second
active connections | 50 | 50x64 | messages_per_second
active connections | 10,000 | active-10000 | messages_per_second

drain | time until the process has ended | drain | drain_ns
drain | of 1,000 clients, without a complete answer | drain | cut_connections
";

pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) case: &'static str,
    pub(crate) figure: &'static str,
}

/// The rows of one table, or the panels of one chart.
pub(crate) fn rows(table: &str) -> Vec<Row> {
    let row = |line: &'static str| {
        let mut fields = line.split(" | ");
        fields.next()?.split(", ").find(|name| *name == table)?;
        let (name, case) = (fields.next()?, fields.next()?);
        let figure = fields.next().unwrap_or(match table {
            "server CPU time" => "cpu_ns_per_message / epoll",
            _ => "messages_per_second / epoll",
        });
        Some(Row { name, case, figure })
    };
    ROWS.lines().filter_map(row).collect()
}

impl Row {
    /// The largest unit that is at most `value`: its size and name.
    fn unit(&self, value: f64) -> (f64, &'static str) {
        let units: &[(f64, &str)] = match self.figure.rsplit('_').next() {
            Some("ns") => &[(1e9, " s"), (1e6, " ms"), (1e3, " µs"), (1.0, " ns")],
            Some("second") => &[(1e6, " M/s"), (1e3, " k/s"), (1.0, " /s")],
            Some("bytes" | "connection") => &[(1e6, " MB"), (1e3, " kB"), (1.0, " B")],
            _ => &[(1.0, "")],
        };
        let fitting = units.iter().find(|(size, _)| value >= *size);
        *fitting.unwrap_or(&units[units.len() - 1])
    }

    /// A power of ten.
    pub(crate) fn show_tick(&self, value: f64) -> String {
        let (size, unit) = self.unit(value);
        format!("{}{unit}", value / size)
    }

    /// The median, and the quartiles if they differ.
    pub(crate) fn show(&self, spread: Spread) -> String {
        let (value, (low, high)) = (spread.median, spread.quartiles);
        let (size, unit) = self.unit(value);
        let digits = match value / size {
            _ if self.figure.contains(" / ") => 2,
            _ if size <= 1.0 => 0,
            ..10.0 => 2,
            ..100.0 => 1,
            _ => 0,
        };
        let [value, low, high] = [value, low, high].map(|it| format!("{:.digits$}", it / size));
        match low == high {
            true => value + unit,
            false => format!("{value}{unit} ({low}–{high})"),
        }
    }
}

/// All tables, for the terminal.
pub(crate) fn text(results: &Results) -> String {
    let names = "throughput | server CPU time | round-trip time | memory | active connections | drain | run";
    let tables = names.split(" | ").map(|name| table(name, results));
    tables.collect::<Vec<_>>().join("\n")
}

/// Replaces what is between `<!-- table: NAME -->` and `<!-- end -->` by the table of that name. Returns nothing if one
/// of these lines is missing.
pub(crate) fn embed(document: &str, results: &Results) -> Option<String> {
    const START: &str = "<!-- table: ";
    const END: &str = "<!-- end -->";
    let mut sections = document.split(START);
    let mut text = sections.next()?.to_owned();
    for section in sections {
        let (name, section) = section.split_once(" -->\n")?;
        let (_old, rest) = section.split_once(END)?;
        let table = table(name, results);
        let _infallible = write!(text, "{START}{name} -->\n{table}{END}{rest}");
    }
    Some(text)
}

/// What was run, and where.
fn run(results: &Results) -> String {
    let noise = results.samples.iter();
    let noise = noise.filter_map(|sample| sample.figures.get("other_cpus").copied());
    let noise = Spread::of(noise).map_or(String::new(), |noise| {
        let (median, max) = (noise.median, noise.max);
        format!("Other processes used {median:.2} CPUs in the median sample, {max:.2} at most.")
    });
    format!(
        "`{}` on {}, commit {}: {} rounds, samples of {} s, {} worker(s) and as many load threads; {}. {}; {}. {noise}\n",
        results.command,
        results.date,
        results.commit,
        results.rounds,
        results.sample_seconds,
        results.workers,
        results.placement(),
        results.machine,
        results.versions.join(", "),
    )
}

/// A Markdown table with a column for each server, and notes on its problems.
fn table(name: &str, results: &Results) -> String {
    if name == "run" {
        return run(results);
    }
    let rows = rows(name);
    let (mut title, mut servers) = (name, results.servers());
    // The reference of ratios, whose own are all 1.
    let reference = rows.first().and_then(|row| row.figure.split(" / ").nth(1));
    servers.retain(|server| reference != Some(*server));
    if name == "summary" {
        (title, servers) = ("", MAIN.map(|(server, _)| server).into());
    }
    let mut lines = vec![String::new(); rows.len() + 2];
    let mut notes = String::new();
    let names = rows.iter().map(|row| row.name.to_owned());
    add_column(&mut lines, title, names);
    for server in servers {
        let mut problems = Vec::new();
        let cell = |row: &Row| {
            let spread = results.spread(row.case, server, row.figure);
            let value = spread.map_or("-".to_owned(), |spread| row.show(spread));
            let Some(problem) = results.problem(row.case, server) else {
                return value;
            };
            problems.push(format!("{}: {problem}", row.case));
            value + "†"
        };
        add_column(&mut lines, server, rows.iter().map(cell));
        problems.dedup();
        if !problems.is_empty() {
            let _infallible = writeln!(notes, "\n† {server}, {}", problems.join("; "));
        }
    }
    lines.join("|\n") + "|\n" + &notes
}

/// Adds a cell to each line, padded to the width of the column. The second line is a rule.
fn add_column(lines: &mut [String], head: &str, cells: impl Iterator<Item = String>) {
    let mut cells: Vec<_> = iter::once(head.to_owned()).chain(cells).collect();
    let width = cells.iter().map(|cell| cell.chars().count()).max();
    let width = width.unwrap_or(0);
    cells.insert(1, "-".repeat(width));
    for (line, cell) in lines.iter_mut().zip(cells) {
        let _infallible = write!(line, "| {cell:<width$} ");
    }
}
