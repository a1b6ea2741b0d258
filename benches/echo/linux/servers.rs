//! The servers as processes: started, asked for CPU time and memory, and killed when dropped.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use procfs::process::{Stat, all_processes};
use rustix::process::{Pid, Signal, kill_process_group};

use super::Result;
use super::peers::PEERS;

/// How long a server may take to listen.
const MAX_START: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) name: String,
    pub(crate) description: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// This project's program, with these options.
    Echoserver(&'static [&'static str]),
    /// This executable, with `--serve`.
    Peer,
    /// A shell command of the user, with `{port}` in it.
    Command(String),
}

impl Server {
    /// All servers, the reference first; `commands` are the user's own.
    pub(crate) fn all(commands: &[(String, String)]) -> Vec<Self> {
        let server = |name: &str, description: &str, kind| Self {
            name: name.to_owned(),
            description: description.to_owned(),
            kind,
        };
        let mut servers: Vec<_> = PEERS
            .map(|(name, description)| server(name, description, Kind::Peer))
            .into();
        let own = [
            server("echoserver", "this server", Kind::Echoserver(&[])),
            server(
                "busy-poll",
                "this server with --busy-poll 50us",
                Kind::Echoserver(&["--busy-poll=50us"]),
            ),
        ];
        servers.splice(1..1, own);
        let commands = commands.iter();
        servers
            .extend(commands.map(|(name, line)| server(name, line, Kind::Command(line.clone()))));
        servers
    }

    /// Starts the server, and waits until it listens.
    pub(crate) fn start(&self, workers: usize) -> Result<Running> {
        match &self.kind {
            Kind::Echoserver(options) => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_echoserver"));
                command.env_clear().arg("--listen=127.0.0.1:0");
                command.arg(format!("--workers={workers}")).args(*options);
                start_announced(command)
            }
            Kind::Peer => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["--serve", &self.name, "--workers", &workers.to_string()]);
                start_announced(command)
            }
            Kind::Command(line) => start_on_port(line, workers),
        }
    }
}

/// A server that listens. Its processes are one process group.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    process: Process,
}

#[derive(Debug)]
struct Process(Child);

impl Process {
    fn spawn(mut command: Command) -> Result<Self> {
        command.process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        Ok(Self(command.spawn()?))
    }

    fn signal(&self, signal: Signal) {
        // It fails only if the group has ended.
        let _ended = kill_process_group(Pid::from_child(&self.0), signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        let _status = self.0.wait();
    }
}

/// Starts a server that prints its address on stderr.
fn start_announced(mut command: Command) -> Result<Running> {
    command.stderr(Stdio::piped());
    let mut process = Process::spawn(command)?;
    let stderr = process.0.stderr.take().expect("it is piped");
    let (sender, lines) = mpsc::channel();
    // Reads until the server ends, so that the server never waits for its log.
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let _receiver_is_gone = sender.send(line);
        }
    });
    let deadline = Instant::now() + MAX_START;
    let mut last = "without a message".to_owned();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                let address = line.split_once("listening on ").map(|(_, address)| address);
                if let Some(Ok(address)) = address.map(|address| address.trim().parse()) {
                    return Ok(Running { address, process });
                }
                last = line;
            }
            Err(RecvTimeoutError::Timeout) => return Err(format!("does not listen: {last}").into()),
            Err(RecvTimeoutError::Disconnected) => return Err(format!("has ended: {last}").into()),
        }
    }
}

/// Starts a server on a free port, and waits until it accepts a connection.
fn start_on_port(line: &str, workers: usize) -> Result<Running> {
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let line = line
        .replace("{port}", &address.port().to_string())
        .replace("{workers}", &workers.to_string());
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {line}")]);
    command.stderr(Stdio::null());
    let mut process = Process::spawn(command)?;
    let deadline = Instant::now() + MAX_START;
    while TcpStream::connect(address).is_err() {
        if let Ok(Some(status)) = process.0.try_wait() {
            return Err(format!("has ended: {status}").into());
        }
        if Instant::now() >= deadline {
            return Err(format!("does not listen on {address}").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(Running { address, process })
}

impl Running {
    fn stats(&self) -> Vec<Stat> {
        let group = self.process.0.id() as i32;
        let processes = all_processes().into_iter().flatten().flatten();
        let stats = processes.filter_map(|process| process.stat().ok());
        stats.filter(|stat| stat.pgrp == group).collect()
    }

    /// CPU time used so far. The resolution is a tick, 10 ms.
    pub(crate) fn cpu_time(&self) -> Duration {
        self.stats().iter().map(cpu_time).sum()
    }

    /// Resident memory, in bytes.
    pub(crate) fn memory(&self) -> u64 {
        let pages: u64 = self.stats().iter().map(|stat| stat.rss).sum();
        pages * procfs::page_size()
    }

    pub(crate) fn terminate(&self) {
        self.process.signal(Signal::TERM);
    }

    /// Waits until the server has ended.
    pub(crate) fn wait(&mut self) {
        let _status = self.process.0.wait();
    }
}

/// CPU time of a process, threads that have ended included.
pub(crate) fn cpu_time(stat: &Stat) -> Duration {
    ticks(stat.utime + stat.stime)
}

pub(crate) fn ticks(count: u64) -> Duration {
    Duration::from_secs_f64(count as f64 / procfs::ticks_per_second() as f64)
}
