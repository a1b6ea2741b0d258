//! Snapshots of what users read: the help, the man page and typical errors.
//!
//! `SNAPSHOTS=overwrite cargo test --test it snapshots` writes them anew; review the difference before you commit it.

use std::net::TcpListener;

use snapbox::{Assert, Data, file};

use crate::harness::{program, run};

/// Compares without patterns: brackets in a snapshot stand for themselves.
fn check(text: &str, snapshot: Data) {
    let assert = Assert::new().action_env(snapbox::assert::DEFAULT_ACTION_ENV);
    assert.eq(text, snapshot.raw());
}

fn stdout(arguments: &[&str]) -> String {
    let output = run(program().args(arguments).env_remove("COLUMNS"));
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn help_matches_its_snapshot() {
    check(&stdout(&["--help"]), file!["snapshots/help.txt"]);
    check(
        &stdout(&["check", "--help"]),
        file!["snapshots/help-check.txt"],
    );
    check(
        &stdout(&["load", "--help"]),
        file!["snapshots/help-load.txt"],
    );
    check(
        &stdout(&["plot", "--help"]),
        file!["snapshots/help-plot.txt"],
    );
    check(&stdout(&["check", "--list"]), file!["snapshots/cases.txt"]);
}

#[test]
fn man_pages_match_their_snapshots() {
    let page = |name| stdout(&["--generate", name]).replace(env!("CARGO_PKG_VERSION"), "VERSION");
    check(&page("man"), file!["snapshots/man.txt"]);
    check(&page("man-check"), file!["snapshots/man-check.txt"]);
    check(&page("man-load"), file!["snapshots/man-load.txt"]);
    check(&page("man-plot"), file!["snapshots/man-plot.txt"]);
}

#[test]
fn errors_match_their_snapshot() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let in_use = other.local_addr().unwrap().to_string();
    let report = |line: &str| {
        let line = line.replace("ADDRESS_IN_USE", &in_use);
        let (variable, arguments) = line.split_once("echoserver").expect("a command line");
        let mut command = program();
        command.args(arguments.split_whitespace());
        if let Some((name, value)) = variable.trim().split_once('=') {
            command.env(name, value);
        }
        let output = run(&mut command);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let status = output.status.code().expect("no signal");
        format!("$ {line}\n{stderr}exit status {status}\n").replace(&in_use, "ADDRESS_IN_USE")
    };
    let reports = [
        "echoserver --workers=0",
        "echoserver --workers=1 --workers=2",
        "echoserver --workers",
        "ECHOSERVER_WORKERS=abc echoserver",
        "echoserver --listen=localhost",
        "echoserver --listen=::1",
        "echoserver --listen=*:5555",
        "echoserver --listen=tcp://localhost:5555",
        "echoserver --listen=256.1.1.1:5555",
        "echoserver --listen=127.0.0.1:0, 127.0.0.1:0",
        "ECHOSERVER_LISTEN=127.0.0.1:0,*:0 echoserver",
        "echoserver --listen=192.0.2.1:5555",
        "echoserver --listen=unix:/missing/echo",
        "echoserver --listen=ADDRESS_IN_USE",
        "echoserver --listen=127.0.0.1:0 --metrics=ADDRESS_IN_USE",
        "echoserver --unix-mode=9",
        "ECHOSERVER_UNIX_MODE=0600 echoserver",
        "echoserver --max-connections=many",
        "echoserver --max-connections=18446744073709551616",
        "echoserver --buffer-size=2GiB",
        "echoserver --buffer-size -1",
        "echoserver --idle-timeout=5fortnights",
        "echoserver --tcp-keepalive=10h",
        "echoserver --stats-interval=0s",
        "echoserver --log-format=xml",
        "echoserver --delay=2s..1s",
        "echoserver --slice=0",
        "echoserver --fault=hang@5s",
        "echoserver --fault=stall@5",
        "ECHOSERVER_FAULT=drop@eof echoserver",
        "echoserver --fault-share=101",
        "echoserver --drain-time=1s",
        "echoserver stray",
        "echoserver 5555",
        "echoserver localhost:5555",
        "echoserver -p 5555",
        "echoserver --port=5555",
        "echoserver check -p 5555 localhost",
        "echoserver -v check 5555",
        "echoserver check",
        "echoserver check localhost",
        "echoserver check 127.0.0.1:1",
        "echoserver check :1",
        "ECHOSERVER_WORKERS=abc echoserver check 127.0.0.1:1",
        "echoserver check unix:/missing/echo",
        "echoserver check 5555 --only=nothing",
        "echoserver check 5555 --only=[",
        "echoserver check 5555 --patience=0",
        "echoserver check 5555 --jobs=0",
        "echoserver load",
        "echoserver load 127.0.0.1:1",
        "echoserver load 127.0.0.1:1 --rate=fast",
        "echoserver load 127.0.0.1:1 --size=0",
        "echoserver load 127.0.0.1:1 --duration=long",
        "echoserver load 127.0.0.1:1 --connections=0",
        "echoserver load -d -1 127.0.0.1:1",
        "echoserver load 127.0.0.1:1 --flood --rate=1",
        "echoserver load 127.0.0.1:1 -n 1 --warm-up=1",
        "echoserver plot 1 2 3 4 5 6 7 8 -o chart.svg",
    ];
    let text = reports.map(report).join("\n");
    check(&text, file!["snapshots/errors.txt"]);
}
