//! What is measured: the cases of each measure, and how one sample of a case is taken.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{CpuTime, Machine, Running, Server, TICK_NS, children_time, cpu_time};

/// How long anything outside of a measurement may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A question, and the cases that answer it.
pub(crate) struct Measure {
    pub(crate) name: &'static str,
    pub(crate) title: String,
    pub(crate) shape: Shape,
    pub(crate) cases: Vec<Case>,
}

/// How a measure is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One case: its figures in full.
    Rate,
    /// Several cases, to be compared with each other.
    Curve,
    /// One case, of bytes and not of time.
    Memory,
}

/// One load on one server.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// What sets it apart from the measure's other cases.
    pub(crate) label: String,
    pub(crate) workers: usize,
    pub(crate) load: Load,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Load {
    /// Connections that wait for their answers, beside others that rest.
    Messages {
        connections: usize,
        bytes: usize,
        in_flight: usize,
        resting: usize,
    },
    Flood {
        connections: usize,
    },
    Visits {
        at_once: usize,
    },
    Resting {
        connections: usize,
    },
}

/// What the measures depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    pub(crate) workers: usize,
    /// Connections that the descriptor limit and the hurry allow.
    pub(crate) max_connections: usize,
}

/// Every measure, by name and what it is.
pub(crate) const NAMES: [(&str, &str); 11] = [
    ("ping-pong", "one connection, 64 B"),
    ("50x64", "50 connections, 64 B"),
    ("500x512", "500 connections, 512 B"),
    ("50x64k", "50 connections, 64 KiB"),
    (
        "50x64x16",
        "50 connections, 64 B, 16 messages in flight on each",
    ),
    (
        "flood",
        "50 connections that write without waiting and read what comes",
    ),
    (
        "visits",
        "connections per second: connect, one echo of 64 B, close; 50 at once",
    ),
    ("memory", "memory per idle connection that has echoed once"),
    ("beside-idle", "50 connections, 64 B, beside idle ones"),
    (
        "by-workers",
        "50 connections, 64 B, by the number of workers",
    ),
    (
        "by-connections",
        "64 B, by the number of connections, all of them active",
    ),
];

pub(crate) fn measure(name: &str, scale: Scale) -> Option<Measure> {
    let (name, what) = *NAMES.iter().find(|(known, _)| *known == name)?;
    let messages = |connections, bytes, in_flight| Load::Messages {
        connections,
        bytes,
        in_flight,
        resting: 0,
    };
    let case = |label: String, load| Case {
        label,
        workers: scale.workers,
        load,
    };
    let many = scale.max_connections.min(10_000);
    let (shape, cases) = match name {
        "ping-pong" => (Shape::Rate, vec![case(String::new(), messages(1, 64, 1))]),
        "50x64" => (Shape::Rate, vec![case(String::new(), messages(50, 64, 1))]),
        "500x512" => (
            Shape::Rate,
            vec![case(String::new(), messages(500, 512, 1))],
        ),
        "50x64k" => (
            Shape::Rate,
            vec![case(String::new(), messages(50, 65_536, 1))],
        ),
        "50x64x16" => (Shape::Rate, vec![case(String::new(), messages(50, 64, 16))]),
        "flood" => (
            Shape::Rate,
            vec![case(String::new(), Load::Flood { connections: 50 })],
        ),
        "visits" => (
            Shape::Rate,
            vec![case(String::new(), Load::Visits { at_once: 50 })],
        ),
        "memory" => {
            let resting = Load::Resting { connections: many };
            (
                Shape::Memory,
                vec![case(format!("{many} connections"), resting)],
            )
        }
        "beside-idle" => {
            let beside = |resting| Load::Messages {
                connections: 50,
                bytes: 64,
                in_flight: 1,
                resting,
            };
            let cases = [0, many].map(|idle| case(format!("{idle} idle"), beside(idle)));
            (Shape::Curve, cases.into())
        }
        "by-workers" => {
            let by = |workers| Case {
                label: format!("{workers}"),
                workers,
                load: messages(50, 64, 1),
            };
            (Shape::Curve, [1, 2, 4].map(by).into())
        }
        _ => {
            let counts = [1, 10, 100, 1_000, 10_000].map(|count: usize| count.min(many));
            let by = |count: usize| case(count.to_string(), messages(count, 64, 1));
            let mut counts = counts.to_vec();
            counts.dedup();
            (Shape::Curve, counts.into_iter().map(by).collect())
        }
    };
    Some(Measure {
        name,
        title: what.to_owned(),
        shape,
        cases,
    })
}

