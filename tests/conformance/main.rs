//! The commands `check` and `load`, tried on a plain server that is right, and on faulty ones; and `load` on this server,
//! also with its faults on request.
//!
//! This server passes every case of `check`: see the contract's module `byte_exact`.

#![cfg(unix)]

#[allow(dead_code, unused_imports, reason = "only a part is needed")]
#[path = "../it/harness/mod.rs"]
mod harness;
#[cfg(target_os = "linux")]
mod limits;
mod load;
mod matrix;
mod servers;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use harness::{DEADLINE, Process, cases_with, program, report, run};
use rustix::process::Signal;
use serde_json::Value;
use servers::{DETECTED, Fault, WRONG_PLACE, listen};
use socket2::SockRef;

#[test]
fn plain_server_passes_every_required_case() {
    let address = servers::start(Fault::LosesUrgentData);
    let (status, report) = report("check", &address, &["--jobs=8"]);
    assert_eq!(cases_with(&report, "fail"), []);
    let [(first, _), (second, _)] = cases_with(&report, "warn")[..] else {
        panic!("not two warnings: {report}");
    };
    assert!(first.starts_with("urgent-data") && second.starts_with("urgent-data"));
    assert_eq!(status, 0);
}

#[test]
fn failed_strict_cases_are_warnings_in_the_text() {
    let address = servers::start(Fault::LosesUrgentData);
    let check = |arguments: &[&str]| {
        let output = run(program().args(["check", &address]).args(arguments));
        let text = String::from_utf8(output.stdout).expect("text");
        (output.status.code(), text)
    };
    let (status, text) = check(&["--only=urgent_data_in*", "--only=burst"]);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!((status, lines.len()), (Some(0), 3), "{text}");
    assert!(lines[0].starts_with("ok       burst "), "{text}");
    let is_warning = lines[1].starts_with("warn     urgent-data-in-a-stream ");
    assert!(is_warning, "{text}");
    let summary = "1 of 2 cases passed, 0 failed, 1 strict failed (not counted without --strict)";
    assert_eq!(lines[2], format!("{address}: {summary}"));

    let (status, text) = check(&["--only=urgent-data-in*", "--strict"]);
    assert!(
        text.starts_with("FAIL     urgent-data-in-a-stream "),
        "{text}"
    );
    let has_summary = text.ends_with(": 0 of 1 cases passed, 1 failed\n");
    assert!(has_summary && status == Some(1), "{status:?}: {text}");
}

#[test]
fn plain_server_with_inline_urgent_data_passes_every_case() {
    let address = servers::start(Fault::None);
    let (status, report) = report("check", &address, &["--strict", "--jobs=8"]);
    assert_eq!(cases_with(&report, "fail"), []);
    assert_eq!((status, cases_with(&report, "ok").len()), (0, 29));
}

/// The kernel accepts connections and bytes, and no one reads them.
#[test]
fn server_that_never_answers_fails_in_bounded_time() {
    let (_listener, address) = listen();
    let (status, report) = report("check", &address, &["--patience=0.5", "--jobs=8"]);
    assert_eq!(status, 1);
    let passed = cases_with(&report, "ok");
    assert!(passed.len() < 6, "{passed:?}");
}

#[test]
fn faults_are_named() {
    thread::scope(|scope| {
        for &(fault, case, named) in DETECTED {
            scope.spawn(move || {
                let address = servers::start(fault);
                let only = format!("--only={case}");
                let (status, report) = report("check", &address, &["--strict", &only]);
                let failed = cases_with(&report, "fail");
                assert_eq!((status, failed.len()), (1, 1), "{fault:?} was not detected");
                let error = failed[0].1;
                assert!(
                    named.split(" | ").any(|named| error.contains(named)),
                    "{fault:?} was called {error:?}, not {named:?}"
                );
            });
        }
    });
}

