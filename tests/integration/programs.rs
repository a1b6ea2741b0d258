//! Real programs as clients. One that isn't installed is skipped, with a line that says so.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::thread;

use crate::daemon::{Daemon, program};
use crate::support::pattern;

/// Whether a program is there.
fn has(name: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", "command -v \"$0\"", name])
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        println!("skipped: {name} is not installed");
    }
    found
}

/// Sends `bytes` through a client's stdin, closes it, and expects them back at its stdout.
fn check_client(client: &mut Command, bytes: &[u8]) {
    let mut child = client
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it is installed");
    let mut stdin = child.stdin.take().expect("it is piped");
    let mut stdout = child.stdout.take().expect("it is piped");
    let mut echoed = Vec::new();
    thread::scope(|scope| {
        // The drop of stdin is its end.
        scope.spawn(move || stdin.write_all(bytes).expect("the client takes it all"));
        stdout.read_to_end(&mut echoed).expect("the client answers");
    });
    assert!(child.wait().expect("it is a child").success());
    assert_eq!(echoed.len(), bytes.len());
    assert!(echoed == bytes, "some bytes have changed");
}

#[test]
fn netcats_side_by_side() {
    if !has("nc") {
        return;
    }
    let daemon = Daemon::start(&["--workers=2"]);
    let port = daemon.address().port().to_string();
    thread::scope(|scope| {
        for seed in 0..8 {
            let port = &port;
            scope.spawn(move || {
                let mut client = Command::new("timeout");
                client.args(["30", "nc", "-N", "127.0.0.1", port]);
                check_client(&mut client, &pattern(seed, 3_000_000));
            });
        }
    });
    daemon.end();
}

#[test]
fn socat() {
    if !has("socat") {
        return;
    }
    let daemon = Daemon::start(&[]);
    // Without -t it waits no longer than half a second for what comes after its own end.
    let target = format!("TCP:{}", daemon.address());
    let mut client = Command::new("timeout");
    client.args(["30", "socat", "-t30", "-", &target]);
    check_client(&mut client, &pattern(9, 5_000_000));
    daemon.end();
}

/// A person at a terminal.
fn check_telnet(daemon: &Daemon) -> Result<(), rexpect::error::Error> {
    let address = daemon.address();
    let telnet = format!("telnet {} {}", address.ip(), address.port());
    let mut terminal = rexpect::spawn(&telnet, Some(20_000))?;
    terminal.exp_string("Escape character is '^]'.")?;
    for line in ["hello", "quit", "exit", "a line of several words"] {
        terminal.send_line(line)?;
        // Once as the terminal shows what is typed, and once as it comes back.
        terminal.exp_string(line)?;
        terminal.exp_string(line)?;
    }
    terminal.send_control(']')?;
    terminal.exp_string("telnet>")?;
    terminal.send_line("quit")?;
    terminal.exp_eof()?;
    Ok(())
}

#[test]
fn telnet_over_both_versions_of_ip() {
    if !has("telnet") {
        return;
    }
    for listen in ["127.0.0.1:0", "[::1]:0"] {
        let daemon = Daemon::spawn(program().args(["--listen", listen]));
        check_telnet(&daemon).unwrap_or_else(|error| panic!("{listen}: {error}"));
        daemon.end();
    }
}
