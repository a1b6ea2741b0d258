//! SIGTERM, SIGINT and SIGHUP, at any moment and repeatedly.

use std::fs;
use std::hint;
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::resources::{can_trace, end_tracer};
use crate::harness::{
    BALANCED, Client, Process, command, http, installed, ping_all, program, random_bytes,
    wait_until,
};

/// A signal ends the process by its default action until it is caught, and cleanly from then on.
#[test]
fn signals_during_startup_end_it() {
    for step in 0..40 {
        let server = Process::launch(program().args(["--listen=127.0.0.1:0", "--workers=2"]));
        // Hits a different moment of the startup each time.
        let moment = Instant::now() + Duration::from_micros(200 * step);
        while Instant::now() < moment {
            hint::spin_loop();
        }
        server.signal(if step % 2 == 0 {
            Signal::TERM
        } else {
            Signal::INT
        });
        let (status, log) = server.wait();
        if !log.is_empty() {
            assert_eq!(status.code(), Some(0), "{status}: {log}");
            assert!(log.contains(BALANCED), "{log}");
        }
        let is_default = status.signal().is_some();
        assert!(is_default || status.code() == Some(0), "{status}");
    }
}

#[test]
fn signals_drain_a_running_server() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let server = Process::serve(&[]);
        server.signal(signal);
        server.wait_for_success();
    }
}

#[test]
fn second_signal_exits_at_once() {
    for (first, second, code) in [
        (Signal::TERM, Signal::TERM, 143),
        (Signal::INT, Signal::INT, 130),
        (Signal::INT, Signal::TERM, 143),
        (Signal::TERM, Signal::HUP, 129),
    ] {
        // Longer than any test waits.
        let mut server = Process::serve(&["--workers=1", "--drain-timeout=1h"]);
        let client = Client::connect_with_receive_buffer(server.address(), 64 << 10);
        client.send_until_stuck(&random_bytes(1, 40 << 20));
        server.signal(first);
        server.wait_for_log(": draining");
        if first == second {
            wait_until_no_repeat();
        }
        server.signal(second);
        assert_eq!(server.wait().0.code(), Some(code));
    }
}

/// Waits until the same signal is a second one, and no repeat.
fn wait_until_no_repeat() {
    let end = Instant::now() + Duration::from_millis(300);
    wait_until("the time has passed", || Instant::now() >= end);
}

/// `timeout` signals its child and then its group, to which the child belongs.
#[test]
fn repeated_signal_is_one_request() {
    for repeats in [1, 2, 5] {
        let mut server = Process::serve(&["--drain-timeout=1h"]);
        let client = Client::connect(server.address());
        client.ping(b"open");
        for _ in 0..=repeats {
            server.signal(Signal::TERM);
        }
        server.wait_for_log(": draining");
        client.expect_eof();
        drop(client);
        server.wait_for_success();
    }
}

#[test]
fn timeout_drains() {
    if !installed(&["timeout"]) {
        return;
    }
    for _ in 0..10 {
        let mut timeout = command("timeout");
        timeout.arg("0.3").arg(program().get_program());
        let (status, log) = Process::launch(timeout.arg("--listen=127.0.0.1:0")).wait();
        // That of timeout, which tells that the time is over.
        assert_eq!(status.code(), Some(124), "{log}");
        assert!(log.contains(BALANCED), "{log}");
    }
}

#[test]
fn drain_delay_accepts_while_it_reports_not_ready() {
    let arguments = ["--metrics=127.0.0.1:0", "--drain-delay=1s"];
    let mut server = Process::serve(&arguments);
    let metrics = server.metrics_address();
    let old = Client::connect(server.address());
    old.ping(b"old");
    server.signal(Signal::TERM);
    server.wait_for_log("SIGTERM: not ready, draining in 1s");
    assert_eq!(http::get(metrics, "/readyz").status, 503);
    assert_eq!(http::get(metrics, "/healthz").status, 503);
    assert_eq!(http::get(metrics, "/livez").status, 200);
    let new = Client::connect(server.address());
    new.ping(b"new");
    old.ping(b"still served");
    assert!(server.lines_with("SIGTERM: draining").is_empty());
    for client in [old, new] {
        client.expect_eof();
    }
    server.wait_for_log("SIGTERM: draining");
    server.wait_for_success();
}

