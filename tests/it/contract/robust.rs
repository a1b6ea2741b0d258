//! Closed standard streams, an unread or broken log, SIGPIPE, SIGSTOP and SIGCONT do not stop the program.
#![cfg(all(target_os = "linux", feature = "cli"))]

use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;

use rustix::io::ioctl_fionbio;
use rustix::process::Signal;
use serde_json::{Map, Value};

use crate::harness::{Client, DEADLINE, Process, program, program_after, random_bytes, wait_until};
use crate::program::resources::{can_trace, with_few_threads};

/// Sends SIGTERM and expects exit status 0, of a process whose log is not kept.
fn terminate(server: Process) {
    server.signal(Signal::TERM);
    assert_eq!(server.wait().0.code(), Some(0));
}

#[test]
fn stop_and_continue_lose_nothing() {
    let server = Process::serve(&["--workers=2"]);
    let bytes = random_bytes(4, 8_000_000);
    thread::scope(|scope| {
        let transfer = |_| scope.spawn(|| Client::connect(server.address()).check_echo(&bytes));
        let transfers: Vec<_> = (0..4).map(transfer).collect();
        let mut rounds = 0;
        while rounds < 10 || transfers.iter().any(|transfer| !transfer.is_finished()) {
            server.pause();
            server.signal(Signal::CONT);
            wait_until("the server continues", || {
                server.procfs().stat().expect("it runs").state != 'T'
            });
            rounds += 1;
        }
    });
    server.terminate();
}

/// Rule 6 of the event loop.
#[test]
fn sigpipe_is_ignored() {
    let server = Process::serve(&[]);
    server.signal(Signal::PIPE);
    Client::connect(server.address()).check_echo(b"still here");
    server.terminate();
}

#[test]
fn closed_standard_streams_do_not_matter() {
    for closed in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"] {
        let mut command = program_after(&format!("exec {closed}"));
        let (server, address) = Process::start_without_log(&mut command, Stdio::null());
        Client::connect(address).check_echo(b"without standard streams");
        terminate(server);
    }
}

/// A pipe whose reader is closed.
fn broken_pipe() -> PipeWriter {
    io::pipe().unwrap().1
}

#[test]
fn broken_pipes_do_not_change_the_exit_status() {
    for (argument, status) in [("--help", 0), ("--version", 0), ("--nope", 2)] {
        let mut command = program();
        let output = command
            .arg(argument)
            .stdout(broken_pipe())
            .stderr(Stdio::piped());
        let output = output.spawn().unwrap().wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{argument}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!stderr.contains("panicked"), "{argument}: {stderr}");

        let mut command = program();
        let command = command.arg(argument).stdout(Stdio::null());
        let exited = command.stderr(broken_pipe()).status().unwrap();
        assert_eq!(exited.code(), Some(status), "{argument}");
    }
}

/// Starts the program with the longest log that it can write, to a pipe.
fn start_with_long_log() -> (Process, SocketAddr, PipeReader) {
    let (reader, writer) = io::pipe().unwrap();
    let mut command = program();
    command.args(["--log-format=json", "--workers=1"]);
    let (server, address) = Process::start_without_log(command.env("RUST_LOG", "trace"), writer);
    (server, address, reader)
}

/// Opens and closes connections, each of which is logged. 6,000 fill the pipe and the queue in front of it.
fn log_connections(address: SocketAddr, count: usize) {
    for _ in 0..count {
        Client::connect(address).ping(b"x");
    }
}

#[test]
fn unread_log_does_not_block_the_server() {
    let (server, address, _reader) = start_with_long_log();
    log_connections(address, 6_000);
    Client::connect(address).check_echo(&random_bytes(5, 1_000_000));
    terminate(server);
}

#[test]
fn dropped_log_lines_are_reported() {
    let (server, address, reader) = start_with_long_log();
    log_connections(address, 6_000);
    let (found, is_found) = mpsc::channel();
    let reading = thread::spawn(move || {
        for line in BufReader::new(reader).lines().map_while(Result::ok) {
            let line: Map<String, Value> = serde_json::from_str(&line).expect("an object");
            let message = line["message"].as_str().expect("a string");
            if message.contains("log lines were dropped") {
                assert_eq!(line["level"], "WARN");
                assert_eq!(line["target"], "echoserver");
                // The test waits for the first one only.
                let _received = found.send(());
            }
        }
    });
    is_found.recv_timeout(DEADLINE).expect("it is logged");
    terminate(server);
    reading.join().unwrap();
}

#[test]
fn broken_log_does_not_stop_the_server() {
    let (server, address, reader) = start_with_long_log();
    drop(reader);
    log_connections(address, 500);
    Client::connect(address).check_echo(&random_bytes(6, 1_000_000));
    terminate(server);
}

/// Fills a pipe, so that the next write to it would block.
fn fill(pipe: &mut PipeWriter) {
    ioctl_fionbio(&*pipe, true).expect("it is a pipe");
    for size in [4096, 1] {
        while pipe.write(&vec![b'x'; size]).is_ok() {}
    }
    ioctl_fionbio(&*pipe, false).expect("it is a pipe");
}

#[test]
fn blocked_stderr_does_not_delay_a_failure() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    let (_reader, mut writer) = io::pipe().unwrap();
    fill(&mut writer);
    // The log is silent, or has a warning first that blocks its thread: a limit of too many connections.
    for level in ["-qqq", "-vv"] {
        let mut command = program();
        command.args([level, "-c1000000000", "--listen", &address]);
        let stderr = writer.try_clone().unwrap();
        let (status, _) = Process::launch_with_stderr(&mut command, stderr).wait();
        assert_eq!(status.code(), Some(1), "{level}");
    }
}

#[test]
fn blocked_stderr_does_not_delay_a_lack_of_threads() {
    if !can_trace() {
        return;
    }
    let (_reader, mut writer) = io::pipe().unwrap();
    fill(&mut writer);
    // The log's thread starts, that for signals does not.
    let (status, _) = Process::launch_with_stderr(&mut with_few_threads(1), writer).wait();
    assert_eq!(status.code(), Some(1));
}
