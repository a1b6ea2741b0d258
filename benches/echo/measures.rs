//! What is measured: the cases of each measure, and how one sample of a case is taken.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::load::{self, Client, Echoes, PATIENCE, Pace, Tally, Visits};
use crate::process::{CpuTime, Machine, Running, Server, TICK_NS, cpu_time};

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
    /// What is counted per second, and how many operations of the load are one of them.
    pub(crate) fn unit(&self) -> (&'static str, f64) {
        match self {
            Self::Messages { .. } => ("messages/s", 1.0),
            Self::Flood { .. } => ("MB/s", 1e6),
            Self::Visits { .. } => ("connections/s", 1.0),
            Self::Resting { .. } => ("B/connection", 1.0),
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
    drop(load::rest(running.address, 1)?);
    let before = running.memory().ok_or_else(unknown)?;
    let resting = load::rest(running.address, connections)?;
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

fn drive(case: &Case, running: &Running, effort: Effort) -> io::Result<Sample> {
    let resting = match case.load {
        Load::Messages { resting, .. } => load::rest(running.address, resting)?,
        _ => Vec::new(),
    };
    let mut clients = clients(case, running, effort.threads)?;
    let effort = effort.at_least(case.load.connections());
    drive_until_answered(&mut clients, effort.warm_up)?;

    let (own, machine, start) = (own_time(), Machine::now(), Instant::now());
    let before = running.cpu_time();
    let tally = drive_until_answered(&mut clients, effort.sample)?;
    let after = running.cpu_time();
    let used = before.zip(after).map(|(before, after)| after.since(before));
    let noise = noise(own, machine, used.unwrap_or_default(), start.elapsed());
    drop(resting);
    if tally.operations == 0 {
        return Err(io::Error::other("nothing came back"));
    }
    Ok(figures(case, &tally, used, noise))
}

/// Runs for so long; on a machine that is busy with something else the first answer may take longer.
fn drive_until_answered(clients: &mut [Box<dyn Client>], duration: Duration) -> io::Result<Tally> {
    let mut elapsed = Duration::ZERO;
    loop {
        let mut tally = load::run(clients, duration)?;
        elapsed += tally.elapsed;
        tally.elapsed = elapsed;
        if tally.operations > 0 || elapsed > PATIENCE {
            return Ok(tally);
        }
    }
}

fn figures(case: &Case, tally: &Tally, used: Option<Duration>, noise: Noise) -> Sample {
    let (_, per) = case.load.unit();
    let count = tally.operations as f64 / per;
    let quantile = |quantile| tally.latency.value_at_quantile(quantile);
    let any = !tally.latency.is_empty();
    Sample {
        value: count / tally.elapsed.as_secs_f64(),
        cpu_ns: used.map(|used| used.as_nanos() as f64 / count),
        latency_ns: any.then(|| [0.5, 0.99, 0.999].map(quantile)),
        starved: case.load.connections().saturating_sub(tally.served),
        noise,
    }
}

/// The connections of a load, shared out among threads.
fn clients(case: &Case, running: &Running, threads: usize) -> io::Result<Vec<Box<dyn Client>>> {
    let address = running.address;
    let total = case.load.connections();
    let threads = threads.clamp(1, total);
    (0..threads)
        .map(|thread| {
            let count = total / threads + usize::from(thread < total % threads);
            let client: Box<dyn Client> = match case.load {
                Load::Messages {
                    bytes, in_flight, ..
                } => {
                    let pace = Pace::Messages { bytes, in_flight };
                    Box::new(Echoes::connect(address, count, pace)?)
                }
                Load::Flood { .. } => Box::new(Echoes::connect(address, count, Pace::Flood)?),
                Load::Visits { .. } => Box::new(Visits::new(address, count)?),
                Load::Resting { .. } => unreachable!("those who rest are no load"),
            };
            Ok(client)
        })
        .collect()
}

fn own_time() -> Option<CpuTime> {
    cpu_time(Path::new("/proc/self"))
}

/// How busy the machine was beyond the server and its clients.
fn noise(own: Option<CpuTime>, machine: Machine, server: Duration, elapsed: Duration) -> Noise {
    let own = own
        .zip(own_time())
        .map(|(before, after)| after.since(before));
    let now = Machine::now();
    let ours = (own.unwrap_or_default() + server).as_secs_f64();
    let seconds = |ticks: u64| (ticks * TICK_NS) as f64 / 1e9;
    let elapsed = elapsed.as_secs_f64();
    Noise {
        others: ((seconds(now.busy - machine.busy) - ours) / elapsed).max(0.0),
        stolen: seconds(now.stolen - machine.stolen) / elapsed,
    }
}
