//! The program itself, as a child process.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use super::{DEADLINE, until};

/// The program, listening on a loopback port of its own. Its drop kills and reaps it.
pub(crate) struct Program {
    child: Child,
    address: SocketAddr,
    log: Option<JoinHandle<String>>,
}

impl Program {
    /// Starts it with `arguments` (but for `--listen`), and waits until it listens.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_echoserver"));
        command.args(arguments);
        Self::start_by(command)
    }

    /// The same by a `command` that ends in starting it, with its arguments so far.
    pub(crate) fn start_by(mut command: Command) -> Self {
        let mut child = command
            .args(["--listen", "127.0.0.1:0"])
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program was built");
        let stderr = child.stderr.take().expect("it is piped");
        let (listening, addresses) = mpsc::channel();
        let log = thread::spawn(move || follow(stderr, &listening));
        let address = first(&addresses, &mut child);
        Self {
            child,
            address,
            log: Some(log),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends it a signal: `TERM`, `INT`, `STOP`, `CONT`.
    pub(crate) fn signal(&self, name: &str) {
        let kill = format!("kill -s {name} {}", self.child.id());
        let killed = Command::new("sh").args(["-c", &kill]).status();
        assert!(killed.expect("there is a shell").success());
    }

    /// Waits for its end; returns how it ended, and all that it logged.
    pub(crate) fn wait(mut self) -> (ExitStatus, String) {
        let mut status = None;
        until("the program ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        let log = self.log.take().expect("only this takes it");
        (status.expect("it has ended"), log.join().unwrap())
    }

    /// Asks it to end with SIGTERM; returns how it ended, and all that it logged.
    pub(crate) fn stop(self) -> (ExitStatus, String) {
        self.signal("TERM");
        self.wait()
    }

    /// How many descriptors it has open.
    pub(crate) fn descriptors(&self) -> usize {
        self.count("fd")
    }

    /// How many threads it has.
    pub(crate) fn threads(&self) -> usize {
        self.count("task")
    }

    fn count(&self, of: &str) -> usize {
        let entries = fs::read_dir(format!("/proc/{}/{of}", self.child.id()));
        entries.expect("it runs, on Linux").count()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Reads the log to its end, tells of each address in it, and returns all of it.
fn follow(stderr: ChildStderr, listening: &Sender<SocketAddr>) -> String {
    let mut log = String::new();
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        if let Some((_, address)) = line.split_once("listening on ") {
            let address = address.parse().expect("the log gives an IP address");
            // Only the first one is waited for.
            let _unheard = listening.send(address);
        }
        log += &line;
        log += "\n";
    }
    log
}

/// The first address that it listens on. A program that ends before has closed its log.
fn first(addresses: &Receiver<SocketAddr>, child: &mut Child) -> SocketAddr {
    addresses.recv_timeout(DEADLINE).unwrap_or_else(|_| {
        // It is ours to reap: there is no `Program` yet.
        let _ended = child.kill();
        panic!("the program never listened: {:?}", child.wait());
    })
}
