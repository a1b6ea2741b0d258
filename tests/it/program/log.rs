//! The log: counters when a signal or interval requests them, and at the end; connections as they close; as text
//! and as JSON.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use rustix::process::Signal;
use serde_json::{Map, Value};

use crate::harness::{
    Client, Process, READY, error_line, number, program, random_bytes, total, wait_until,
};

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
            "] stats: accepted=2 open=1 closed=1 closed_peer_closed=1 bytes_in=1500 bytes_out=1500";
        !server.lines_with(expected).is_empty()
    });
    open.ping(b"still served");
    let log = server.terminate();
    assert_eq!(total(&log, "accepted"), 2);
}

#[test]
fn interval_logs_the_counters_repeatedly() {
    let server = Process::serve(&["--stats-interval=1ms"]);
    Client::connect(server.address()).check_echo(b"counted");
    wait_until("three lines have them", || {
        server.lines_with(" stats: accepted=1 closed=1 ").len() >= 3
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
    let log = server.terminate();
    assert!(!log.contains("opened"), "{log}");
}

#[test]
fn more_verbose_logs_each_connection_when_it_opens() {
    let mut server = Process::serve(&["-vv"]);
    let client = Client::connect(server.address());
    let peer = client.local_address().to_string();
    server.wait_for_log(&format!("echoserver::access] opened peer={peer}"));
    client.close();
    server.terminate();
}

#[test]
fn flags_override_rust_log() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("echo");
    for (filter, option, logs_connections, is_silent) in [
        ("debug", "--backlog=7", true, false),
        ("echoserver::access=debug", "--backlog=7", true, false),
        ("off", "--backlog=7", false, true),
        ("debug", "-qqq", false, true),
        ("off", "-v", true, false),
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
fn empty_variable_counts_as_unset() {
    let mut command = program();
    command.arg("--listen=127.0.0.1:0");
    for unset in [
        "WORKERS",
        "VERBOSE",
        "METRICS",
        "LOG_FORMAT",
        "IDLE_TIMEOUT",
    ] {
        command.env(format!("ECHOSERVER_{unset}"), "");
    }
    // As Kubernetes sets it.
    command.env("ECHOSERVER_PORT", "tcp://10.0.0.1:5555");
    let server = Process::start(&mut command);
    assert_eq!(server.lines_with("WARN"), [""; 0]);
    server.terminate();
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

/// It would be printed to stderr, which panics if that fails, before the log runs.
#[test]
#[cfg(target_os = "linux")]
fn invalid_rust_log_is_survived_by_a_full_or_closed_stderr() {
    use crate::harness::program_after;

    for redirection in ["2>/dev/full", "2>&-"] {
        let mut command = program_after(&format!("exec {redirection}"));
        command.env("RUST_LOG", "a=b=c");
        let (server, address) =
            Process::start_without_log(&mut command, std::process::Stdio::null());
        Client::connect(address).check_echo(b"without a log");
        server.signal(Signal::TERM);
        assert_eq!(server.wait().0.code(), Some(0));
    }
}

#[test]
fn invalid_rust_log_is_not_read_with_a_level() {
    let mut command = program();
    command.args(["--listen=127.0.0.1:0", "-v"]);
    let log = Process::start(command.env("RUST_LOG", "a=b=c")).terminate();
    assert!(
        !log.contains("RUST_LOG") && !log.contains("warning"),
        "{log}"
    );
}

/// Returns what the program writes to a terminal, up to `end`.
fn log_on_a_terminal(variable: &str, value: &str, end: &str) -> String {
    let mut command = program();
    command.env_remove("NO_COLOR").env("TERM", "xterm");
    command.env(variable, value);
    command.arg("--listen=127.0.0.1:0");
    let mut terminal = rexpect::session::spawn_command(command, Some(30_000)).unwrap();
    let log = terminal.exp_string(end).unwrap();
    terminal.send_control('c').unwrap();
    terminal.exp_string("counters balance").unwrap();
    terminal.exp_eof().unwrap();
    log
}

#[test]
fn log_is_coloured_on_a_terminal_only() {
    const ESCAPE: char = '\x1b';
    for (variable, value, is_coloured) in [
        ("NO_COLOR", "", true),
        ("NO_COLOR", "1", false),
        ("TERM", "dumb", false),
        ("ECHOSERVER_LOG_FORMAT", "json", false),
    ] {
        let log = log_on_a_terminal(variable, value, "buffer memory");
        assert_eq!(
            log.contains(ESCAPE),
            is_coloured,
            "{variable}={value}: {log:?}"
        );
        assert_eq!(log.contains("\x1b[32mINFO \x1b[0m"), is_coloured, "{log:?}");
    }
    let log = Process::serve(&[]).terminate();
    assert!(!log.contains(ESCAPE), "{log:?}");
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
    for line in log.lines() {
        let keys = [
            "{\"time\":\"",
            "\"level\":\"",
            "\"target\":\"",
            "\"message\":\"",
        ];
        let positions = keys.map(|key| line.find(key).unwrap_or_else(|| panic!("{key}: {line}")));
        assert!(positions.is_sorted() && positions[0] == 0, "{line}");
    }
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
    let config = line_with("configuration");
    for (name, value) in [
        ("workers", 1),
        ("buffer_size", 65_536),
        ("backlog", 4096),
        ("idle_timeout_ms", 0),
        ("drain_timeout_ms", 5000),
        ("busy_poll_us", 0),
    ] {
        assert_eq!(config[name], value, "{name}: {config:?}");
    }
    assert!(config["max_buffer_bytes"].as_u64() > config["spare_buffer_bytes"].as_u64());
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
        assert!(names.contains("ticks") && names.contains("bulk_turns"));
    }
}

#[test]
fn json_log_includes_failures_to_start() {
    let in_use = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = in_use.local_addr().unwrap();
    let mut failing = program();
    failing.args(["--log-format=json", "--listen", &address.to_string()]);
    let mut inheriting = program();
    inheriting.env("ECHOSERVER_LOG_FORMAT", "json");
    for (command, message) in [
        (
            &mut failing,
            format!("cannot listen on {address}: address already in use"),
        ),
        (
            inheriting.env("LISTEN_FDS", "x"),
            "LISTEN_FDS: expected a number of descriptors up to 1024, not 'x'".to_owned(),
        ),
    ] {
        let (exit, log) = Process::launch(command).wait();
        assert_eq!(exit.code(), Some(1), "{log}");
        let lines = objects(&log);
        let last = lines.last().expect("a line");
        assert_eq!(last["level"], "ERROR");
        assert_eq!(last["message"], message, "{log}");
    }
}

#[test]
fn invalid_command_line_is_reported_as_text() {
    let mut command = program();
    command.args(["--log-format=json", "--workers=0"]);
    let error = error_line(&mut command, 2);
    let start = "invalid value '0' for '--workers <N>': ";
    assert!(error.starts_with(start), "{error}");
}

/// Launches `command` with a file as its log, which is taken for a stream to the journal. Returns its status
/// and log.
fn run_under_journal(command: &mut std::process::Command) -> (Option<i32>, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let metadata = file.as_file().metadata().unwrap();
    command.env(
        "JOURNAL_STREAM",
        format!("{}:{}", metadata.dev(), metadata.ino()),
    );
    let process = Process::launch_with_stderr(command, file.reopen().unwrap());
    wait_until("it serves or fails", || {
        let log = fs::read_to_string(file.path()).unwrap();
        log.contains(READY) || log.contains("cannot listen")
    });
    // It may have failed.
    let _exited = rustix::process::kill_process(process.pid(), Signal::TERM);
    let (status, _) = process.wait();
    (status.code(), fs::read_to_string(file.path()).unwrap())
}

#[test]
fn journal_gets_priorities_instead_of_timestamps() {
    let mut command = program();
    command.args(["--listen=127.0.0.1:0", "--drain-timeout=1s"]);
    let (status, log) = run_under_journal(command.env("RUST_LOG", "a=b=c"));
    assert_eq!(status, Some(0), "{log}");
    let lines: Vec<_> = log.lines().collect();
    assert!(lines[0].starts_with("<4>RUST_LOG is not used: "), "{log}");
    assert!(lines[1].starts_with("<6>listening on 127.0.0.1:"), "{log}");
    assert!(
        lines[1..].iter().all(|line| line.starts_with("<6>")),
        "{log}"
    );

    let (status, log) = run_under_journal(program().arg("--listen=192.0.2.1:1"));
    assert_eq!(status, Some(1), "{log}");
    assert!(
        log.starts_with("<3>echoserver: cannot listen on 192.0.2.1:1: "),
        "{log}"
    );

    // Another stream than stderr, which was redirected.
    let mut command = program();
    command
        .arg("--listen=127.0.0.1:0")
        .env("JOURNAL_STREAM", "8:1");
    let log = Process::start(&mut command).terminate();
    assert!(log.starts_with('['), "{log}");
}

/// The file's size is limited, so that the last line that fits is incomplete.
#[test]
#[cfg(target_os = "linux")]
fn full_log_file_is_survived_and_lost_lines_are_reported() {
    use crate::harness::{BALANCED, program_after};

    let file = tempfile::NamedTempFile::new().unwrap();
    let read = || fs::read_to_string(file.path()).unwrap();
    let mut command = program_after("ulimit -f 4");
    let append = fs::File::options().append(true).open(file.path()).unwrap();
    let (server, address) = Process::start_without_log(&mut command, append);
    wait_until("the limit is reached", || {
        server.signal(Signal::USR1);
        // A unit of the limit has 512 or 1024 bytes.
        let length = read().len();
        length >= 2048 && length % 1024 == 0
    });
    let client = Client::connect(address);
    for _ in 0..20 {
        server.signal(Signal::USR1);
        client.ping(b"still there");
    }
    let full = read();
    assert!(!full.ends_with('\n'), "{full}");
    // Room for a few lines, after a part of one.
    let end_of_line = full[..full.len() - 900]
        .rfind('\n')
        .expect("there are lines");
    file.as_file().set_len(end_of_line as u64 + 5).unwrap();
    let mut log = String::new();
    wait_until("the lost lines are reported", || {
        server.signal(Signal::USR1);
        log = read();
        log.contains("] log lines were dropped: lines=") && log.contains(" reason=")
    });
    file.as_file().set_len(0).unwrap();
    client.close();
    server.signal(Signal::TERM);
    let (status, _) = server.wait();
    assert_eq!(status.code(), Some(0));
    assert!(read().ends_with(&format!("{BALANCED}\n")), "{}", read());
    let starts = |line: &str| line.matches("[20").count();
    assert!(log.lines().all(|line| starts(line) <= 1), "{log}");
}

/// More than the old limit of 2 s, in steps.
#[test]
#[cfg(target_os = "linux")]
fn exit_waits_for_a_slow_reader_of_the_log() {
    use std::io::Read;
    use std::net::TcpStream;
    use std::time::{Duration, Instant};

    use crate::harness::{BALANCED, ping_all};

    let (mut reader, writer) = std::io::pipe().unwrap();
    let (server, address) = Process::start_without_log(program().arg("-v"), writer);
    let clients: Vec<_> = (0..1000).map(|_| Client::connect(address)).collect();
    ping_all(&clients, b"x");
    clients.into_iter().for_each(Client::close);
    server.signal(Signal::TERM);
    wait_until("it has closed its listener", || {
        TcpStream::connect(address).is_err()
    });
    let mut log = vec![0; 4096];
    for step in 0..8 {
        let end = Instant::now() + Duration::from_millis(400);
        wait_until("the pause is over", || Instant::now() >= end);
        let start = 4096 * step;
        log.resize(start + 4096, 0);
        reader
            .read_exact(&mut log[start..])
            .expect("the log is full");
    }
    reader.read_to_end(&mut log).unwrap();
    assert_eq!(server.wait().0.code(), Some(0));
    let log = String::from_utf8(log).unwrap();
    assert!(log.ends_with(&format!("{BALANCED}\n")), "{log}");
    assert!(log.contains("] ended: accepted="), "{log}");
}

/// As another process can make it that shares the pipe or the terminal.
#[test]
#[cfg(target_os = "linux")]
fn non_blocking_stderr_loses_no_line() {
    use std::io::Read;

    use crate::harness::{BALANCED, ping_all};

    let (mut reader, writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let (server, address) = Process::start_without_log(program().arg("-v"), writer);
    let clients: Vec<_> = (0..1000).map(|_| Client::connect(address)).collect();
    ping_all(&clients, b"x");
    clients.into_iter().for_each(Client::close);
    server.signal(Signal::TERM);
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    assert_eq!(server.wait().0.code(), Some(0));
    assert!(log.ends_with(&format!("{BALANCED}\n")), "{log}");
    assert_eq!(log.matches(" reason=").count(), 1000);
    assert!(!log.contains("dropped"), "{log}");
}
