//! The program as a process of its own: its log kept in a file, killed if left behind.

use std::env;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::wait_until;

/// The last line of those that tell how the server was started.
const STARTED: &str = "buffer memory: ";

/// The program, with nothing in its environment that speaks to it.
pub(crate) fn program() -> Command {
    clean(Command::new(env!("CARGO_BIN_EXE_echoserver")))
}

/// A command that is to run the program, with nothing in its environment that speaks to that.
pub(crate) fn clean(mut command: Command) -> Command {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    for (name, _) in env::vars_os() {
        let variable = name.to_string_lossy();
        let ours = ["ECHOSERVER_", "RUST_LOG", "LISTEN_", "NOTIFY_SOCKET"];
        if ours.iter().any(|start| variable.starts_with(start)) {
            command.env_remove(name);
        }
    }
    command
}

/// A running server.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts the program at a free port of loopback, and waits until it serves.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::spawn(program().args(["--listen", "127.0.0.1:0"]).args(arguments))
    }

    /// Starts `command`, which is to run the program, and waits until it serves.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut daemon = Self::launch(command);
        daemon.wait_for_log(STARTED);
        daemon
    }

    /// Starts `command`, and waits for nothing.
    pub(crate) fn launch(command: &mut Command) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "operations-{}-{}.log",
            std::process::id(),
            COUNT.fetch_add(1, Relaxed)
        );
        let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let file = File::create(&log).expect("a log file can be made");
        let child = command.stderr(file).spawn().expect("it starts");
        Self { child, log }
    }

    /// Where it listens first.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address_behind("] listening on ")
    }

    /// Where it serves its metrics.
    pub(crate) fn metrics(&mut self) -> SocketAddr {
        self.wait_for_log("metrics: listening on ");
        self.address_behind("metrics: listening on ")
    }

    fn address_behind(&self, text: &str) -> SocketAddr {
        let log = self.log();
        let (_, rest) = log.split_once(text).expect("it says where it listens");
        let address = rest.split_whitespace().next().expect("an address");
        address.parse().expect("an IP address")
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The whole lines so far that contain `text`.
    pub(crate) fn lines_with(&self, text: &str) -> Vec<String> {
        let log = self.log();
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        let lines = whole.lines().filter(|line| line.contains(text));
        lines.map(str::to_owned).collect()
    }

    /// Waits until a whole line with `text` is in its log.
    pub(crate) fn wait_for_log(&mut self, text: &str) {
        let what = format!("{text:?} in the log");
        wait_until(&what, || {
            let ended = self.child.try_wait().expect("it is a child");
            let found = !self.lines_with(text).is_empty();
            assert!(found || ended.is_none(), "it ended early: {}", self.log());
            found
        });
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it runs");
    }

    /// Waits until it has ended by itself; returns how, and its log.
    pub(crate) fn wait(mut self) -> (ExitStatus, String) {
        let mut status = None;
        wait_until("the server has ended", || {
            status = self.child.try_wait().expect("it is a child");
            status.is_some()
        });
        (status.expect("it was waited for"), self.log())
    }

    /// Ends it as a service manager would; it must end in order. Returns its log.
    pub(crate) fn end(self) -> String {
        self.signal(Signal::TERM);
        self.wait_in_order()
    }

    /// Waits until it has ended by itself; it must end in order. Returns its log.
    pub(crate) fn wait_in_order(self) -> String {
        let (status, log) = self.wait();
        assert_eq!(status.code(), Some(0), "{status}: {log}");
        assert!(log.contains("counters balance: "), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        log
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

/// The value of `name=value` in a line; what isn't shown is 0.
pub(crate) fn number(line: &str, name: &str) -> u64 {
    let mut words = line.split_whitespace();
    let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.map_or(0, |value| value.parse().expect("a number"))
}

/// The line with the totals at a log's end.
pub(crate) fn totals(log: &str) -> &str {
    let line = log.lines().rfind(|line| line.contains(" ended: "));
    line.unwrap_or_else(|| panic!("no totals in {log}"))
}
