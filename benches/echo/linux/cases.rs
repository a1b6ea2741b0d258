//! What is measured: the cases, and how a sample of one is taken.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use procfs::process::Process;
use procfs::{CurrentSI, KernelStats};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use super::Result;
use super::servers::{Running, Server, cpu_time, ticks};

/// Limit for anything outside of a measurement.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What a server did under one load, by name. The names contain the unit.
pub(crate) type Figures = BTreeMap<String, f64>;

/// One load on a server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) connections: usize,
    load: Load,
}

#[derive(Clone, Copy, Debug)]
enum Load {
    /// `echoserver load` with these options.
    Options(&'static [&'static str]),
    /// A connection for each message.
    Connect,
    /// Messages at a fixed rate: this percentage of the rate at which the reference answers 50 connections.
    Rate(u32),
    /// One connection that waits for its answers, beside others that flood.
    Beside,
    /// Connections that have echoed once and are idle.
    Idle,
    /// Connections that send and never read, until they leave.
    Peak,
    /// SIGTERM while the connections wait for answers.
    Drain,
}

const CASES: [(&str, usize, Load); 19] = [
    ("1x64", 1, Load::Options(&[])),
    ("50x64", 50, Load::Options(&[])),
    ("500x512", 500, Load::Options(&["--size=512"])),
    ("50x64k", 50, Load::Options(&["--size=64KiB"])),
    ("50x64x16", 50, Load::Options(&["--in-flight=16"])),
    ("flood", 50, Load::Options(FLOOD)),
    ("connect", 50, Load::Connect),
    ("beside-1", 1, Load::Beside),
    ("beside-20", 20, Load::Beside),
    ("beside-200", 200, Load::Beside),
    ("rate-50", 50, Load::Rate(50)),
    ("rate-90", 50, Load::Rate(90)),
    ("active-10", 10, Load::Options(&[])),
    ("active-100", 100, Load::Options(&[])),
    ("active-1000", 1_000, Load::Options(&[])),
    ("active-10000", 10_000, Load::Options(&[])),
    ("idle", 10_000, Load::Idle),
    ("peak", 4_000, Load::Peak),
    ("drain", 1_000, Load::Drain),
];

const FLOOD: &[&str] = &["--flood"];

/// Longest sample of [`Load::Connect`]. Closed connections hold their ports for a minute. Once half of the 28,000 ports are
/// held, the client's kernel looks for free ones for longer than a server takes.
const MAX_CONNECT_SAMPLE: Duration = Duration::from_millis(300);

/// All cases, each with at most `max_connections`.
pub(crate) fn cases(max_connections: usize) -> Vec<Case> {
    let case = |(name, connections, load): (_, usize, _)| Case {
        name,
        connections: connections.min(max_connections),
        load,
    };
    CASES.map(case).into()
}

/// The length of a sample and of its warm-up, and the threads of the server and of the load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) sample: Duration,
    pub(crate) warm_up: Duration,
    pub(crate) workers: usize,
}

/// Starts a server, loads it, and kills it. `capacity` is the rate that [`Load::Rate`] refers to.
pub(crate) fn sample(
    case: Case,
    server: &Server,
    effort: Effort,
    capacity: f64,
) -> Result<Figures> {
    let mut running = server.start(effort.workers)?;
    let count = case.connections;
    match case.load {
        Load::Options(options) => measure_load(&running, count, effort, options),
        Load::Connect => {
            let sample = effort.sample.min(MAX_CONNECT_SAMPLE);
            let warm_up = effort.warm_up.min(MAX_CONNECT_SAMPLE / 4);
            let effort = Effort {
                sample,
                warm_up,
                ..effort
            };
            measure_load(&running, count, effort, &["--connect"])
        }
        Load::Rate(_) if capacity == 0.0 => Err("it needs samples of 50x64 with epoll".into()),
        Load::Rate(percent) => {
            let rate = format!("--rate={}", capacity * f64::from(percent) / 100.0);
            measure_load(&running, count, effort, &[&rate])
        }
        Load::Beside => measure_beside(&running, count, effort),
        Load::Idle => measure_idle(&running, count),
        Load::Peak => measure_peak(&running, count),
        Load::Drain => measure_drain(&mut running, count),
    }
}

