//! `check` where this machine has little: descriptors, threads, ports, and room in the buffers of sockets. None of it is a
//! fault of the server.

use std::net::TcpStream;
use std::{fs, iter, thread};

use nix::sched::{CloneFlags, unshare};
use rustix::process::geteuid;
use serde_json::Value;

use crate::harness::{
    Process, cases_with, command, error_line, installed, program, program_after, run,
};
use crate::servers::{self, Fault};

/// Runs `check --json` with `arguments`, after `command` has set limits for it.
fn check(command: &mut std::process::Command, address: &str, arguments: &[&str]) -> (i32, Value) {
    let output = run(command.args(["check", address, "--json"]).args(arguments));
    let stderr = String::from_utf8_lossy(&output.stderr);
    let status = output.status.code().expect("no signal");
    let report = serde_json::from_slice(&output.stdout);
    (
        status,
        report.unwrap_or_else(|_| panic!("status {status}: {stderr}")),
    )
}

/// Checks that `case` was not run, because of `error`, that others passed, and that this is an exit status of its own.
fn assert_not_run((status, report): &(i32, Value), case: &str, error: &str) {
    assert_eq!(cases_with(report, "fail"), []);
    assert_eq!(cases_with(report, "warn"), []);
    assert_eq!(cases_with(report, "not run"), [(case, error)]);
    assert_eq!(cases_with(report, "ok"), [("every-byte-value", "")]);
    assert_eq!((*status, &report["passed"]), (4, &false.into()));
}

#[test]
fn case_without_descriptors_is_not_run() {
    let address = servers::start(Fault::None);
    let arguments = ["--only=crowd", "--only=every-byte*"];
    let mut limited = program_after("ulimit -n 60");
    let ended = check(&mut limited, &address, &arguments);
    assert_not_run(&ended, "crowd", "too many open files");

    let mut limited = program_after("ulimit -n 60");
    let output = run(limited.args(["check", &address]).args(arguments));
    let text = String::from_utf8(output.stdout).expect("text");
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[1].starts_with("not run  crowd "), "{text}");
    let summary = ": 1 of 2 cases passed, 0 failed, 1 not run, because of this machine";
    assert!(lines[2].ends_with(summary), "{text}");
}

/// A failure counts for more than a case that was not run.
#[test]
fn failure_beside_a_case_that_is_not_run_is_reported() {
    let server = Process::serve(&["--fault", "reset@eof"]);
    let address = server.address().to_string();
    let arguments = ["--only=crowd", "--only=half-close-at-once"];
    let (status, report) = check(&mut program_after("ulimit -n 60"), &address, &arguments);
    let ended = ["fail", "not run"].map(|status| cases_with(&report, status).len());
    assert_eq!((status, ended), (1, [1, 1]), "{report}");
}

/// The limit of root does not hold, so another user runs it.
#[test]
fn case_without_threads_is_not_run() {
    if !installed(&["setpriv", "prlimit"]) {
        return;
    }
    let address = servers::start(Fault::None);
    let is_root = geteuid().is_root();
    let mut limited = command(if is_root { "setpriv" } else { "prlimit" });
    if is_root {
        limited.args(["--reuid=65533", "--clear-groups", "prlimit"]);
    }
    limited.arg("--nproc=1");
    limited.arg(program().get_program());
    // One job more than there are threads for.
    let arguments = [
        "--only=connect-and-leave",
        "--only=never-speaks*",
        "--jobs=2",
    ];
    let (status, report) = check(&mut limited, &address, &arguments);
    let error = "cannot start a thread: resource temporarily unavailable";
    let expected = ["never-speaks-first", "connect-and-leave"].map(|case| (case, error));
    assert_eq!(
        (status, cases_with(&report, "not run")),
        (4, expected.to_vec())
    );
}

/// Runs `body` in a network namespace of its own, with these settings of IPv4. Prints why, if that is not possible.
fn in_namespace(settings: &[(&str, &str)], body: impl FnOnce() + Send) {
    let run = || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            println!("skipped: no network namespace: {error}");
            return;
        }
        let up = run(command("ip").args(["link", "set", "lo", "up"]));
        assert!(up.status.success(), "{up:?}");
        for (name, value) in settings {
            fs::write(format!("/proc/sys/net/ipv4/{name}"), value).expect("it is allowed");
        }
        body();
    };
    if installed(&["ip"]) {
        let result = thread::scope(|scope| scope.spawn(run).join());
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}

#[test]
fn case_without_ports_is_not_run() {
    // Linux would use the port of a closed connection again after a second.
    let settings = [
        ("ip_local_port_range", "40000 40099"),
        ("tcp_tw_reuse", "0"),
    ];
    in_namespace(&settings, || {
        let address = servers::start(Fault::None);
        let error = "no local port is free: closed connections hold them for a minute";
        let ended = check(
            &mut program(),
            &address,
            &["--only=crowd", "--only=every-byte*"],
        );
        assert_not_run(&ended, "crowd", error);

        let connections = iter::repeat_with(|| TcpStream::connect(&address));
        let _open: Vec<_> = connections.map_while(Result::ok).collect();
        let line = error_line(program().args(["check", &address]), 4);
        assert_eq!(line, format!("cannot connect to {address}: {error}"));
    });
}

/// With 4 KiB for each direction, a client that does not read soon can send no more.
#[test]
fn correct_server_with_small_socket_buffers_passes() {
    let sizes = "4096 4096 4096";
    in_namespace(&[("tcp_rmem", sizes), ("tcp_wmem", sizes)], || {
        let plain = servers::start(Fault::None);
        let (status, report) = check(&mut program(), &plain, &["--strict", "--jobs=8"]);
        assert_eq!(cases_with(&report, "fail"), []);
        assert_eq!((status, cases_with(&report, "ok").len()), (0, 29));

        let server = Process::serve(&["--buffer-size=1K"]);
        let address = server.address().to_string();
        let cases = ["pieces*", "resets*", "close-with*"].map(|case| format!("--only={case}"));
        let cases = cases.each_ref().map(String::as_str);
        let (status, report) = check(&mut program(), &address, &cases);
        assert_eq!(cases_with(&report, "fail"), []);
        assert_eq!((status, cases_with(&report, "ok").len()), (0, 3));
        server.terminate();
    });
}
