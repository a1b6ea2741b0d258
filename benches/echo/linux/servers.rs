//! The servers as processes: started, asked for CPU time and memory, and killed when dropped.

use std::env;
use std::io::{self, Seek};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use procfs::process::{Process, Stat, all_processes};
use procfs::{CurrentSI, KernelStats};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::Result;
use super::peers::SERVERS;
use super::results::Results;

/// How long a server may take to listen.
const MAX_START: Duration = Duration::from_secs(10);

/// A server that can be started.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) name: String,
    pub(crate) description: String,
    /// A shell command with `{port}` and `{workers}`.
    command: String,
}

impl Server {
    /// The servers that this executable can become, the reference first.
    pub(crate) fn built_in() -> Vec<Self> {
        let server = |(name, description): (&str, &str)| Self {
            name: name.to_owned(),
            description: description.to_owned(),
            // `$1` is this executable.
            command: format!("\"$1\" --serve={name} --port={{port}} --workers={{workers}}"),
        };
        SERVERS.map(server).into()
    }

    /// Parses the option `--peer`.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        match text.split_once('=') {
            Some((name, command)) if !name.is_empty() && command.contains("{port}") => Ok(Self {
                name: name.to_owned(),
                description: command.to_owned(),
                command: command.to_owned(),
            }),
            _ => Err("expected NAME='COMMAND', with {port} in the command"),
        }
    }

    /// Starts the server on a free port and on its CPUs, and waits until it accepts a connection.
    pub(crate) fn start(&self, run: &Results) -> Result<Running> {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let command = self.command.replace("{workers}", &run.workers.to_string());
        let command = command.replace("{port}", &address.port().to_string());
        // A file, unlike a pipe, need not be drained while the server runs.
        let mut stderr = tempfile::tempfile()?;
        pin(&run.server_cpus)?;
        let process = Command::new("sh")
            .args(["-c", &format!("exec {command}"), "sh"])
            .arg(env::current_exe()?)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(stderr.try_clone()?)
            .spawn()?;
        let mut running = Running { address, process };
        pin(&run.load_cpus)?;
        let deadline = Instant::now() + MAX_START;
        while TcpStream::connect(address).is_err() {
            thread::sleep(Duration::from_millis(1));
            let status = running.process.try_wait()?;
            if status.is_none() && Instant::now() < deadline {
                continue;
            }
            let problem = match status {
                Some(status) => format!("has ended, {status}"),
                None => format!("does not listen on {address}"),
            };
            stderr.rewind()?;
            let log = io::read_to_string(stderr).unwrap_or_default();
            let message = log.lines().last().unwrap_or("without a message");
            return Err(format!("{problem}: {message}").into());
        }
        Ok(running)
    }
}

/// Restricts this thread, and the processes that it starts from now on, to these CPUs. Without any, it changes nothing.
fn pin(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu);
    }
    match cpus {
        [] => Ok(()),
        _ => Ok(sched_setaffinity(None, &set)?),
    }
}

/// A server that listens. Its processes are one process group.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) process: Child,
}

impl Running {
    fn stats(&self) -> impl Iterator<Item = Stat> {
        let group = self.process.id().cast_signed();
        let processes = all_processes().into_iter().flatten().flatten();
        let stats = processes.filter_map(|process| process.stat().ok());
        stats.filter(move |stat| stat.pgrp == group)
    }

    /// CPU time so far, in seconds and in steps of 10 ms: first of the server, then of the rest of the machine, which
    /// includes interrupts and the hypervisor, but not this process and its children that have ended.
    pub(crate) fn cpu_time(&self) -> Result<[f64; 2]> {
        let ticks = |stat: &Stat| stat.utime + stat.stime;
        let server = self.stats().map(|stat| ticks(&stat)).sum();
        let bench = Process::myself()?.stat()?;
        let ours = server + ticks(&bench) + (bench.cutime + bench.cstime).unsigned_abs();
        let total = KernelStats::current()?.total;
        let interrupts = [total.irq, total.softirq, total.steal];
        let interrupts: u64 = interrupts.iter().flatten().sum();
        let busy = total.user + total.nice + total.system + interrupts;
        let seconds = |ticks| ticks as f64 / procfs::ticks_per_second() as f64;
        Ok([server, busy.saturating_sub(ours)].map(seconds))
    }

    /// Resident memory, in bytes.
    pub(crate) fn memory(&self) -> f64 {
        let pages: u64 = self.stats().map(|stat| stat.rss).sum();
        (pages * procfs::page_size()) as f64
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // It fails only if the group has ended.
        let _ended = kill_process_group(Pid::from_child(&self.process), signal);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        let _status = self.process.wait();
    }
}
