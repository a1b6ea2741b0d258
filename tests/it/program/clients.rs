//! Clients that people use: netcat, socat and telnet.

use std::thread;

use crate::harness::{DEADLINE, Process, command, installed, program, random_bytes};

/// Sends `bytes` through a client's stdin, and expects them at its stdout.
fn check_client(arguments: &[&str], bytes: &[u8]) {
    let mut client = command(arguments[0]);
    client.args(&arguments[1..]);
    let mut client = assert_cmd::Command::from_std(client);
    let output = client
        .timeout(DEADLINE)
        .write_stdin(bytes)
        .output()
        .expect("it exits");
    assert!(output.status.success(), "{arguments:?}: {}", output.status);
    assert_eq!(output.stdout.len(), bytes.len(), "{arguments:?}");
    assert!(
        output.stdout == bytes,
        "{arguments:?}: other bytes came back"
    );
}

#[test]
fn netcat_transfers_in_parallel() {
    if !installed(&["nc"]) {
        return;
    }
    let server = Process::serve(&["--workers=2"]);
    let port = &server.address().port().to_string();
    thread::scope(|scope| {
        for seed in 0..8 {
            let bytes = random_bytes(seed, 3_000_000);
            scope.spawn(move || check_client(&["nc", "-N", "127.0.0.1", port], &bytes));
        }
    });
    server.terminate();
}

#[test]
fn socat_transfers() {
    if !installed(&["socat"]) {
        return;
    }
    let server = Process::serve(&[]);
    let target = format!("TCP:{}", server.address());
    // Without -t it waits no longer than half a second for what comes after its own EOF.
    check_client(
        &["socat", "-t30", "-", &target],
        &random_bytes(9, 5_000_000),
    );
    server.terminate();
}

/// Types lines at a terminal, commands of other servers among them, and leaves.
fn check_telnet(server: &Process) -> Result<(), rexpect::error::Error> {
    let address = server.address();
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
fn telnet_works_over_ipv4_and_ipv6() {
    if !installed(&["telnet"]) {
        return;
    }
    for listen in ["--listen=127.0.0.1:0", "--listen=[::1]:0"] {
        let server = Process::start(program().arg(listen));
        check_telnet(&server).unwrap_or_else(|error| panic!("{listen}: {error}"));
        server.terminate();
    }
}
