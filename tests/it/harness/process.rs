//! Child processes: the program, the examples and the tools around them. All are killed when dropped.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::{env, fs, thread};

#[cfg(unix)]
use rustix::process::{Pid, Signal, kill_process};
#[cfg(feature = "cli")]
use serde_json::Value;
use tempfile::NamedTempFile;

use super::{DEADLINE, wait_for, wait_until};

/// The last line that the program logs before it serves.
pub(crate) const READY: &str = "buffer memory: ";
/// The program's last line, if its counters balance.
pub(crate) const BALANCED: &str = "counters balance: all connections and bytes accounted for";

/// Returns a command that inherits no variable that the program reads, and ignores no signal that ends it.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    #[cfg(all(target_os = "linux", feature = "cli"))]
    catch_ignored_signals();
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    for (name, _) in env::vars_os() {
        let prefixes = ["ECHOSERVER_", "RUST_LOG", "LISTEN_", "NOTIFY_", "WATCHDOG_"];
        let variable = name.to_string_lossy();
        if prefixes.iter().any(|prefix| variable.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}

/// Catches the signals that this process ignores, and does nothing then. A child process inherits an ignored signal, but
/// has the default action for one that is caught. A shell without job control starts background processes with SIGINT
/// ignored, and nohup with SIGHUP.
#[cfg(all(target_os = "linux", feature = "cli"))]
fn catch_ignored_signals() {
    use std::sync::atomic::AtomicBool;
    use std::sync::{Arc, Once};

    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let this = procfs::process::Process::myself();
        let ignored = this.and_then(|this| this.status()).expect("it runs").sigign;
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            if ignored & (1 << (signal - 1)) != 0 {
                signal_hook::flag::register(signal, Arc::<AtomicBool>::default())
                    .expect("it can be caught");
            }
        }
    });
}

#[cfg(feature = "cli")]
pub(crate) fn program() -> Command {
    command(env!("CARGO_BIN_EXE_echoserver"))
}

/// Returns a command that runs the program in the place of a shell, after the shell has run `setup`.
#[cfg(feature = "cli")]
pub(crate) fn program_after(setup: &str) -> Command {
    let mut shell = command("sh");
    shell.args(["-c", &format!(r#"{setup} && exec "$0" "$@""#)]);
    shell.arg(program().get_program());
    shell
}

/// Checks that the program fails with `status` and one line of output; returns the error in that line.
#[cfg(feature = "cli")]
pub(crate) fn error_line(program: &mut Command, status: i32) -> String {
    let (exit, output) = Process::launch_with_stdout(program).wait();
    assert_eq!(exit.code(), Some(status), "{output}");
    let line = output.strip_suffix('\n').expect("a complete line");
    for unwanted in ["\n", "panicked", "Usage"] {
        assert!(!line.contains(unwanted), "{unwanted:?} in {output}");
    }
    let error = line.strip_prefix("echoserver: ");
    error.expect("the program's name").to_owned()
}

/// Runs `command` until it exits. Panics after the [`DEADLINE`].
pub(crate) fn run(command: &mut Command) -> Output {
    let command = std::mem::replace(command, Command::new(""));
    let mut command = assert_cmd::Command::from_std(command);
    command.timeout(DEADLINE).output().expect("it exits")
}

/// Runs `echoserver COMMAND ADDRESS --json`; returns its exit status and report.
#[cfg(feature = "cli")]
pub(crate) fn report(command: &str, address: &str, arguments: &[&str]) -> (i32, Value) {
    let output = run(program().args([command, address, "--json"]).args(arguments));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.is_empty(), "{stderr}");
    let status = output.status.code().expect("no signal");
    let report = serde_json::from_slice(&output.stdout).expect("one JSON object");
    (status, report)
}

/// Returns the names and errors of the cases that ended so.
#[cfg(feature = "cli")]
pub(crate) fn cases_with<'a>(report: &'a Value, status: &str) -> Vec<(&'a str, &'a str)> {
    let cases = report["cases"].as_array().expect("a list");
    let cases = cases.iter().filter(|case| case["status"] == status);
    let text = |value: &'a Value| value.as_str().unwrap_or_default();
    let cases = cases.map(|case| (text(&case["name"]), text(&case["error"])));
    cases.collect()
}

/// A running process, whose output is kept in a file.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    log: NamedTempFile,
}

impl Process {
    /// Starts the program at a free loopback port, and waits until it serves.
    #[cfg(feature = "cli")]
    pub(crate) fn serve(arguments: &[&str]) -> Self {
        Self::start(program().arg("--listen=127.0.0.1:0").args(arguments))
    }