impl Load {
    /// What is counted per second.
    pub(crate) fn unit(&self) -> &'static str {
        match self {
            Self::Messages { .. } => "messages/s",
            Self::Flood { .. } => "MB/s",
            Self::Visits { .. } => "connections/s",
            Self::Resting { .. } => "B/connection",
        }
    }

    /// One of what is counted.
    pub(crate) fn one(&self) -> &'static str {
        match self {
            Self::Messages { .. } => "message",
            Self::Flood { .. } => "MB",
            Self::Visits { .. } => "visit",
            Self::Resting { .. } => "connection",
        }
    }

    pub(crate) fn connections(&self) -> usize {
        match *self {
            Self::Messages { connections, .. }
            | Self::Flood { connections }
            | Self::Resting { connections } => connections,
            Self::Visits { at_once } => at_once,
        }
    }
}

/// How long, and with how many threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) sample: Duration,
    pub(crate) warm_up: Duration,
    pub(crate) threads: usize,
}

impl Effort {
    /// Long enough that each of so many connections gets its answers, several times.
    fn at_least(self, connections: usize) -> Self {
        let each = Duration::from_micros(50) * connections as u32;
        Self {
            sample: self.sample.max(each),
            warm_up: self.warm_up.max(each / 2),
            ..self
        }
    }
}

/// One sample: what one server did under one load for a while.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// In the load's unit: per second, or bytes of memory.
    pub(crate) value: f64,
    /// Of the server, per one of what is counted, in nanoseconds.
    pub(crate) cpu_ns: Option<f64>,
    /// p50, p99 and p99.9, in nanoseconds.
    pub(crate) latency_ns: Option<[u64; 3]>,
    /// Connections that got no answer at all.
    pub(crate) starved: usize,
    pub(crate) noise: Noise,
}

/// CPUs that others used while a sample was taken.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Noise {
    pub(crate) others: f64,
    pub(crate) stolen: f64,
}

/// Starts a server, loads it, and kills it.
///
/// # Errors
///
/// One line that says why there is no such sample.
pub(crate) fn sample(case: &Case, server: &Server, effort: Effort) -> Result<Sample, String> {
    let running = server.start(case.workers)?;
    let taken = match case.load {
        Load::Resting { connections } => rest(&running, connections),
        _ => drive(case, &running, effort),
    };
    taken.map_err(|error| error.to_string())
}

fn rest(running: &Running, connections: usize) -> io::Result<Sample> {
    let unknown = || io::Error::other("a remote server's memory is not seen");
    // What the first connection costs, the server pays once.
    drop(open_idle(running.address, 1)?);
    let before = running.memory().ok_or_else(unknown)?;
    let resting = open_idle(running.address, connections)?;
    let after = running.memory().ok_or_else(unknown)?;
    drop(resting);
    Ok(Sample {
        value: after.saturating_sub(before) as f64 / connections as f64,
        cpu_ns: None,
        latency_ns: None,
        starved: 0,
        noise: Noise::default(),
    })
}

/// Opens connections that are served once and then idle.
fn open_idle(address: SocketAddr, count: usize) -> io::Result<Vec<TcpStream>> {
    let open = |index| {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE / 5))?;
        stream.write_all(&[b'x'; 64])?;
        stream.read_exact(&mut [0; 64]).map_err(|error| {
            let message = format!("only {index} of {count} connections are served");
            io::Error::new(error.kind(), message)
        })?;
        Ok(stream)
    };
    (0..count).map(open).collect()
}

