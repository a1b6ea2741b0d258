//! Tables and charts of the results: for the terminal, and for the documents.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::charts::{self, Panel};
use super::results::{Results, Spread};

/// The servers in the charts and in the summary.
const MAIN: [&str; 5] = ["echoserver", "epoll", "tokio-64k", "tokio-16k", "threads"];

/// What a reader of a chart must know besides.
const NOTES: [&str; 2] = [
    "Medians (quartiles); each panel has a scale of its own. Loopback, one worker, two CPUs shared by clients and server.",
    "epoll: a raw event loop. tokio-64k, tokio-16k: buffers of 64 and 16 KiB. threads: one for each connection.",
];

/// The rows of all tables and the panels of all charts: table or chart, label, case and figure. `figure / server` is
/// the ratio to the figure of that server in the same round.
const ROWS: &str = "
summary | p99 RTT, 500 connections, 512 B | 500x512 | rtt_p99_ns
summary | p99 RTT, 1 connection beside 20 that flood | beside-20 | rtt_p99_ns
summary | server memory for each of 10,000 idle connections | idle | bytes_per_connection
summary | server memory for 4,000 clients that never read | peak | peak_bytes
summary | server memory kept after these have left | peak | kept_bytes
summary | throughput, 50 connections, 64 KiB | 50x64k | messages_per_second / epoll
summary | throughput, 50 connections, 64 B | 50x64 | messages_per_second / epoll
summary | throughput, 50 connections that flood | flood | messages_per_second / epoll
summary | connect, one echo, close: connections per second | connect | messages_per_second / epoll
summary | connect, one echo, close: server CPU time | connect | cpu_ns_per_message / epoll

throughput | 1 connection, 64 B | 1x64 | messages_per_second / epoll
throughput | 50 connections, 64 B | 50x64 | messages_per_second / epoll
throughput | 500 connections, 512 B | 500x512 | messages_per_second / epoll
throughput | 50 connections, 64 KiB | 50x64k | messages_per_second / epoll
throughput | 50 connections, 64 B, 16 in flight | 50x64x16 | messages_per_second / epoll
throughput | 50 connections that flood | flood | messages_per_second / epoll
throughput | 20 connections that flood beside 1 | beside-20 | flood_bytes_per_second / epoll
throughput | connect, one echo, close | connect | messages_per_second / epoll

server CPU time | 1 connection, 64 B | 1x64 | cpu_ns_per_message / epoll
server CPU time | 50 connections, 64 B | 50x64 | cpu_ns_per_message / epoll
server CPU time | 500 connections, 512 B | 500x512 | cpu_ns_per_message / epoll
server CPU time | 50 connections, 64 KiB | 50x64k | cpu_ns_per_message / epoll
server CPU time | 50 connections, 64 B, 16 in flight | 50x64x16 | cpu_ns_per_message / epoll
server CPU time | 50 connections that flood | flood | cpu_ns_per_message / epoll
server CPU time | connect, one echo, close | connect | cpu_ns_per_message / epoll

round-trip time | 1 connection, 64 B: p50 | 1x64 | rtt_p50_ns
round-trip time | p99 | 1x64 | rtt_p99_ns
round-trip time | 500 connections, 512 B: p50 | 500x512 | rtt_p50_ns
round-trip time | p99 | 500x512 | rtt_p99_ns
round-trip time | p99.9 | 500x512 | rtt_p99.9_ns
round-trip time | 1 connection beside 1 that floods: p99 | beside-1 | rtt_p99_ns
round-trip time | beside 20: p99 | beside-20 | rtt_p99_ns
round-trip time | beside 200: p99 | beside-200 | rtt_p99_ns
round-trip time | 50 connections at 50 % of the rate of `epoll`: p99 | rate-50 | rtt_p99_ns
round-trip time | at 90 %: p99 | rate-90 | rtt_p99_ns

memory | for each of 10,000 idle connections | idle | bytes_per_connection
memory | for 4,000 clients that never read | peak | peak_bytes
memory | kept after these have left | peak | kept_bytes

