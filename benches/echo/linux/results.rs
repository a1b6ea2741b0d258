//! The samples of a run, as they are stored, and the statistics of them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::SystemTime;

use procfs::{CpuInfo, Current};
use serde::{Deserialize, Serialize};

use super::Result;
use super::cases::Figures;

/// One run, as JSON in `benches/results/`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) date: String,
    pub(crate) commit: String,
    pub(crate) command: String,
    pub(crate) machine: String,
    pub(crate) versions: Vec<String>,
    pub(crate) workers: usize,
    pub(crate) rounds: u32,
    pub(crate) sample_seconds: f64,
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
        let model = CpuInfo::current().ok();
        let model = model.and_then(|info| Some(info.model_name(0)?.to_owned()));
        let cpus = thread::available_parallelism().map_or(0, usize::from);
        let arguments = std::env::args().skip(1);
        let arguments: Vec<_> = arguments.filter(|argument| argument != "--bench").collect();
        let lock = fs::read_to_string("Cargo.lock").unwrap_or_default();
        let version = |name: &str| {
            let (_, rest) = lock.split_once(&format!("name = \"{name}\"\nversion = \""))?;
            Some(format!("{name} {}", rest.split('"').next()?))
        };
        let tools = [output("uname", &["-sr"]), output("rustc", &["--version"])];
        let crates = ["echoserver", "mio", "tokio"]
            .iter()
            .filter_map(|name| version(name));
        Self {
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            commit: output("git", &["describe", "--always", "--dirty", "--exclude=*"]),
            command: format!("cargo bench -- {}", arguments.join(" "))
                .trim_end_matches(" -- ")
                .to_owned(),
            machine: format!("{}, {cpus} CPUs", model.unwrap_or_default()),
            versions: tools.into_iter().chain(crates).collect(),
            workers: 0,
            rounds: 0,
            sample_seconds: 0.0,
            samples: Vec::new(),
        }
    }

    /// Reads the newest file in `directory`.
    pub(crate) fn newest(directory: &Path) -> Result<Self> {
        let files = fs::read_dir(directory)?.flatten();
        let newest = files.map(|entry| entry.path()).max().ok_or("no results")?;
        Ok(serde_json::from_str(&fs::read_to_string(newest)?)?)
    }

    /// The median rate of the reference with 50 connections so far, or 0.
    pub(crate) fn capacity(&self) -> f64 {
        let rates = self.spread("50x64", "epoll", "messages_per_second");
        rates.map_or(0.0, |rates| rates.median)
    }

    /// As JSON, a sample on a line.
    pub(crate) fn to_json(&self) -> String {
        let json = serde_json::to_string(self).expect("it has string keys");
        json.replace("{\"case\"", "\n{\"case\"")
            .replace("}]}", "}\n]}\n")
    }

    /// The samples of a server in a case that have a figure.
    fn values(&self, case: &str, server: &str, figure: &str) -> impl Iterator<Item = (u32, f64)> {
        let samples = self.samples.iter();
        let samples = samples.filter(move |sample| sample.case == case && sample.server == server);
        samples.filter_map(move |sample| Some((sample.round, *sample.figures.get(figure)?)))
    }

    pub(crate) fn spread(&self, case: &str, server: &str, figure: &str) -> Option<Spread> {
        Spread::of(self.values(case, server, figure).map(|(_, value)| value))
    }

    /// The ratio to the reference in the same round.
    pub(crate) fn ratio(
        &self,
        case: &str,
        server: &str,
        reference: &str,
        figure: &str,
    ) -> Option<Spread> {
        let ratios = self
            .values(case, server, figure)
            .filter_map(|(round, value)| {
                let mut references = self.values(case, reference, figure);
                let (_, reference) = references.find(|(of, _)| *of == round)?;
                Some(value / reference)
            });
        Spread::of(ratios)
    }

    /// The first error of a server in a case, or the connections that it has left unanswered.
    pub(crate) fn problem(&self, case: &str, server: &str) -> Option<String> {
        let samples = self.samples.iter();
        let error = samples
            .filter(|sample| sample.case == case && sample.server == server)
            .find_map(|sample| sample.error.clone());
        let unanswered = self.spread(case, server, "unanswered_connections");
        let unanswered = unanswered.filter(|spread| spread.max > 0.0);
        error.or_else(|| Some(format!("up to {} connections unanswered", unanswered?.max)))
    }

    /// The servers, in the order of their samples.
    pub(crate) fn servers(&self) -> Vec<&str> {
        let mut servers = Vec::new();
        for sample in &self.samples {
            if !servers.contains(&sample.server.as_str()) {
                servers.push(&sample.server);
            }
        }
        servers
    }
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let stdout = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&stdout).trim().to_owned()
}
