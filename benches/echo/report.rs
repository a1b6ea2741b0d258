//! The tables: medians and their spread, and ratios to the reference's sample of the same round.

use std::fmt::Write;

use crate::measures::{Case, Measure, Sample, Shape};
use crate::process::Server;

/// All samples of one measure.
pub(crate) struct Results {
    pub(crate) name: &'static str,
    pub(crate) servers: Vec<String>,
    /// By case, then by server.
    pub(crate) entries: Vec<Vec<Entry>>,
}

/// One server's samples in one case.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    /// Each with its round.
    pub(crate) samples: Vec<(u32, Sample)>,
    /// Why there are no more of them.
    pub(crate) fault: Option<String>,
}

/// The middle of some figures, and how far they lie apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    fn of(figures: impl Iterator<Item = f64>) -> Option<Self> {
        let mut figures: Vec<f64> = figures.collect();
        figures.sort_by(f64::total_cmp);
        let (&min, &max) = (figures.first()?, figures.last()?);
        let middle = figures.len() / 2;
        let median = match figures.len() % 2 {
            0 => f64::midpoint(figures[middle - 1], figures[middle]),
            _ => figures[middle],
        };
        Some(Self { median, min, max })
    }
}

impl Entry {
    fn spread(&self, figure: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.samples.iter().filter_map(|(_, sample)| figure(sample)))
    }

    /// How a figure relates to the reference's, round by round.
    fn ratio(&self, reference: &Entry, figure: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        let pairs = self.samples.iter().filter_map(|(round, sample)| {
            let (_, other) = reference.samples.iter().find(|(other, _)| other == round)?;
            Some(figure(sample)? / figure(other)?)
        });
        Spread::of(pairs.filter(|ratio| ratio.is_finite()))
    }
}

impl Results {
    pub(crate) fn new(measure: &Measure, servers: &[Server]) -> Self {
        let row = || servers.iter().map(|_| Entry::default()).collect();
        Self {
            name: measure.name,
            servers: servers.iter().map(|server| server.name.clone()).collect(),
            entries: measure.cases.iter().map(|_| row()).collect(),
        }
    }

    /// The rate or the memory of one server in one case.
    pub(crate) fn value(&self, case: usize, server: usize) -> Option<Spread> {
        self.entries[case][server].spread(|sample| Some(sample.value))
    }

    /// Why samples are missing: the server's name, and what happened.
    pub(crate) fn faults(&self) -> Vec<String> {
        let of =
            |(name, entry): (&String, &Entry)| Some(format!("{name}: {}", entry.fault.as_ref()?));
        let rows = self.entries.iter();
        rows.flat_map(|row| self.servers.iter().zip(row).filter_map(of))
            .collect()
    }

    /// The rate or the memory as a ratio to the reference's.
    pub(crate) fn ratio(&self, case: usize, server: usize) -> Option<Spread> {
        let entries = &self.entries[case];
        entries[server].ratio(&entries[REFERENCE], |sample| Some(sample.value))
    }
}

/// The raw loop, or whichever server is the first of those chosen.
const REFERENCE: usize = 0;

fn cpu(sample: &Sample) -> Option<f64> {
    sample.cpu_ns
}

/// Everything about one measure, to be read by people.
pub(crate) fn tables(measure: &Measure, results: &Results) -> String {
    let mut text = format!("{}: {}\n", measure.name, measure.title);
    let table = match measure.shape {
        Shape::Rate => rates(&measure.cases[0], results),
        Shape::Memory => memory(&measure.cases[0], results),
        Shape::Curve => curve(measure, results),
    };
    text += &table;
    text += &faults(measure, results);
    text.push('\n');
    text
}

fn rates(case: &Case, results: &Results) -> String {
    let unit = case.load.unit();
    let mut table = Table::new(&[
        "",
        unit,
        "(min-max)",
        "ratio",
        "(min-max)",
        "p50",
        "p99",
        "p99.9",
        &format!("CPU/{}", case.load.one()),
        "ratio",
        "(min-max)",
    ]);
    let entries = &results.entries[0];
    for (server, entry) in entries.iter().enumerate() {
        let reference = &entries[REFERENCE];
        let latency = |index: usize| {
            let nanos = |sample: &Sample| Some(sample.latency_ns?[index] as f64);
            entry.spread(nanos).map(|spread| time(spread.median))
        };
        let (rate, ratio) = (results.value(0, server), results.ratio(0, server));
        let (cost, cost_ratio) = (entry.spread(cpu), entry.ratio(reference, cpu));
        table.row(&[
            Some(results.servers[server].clone()),
            rate.map(|rate| short(rate.median)),
            rate.map(|rate| format!("{}-{}", short(rate.min), short(rate.max))),
            ratio.map(|ratio| format!("{:.2}", ratio.median)),
            ratio.map(range),
            latency(0),
            latency(1),
            latency(2),
            cost.map(|cost| time(cost.median)),
            cost_ratio.map(|ratio| format!("{:.2}", ratio.median)),
            cost_ratio.map(range),
        ]);
    }
    table.text()
}

fn memory(case: &Case, results: &Results) -> String {
    let unit = case.load.unit();
    let mut table = Table::new(&["", unit, "(min-max)", &case.label]);
    for (server, name) in results.servers.iter().enumerate() {
        let spread = results.value(0, server);
        table.row(&[
            Some(name.clone()),
            spread.map(|spread| format!("{:.0}", spread.median)),
            spread.map(|spread| format!("{:.0}-{:.0}", spread.min, spread.max)),
            Some(String::new()),
        ]);
    }
    table.text()
}