active connections | 1 | 1x64 | messages_per_second
active connections | 10 | active-10 | messages_per_second
active connections | 100 | active-100 | messages_per_second
active connections | 1,000 | active-1000 | messages_per_second
active connections | 10,000 | active-10000 | messages_per_second

drain | time until the process has ended | drain | drain_ns
drain | of 1,000 clients, without a complete answer | drain | cut_connections

throughput.svg | 50 connections, 64 B | 50x64 | messages_per_second / epoll
throughput.svg | 500 connections, 512 B | 500x512 | messages_per_second / epoll
throughput.svg | 50 connections, 64 KiB | 50x64k | messages_per_second / epoll
throughput.svg | 50 connections, 64 B, 16 in flight | 50x64x16 | messages_per_second / epoll
throughput.svg | 50 connections that flood | flood | messages_per_second / epoll
throughput.svg | connect, one echo, close | connect | messages_per_second / epoll

latency.svg | p99 RTT, 500 connections, 512 B | 500x512 | rtt_p99_ns
latency.svg | p99 RTT of 1 connection beside 20 that flood | beside-20 | rtt_p99_ns
latency.svg | p99 RTT of 1 connection beside 200 that flood | beside-200 | rtt_p99_ns
latency.svg | p99.9 RTT, 500 connections, 512 B | 500x512 | rtt_p99.9_ns
latency.svg | server memory for each of 10,000 idle connections | idle | bytes_per_connection
latency.svg | server memory kept after 4,000 clients that never read | peak | kept_bytes
";

#[derive(Clone, Copy)]
struct Row {
    label: &'static str,
    case: &'static str,
    figure: &'static str,
    reference: Option<&'static str>,
}

/// The rows of one table, or the panels of one chart.
fn rows(table: &str) -> Vec<Row> {
    let row = |line: &'static str| {
        let mut fields = line.split(" | ");
        fields.next().filter(|name| *name == table)?;
        let (label, case, figure) = (fields.next()?, fields.next()?, fields.next()?);
        let (figure, reference) = match figure.split_once(" / ") {
            Some((figure, reference)) => (figure, Some(reference)),
            None => (figure, None),
        };
        Some(Row {
            label,
            case,
            figure,
            reference,
        })
    };
    ROWS.lines().filter_map(row).collect()
}

impl Row {
    fn spread(&self, server: &str, results: &Results) -> Option<Spread> {
        match self.reference {
            Some(reference) => results.ratio(self.case, server, reference, self.figure),
            None => results.spread(self.case, server, self.figure),
        }
    }

    /// The median, and the quartiles if they differ.
    fn show(&self, spread: Spread) -> String {
        let (value, (low, high)) = (spread.median, spread.quartiles);
        let units: &[(f64, &str)] = match self.figure {
            _ if self.reference.is_some() => &[(1.0, "")],
            figure if figure.ends_with("_ns") => {
                &[(1e9, " s"), (1e6, " ms"), (1e3, " µs"), (1.0, " ns")]
            }
            figure if figure.ends_with("_per_second") => {
                &[(1e6, " M/s"), (1e3, " k/s"), (1.0, " /s")]
            }
            figure if figure.contains("bytes") => &[(1e6, " MB"), (1e3, " kB"), (1.0, " B")],
            _ => &[(1.0, "")],
        };
        let last = units[units.len() - 1];
        let (size, unit) = *units
            .iter()
            .find(|(size, _)| value >= *size)
            .unwrap_or(&last);
        let digits = match value / size {
            _ if self.reference.is_some() => 2,
            _ if size <= 1.0 => 0,
            ..10.0 => 2,
            ..100.0 => 1,
            _ => 0,
        };
        let number = |value: f64| format!("{:.digits$}", value / size);
        let (value, low, high) = (number(value), number(low), number(high));
        match low == high {
            true => value + unit,
            false => format!("{value}{unit} ({low}–{high})"),
        }
    }
}

/// All tables, for the terminal.
pub(crate) fn text(results: &Results) -> String {
    let names = [
        "throughput",
        "server CPU time",
        "round-trip time",
        "memory",
        "active connections",
        "drain",
    ];
    names.map(|name| table(name, results) + "\n").concat() + &run(results)
}

