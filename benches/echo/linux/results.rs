//! The samples of a run, as they are stored, and the statistics of them.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::SystemTime;
use std::{env, fs};

use rustix::thread::{CpuSet, sched_getaffinity};
use serde::{Deserialize, Serialize};

use super::Result;

/// What a server did under one load, by name. The names contain the unit.
pub(crate) type Figures = BTreeMap<String, f64>;

/// One run, as JSON in `benches/results/`. What an older file lacks is empty.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Results {
    pub(crate) date: String,
    pub(crate) commit: String,
    pub(crate) command: String,
    pub(crate) machine: String,
    pub(crate) versions: Vec<String>,
    pub(crate) workers: usize,
    pub(crate) rounds: u32,
    pub(crate) sample_seconds: f64,
    /// Limit for the connections of each case.
    pub(crate) max_connections: usize,
    /// The CPUs of the server, and those of the load. With a single CPU, both are empty, and nothing is pinned.
    pub(crate) server_cpus: Vec<usize>,
    pub(crate) load_cpus: Vec<usize>,
    /// Whether a ping beside floods has real-time priority, so that it does not wait for the load of the floods.
    pub(crate) real_time_pings: bool,
    pub(crate) samples: Vec<Sample>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) case: String,
    pub(crate) server: String,
    pub(crate) round: u32,
    /// Empty if there is an error.
    #[serde(flatten)]
    pub(crate) figures: Figures,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// The spread of one figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    /// Between these is the middle half of the values.
    pub(crate) quartiles: (f64, f64),
    pub(crate) max: f64,
}

impl Spread {
    pub(crate) fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        // Between two values, in proportion to their distance.
        let quantile = |share: f64| {
            let place = share * (values.len() - 1) as f64;
            let (below, above) = (place.floor() as usize, place.ceil() as usize);
            values[below] + (values[above] - values[below]) * place.fract()
        };
        Some(Self {
            median: quantile(0.5),
            quartiles: (quantile(0.25), quantile(0.75)),
            max,
        })
    }
}

impl Results {
    /// Describes this machine and this run, without samples.
    pub(crate) fn describe() -> Self {
        let model = output("sed -n '/^model name/ { s/.*: //p; q }' /proc/cpuinfo");
        let cpus = sched_getaffinity(None).unwrap_or_default();
        let cpus: Vec<_> = (0..CpuSet::MAX_CPU).filter(|it| cpus.is_set(*it)).collect();
        let (server_cpus, load_cpus) = match cpus.len() {
            ..2 => Default::default(),
            count => cpus.split_at(count / 2),
        };
        let arguments: Vec<_> = env::args().skip(1).filter(|it| it != "--bench").collect();
        let command = format!("cargo bench -- {}", arguments.join(" "));
        let versions = [
            "uname -sr",
            "rustc --version",
            concat!("'", env!("CARGO_BIN_EXE_echoserver"), "' --version"),
            "cargo tree --depth 0 --package mio",
            "cargo tree --depth 0 --package tokio",
        ];
        Self {
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            commit: output("git describe --always --dirty --exclude='*'"),
            command: command.trim_end_matches(" -- ").to_owned(),
            machine: format!("{model}, {} CPUs", cpus.len()),
            versions: versions.map(output).into(),
            server_cpus: server_cpus.to_vec(),
            load_cpus: load_cpus.to_vec(),
            real_time_pings: output("chrt -f 1 echo yes") == "yes",
            ..Self::default()
        }
    }

    /// Reads the newest file in `directory`.
    pub(crate) fn newest(directory: &str) -> Result<Self> {
        let files = fs::read_dir(directory)?.flatten();
        let newest = files.map(|entry| entry.path()).max().ok_or("no results")?;
        Self::from_json(&fs::read_to_string(newest)?)
    }

    pub(crate) fn from_json(json: &str) -> Result<Self> {
        Ok(serde_json::from_str(json)?)
    }

    /// As JSON, a sample on a line.
    pub(crate) fn to_json(&self) -> String {
        let json = serde_json::to_string(self).expect("it has string keys");
        json.replace("{\"case\"", "\n{\"case\"")
            .replace("}]}", "}\n]}\n")
    }

    fn samples(&self, case: &str, server: &str) -> impl Iterator<Item = &Sample> {
        let samples = self.samples.iter();
        samples.filter(move |sample| sample.case == case && sample.server == server)
    }

    /// The spread of a figure. `FIGURE / SERVER` is its ratio to that of another server in the same round.
    pub(crate) fn spread(&self, case: &str, server: &str, figure: &str) -> Option<Spread> {
        let (figure, reference) = figure.split_once(" / ").unwrap_or((figure, ""));
        let value = |sample: &Sample| {
            let value = *sample.figures.get(figure)?;
            if reference.is_empty() {
                return Some(value);
            }
            let mut references = self.samples(case, reference);
            let reference = references.find(|other| other.round == sample.round)?;
            Some(value / reference.figures.get(figure)?)
        };
        Spread::of(self.samples(case, server).filter_map(value))
    }

    /// The first error of a server in a case, or the connections that it has left unanswered.
    pub(crate) fn problem(&self, case: &str, server: &str) -> Option<String> {
        let error = self
            .samples(case, server)
            .find_map(|sample| sample.error.clone());
        let unanswered = self.spread(case, server, "unanswered_connections");
        let unanswered = unanswered.filter(|spread| spread.max > 0.0);
        error.or_else(|| Some(format!("up to {} connections unanswered", unanswered?.max)))
    }

    /// Where the processes ran, and with which priority.
    pub(crate) fn placement(&self) -> String {
        let (server, load) = (&self.server_cpus, &self.load_cpus);
        let cpus = match server[..] {
            [] => "server and load on the same CPUs".to_owned(),
            _ => format!("server on CPUs {server:?}, load on CPUs {load:?}"),
        };
        let priority = if self.real_time_pings {
            "real-time"
        } else {
            "usual"
        };
        format!("{cpus}, pings beside floods with {priority} priority")
    }

    /// The servers, in the order of the first round.
    pub(crate) fn servers(&self) -> Vec<&str> {
        let samples = self.samples.iter();
        let first = samples.take_while(|it| it.round == 1 && it.case == self.samples[0].case);
        first.map(|sample| sample.server.as_str()).collect()
    }
}

/// What a shell command prints, or nothing if it fails.
fn output(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output();
    let stdout = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&stdout).trim().to_owned()
}
