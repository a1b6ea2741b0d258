//! The log: counters when a signal or interval requests them, and at the end; connections as they close; as text
//! and as JSON.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;

use rustix::process::Signal;
use serde_json::{Map, Value};

use crate::harness::{Client, Process, number, program, random_bytes, total, wait_until};

#[test]
fn sigusr1_logs_the_counters() {
    let server = Process::serve(&["--workers=2"]);
    let open = Client::connect(server.address());
    open.ping(&random_bytes(1, 1000));
    Client::connect(server.address()).check_echo(&random_bytes(2, 500));
    // A client can have its bytes before they are counted.
    wait_until("the counters are logged", || {
        server.signal(Signal::USR1);
        let expected =
            "stats: accepted=2 open=1 closed=1 closed_peer_closed=1 bytes_in=1500 bytes_out=1500";
        !server.lines_with(expected).is_empty()
    });
    open.ping(b"still served");
    let log = server.terminate();
    assert_eq!(total(&log, "accepted"), 2);
}

#[test]
fn interval_logs_the_counters_repeatedly() {
    let server = Process::serve(&["--stats-interval=20ms"]);
    Client::connect(server.address()).check_echo(b"counted");
    wait_until("three lines have them", || {
        server
            .lines_with(" stats: accepted=1 open=0 closed=1 ")
            .len()
            >= 3
    });
    let log = server.terminate();
    let last = log.lines().rfind(|line| line.contains("accepted="));
    assert!(last.is_some_and(|line| line.contains(" ended: ")), "{log}");
}

#[test]
fn counters_and_connections_are_not_logged_by_default() {
    let server = Process::serve(&[]);
    Client::connect(server.address()).check_echo(b"quietly");
    let log = server.terminate();
    assert!(!log.contains("stats:") && !log.contains("reason="), "{log}");
}

#[test]
fn verbose_logs_each_connection_when_it_closes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("echo");
    let unix = format!("--listen=unix:{}", path.display());
    let mut server = Process::serve(&["-v", "--workers=1", &unix]);
    let client = Client::connect(server.address());
    let peer = client.local_address().to_string();
    client.check_echo(&random_bytes(1, 70_000));
    Client::connect_unix(&path).check_echo(&random_bytes(2, 300));
    for (peer, bytes) in [(peer.as_str(), 70_000), ("unix", 300)] {
        let start = format!("closed peer={peer} worker=0 ms=");
        server.wait_for_log(&start);
        let lines = server.lines_with(&start);
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_eq!(number(&lines[0], "bytes_in"), bytes);
        assert_eq!(number(&lines[0], "bytes_out"), bytes);
        assert!(lines[0].ends_with(" reason=peer_closed"), "{lines:?}");
    }
    server.terminate();
}

#[test]
fn rust_log_overrides_verbose_and_quiet() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("echo");
    for (filter, option, logs_connections, is_silent) in [
        ("debug", "-qqq", true, false),
        ("echoserver::access=debug", "-q", true, false),
        ("warn", "-vv", false, true),
        ("off", "-vv", false, true),
        ("", "-v", true, false),
    ] {
        let mut command = program();
        command.arg(format!("--listen=unix:{}", path.display()));
        let server = Process::launch(command.arg(option).env("RUST_LOG", filter));
        wait_until("it listens", || UnixStream::connect(&path).is_ok());
        Client::connect_unix(&path).check_echo(b"logged or not");
        server.signal(Signal::TERM);
        let (status, log) = server.wait();
        assert_eq!(status.code(), Some(0), "{filter}: {log}");
        let has_connections = log.contains(" reason=peer_closed");
        assert_eq!(has_connections, logs_connections, "{filter}: {log}");
        assert_eq!(log.is_empty(), is_silent, "{filter}: {log}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn quietest_log_is_empty() {
    use std::io::Read;

    let (mut reader, writer) = std::io::pipe().unwrap();
    let (server, address) = Process::start_without_log(program().arg("-qqq"), writer);
    Client::connect(address).check_echo(b"quietly");
    server.signal(Signal::TERM);
    assert_eq!(server.wait().0.code(), Some(0));
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    assert_eq!(log, "");
}

#[test]
fn invalid_rust_log_is_reported() {
    for invalid in ["echoserver=loud", "info/a/b", "a=b=c"] {
        let mut command = program();
        command.args(["--listen=127.0.0.1:0", "--log-format=json"]);
        let log = Process::start(command.env("RUST_LOG", invalid)).terminate();
        let lines = objects(&log);
        let is_warning = |line: &&Map<_, _>| line["level"] == "WARN";
        let warnings: Vec<_> = lines.iter().filter(is_warning).collect();
        assert_eq!(warnings.len(), 1, "{log}");
        let message = warnings[0]["message"].as_str().unwrap();
        let expected = format!("RUST_LOG is not used: '{invalid}'");
        assert!(message.contains(&expected), "{log}");
    }
}

/// Parses a log of which every line is a JSON object.
fn objects(log: &str) -> Vec<Map<String, Value>> {
    let object = |line: &str| match serde_json::from_str(line) {
        Ok(Value::Object(object)) => object,
        other => panic!("{line}: {other:?}"),
    };
    log.lines().map(object).collect()
}

#[test]
fn json_log_has_one_object_per_line() {
    let folder = tempfile::tempdir().unwrap();
    // JSON must escape this name.
    let unix = format!("unix:{}", folder.path().join("quote\"d\\").display());
    let mut server = Process::serve(&[
        "-vv",
        "--log-format=json",
        "--workers=1",
        &format!("--listen={unix}"),
    ]);
    let client = Client::connect(server.address());
    let peer = client.local_address().to_string();
    client.check_echo(&random_bytes(1, 1000));
    server.wait_for_log("\"reason\"");
    server.signal(Signal::USR1);
    server.wait_for_log("\"stats\"");
    let log = server.terminate();

    let lines = objects(&log);
    for line in &lines {
        for name in ["time", "level", "target", "message"] {
            assert!(line[name].is_string(), "{name}: {line:?}");
        }
    }
    let line_with = |message: &str| {
        let mut found = lines.iter().filter(|line| line["message"] == message);
        found
            .next()
            .unwrap_or_else(|| panic!("no {message} in {log}"))
    };
    let listening = line_with(&format!("listening on {unix}"));
    assert_eq!(listening["level"], "INFO");
    let closed = line_with("closed");
    assert_eq!(closed["peer"], peer.as_str());
    assert_eq!(closed["reason"], "peer_closed");
    for (name, value) in [("worker", 0), ("bytes_in", 1000), ("bytes_out", 1000)] {
        assert_eq!(closed[name], value, "{name}: {closed:?}");
    }
    assert!(closed["ms"].is_u64(), "{closed:?}");
    for message in ["stats", "ended"] {
        let stats = line_with(message);
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