/// Replaces what is between the lines `<!-- table: NAME -->` and `<!-- end -->` by the table of that name.
pub(crate) fn embed(document: &str, results: &Results) -> String {
    let mut text = String::new();
    let mut is_inside = false;
    for line in document.lines() {
        is_inside &= line != "<!-- end -->";
        if !is_inside {
            let _infallible = writeln!(text, "{line}");
        }
        let name = line.strip_prefix("<!-- table: ");
        if let Some(name) = name.and_then(|name| name.strip_suffix(" -->")) {
            is_inside = true;
            text += &match name {
                "run" => run(results),
                name => table(name, results),
            };
        }
    }
    text
}

/// The charts, by file name.
pub(crate) fn charts(results: &Results) -> [(&'static str, String); 2] {
    let draw = |(name, title)| {
        let panel = |row: &Row| Panel {
            title: row.label,
            bars: MAIN
                .iter()
                .filter_map(|server| bar(row, server, results))
                .collect(),
        };
        let panels: Vec<_> = rows(name).iter().map(panel).collect();
        (name, charts::draw(title, &NOTES, &panels))
    };
    let titles = [
        (
            "throughput.svg",
            "Throughput as a ratio to a raw epoll loop: higher is better",
        ),
        ("latency.svg", "Latency and memory: lower is better"),
    ];
    titles.map(draw)
}

fn bar(row: &Row, server: &'static str, results: &Results) -> Option<(&'static str, f64, String)> {
    let spread = row.spread(server, results)?;
    let mark = results
        .problem(row.case, server)
        .map_or("", |_| " (incomplete)");
    Some((server, spread.median, row.show(spread) + mark))
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
        "`{}` on {}, commit {}: {} rounds, samples of {} s, {} worker(s) and as many load threads. {}; {}. {noise}\n",
        results.command,
        results.date,
        results.commit,
        results.rounds,
        results.sample_seconds,
        results.workers,
        results.machine,
        results.versions.join(", "),
    )
}

/// A table with a column for each server, and notes on its problems.
fn table(name: &str, results: &Results) -> String {
    let all = results.servers();
    let rows = rows(name);
    let is_shown = |server: &&str| rows.iter().all(|row| row.reference != Some(*server));
    let (title, servers) = match name {
        "summary" => ("", MAIN.to_vec()),
        name => (name, all.into_iter().filter(is_shown).collect()),
    };
    let mut cells = vec![vec![title.to_owned()]];
    cells[0].extend(servers.iter().map(ToString::to_string));
    let mut notes = BTreeMap::<_, Vec<String>>::new();
    for row in &rows {
        let mut line = vec![row.label.to_owned()];
        for server in &servers {
            let cell = row.spread(server, results).map(|spread| row.show(spread));
            let mut cell = cell.unwrap_or_else(|| "-".to_owned());
            if let Some(problem) = results.problem(row.case, server) {
                cell += "†";
                let note = format!("{}: {problem}", row.case);
                let of_server = notes.entry(*server).or_default();
                if !of_server.contains(&note) {
                    of_server.push(note);
                }
            }
            line.push(cell);
        }
        cells.push(line);
    }
    let note = |(server, problems): (&str, Vec<String>)| {
        format!("\n† {server}, {}\n", problems.join("; "))
    };
    aligned(&cells) + &notes.into_iter().map(note).collect::<String>()
}

/// Cells as Markdown, padded to the width of their column.
fn aligned(cells: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let lengths = cells.iter().map(|row| row[column].chars().count());
        lengths.max().unwrap_or(0).max(3)
    };
    let widths: Vec<usize> = (0..cells[0].len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let padded = row.iter().zip(&widths);
        let padded = padded.map(|(cell, width)| format!("| {cell:<width$} "));
        padded.collect::<String>() + "|\n"
    };
    let rule = widths.iter().map(|width| "-".repeat(*width)).collect();
    let body = cells[1..].iter().map(line).collect::<String>();
    line(&cells[0]) + &line(&rule) + &body
}
