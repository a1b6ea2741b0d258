//! What is measured: the cases, and how a sample of one is taken.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use super::Result;
use super::results::{Figures, Results, Sample};
use super::servers::{Running, Server};

/// Limit for anything outside of a measurement.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Longest sample of `connect`, in seconds. Closed connections hold their ports for a minute. Once half of the 28,000 ports
/// are held, the client's kernel looks for free ones for longer than a server takes.
const MAX_CONNECT_SECONDS: f64 = 0.3;

/// One load on a server: name, connections, and how a sample is taken.
#[derive(Clone, Copy)]
pub(crate) struct Case(pub(crate) &'static str, usize, fn(Trial) -> Result<Figures>);

pub(crate) const CASES: [Case; 17] = [
    Case("1x64", 1, |trial| trial.load(&[])),
    Case("50x64", 50, |trial| trial.load(&[])),
    Case("500x512", 500, |trial| trial.load(&["--size=512"])),
    Case("50x64k", 50, |trial| trial.load(&["--size=64KiB"])),
    Case("50x64x16", 50, |trial| trial.load(&["--in-flight=16"])),
    Case("flood", 50, |trial| trial.load(&["--flood"])),
    Case("connect", 50, |mut trial| trial.connect()),
    Case("beside-1", 1, |trial| trial.beside_floods(1)),
    Case("beside-20", 20, |trial| trial.beside_floods(1)),
    Case("beside-200", 200, |trial| trial.beside_floods(1)),
    Case("50-beside-100", 100, |trial| trial.beside_floods(50)),
    Case("500-beside-50", 50, |trial| trial.beside_floods(500)),
    Case("rate-50", 50, |trial| trial.load_at_rate(0.5)),
    Case("active-10000", 10_000, |trial| trial.load(&[])),
    Case("idle", 10_000, |trial| trial.idle()),
    Case("peak", 4_000, |trial| trial.peak()),
    Case("drain", 1_000, |mut trial| trial.drain()),
];

impl Case {
    /// Starts a server, loads it, and kills it.
    pub(crate) fn sample(&self, server: &Server, run: &Results) -> Result<Figures> {
        let Self(_, connections, measure) = *self;
        let connections = connections.min(run.max_connections);
        measure(Trial {
            server: server.start(run)?,
            connections,
            // Long enough that each connection gets several answers.
            seconds: run.sample_seconds.max(50e-6 * connections as f64),
            run,
        })
    }
}

/// A running server, and what determines its load.
struct Trial<'a> {
    server: Running,
    connections: usize,
    /// Length of the sample.
    seconds: f64,
    /// The run so far.
    run: &'a Results,
}

