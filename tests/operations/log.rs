//! What is counted is logged: when asked by a signal, regularly, and at the end; for people and for
//! programs; and each connection at its end, for those who want to know.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Map, Value};
use socket2::SockRef;

use crate::daemon::{Daemon, number, program, totals};
use crate::support::{
    Client, Scratch, check_echo, connect, connect_unix, pattern, ping, wait_until,
};

#[test]
fn a_signal_logs_the_numbers() {
    let daemon = Daemon::start(&["--workers=2"]);
    let mut open = connect(daemon.address());
    ping(&mut open, &pattern(1, 1000));
    check_echo(connect(daemon.address()), &pattern(2, 500));
    // A client may have its bytes before they are counted.
    wait_until("the numbers of a stats line", || {
        daemon.signal(Signal::USR1);
        let wanted =
            "stats: accepted=2 open=1 closed=1 closed_peer_closed=1 bytes_in=1500 bytes_out=1500";
        !daemon.lines_with(wanted).is_empty()
    });
    ping(&mut open, b"still served");
    let log = daemon.end();
    assert_eq!(number(totals(&log), "accepted"), 2);
}

#[test]
fn an_interval_logs_the_numbers_over_and_over() {
    let daemon = Daemon::start(&["--stats-interval=20ms"]);
    check_echo(connect(daemon.address()), b"counted");
    wait_until("three lines that have it", || {
        daemon
            .lines_with(" stats: accepted=1 open=0 closed=1 ")
            .len()
            >= 3
    });
    let log = daemon.end();
    let last = log.lines().rfind(|line| line.contains("accepted="));
    assert!(last.is_some_and(|line| line.contains(" ended: ")), "{log}");
}

#[test]
fn nothing_is_logged_unasked() {
    let daemon = Daemon::start(&[]);
    check_echo(connect(daemon.address()), b"quietly");
    let log = daemon.end();
    assert!(!log.contains("stats:") && !log.contains("reason="), "{log}");
}

#[test]
fn the_end_tells_why_connections_were_closed() {
    let mut daemon = Daemon::start(&["-v", "--workers=1"]);
    let mut open = connect(daemon.address());
    ping(&mut open, b"open");
    check_echo(connect(daemon.address()), b"one");
    check_echo(connect(daemon.address()), b"two");
    let mut resetting = connect(daemon.address());
    ping(&mut resetting, b"three");
    SockRef::from(&resetting)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(resetting);
    daemon.wait_for_log("reason=reset");
    let pending = open.twin();
    daemon.signal(Signal::TERM);
    assert_eq!(std::io::Read::read(&mut open, &mut [0]).unwrap(), 0);
    pending.end();
    let log = daemon.wait_in_order();
    let totals = totals(&log);
    for (name, value) in [
        ("accepted", 4),
        ("open", 0),
        ("closed", 4),
        ("closed_peer_closed", 2),
        ("closed_reset", 1),
        ("closed_shutdown", 1),
        ("bytes_in", 15),
        ("bytes_out", 15),
    ] {
        assert_eq!(number(totals, name), value, "{name}: {totals}");
    }
}

#[test]
fn each_connection_is_logged_at_its_end() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    let mut daemon = Daemon::spawn(program().args([
        "-v",
        "--workers=1",
        "--listen=127.0.0.1:0",
        &format!("--listen=unix:{}", path.display()),
    ]));
    let client = connect(daemon.address());
    let peer = client.local_addr().unwrap();
    check_echo(client, &pattern(1, 70_000));
    check_echo(connect_unix(&path), &pattern(2, 300));
    for (peer, bytes) in [(peer.to_string(), 70_000), ("unix".to_owned(), 300)] {
        let words = format!("closed peer={peer} worker=0 ms=");
        daemon.wait_for_log(&words);
        let lines = daemon.lines_with(&words);
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_eq!(number(&lines[0], "bytes_in"), bytes);
        assert_eq!(number(&lines[0], "bytes_out"), bytes);
        assert!(lines[0].ends_with(" reason=peer_closed"), "{lines:?}");
    }
    daemon.end();
}