/// Two tables: rates with their ratios, and what an operation costs from the first case to the last.
fn curve(measure: &Measure, results: &Results) -> String {
    let load = measure.cases[0].load;
    let heads = |first: &str, last: &str| {
        let mut heads = vec![first.to_owned()];
        heads.extend(measure.cases.iter().map(|case| case.label.clone()));
        heads.push(last.to_owned());
        heads
    };
    let cases = 0..measure.cases.len();
    let mut rates = Table::new(&heads(load.unit(), ""));
    let mut costs = Table::new(&heads(
        &format!("CPU/{}", load.one()),
        "last/first (min-max)",
    ));
    for (server, name) in results.servers.iter().enumerate() {
        let mut row = vec![Some(name.clone())];
        row.extend(cases.clone().map(|case| {
            let rate = short(results.value(case, server)?.median);
            Some(match results.ratio(case, server) {
                Some(ratio) => format!("{rate} x{:.2}", ratio.median),
                None => rate,
            })
        }));
        row.push(Some(String::new()));
        rates.row(&row);

        let entry = |case: usize| &results.entries[case][server];
        let mut row = vec![Some(name.clone())];
        row.extend(
            cases
                .clone()
                .map(|case| Some(time(entry(case).spread(cpu)?.median))),
        );
        let growth = entry(cases.end - 1).ratio(entry(0), cpu);
        row.push(growth.map(|growth| format!("{:.2} {}", growth.median, range(growth))));
        costs.row(&row);
    }
    rates.text() + &costs.text()
}

/// What did not go as it should: no samples, or connections that got no answer.
fn faults(measure: &Measure, results: &Results) -> String {
    let mut text = String::new();
    let mut late = Vec::new();
    for (case, entries) in measure.cases.iter().zip(&results.entries) {
        for (name, entry) in results.servers.iter().zip(entries) {
            let label = match case.label.as_str() {
                "" => name.clone(),
                label => format!("{name}, {label}"),
            };
            if let Some(fault) = &entry.fault {
                let _infallible = writeln!(text, "  ! {label}: {fault}");
            } else if entry.samples.is_empty() {
                late.push(label.clone());
            }
            let starved = entry.samples.iter().map(|(_, sample)| sample.starved).max();
            if let Some(starved @ 1..) = starved {
                let total = case.load.connections();
                let _infallible = writeln!(
                    text,
                    "  ! {label}: {starved} of {total} connections got no answer at all"
                );
            }
        }
    }
    if !late.is_empty() {
        let _infallible = writeln!(text, "  ! no time was left for: {}", late.join("; "));
    }
    text
}

/// How quiet the machine was.
pub(crate) fn noise(all: &[Results]) -> String {
    let samples = || {
        let entries = all
            .iter()
            .flat_map(|results| results.entries.iter().flatten());
        entries.flat_map(|entry| entry.samples.iter().map(|(_, sample)| sample))
    };
    let (Some(others), Some(stolen)) = (
        Spread::of(samples().map(|sample| sample.noise.others)),
        Spread::of(samples().map(|sample| sample.noise.stolen)),
    ) else {
        return String::new();
    };
    format!(
        "Noise: other processes used {:.2} CPUs (at most {:.2}), the hypervisor took {:.2} (at most {:.2}).\n",
        others.median, others.max, stolen.median, stolen.max
    )
}

/// Columns of words, the first to the left and the others to the right.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(heads: &[impl AsRef<str>]) -> Self {
        let heads = heads.iter().map(|head| head.as_ref().to_owned()).collect();
        Self { rows: vec![heads] }
    }

    fn row(&mut self, words: &[Option<String>]) {
        let word = |word: &Option<String>| word.clone().unwrap_or_else(|| "-".to_owned());
        self.rows.push(words.iter().map(word).collect());
    }

    fn text(&self) -> String {
        let count = self.rows[0].len();
        let width = |column: usize| {
            self.rows
                .iter()
                .map(|row| row[column].chars().count())
                .max()
        };
        let widths: Vec<usize> = (0..count)
            .map(|column| width(column).unwrap_or(0))
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = format!("  {:<width$}", row[0], width = widths[0]);
            for (word, width) in row.iter().zip(&widths).skip(1) {
                let _infallible = write!(line, "  {word:>width$}");
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

fn range(spread: Spread) -> String {
    format!("({:.2}-{:.2})", spread.min, spread.max)
}

/// Three digits, and k or M for what is large.
fn short(figure: f64) -> String {
    match figure {
        1e6.. => format!("{}M", digits(figure / 1e6)),
        1e4.. => format!("{}k", digits(figure / 1e3)),
        _ => digits(figure),
    }
}

/// Nanoseconds, in the unit that suits them.
fn time(nanos: f64) -> String {
    match nanos {
        1e6.. => format!("{} ms", digits(nanos / 1e6)),
        1e3.. => format!("{} us", digits(nanos / 1e3)),
        _ => format!("{nanos:.0} ns"),
    }
}

fn digits(figure: f64) -> String {
    match figure {
        100.0.. => format!("{figure:.0}"),
        10.0.. => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
    }
}
