//! The program as a process of its own: started on a free port, its log kept, killed if left behind.

// Each test crate uses its part of this.
#![allow(dead_code)]

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
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{}-{}.log", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let log = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        let file = File::create(&log).expect("a log file can be made");
        let child = command
            .args(["--listen", "127.0.0.1:0"])
            .stderr(file)
            .spawn()
            .expect("it starts");
        let mut daemon = Self {
            child,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            log,
        };
        daemon.wait_for_log("workers: ");
        daemon.address = address_in(&daemon.log()).expect("it says where it listens");
        daemon
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).expect("the log is there")).into_owned()
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
        assert!(log.contains(" balanced: "), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        log
    }

    /// Its open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        let directory = format!("/proc/{}/fd", self.child.id());
        fs::read_dir(directory).expect("it runs").count()
    }

    /// The memory it has in use, in KiB.
    pub(crate) fn memory_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
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