#[test]
fn second_signal_ends_a_drain_delay_at_once() {
    let mut server = Process::serve(&["--drain-delay=1h"]);
    let client = Client::connect(server.address());
    client.ping(b"open");
    server.signal(Signal::TERM);
    server.wait_for_log("SIGTERM: not ready, draining in ");
    server.signal(Signal::INT);
    let (status, log) = server.wait();
    assert_eq!(status.code(), Some(130), "{log}");
    let line = "second SIGINT: exiting without draining: accepted=1 open=1 ";
    assert!(log.contains(line), "{log}");
}

/// The server has ended, but waits for a log that takes no byte.
#[test]
fn second_signal_ends_the_wait_for_the_log() {
    let (_reader, writer) = std::io::pipe().unwrap();
    let (server, address) = Process::start_without_log(program().arg("-v"), writer);
    let clients: Vec<_> = (0..1000).map(|_| Client::connect(address)).collect();
    ping_all(&clients, b"x");
    clients.into_iter().for_each(Client::close);
    server.signal(Signal::TERM);
    wait_until("it has closed its listener", || {
        TcpStream::connect(address).is_err()
    });
    wait_until_no_repeat();
    server.signal(Signal::TERM);
    assert_eq!(server.wait().0.code(), Some(143));
}

/// Runs the program by env(1) with this option.
fn serve_with_env(option: &str) -> Process {
    let mut env = command("env");
    env.arg(option).arg(program().get_program());
    Process::start(env.arg("--listen=127.0.0.1:0"))
}

/// As under nohup, or in a background job of a shell without job control.
#[test]
fn ignored_signal_stays_ignored() {
    for (signal, name) in [(Signal::HUP, "HUP"), (Signal::INT, "INT")] {
        let server = serve_with_env(&format!("--ignore-signal={name}"));
        server.signal(signal);
        Client::connect(server.address()).check_echo(b"still served");
        let log = server.terminate();
        assert!(!log.contains(&format!("SIG{name}")), "{log}");
    }
}

#[test]
fn load_keeps_an_ignored_interrupt_ignored() {
    let server = Process::serve(&[]);
    let mut env = command("env");
    env.arg("--ignore-signal=INT").arg(program().get_program());
    env.args(["load", &server.address().to_string(), "-n100", "--rate=100"]);
    let mut load = Process::launch_with_stdout(&mut env);
    load.wait_for_log("100 messages/s");
    load.signal(Signal::INT);
    let (status, output) = load.wait();
    assert!(
        status.success() && output.contains(" 100 messages\n"),
        "{output}"
    );
}

#[test]
fn signals_blocked_by_the_parent_are_unblocked() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let server = serve_with_env("--block-signal");
        server.signal(signal);
        server.wait_for_success();
    }
}

/// A slow resolver is a slow /etc/hosts here, which strace delays.
#[test]
fn signal_ends_a_slow_host_name_lookup() {
    if !can_trace() {
        return;
    }
    let trace = tempfile::NamedTempFile::new().unwrap();
    let mut strace = command("strace");
    strace.args(["-D", "-f", "-P", "/etc/hosts", "-o"]);
    strace.arg(trace.path());
    strace.args(["-e", "inject=openat:delay_enter=60000000"]);
    strace.arg(program().get_program());
    let mut server = Process::launch(strace.arg("--listen=slow.invalid:0"));
    wait_until("the name is looked up", || {
        fs::read_to_string(trace.path())
            .unwrap()
            .contains("/etc/hosts")
    });
    server.signal(Signal::TERM);
    server.wait_for_log("SIGTERM: exiting before the server has started");
    end_tracer(&server);
    let (status, log) = server.wait();
    assert_eq!(status.code(), Some(0), "{log}");
}