impl Trial<'_> {
    /// `echoserver load` with these options.
    fn load(&self, options: &[&str]) -> Result<Figures> {
        let (start, before) = (Instant::now(), self.server.cpu_time()?);
        let mut load = self.load_command(self.connections, self.seconds, options);
        let report = Report::new(&load.output()?)?;
        let after = self.server.cpu_time()?;
        let [server, rest] = [0, 1].map(|index| after[index] - before[index]);
        // The warm-up costs CPU time as well.
        let all_messages = (report.messages + report.warm_up["messages"]).max(1.0);
        let unanswered = self.connections as f64 - report.answered;
        let other_cpus = rest / start.elapsed().as_secs_f64();
        Ok(report.rtt_and([
            ("messages_per_second", report.messages / report.seconds),
            ("bytes_per_second", report.bytes_verified / report.seconds),
            ("cpu_ns_per_message", server * 1e9 / all_messages),
            ("unanswered_connections", unanswered.max(0.0)),
            ("other_cpus", other_cpus.max(0.0)),
        ]))
    }

    /// A connection for each message.
    fn connect(&mut self) -> Result<Figures> {
        self.seconds = self.seconds.min(MAX_CONNECT_SECONDS);
        self.load(&["--connect"])
    }

    /// Messages at a fixed rate: this share of the rate at which the reference answers 50 connections.
    fn load_at_rate(&self, share: f64) -> Result<Figures> {
        let capacity = self.run.spread("50x64", "epoll", "messages_per_second");
        let capacity = capacity.ok_or("it needs samples of 50x64 with epoll")?;
        self.load(&[&format!("--rate={}", share * capacity.median)])
    }

    /// The messages of `pings` connections with one in flight each, while the others flood.
    fn beside_floods(&self, pings: usize) -> Result<Figures> {
        let pings = pings.min(self.run.max_connections);
        let mut flood = self.load_command(self.connections, 0.0, &["--flood"]);
        let flood = flood.spawn()?;
        // The floods need time to fill their sockets.
        thread::sleep(Duration::from_secs_f64(self.seconds / 4.0));
        let load = self.load_command(pings, self.seconds, &[]);
        let mut ping = Command::new("env");
        if self.run.real_time_pings {
            ping.args(["chrt", "-f", "1"]);
        }
        ping.arg(load.get_program()).args(load.get_args());
        let ping = ping.output();
        // Ctrl-C. It fails only if the load has ended.
        let _ended = kill_process(Pid::from_child(&flood), Signal::INT);
        let flood = Report::new(&flood.wait_with_output()?)?;
        let ping = Report::new(&ping?)?;
        Ok(ping.beside(&flood, pings + self.connections))
    }

    /// The memory of each of many connections that have echoed once and are idle.
    fn idle(&self) -> Result<Figures> {
        // What the first connection allocates is not part of the difference.
        drop(self.connect_and_echo(1)?);
        let before = self.server.memory();
        let connections = self.connect_and_echo(self.connections)?;
        let growth = (self.server.memory() - before).max(0.0);
        let bytes = growth / connections.len() as f64;
        Ok(named([("bytes_per_connection", bytes)]))
    }

    /// The memory that clients which do not read occupy, and what is left of it when they are gone.
    fn peak(&self) -> Result<Figures> {
        /// What each client sends at most, so that the kernel does not run out of memory.
        const MAX_SENT: usize = 512 << 10;
        /// How long after the last client has left memory may still be returned.
        const SETTLE: Duration = Duration::from_secs(8);
        /// Less than this need not be waited for.
        const SETTLED_BYTES: f64 = 1e6;
        let before = self.server.memory();
        let grown = || (self.server.memory() - before).max(0.0);
        let connect = |_| -> io::Result<TcpStream> {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_recv_buffer_size(8 << 10)?;
            socket.connect(&self.server.address.into())?;
            socket.set_nonblocking(true)?;
            Ok(socket.into())
        };
        let mut clients: Vec<_> = (0..self.connections)
            .map(connect)
            .collect::<io::Result<_>>()?;
        let chunk = vec![b'x'; MAX_SENT / 8];
        for _ in 0..8 {
            for client in &mut clients {
                // A full socket or a server that has closed: either way, the client has done its part.
                let _sent = client.write(&chunk);
            }
        }
        let peak = grown();
        drop(clients);
        let start = Instant::now();
        let mut kept = f64::MAX;
        while start.elapsed() < SETTLE && kept > SETTLED_BYTES {
            thread::sleep(Duration::from_millis(100));
            kept = grown();
        }
        Ok(named([("peak_bytes", peak), ("kept_bytes", kept)]))
    }

    /// How long the server takes to end after SIGTERM, and how many clients do not get back all that they had sent.
    fn drain(&mut self) -> Result<Figures> {
        let mut message = [b'x'; 16 << 10];
        let mut clients = self.connect_and_echo(self.connections)?;
        for client in &mut clients {
            client.write_all(&message)?;
        }
        let start = Instant::now();
        self.server.signal(Signal::TERM);
        let answers = clients.iter_mut().map(|it| it.read_exact(&mut message));
        let cut = answers.filter(io::Result::is_err).count() as f64;
        drop(clients);
        self.server.process.wait()?;
        let nanos = start.elapsed().as_nanos() as f64;
        Ok(named([("drain_ns", nanos), ("cut_connections", cut)]))
    }

    /// Opens connections, each of which is served once.
    fn connect_and_echo(&self, count: usize) -> io::Result<Vec<TcpStream>> {
        let open = |index| {
            let mut stream = TcpStream::connect_timeout(&self.server.address, TIMEOUT)?;
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

    /// The command that sends a load. With 0 seconds, it runs until SIGINT.
    fn load_command(&self, connections: usize, seconds: f64, options: &[&str]) -> Command {
        let arguments = format!(
            "load --json {} --connections={connections} --threads={} --warm-up={} --duration={seconds}",
            self.server.address,
            self.run.workers,
            (self.seconds / 4.0).min(0.25),
        );
        let mut command = Command::new(env!("CARGO_BIN_EXE_echoserver"));
        command.args(arguments.split(' ')).args(options);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// Leaves out what was not measured, for example 0 bytes in 0 seconds: JSON has no number for it.
fn named<const N: usize>(figures: [(&str, f64); N]) -> Figures {
    let measured = figures.into_iter().filter(|(_, value)| value.is_finite());
    measured
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// What is used of the report of a load.
#[derive(Deserialize)]
struct Report {
    seconds: f64,
    messages: f64,
    bytes_verified: f64,
    answered: f64,
    warm_up: Figures,
    errors: Figures,
    rtt_ns: Value,
}

impl Report {
    /// Reads what a load has printed. Its first error is the sample's error.
    fn new(output: &Output) -> Result<Self> {
        if output.stdout.is_empty() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().into());
        }
        let report: Self = serde_json::from_slice(&output.stdout)?;
        match report.errors.keys().next() {
            Some(error) => Err(error.as_str().into()),
            None => Ok(report),
        }
    }

    fn rtt_and<const N: usize>(&self, others: [(&str, f64); N]) -> Figures {
        let mut figures = named(others);
        for quantile in ["p50", "p99", "p99.9"] {
            let nanos = self.rtt_ns[quantile].as_f64();
            figures.extend(nanos.map(|nanos| (format!("rtt_{quantile}_ns"), nanos)));
        }
        figures
    }

    /// The figures of a load beside one that floods.
    fn beside(&self, flood: &Self, connections: usize) -> Figures {
        let unanswered = connections as f64 - flood.answered - self.answered;
        let flood_rate = flood.bytes_verified / flood.seconds;
        self.rtt_and([
            ("messages_per_second", self.messages / self.seconds),
            ("flood_bytes_per_second", flood_rate),
            ("unanswered_connections", unanswered),
        ])
    }
}

/// Tests that a sample whose flood ended within its warm-up can be read back.
pub(crate) fn test_unmeasured_flood() -> Result<()> {
    let report = r#"{"seconds": 0, "messages": 0, "bytes_verified": 0, "answered": 200, "warm_up": {}, "errors": {},
        "rtt_ns": {}}"#;
    let report: Report = serde_json::from_str(report)?;
    let sample = Sample {
        case: "beside-200".to_owned(),
        server: "echoserver".to_owned(),
        round: 1,
        figures: report.beside(&report, 200),
        error: None,
    };
    let results = Results {
        samples: vec![sample],
        ..Results::default()
    };
    Results::from_json(&results.to_json()).map(drop)
}