#[test]
fn greeting_is_skipped_on_request() {
    let address = servers::start(Fault::SendsFirst);
    let cases = [
        "every-byte*",
        "never-speaks*",
        "half-close-at*",
        "crowd",
        "churn",
    ];
    let only = cases.map(|case| format!("--only={case}"));
    let mut arguments = vec!["--skip-greeting"];
    arguments.extend(only.iter().map(String::as_str));
    let (status, report) = report("check", &address, &arguments);
    assert_eq!(cases_with(&report, "fail"), []);
    assert_eq!((status, cases_with(&report, "ok").len()), (0, 6));
}

#[test]
fn greeting_that_does_not_come_is_an_error() {
    let address = servers::start(Fault::None);
    let arguments = ["--skip-greeting", "--only=burst", "--patience=0.5"];
    let (status, report) = report("check", &address, &arguments);
    let error = "the greeting was not a line: nothing for 500ms";
    assert_eq!(
        (status, cases_with(&report, "fail")),
        (1, vec![("burst", error)])
    );
}

fn recorded_times(report: &Value) -> u64 {
    let histogram = report["rtt_ns"]["histogram"].as_array().expect("a list");
    let counts = histogram.iter().map(|pair| pair[1].as_u64());
    counts.sum::<Option<u64>>().expect("numbers")
}

#[test]
fn load_verifies_every_byte_in_every_mode() {
    let folder = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}/echo", folder.path().display());
    let server = Process::serve(&["--workers=2", &format!("--listen={unix}")]);
    let tcp = server.address().to_string();
    for (arguments, size) in [
        ("-n=1", 64),
        ("-n=1000 -c=7 --threads=2", 64),
        ("-n=300 -c=3 --size=100KiB", 100 << 10),
        ("-n=10001 -c=10 --in-flight=16 --size=7", 7),
        ("-n=500 -c=4 --flood", 64 << 10),
        ("-n=300 -c=5 --connect --threads=2", 64),
        ("-n=100 -c=3 --rate=1000 --threads=3", 64),
        ("-n=100 -c=3 --rate=1000 --connect", 64),
    ] {
        let arguments: Vec<_> = arguments.split(' ').collect();
        let messages: u64 = arguments[0].strip_prefix("-n=").unwrap().parse().unwrap();
        for address in [&tcp, &unix] {
            let (status, report) = report("load", address, &arguments);
            let count = |name: &str| report[name].as_u64().expect("a number");
            let counts = ["failed", "messages", "bytes_verified"].map(count);
            assert_eq!(
                (status, counts, recorded_times(&report)),
                (0, [0, messages, messages * size], messages),
                "{arguments:?}: {}",
                report["errors"]
            );
        }
    }
    server.terminate();
}

/// One wrong place in each of two streams of 52 MB.
#[test]
fn load_detects_wrong_bytes() {
    let faults = [
        Fault::SwapsTwoReads,
        Fault::RepeatsARead,
        Fault::MixesConnections,
    ];
    let plain = faults.map(|fault| (format!("{fault:?}"), servers::start(fault)));
    let flip = format!("--fault=corrupt@{WRONG_PLACE}B");
    let server = Process::serve(&[&flip]);
    let this = (flip, server.address().to_string());
    thread::scope(|scope| {
        for (fault, address) in plain.into_iter().chain([this]) {
            scope.spawn(move || {
                let arguments = ["--flood", "-n=1600", "-c=2"];
                let (status, report) = report("load", &address, &arguments);
                let errors = report["errors"].as_object().expect("an object");
                let failed = &report["failed"];
                assert_eq!((status, failed), (1, &2.into()), "{fault}: {errors:?}");
                // The fault is in the read that reaches 29,9xx,xxx, and shows there or in the one after it.
                let places = ["wrong byte: byte 29,9", "wrong byte: byte 30,0"];
                let is_wrong_byte =
                    |error: &String| places.iter().any(|place| error.starts_with(place));
                assert!(errors.keys().all(is_wrong_byte), "{fault}: {errors:?}");
            });
        }
    });
    server.terminate();
}