fn figures<const N: usize>(figures: [(&str, f64); N]) -> Figures {
    figures.map(|(name, value)| (name.to_owned(), value)).into()
}

/// The memory of each of many idle connections.
fn measure_idle(running: &Running, count: usize) -> Result<Figures> {
    // What the first connection allocates is not part of the difference.
    drop(open_idle(running.address, 1)?);
    let before = running.memory();
    let connections = open_idle(running.address, count)?;
    let growth = running.memory().saturating_sub(before);
    drop(connections);
    let bytes = growth as f64 / count as f64;
    Ok(figures([("bytes_per_connection", bytes)]))
}

/// Opens connections that are served once.
fn open_idle(address: SocketAddr, count: usize) -> io::Result<Vec<TcpStream>> {
    let open = |index| {
        let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT / 10))?;
        stream.write_all(&[b'x'; 64])?;
        stream.read_exact(&mut [0; 64]).map_err(|error| {
            let message = format!("only {index} of {count} connections are served");
            io::Error::new(error.kind(), message)
        })?;
        Ok(stream)
    };
    (0..count).map(open).collect()
}

/// The memory that clients which do not read occupy, and what is left of it when they are gone.
fn measure_peak(running: &Running, count: usize) -> Result<Figures> {
    /// What each client sends at most, so that the kernel does not run out of memory.
    const MAX_SENT: usize = 512 << 10;
    /// How long after the last client has left memory may still be returned.
    const SETTLE: Duration = Duration::from_secs(8);
    /// Less than this need not be waited for.
    const SETTLED_BYTES: f64 = 1e6;
    let before = running.memory();
    let open = || -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_recv_buffer_size(8 << 10)?;
        socket.connect(&running.address.into())?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    };
    let mut clients: Vec<_> = (0..count).map(|_| open()).collect::<io::Result<_>>()?;
    let chunk = vec![b'x'; MAX_SENT / 8];
    for _ in 0..8 {
        for client in &mut clients {
            // A full socket or a server that has closed: either way, the client has done its part.
            let _sent = client.write(&chunk);
        }
    }
    let peak = running.memory();
    drop(clients);
    let start = Instant::now();
    let mut kept = f64::MAX;
    while start.elapsed() < SETTLE && kept > SETTLED_BYTES {
        thread::sleep(Duration::from_millis(100));
        kept = running.memory().saturating_sub(before) as f64;
    }
    let grown = peak.saturating_sub(before) as f64;
    Ok(figures([("peak_bytes", grown), ("kept_bytes", kept)]))
}

/// How long the server takes to end, and how many clients do not get back all that they had sent.
fn measure_drain(running: &mut Running, count: usize) -> Result<Figures> {
    let message = [b'x'; 16 << 10];
    let mut clients = open_idle(running.address, count)?;
    for client in &mut clients {
        client.write_all(&message)?;
    }
    let start = Instant::now();
    running.terminate();
    let is_cut = |client: &mut TcpStream| {
        let mut echo = Vec::new();
        client.read_to_end(&mut echo).is_err() || echo.len() < message.len()
    };
    let cut = clients.iter_mut().map(is_cut).filter(|is_cut| *is_cut);
    let cut = cut.count() as f64;
    drop(clients);
    running.wait();
    let nanos = start.elapsed().as_nanos() as f64;
    Ok(figures([("drain_ns", nanos), ("cut_connections", cut)]))
}

/// The round-trip times of one connection while others flood.
fn measure_beside(running: &Running, floods: usize, effort: Effort) -> Result<Figures> {
    let endless = Effort {
        sample: Duration::ZERO,
        ..effort
    };
    let flood = load(running, floods, endless, FLOOD).spawn()?;
    // The floods need time to fill their sockets.
    let effort = Effort {
        warm_up: effort.warm_up.max(effort.sample / 2),
        ..effort
    };
    let single = load(running, 1, effort, &[]).output();
    // Ctrl-C. It fails only if the load has ended.
    let _ended = kill_process(Pid::from_child(&flood), Signal::INT);
    let flood = report(&flood.wait_with_output()?)?;
    let single = report(&single?)?;
    let rate = number(&flood["bytes_verified"]) / number(&flood["seconds"]);
    let answered = number(&flood["answered"]) + number(&single["answered"]);
    let mut all = figures([
        ("flood_bytes_per_second", rate),
        ("unanswered_connections", (floods + 1) as f64 - answered),
    ]);
    all.append(&mut rtt(&single));
    Ok(all)
}