fn drive(case: &Case, running: &Running, effort: Effort) -> io::Result<Sample> {
    let idle = match case.load {
        Load::Messages { resting, .. } => open_idle(running.address, resting)?,
        _ => Vec::new(),
    };
    let effort = effort.at_least(case.load.connections());
    let start = Instant::now();
    loop {
        let (own, machine, start_of_run) = (own_time(), Machine::now(), Instant::now());
        let before = running.cpu_time();
        let report = load(case.load, running.address, effort)?;
        let after = running.cpu_time();
        let used = before.zip(after).map(|(before, after)| after.since(before));
        // On a machine that is busy with something else the first answer may take longer.
        if report["messages"] == 0 && start.elapsed() < PATIENCE {
            continue;
        }
        if report["messages"] == 0 {
            return Err(io::Error::other("nothing came back"));
        }
        let noise = noise(
            own,
            machine,
            used.unwrap_or_default(),
            start_of_run.elapsed(),
        );
        drop(idle);
        return Ok(figures(case, &report, used, noise));
    }
}

/// Runs `echoserver load`, and returns its report.
fn load(load: Load, address: SocketAddr, effort: Effort) -> io::Result<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_echoserver"));
    command.args(["load", "--json", &address.to_string()]);
    command.arg(format!("--connections={}", load.connections()));
    command.arg(format!("--duration={}", effort.sample.as_secs_f64()));
    command.arg(format!("--warm-up={}", effort.warm_up.as_secs_f64()));
    command.arg(format!("--threads={}", effort.threads));
    match load {
        Load::Messages {
            bytes, in_flight, ..
        } => {
            command.arg(format!("--size={bytes}"));
            command.arg(format!("--in-flight={in_flight}"));
        }
        Load::Flood { .. } => drop(command.arg("--flood")),
        Load::Visits { .. } => drop(command.arg("--connect")),
        Load::Resting { .. } => unreachable!("idle connections are no load"),
    }
    let output = command.stdin(Stdio::null()).output()?;
    if output.stdout.is_empty() {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(error.trim().to_owned()));
    }
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let errors = report["errors"].as_object().into_iter().flatten();
    match errors.map(|(error, _)| error).next() {
        Some(error) => Err(io::Error::other(error.clone())),
        None => Ok(report),
    }
}

fn figures(case: &Case, report: &Value, used: Option<Duration>, noise: Noise) -> Sample {
    let (counted, per) = match case.load {
        Load::Flood { .. } => ("bytes_verified", 1e6),
        _ => ("messages", 1.0),
    };
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let count = number(&report[counted]) / per;
    // The server's CPU time includes the warm-up.
    let all = count + number(&report["warm_up"][counted]) / per;
    let latency = |name: &str| report["rtt_ns"][name].as_u64();
    let latency_ns = [latency("p50"), latency("p99"), latency("p99.9")];
    let answered = report["answered"].as_u64().unwrap_or(0) as usize;
    Sample {
        value: count / number(&report["seconds"]),
        cpu_ns: used.map(|used| used.as_nanos() as f64 / all),
        latency_ns: latency_ns[0].map(|_| latency_ns.map(Option::unwrap_or_default)),
        starved: match case.load {
            // Each is followed by the next.
            Load::Visits { .. } => 0,
            _ => case.load.connections().saturating_sub(answered),
        },
        noise,
    }
}

/// CPU time of this process, and of the loads that have ended.
fn own_time() -> Duration {
    let own = cpu_time(Path::new("/proc/self")).map(CpuTime::total);
    own.unwrap_or_default() + children_time().unwrap_or_default()
}

/// How busy the machine was beyond the server and its clients.
fn noise(own: Duration, machine: Machine, server: Duration, elapsed: Duration) -> Noise {
    let now = Machine::now();
    let ours = (own_time().saturating_sub(own) + server).as_secs_f64();
    let seconds = |ticks: u64| (ticks * TICK_NS) as f64 / 1e9;
    let elapsed = elapsed.as_secs_f64();
    Noise {
        others: ((seconds(now.busy - machine.busy) - ours) / elapsed).max(0.0),
        stolen: seconds(now.stolen - machine.stolen) / elapsed,
    }
}
