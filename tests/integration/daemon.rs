//! The program as a process of its own: started on a free port, its log kept, killed if left behind.

#![allow(dead_code, reason = "each test crate uses its part of this")]

use std::env;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// For so long a condition is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `condition` holds; `what` says in the present what is waited for.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The program, to be given arguments, with nothing in its environment that speaks to it.
pub(crate) fn program() -> Command {
    clean(Command::new(env!("CARGO_BIN_EXE_echoserver")))
}

/// The program with at most `descriptors` of them.
pub(crate) fn program_with_descriptors(descriptors: u32) -> Command {
    let mut shell = clean(Command::new("sh"));
    shell.arg("-c");
    shell.arg(format!(r#"ulimit -n {descriptors}; exec "$0" "$@""#));
    shell.arg(env!("CARGO_BIN_EXE_echoserver"));
    shell
}

fn clean(mut command: Command) -> Command {
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    for (name, _) in env::vars_os().filter(|(name, _)| is_ours(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command
}

fn is_ours(variable: &str) -> bool {
    variable.starts_with("ECHOSERVER_")
}

/// A running server. Its log goes to a file, so that it can be read at any time.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    address: SocketAddr,
    log: PathBuf,
}

impl Daemon {
    /// Starts the program at a free port of loopback.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::spawn(program().args(arguments))
    }

    /// Starts `command`, which is to run the program, and waits until it listens.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        Self::spawn_or_end(command).unwrap_or_else(|(status, log)| panic!("{status}: {log}"))
    }

    /// The same, unless it ends before that: then how, and what it said.
    pub(crate) fn spawn_or_end(command: &mut Command) -> Result<Self, (ExitStatus, String)> {
        let mut daemon = Self::launch(command);
        let mut ended = None;
        wait_until("the server listens, or has ended", || {
            ended = daemon.child.try_wait().expect("it is a child");
            ended.is_some() || daemon.log().contains("workers: ")
        });
        if let Some(status) = ended {
            return Err((status, daemon.log()));
        }
        daemon.address = address_in(&daemon.log()).expect("it says where it listens");
        Ok(daemon)
    }

    /// The same with a stderr that tells nothing here, and so `log` doesn't either.
    pub(crate) fn spawn_unheard(command: &mut Command, stderr: impl Into<Stdio>) -> Self {
        let mut daemon = Self::launch_with(command, stderr);
        let mut address = None;
        wait_until("the server listens", || {
            address = listening_on(daemon.child.id());
            address.is_some()
        });
        daemon.address = address.expect("it was waited for");
        daemon
    }

    /// Starts `command` and waits for nothing.
    pub(crate) fn launch(command: &mut Command) -> Self {
        let log = new_log();
        let file = File::create(&log).expect("a log file can be made");
        let mut daemon = Self::launch_with(command, file);
        daemon.log = log;
        daemon
    }

    /// The same with another stderr.
    pub(crate) fn launch_with(command: &mut Command, stderr: impl Into<Stdio>) -> Self {
        let command = command.args(["--listen", "127.0.0.1:0"]).stderr(stderr);
        Self {
            child: command.spawn().expect("it starts"),
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            log: PathBuf::new(),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until `text` is in its log.
    pub(crate) fn wait_for_log(&mut self, text: &str) {
        let what = format!("{text:?} in the log");
        wait_until(&what, || {
            let log = self.log();
            let ended = self.child.try_wait().expect("it is a child");
            assert!(
                log.contains(text) || ended.is_none(),
                "it ended early: {log}"
            );
            log.contains(text)
        });
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it runs");
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the server has ended", || {
            status = self.child.try_wait().expect("it is a child");
            status.is_some()
        });
        status.expect("it was waited for")
    }

    /// Ends it as a service manager would; it must be in order. Returns its log.
    pub(crate) fn end(mut self) -> String {
        self.signal(Signal::TERM);
        self.wait_in_order()
    }

    /// Waits until it has ended by itself; it must be in order. Returns its log.
    pub(crate) fn wait_in_order(&mut self) -> String {
        let status = self.wait();
        let log = self.log();
        assert_eq!(status.code(), Some(0), "{status}: {log}");
        assert!(log.contains("counters balance: "), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        log
    }

    /// Its open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        let directory = format!("/proc/{}/fd", self.child.id());
        fs::read_dir(directory).expect("it runs").count()
    }

    /// Its memory in KiB: `VmRSS` is what it has in use now, `VmHWM` the most it ever had.
    pub(crate) fn memory_kib(&self, which: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix(which));
        let number = line.and_then(|line| line.split_whitespace().nth(1));
        number
            .and_then(|number| number.parse().ok())
            .expect("it has memory")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
        if thread::panicking() {
            eprintln!("the server's log:\n{}", self.log());
        }
        let _gone = fs::remove_file(&self.log);
    }
}

/// A name for a log of its own.
fn new_log() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("{}-{}.log", std::process::id(), COUNT.fetch_add(1, Relaxed));
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Where a process listens on IPv4, as the kernel tells it.
fn listening_on(pid: u32) -> Option<SocketAddr> {
    const LISTENING: &str = "0A";
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let sockets: Vec<_> = descriptors
        .filter_map(|descriptor| fs::read_link(descriptor.ok()?.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .collect();
    let table = fs::read_to_string("/proc/net/tcp").ok()?;
    let port = table.lines().find_map(|line| {
        // sl local_address rem_address st tx:rx tr:tm retrnsmt uid timeout inode ...
        let words: Vec<_> = line.split_whitespace().collect();
        let socket = format!("socket:[{}]", words.get(9)?);
        (words[3] == LISTENING && sockets.contains(&socket)).then(|| words[1])
    })?;
    let port = u16::from_str_radix(port.split_once(':')?.1, 16).ok()?;
    Some(SocketAddr::from(([127, 0, 0, 1], port)))
}

/// The first address that a log says is listened on.
pub(crate) fn address_in(log: &str) -> Option<SocketAddr> {
    let (_, rest) = log.split_once("listening on ")?;
    rest.split_whitespace().next()?.parse().ok()
}

/// The value of `name=value` in the line with the totals at the log's end.
pub(crate) fn total(log: &str, name: &str) -> u64 {
    let totals = log.lines().rfind(|line| line.contains(" ended: "));
    let totals = totals.unwrap_or_else(|| panic!("no totals in {log}"));
    let mut words = totals.split_whitespace();
    let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.map_or(0, |value| value.parse().expect("a number"))
}