#[test]
fn the_usual_variable_wins() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    for (filter, words, logs_access, is_silent) in [
        ("debug", &["-qqq"][..], true, false),
        ("echoserver::access=debug", &["-q"], true, false),
        ("warn", &["-vv"], false, true),
        ("off", &["-vv"], false, true),
        ("", &["-v"], true, false),
    ] {
        let mut command = program();
        command.arg(format!("--listen=unix:{}", path.display()));
        let daemon = Daemon::launch(command.args(words).env("RUST_LOG", filter));
        wait_until("it listens", || UnixStream::connect(&path).is_ok());
        check_echo(connect_unix(&path), b"in passing");
        daemon.signal(Signal::TERM);
        let (status, log) = daemon.wait();
        assert_eq!(status.code(), Some(0), "{filter}: {log}");
        assert_eq!(
            log.contains(" reason=peer_closed"),
            logs_access,
            "{filter}: {log}"
        );
        assert_eq!(log.is_empty(), is_silent, "{filter}: {log}");
    }
}

#[test]
fn what_is_wrong_with_the_usual_variable_is_logged() {
    for bad in ["echoserver=loud", "info/a/b", "a=b=c"] {
        let mut command = program();
        command.args(["--listen=127.0.0.1:0", "--log-format=json"]);
        let daemon = Daemon::spawn(command.env("RUST_LOG", bad));
        let log = daemon.end();
        let lines = objects(&log);
        let warnings: Vec<_> = lines
            .iter()
            .filter(|line| line["level"] == "WARN")
            .collect();
        assert_eq!(warnings.len(), 1, "{log}");
        let message = warnings[0]["message"].as_str().unwrap();
        assert!(
            message.contains(&format!("RUST_LOG is not used: '{bad}'")),
            "{log}"
        );
    }
}

/// Every line is an object, whatever is logged.
fn objects(log: &str) -> Vec<Map<String, Value>> {
    let object = |line: &str| match serde_json::from_str(line) {
        Ok(Value::Object(object)) => object,
        other => panic!("{line}: {other:?}"),
    };
    log.lines().map(object).collect()
}

#[test]
fn a_log_for_programs_has_one_object_a_line() {
    let scratch = Scratch::new();
    // JSON must quote it.
    let place = format!("unix:{}", scratch.join("quote\"d\\").display());
    let mut daemon = Daemon::spawn(program().args([
        "-vv",
        "--log-format=json",
        "--workers=1",
        &format!("--listen={place}"),
        "--listen=127.0.0.1:0",
    ]));
    let address = objects(&daemon.log())
        .iter()
        .filter_map(|line| line["message"].as_str()?.strip_prefix("listening on 127"))
        .map(|rest| format!("127{rest}").parse().unwrap())
        .next()
        .expect("it says where it listens");
    let client = connect(address);
    let peer = client.local_addr().unwrap().to_string();
    check_echo(client, &pattern(1, 1000));
    daemon.wait_for_log("\"reason\"");
    daemon.signal(Signal::USR1);
    daemon.wait_for_log("\"stats\"");
    let log = daemon.end();

    let lines = objects(&log);
    for line in &lines {
        for name in ["time", "level", "target", "message"] {
            assert!(line[name].is_string(), "{name}: {line:?}");
        }
    }
    let said = |what: &str| {
        let mut found = lines.iter().filter(|line| line["message"] == what);
        found.next().unwrap_or_else(|| panic!("no {what} in {log}"))
    };
    assert_eq!(said(&format!("listening on {place}"))["level"], "INFO");
    let closed = said("closed");
    assert_eq!(closed["peer"], peer.as_str());
    assert_eq!(closed["reason"], "peer_closed");
    for (name, value) in [("worker", 0), ("bytes_in", 1000), ("bytes_out", 1000)] {
        assert_eq!(closed[name], value, "{name}: {closed:?}");
    }
    assert!(closed["ms"].is_u64(), "{closed:?}");
    for what in ["stats", "ended"] {
        let stats = said(what);
        for (name, value) in [
            ("accepted", 1),
            ("open", 0),
            ("closed", 1),
            ("closed_peer_closed", 1),
            ("closed_idle_timeout", 0),
            ("bytes_in", 1000),
            ("bytes_out", 1000),
            ("buffered", 0),
            ("discarded", 0),
            ("accept_pauses", 0),
            ("accept_paused_ms", 0),
        ] {
            assert_eq!(stats[name], value, "{name}: {stats:?}");
        }
        let names: BTreeSet<_> = stats.keys().map(String::as_str).collect();
        assert!(names.contains("wakes") && names.contains("yields"));
    }
}