#[test]
fn load_leaves_the_warm_up_out_of_its_figures() {
    let server = Process::serve(&[]);
    let address = server.address().to_string();
    let (status, report) = report("load", &address, &["--warm-up=0.2", "--duration=0.2"]);
    let messages = report["messages"].as_u64().expect("a number");
    // What was in flight at the end has a time as well.
    let after_end = report["after_end"].as_u64().expect("a number");
    let times = recorded_times(&report);
    assert_eq!((status, times), (0, messages + after_end));
    assert_eq!(report["bytes_verified"], messages * 64);
    assert!(report["warm_up"]["messages"].as_u64() > Some(0), "{report}");
    server.terminate();
}

#[test]
fn load_gives_up_a_connection_without_answers() {
    let (_listener, address) = listen();
    let (status, report) = report("load", &address, &["-n=1", "--timeout=0.2"]);
    let counts = ["unanswered", "lost"].map(|name| &report[name]);
    assert_eq!((status, counts), (1, [&1.into(), &0.into()]), "{report}");
    let errors = serde_json::json!({ "nothing came back for 200ms": 1 });
    assert_eq!(report["errors"], errors);
}

#[test]
fn load_ends_at_an_impossible_rate() {
    let server = Process::serve(&[]);
    let address = server.address().to_string();
    let (status, report) = report("load", &address, &["--rate=10000000", "--duration=0.2"]);
    assert_eq!((status, &report["failed"]), (1, &0.into()), "{report}");
    assert!(report["unanswered"].as_u64() > Some(0));
}

/// Accepts the next connection on which something is sent, and echoes two messages. When the second has arrived, the
/// first has come back.
fn echo_two_messages(listener: &TcpListener) -> TcpStream {
    let mut message = [0; 64];
    // On Linux, it bounds accept as well.
    let listening = SockRef::from(listener);
    listening.set_read_timeout(Some(DEADLINE)).unwrap();
    loop {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        // The first connection only tests whether the server can be reached.
        if stream.read_exact(&mut message).is_ok() {
            stream.write_all(&message).unwrap();
            stream.read_exact(&mut message).unwrap();
            return stream;
        }
    }
}

#[test]
fn signal_ends_the_load_with_its_summary() {
    for signal in [Signal::INT, Signal::TERM] {
        let (listener, address) = listen();
        let load = Process::launch_with_stdout(program().args(["load", &address, "-d=0"]));
        let _connection = echo_two_messages(&listener);
        load.signal(signal);
        let (status, output) = load.wait();
        assert_eq!(status.code(), Some(0), "{output}");
        assert!(output.contains("\nverified      64 bytes\n"), "{output}");
    }
}

#[test]
fn failed_connection_is_counted_and_opened_again() {
    let (listener, address) = listen();
    let arguments = ["load", &address, "-d=0", "--rate=100"];
    let load = Process::launch_with_stdout(program().args(arguments));
    drop(echo_two_messages(&listener));
    let _connection = echo_two_messages(&listener);
    load.signal(Signal::INT);
    let (status, output) = load.wait();
    assert_eq!(status.code(), Some(1), "{output}");
    let is_counted = output.contains("connections   1 of 1 answered, 1 failed of 2 attempts\n");
    assert!(is_counted, "{output}");
}

#[test]
fn load_prints_a_line_each_second_on_a_terminal() {
    let server = Process::serve(&[]);
    let mut command = program();
    command.args(["load", &server.address().to_string(), "--rate=50", "-d=0"]);
    let timeout = u64::try_from(DEADLINE.as_millis()).unwrap();
    let mut terminal = rexpect::session::spawn_command(command, Some(timeout)).unwrap();
    let line = r"    1 s  +[0-9]+ messages/s  p99 ";
    terminal.exp_regex(line).unwrap();
    terminal.send_control('c').unwrap();
    terminal.exp_string("verified ").unwrap();
    terminal.exp_eof().unwrap();
    server.terminate();
}
