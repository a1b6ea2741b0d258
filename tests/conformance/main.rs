//! The commands `check` and `load`, tried on this server, on a plain one that is right, and on faulty ones.

#![cfg(unix)]

#[allow(
    dead_code,
    unused_imports,
    reason = "only processes and waits are needed here"
)]
#[path = "../it/harness/mod.rs"]
mod harness;
mod servers;

use std::net::{Ipv4Addr, TcpListener};
use std::thread;

use harness::{Process, program, run};
use serde_json::Value;
use servers::{Fault, ThreadPerConnection};

/// Runs `echoserver COMMAND ADDRESS --json`; returns its exit status and report.
fn report(command: &str, address: &str, arguments: &[&str]) -> (i32, Value) {
    let output = run(program().args([command, address, "--json"]).args(arguments));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.is_empty(), "{stderr}");
    let status = output.status.code().expect("no signal");
    let report = serde_json::from_slice(&output.stdout).expect("one JSON object");
    (status, report)
}

/// Returns the names and errors of the cases that ended so.
fn cases_with(report: &Value, status: &str) -> Vec<(String, String)> {
    let cases = report["cases"].as_array().expect("a list");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    cases
        .iter()
        .filter(|case| case["status"] == status)
        .map(|case| (text(&case["name"]), text(&case["error"])))
        .collect()
}

#[track_caller]
fn check_passes(address: &str, skipped: usize) {
    let (status, report) = report("check", address, &["--strict", "--jobs=8"]);
    assert_eq!(cases_with(&report, "fail"), [], "{address}");
    assert_eq!(cases_with(&report, "ok").len(), 29 - skipped);
    assert_eq!(cases_with(&report, "skip").len(), skipped);
    assert_eq!(status, 0);
}

#[test]
fn this_server_passes_every_case() {
    let folder = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}/echo", folder.path().display());
    let listen = format!("--listen={unix}");
    let server = Process::serve(&["--workers=2", &listen]);
    check_passes(&server.address().to_string(), 0);
    check_passes(&unix, 2);
    server.terminate();
}

#[test]
fn plain_server_passes_every_required_case() {
    raise_descriptor_limit();
    let server = ThreadPerConnection::start(Fault::LosesUrgentData);
    let (status, report) = report("check", &server.address().to_string(), &["--jobs=8"]);
    assert_eq!(cases_with(&report, "fail"), []);
    let warnings = cases_with(&report, "warn");
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(
        warnings
            .iter()
            .all(|(name, _)| name.starts_with("urgent-data"))
    );
    assert_eq!(status, 0);
}

#[test]
fn plain_server_with_inline_urgent_data_passes_every_case() {
    raise_descriptor_limit();
    let server = ThreadPerConnection::start(Fault::None);
    check_passes(&server.address().to_string(), 0);
}

/// Cases are tried at the same time, some with hundreds of connections.
fn raise_descriptor_limit() {
    // If it stays low, a case reports that it cannot connect.
    let _limit = rlimit::increase_nofile_limit(u64::MAX);
}

/// The kernel accepts connections and bytes, and no one reads them.
#[test]
fn server_that_never_answers_fails_in_bounded_time() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (status, report) = report("check", &address, &["--patience=0.5", "--jobs=4"]);
    assert_eq!(status, 1);
    let passed = cases_with(&report, "ok");
    assert!(passed.len() < 6, "{passed:?}");
}

#[test]
fn faults_are_named() {
    let faults = [
        (
            Fault::DropsTheTail,
            "half-close-then-read-late",
            "of 3,000,000 bytes came back, then EOF",
        ),
        (
            Fault::DropsTheTail,
            "half-close-then-read-late-by-a-small-window",
            "bytes came back, then EOF",
        ),
        (
            Fault::StallsAfterABurst,
            "burst",
            "16,384 of 20,000 bytes came back, then nothing for 5s",
        ),
        (
            Fault::ObeysQuit,
            "commands",
            r#"after "quit\n": 0 of 5 bytes came back, then EOF"#,
        ),
        (
            Fault::SpeaksFirst,
            "never-speaks-first",
            r#"the server spoke first: "220 ready\r\n""#,
        ),
        (
            Fault::LosesThePartialWritesRest,
            "late-reader",
            "of 12,000,000 was sent as",
        ),
        (
            Fault::ChangesAByte,
            "bulk",
            "byte 100,001 of 20,000,000 was sent as",
        ),
        (
            Fault::ResetsOnClose,
            "half-close-after-all-is-read",
            "everything came back, then a reset instead of EOF",
        ),
        (
            Fault::NeverEnds,
            "half-close-at-once",
            "then nothing for 5s instead of EOF",
        ),
        (
            Fault::KnowsNoBound,
            "backpressure",
            "no limit: 67,108,864 bytes were accepted from a client that never reads",
        ),
        (
            Fault::LosesUrgentData,
            "urgent-data-with-bytes-after-it",
            "the urgent byte after 0 bytes did not come back in its place",
        ),
        (
            Fault::ServesOneAtATime,
            "crowd",
            "among 300 open connections: 0 of 399 bytes came back, then nothing for 5s",
        ),
        (
            Fault::DiesOfAReset,
            "resets-at-any-point",
            "cannot connect | 0 of 1 bytes came back, then",
        ),
    ];
    raise_descriptor_limit();
    thread::scope(|scope| {
        for (fault, case, named) in faults {
            scope.spawn(move || {
                let server = ThreadPerConnection::start(fault);
                let address = server.address().to_string();
                let only = format!("--only={case}");
                let (status, report) = report("check", &address, &["--strict", &only]);
                let failed = cases_with(&report, "fail");
                assert_eq!((status, failed.len()), (1, 1), "{fault:?} was not detected");
                let error = &failed[0].1;
                assert!(
                    named.split(" | ").any(|named| error.contains(named)),
                    "{fault:?} was called {error:?}, not {named:?}"
                );
            });
        }
    });
}
