//! The servers as processes: started, asked for what they have used, and killed when dropped.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// How long a server may take to listen.
const START_MAX: Duration = Duration::from_secs(10);

/// A kind of server, as the tables name it.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// This project's binary, with more arguments.
    Echoserver(Vec<String>),
    /// This very binary, become a peer.
    Peer,
    /// A command of the user's, with `{port}` in it. Its CPU time and memory are those of all the
    /// processes in its group.
    Command(String),
    /// A server that somebody else has started.
    Remote(String),
}

/// A server that listens.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    process: Option<Process>,
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // With all that it may have started. That it is gone already is no fault.
        let _gone = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        let _gone = self.0.wait();
    }
}

impl Server {
    /// Starts it, and waits until it listens.
    ///
    /// # Errors
    ///
    /// One line that says why there is no such server.
    pub(crate) fn start(&self, workers: usize) -> Result<Running, String> {
        match &self.kind {
            Kind::Echoserver(arguments) => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_echoserver"));
                // It is told everything here, and nothing by the environment.
                command.env_clear().arg("--listen=127.0.0.1:0");
                command.arg(format!("--workers={workers}")).args(arguments);
                announced(command)
            }
            Kind::Peer => {
                let myself = std::env::current_exe().map_err(|error| error.to_string())?;
                let mut command = Command::new(myself);
                command.args(["--serve", &self.name, "--workers", &workers.to_string()]);
                announced(command)
            }
            Kind::Command(line) => connected(line, workers),
            Kind::Remote(address) => {
                let mut addresses = address
                    .to_socket_addrs()
                    .map_err(|error| error.to_string())?;
                let address = addresses.next().ok_or("the name has no address")?;
                Ok(Running {
                    address,
                    process: None,
                })
            }
        }
    }
}

fn spawn(mut command: Command) -> Result<Process, String> {
    command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let child = command
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    Ok(Process(child))
}

/// Starts a server that says on stderr where it listens.
fn announced(mut command: Command) -> Result<Running, String> {
    command.stderr(Stdio::piped());
    let mut process = spawn(command)?;
    let stderr = process.0.stderr.take().expect("it is piped");
    let (sender, said) = mpsc::channel();
    // Reads to the end, so that the server never waits for its log; ends when the server does.
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let _nobody_asks_any_more = sender.send(line);
        }
    });
    let address = announcement(&said)?;
    Ok(Running {
        address,
        process: Some(process),
    })
}

fn announcement(said: &Receiver<String>) -> Result<SocketAddr, String> {
    let deadline = Instant::now() + START_MAX;
    let mut last = "it said nothing".to_owned();
    loop {
        match said.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if let Some((_, address)) = line.split_once("listening on ")
                    && let Ok(address) = address.trim().parse()
                {
                    return Ok(address);
                }
                last = line;
            }
            Err(RecvTimeoutError::Timeout) => return Err(format!("does not listen: {last}")),
            Err(RecvTimeoutError::Disconnected) => return Err(format!("ended: {last}")),
        }
    }
}

/// Starts a server that is told its port, and waits until that takes connections.
fn connected(line: &str, workers: usize) -> Result<Running, String> {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|any| any.local_addr());
    let address = free.map_err(|error| error.to_string())?;
    let line = line
        .replace("{port}", &address.port().to_string())
        .replace("{workers}", &workers.to_string());
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("exec {line}")])
        .stderr(Stdio::null());
    let mut process = spawn(command)?;
    let deadline = Instant::now() + START_MAX;
    while TcpStream::connect(address).is_err() {
        if let Ok(Some(status)) = process.0.try_wait() {
            return Err(format!("ended: {status}"));
        }
        if Instant::now() >= deadline {
            return Err(format!("does not listen on {address}"));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(Running {
        address,
        process: Some(process),
    })
}

/// CPU time used so far, by two clocks: each has its own blind spot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuTime {
    /// Of the threads alive, in nanoseconds.
    alive_ns: u64,
    /// Of all threads that ever were, in ticks of 10 ms.
    ever_ns: u64,
}

