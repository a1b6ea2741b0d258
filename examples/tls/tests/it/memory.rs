//! What an idle connection costs.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use crate::harness::{Client, Identity};

struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _exited = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Program {
    fn resident_bytes(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.unwrap().trim().trim_end_matches(" kB");
        number.parse::<usize>().unwrap() * 1024
    }
}

/// What the documentation of `Tls` says.
#[test]
fn idle_connection_costs_as_much_as_documented() {
    const CLIENTS: usize = 400;
    let (certificate, key) = Identity::get().files("memory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_echoserver-tls"));
    command.args(["127.0.0.1:0", &certificate, &key]);
    let mut program = Program(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    let mut stdout = BufReader::new(program.0.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("listening on ").expect(&line);
    let address = address.parse().unwrap();
    let connect = |_| {
        let mut client = Client::connect(address, None);
        for message in [&[b'a'; 100][..], &[b'b'; 16_000], &[b'c'; 100]] {
            client.send(message);
            client.expect(message);
        }
        client
    };
    let _warm: Vec<_> = (0..100).map(connect).collect();
    let before = program.resident_bytes();
    let _idle: Vec<_> = (0..CLIENTS).map(connect).collect();
    let cost = program.resident_bytes().saturating_sub(before) / CLIENTS;
    println!("{cost} bytes for each idle connection");
    assert!(cost <= 12 << 10, "{cost} bytes for each idle connection");
}