    /// Starts `command`, which runs the program, and waits until it serves.
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut process = Self::launch(command);
        process.wait_for_log(READY);
        process
    }

    /// Starts the program without a log, and waits until it listens; returns its address too.
    #[cfg(target_os = "linux")]
    pub(crate) fn start_without_log(
        command: &mut Command,
        stderr: impl Into<Stdio>,
    ) -> (Self, SocketAddr) {
        let command = command.arg("--listen=127.0.0.1:0");
        let process = Self::launch_with_stderr(command, stderr);
        let address = wait_for("the program listens", || process.listening_address());
        (process, address)
    }

    /// Starts `command` with stderr as its log.
    pub(crate) fn launch(command: &mut Command) -> Self {
        Self::launch_with(|log| command.stderr(log.try_clone().unwrap()).spawn())
    }

    /// Starts `command` with stdout and stderr as its log.
    pub(crate) fn launch_with_stdout(command: &mut Command) -> Self {
        Self::launch_with(|log| {
            command.stdout(log.try_clone().unwrap());
            command.stderr(log.try_clone().unwrap()).spawn()
        })
    }

    /// Starts `command` with another stderr, and an empty log.
    pub(crate) fn launch_with_stderr(command: &mut Command, stderr: impl Into<Stdio>) -> Self {
        Self::launch_with(|_log| command.stderr(stderr).spawn())
    }

    fn launch_with(spawn: impl FnOnce(&fs::File) -> std::io::Result<Child>) -> Self {
        let log = NamedTempFile::new().expect("a file can be created");
        let child = spawn(log.as_file()).expect("the program can be started");
        Self { child, log }
    }

    /// Returns the address of its first listener, as logged.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address_after("listening on ")
    }

    pub(crate) fn metrics_address(&mut self) -> SocketAddr {
        self.wait_for_log("metrics: listening on ");
        self.address_after("metrics: listening on ")
    }

    fn address_after(&self, text: &str) -> SocketAddr {
        let log = self.log();
        let is_part = |letter: char| letter.is_ascii_hexdigit() || "[]:.".contains(letter);
        let mut addresses = log.split(text).skip(1).filter_map(|rest| {
            let end = rest.find(|letter| !is_part(letter)).unwrap_or(rest.len());
            rest[..end].parse().ok()
        });
        addresses
            .next()
            .unwrap_or_else(|| panic!("no address in {log}"))
    }

    /// Returns all that was logged so far.
    pub(crate) fn log(&self) -> String {
        let log = fs::read(self.log.path()).expect("the log is a file");
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Returns the complete lines so far that contain `text`.
    pub(crate) fn lines_with(&self, text: &str) -> Vec<String> {
        let log = self.log();
        let complete = log.rfind('\n').map_or("", |end| &log[..end]);
        let lines = complete.lines().filter(|line| line.contains(text));
        lines.map(str::to_owned).collect()
    }

    /// Waits until the log has a complete line with `text`.
    pub(crate) fn wait_for_log(&mut self, text: &str) {
        wait_until(&format!("{text:?} is logged"), || {
            let exited = self.has_exited();
            let found = !self.lines_with(text).is_empty();
            assert!(found || !exited, "exited early: {}", self.log());
            found
        });
    }

    pub(crate) fn has_exited(&mut self) -> bool {
        self.child.try_wait().expect("it is a child").is_some()
    }

    /// Waits until it exits by itself; returns its status and log.
    pub(crate) fn wait(mut self) -> (ExitStatus, String) {
        let exited = || self.child.try_wait().expect("it is a child");
        (wait_for("the process exits", exited), self.log())
    }

    /// Waits until it exits by itself, with status 0 and balanced counters; returns its log.
    pub(crate) fn wait_for_success(self) -> String {
        let (status, log) = self.wait();
        assert_eq!(status.code(), Some(0), "{status}: {log}");
        assert!(log.contains(BALANCED), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        log
    }
}

#[cfg(unix)]
impl Process {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it runs");
    }

    /// Sends SIGTERM and waits for success; returns the log.
    pub(crate) fn terminate(self) -> String {
        self.signal(Signal::TERM);
        self.wait_for_success()
    }
}

#[cfg(target_os = "linux")]
impl Process {
    pub(crate) fn procfs(&self) -> procfs::process::Process {
        let pid = self.pid().as_raw_nonzero().get();
        procfs::process::Process::new(pid).expect("it runs")
    }

    /// Stops it with SIGSTOP, and waits until it is stopped.
    pub(crate) fn pause(&self) {
        self.signal(Signal::STOP);
        wait_until("the process is stopped", || {
            self.procfs().stat().expect("it runs").state == 'T'
        });
    }

    /// Returns the address of its first IPv4 listener, as the kernel lists it.
    fn listening_address(&self) -> Option<SocketAddr> {
        use procfs::net::TcpState;
        use procfs::process::FDTarget;

        let descriptors = self.procfs().fd().ok()?.flatten();
        let targets: Vec<_> = descriptors.map(|descriptor| descriptor.target).collect();
        let is_its = |inode| targets.contains(&FDTarget::Socket(inode));
        let mut entries = procfs::net::tcp().ok()?.into_iter();
        let entry = entries.find(|entry| entry.state == TcpState::Listen && is_its(entry.inode))?;
        Some(entry.local_address)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have exited already.
        let _exited = self.child.kill();
        let _reaped = self.child.wait();
        if thread::panicking() {
            eprintln!("the log of the process:\n{}", self.log());
        }
    }
}

/// Returns the value of `name=value` in a line; a counter that is not shown is 0.
pub(crate) fn number(line: &str, name: &str) -> u64 {
    let mut words = line.split_whitespace();
    let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.map_or(0, |value| value.parse().expect("a number"))
}

/// Returns the value of a counter in the totals at the end of a log.
pub(crate) fn total(log: &str, name: &str) -> u64 {
    let totals = log.lines().rfind(|line| line.contains(" ended: "));
    number(totals.unwrap_or_else(|| panic!("no totals in {log}")), name)
}