impl CpuTime {
    /// The time used since the start, by the coarse clock.
    pub(crate) fn total(self) -> Duration {
        Duration::from_nanos(self.ever_ns)
    }

    /// The time used since `earlier`: by the fine clock, unless threads that ended took time along.
    pub(crate) fn since(self, earlier: CpuTime) -> Duration {
        const TICKS: u64 = 2 * TICK_NS;
        let alive = self.alive_ns.saturating_sub(earlier.alive_ns);
        let ever = self.ever_ns.saturating_sub(earlier.ever_ns);
        Duration::from_nanos(if ever > alive + TICKS { ever } else { alive })
    }
}

/// Linux counts for user space in hundredths of a second, whatever it does inside.
pub(crate) const TICK_NS: u64 = 10_000_000;

impl Running {
    /// The directories in `/proc` of the server and of what it has started.
    fn processes(&self) -> Option<Vec<PathBuf>> {
        let group = self.process.as_ref()?.0.id().to_string();
        let is_ours = |proc: &PathBuf| stat(proc).is_some_and(|fields| fields[2] == group);
        let all = fs::read_dir("/proc").ok()?.flatten();
        Some(all.map(|entry| entry.path()).filter(is_ours).collect())
    }

    pub(crate) fn cpu_time(&self) -> Option<CpuTime> {
        let processes = self.processes()?;
        let times = processes.iter().filter_map(|proc| cpu_time(proc));
        times.reduce(|sum, time| CpuTime {
            alive_ns: sum.alive_ns + time.alive_ns,
            ever_ns: sum.ever_ns + time.ever_ns,
        })
    }

    /// Bytes of memory that it has touched and still holds.
    pub(crate) fn memory(&self) -> Option<u64> {
        let resident = |proc: PathBuf| {
            let status = fs::read_to_string(proc.join("status")).ok()?;
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("VmRSS:"))?;
            let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
            Some(kib << 10)
        };
        Some(self.processes()?.into_iter().filter_map(resident).sum())
    }
}

/// The fields of a process's `stat`, from its state on; before that stands a name that may hold
/// anything.
fn stat(proc: &Path) -> Option<Vec<String>> {
    let stat = fs::read_to_string(proc.join("stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// CPU time of a process, by its directory in `/proc`.
pub(crate) fn cpu_time(proc: &Path) -> Option<CpuTime> {
    let fields = stat(proc)?;
    let utime_and_stime = &fields[11..13];
    let ticks: u64 = utime_and_stime
        .iter()
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    let mut alive_ns = 0;
    for task in fs::read_dir(proc.join("task")).ok()?.flatten() {
        // A thread may end meanwhile; a kernel without these statistics leaves the coarse clock.
        let schedstat = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        let run = schedstat.split_whitespace().next();
        alive_ns += run.and_then(|run| run.parse::<u64>().ok()).unwrap_or(0);
    }
    Some(CpuTime {
        alive_ns,
        ever_ns: ticks * TICK_NS,
    })
}

/// CPU time of the children of this process that have ended.
pub(crate) fn children_time() -> Option<Duration> {
    let fields = stat(Path::new("/proc/self"))?;
    let cutime_and_cstime = &fields[13..15];
    let ticks = cutime_and_cstime.iter().map(|field| field.parse::<u64>());
    Some(Duration::from_nanos(
        ticks.sum::<Result<u64, _>>().ok()? * TICK_NS,
    ))
}

/// What all CPUs did, in ticks: for others, and for nobody as the hypervisor took it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Machine {
    pub(crate) busy: u64,
    pub(crate) stolen: u64,
}

impl Machine {
    pub(crate) fn now() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let first = stat.lines().next().unwrap_or_default();
        let ticks: Vec<u64> = first.split_whitespace().flat_map(str::parse).collect();
        // user nice system idle iowait irq softirq steal
        let sum = |fields: &[usize]| fields.iter().filter_map(|&field| ticks.get(field)).sum();
        Self {
            busy: sum(&[0, 1, 2, 5, 6]),
            stolen: sum(&[7]),
        }
    }
}