fn measure_load(
    running: &Running,
    connections: usize,
    effort: Effort,
    options: &[&str],
) -> Result<Figures> {
    let noise = Noise::start()?;
    let before = running.cpu_time();
    let report = report(&load(running, connections, effort, options).output()?)?;
    let used = running.cpu_time().saturating_sub(before);
    let messages = number(&report["messages"]);
    let seconds = number(&report["seconds"]);
    let bytes = number(&report["bytes_verified"]);
    // The warm-up costs CPU time as well.
    let all_messages = (messages + number(&report["warm_up"]["messages"])).max(1.0);
    let unanswered = match options {
        ["--connect"] => 0.0,
        _ => connections as f64 - number(&report["answered"]),
    };
    let mut all = figures([
        ("messages_per_second", messages / seconds),
        ("bytes_per_second", bytes / seconds),
        ("cpu_ns_per_message", used.as_nanos() as f64 / all_messages),
        ("unanswered_connections", unanswered.max(0.0)),
        ("other_cpus", noise.other_cpus(used)?),
    ]);
    all.append(&mut rtt(&report));
    Ok(all)
}

/// `echoserver load`. Without a length, it runs until SIGINT.
fn load(running: &Running, connections: usize, effort: Effort, options: &[&str]) -> Command {
    // Long enough that each connection gets several answers.
    let least = Duration::from_micros(50) * connections as u32;
    let sample = match effort.sample {
        Duration::ZERO => Duration::ZERO,
        sample => sample.max(least),
    };
    let warm_up = effort.warm_up.max(least / 2);
    let mut command = Command::new(env!("CARGO_BIN_EXE_echoserver"));
    command.args(["load", "--json", &running.address.to_string()]);
    command.arg(format!("--connections={connections}"));
    command.arg(format!("--threads={}", effort.workers));
    command.arg(format!("--duration={}", sample.as_secs_f64()));
    command.arg(format!("--warm-up={}", warm_up.as_secs_f64()));
    command.args(options).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The report of a load. Its first error is the sample's error.
fn report(output: &Output) -> Result<Value> {
    if output.stdout.is_empty() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().into());
    }
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let errors = report["errors"].as_object();
    match errors.and_then(|errors| errors.keys().next()) {
        Some(error) => Err(error.as_str().into()),
        None => Ok(report),
    }
}

fn rtt(report: &Value) -> Figures {
    let quantile = |name: &str| Some((format!("rtt_{name}_ns"), report["rtt_ns"][name].as_f64()?));
    ["p50", "p99", "p99.9"]
        .into_iter()
        .filter_map(quantile)
        .collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// How busy the machine is with other things than a server and its load.
struct Noise {
    start: Instant,
    machine: Duration,
    own: Duration,
}

impl Noise {
    fn start() -> Result<Self> {
        Ok(Self {
            start: Instant::now(),
            machine: machine_time()?,
            own: own_time()?,
        })
    }

    /// The number of CPUs that other processes have used, apart from a server that has used `server`.
    fn other_cpus(&self, server: Duration) -> Result<f64> {
        let ours = own_time()?.saturating_sub(self.own) + server;
        let others = machine_time()?.saturating_sub(self.machine + ours);
        Ok(others.as_secs_f64() / self.start.elapsed().as_secs_f64())
    }
}

/// CPU time of this process and of the children that have ended.
fn own_time() -> Result<Duration> {
    let stat = Process::myself()?.stat()?;
    Ok(cpu_time(&stat) + ticks((stat.cutime + stat.cstime).unsigned_abs()))
}

/// Time for which the CPUs were busy, or taken by the hypervisor.
fn machine_time() -> Result<Duration> {
    let total = KernelStats::current()?.total;
    let rare: u64 = [total.irq, total.softirq, total.steal]
        .iter()
        .flatten()
        .sum();
    Ok(ticks(total.user + total.nice + total.system + rare))
}
