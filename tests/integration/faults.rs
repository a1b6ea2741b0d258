//! What a system can do to the program: too few descriptors, signals at any moment, a stalled or
//! broken log, a process that is stopped. It serves on, and its books balance.
//!
//! That it idles is counted, not timed: in lines of its log, in failed accepts and in wakes.

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, PipeWriter, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionbio;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, prlimit};
use serde_json::{Map, Value};

use crate::daemon::{Daemon, PATIENCE, program, program_with_descriptors, total};
use crate::support::{Client, check_echo, pattern, until, until_arrived};

const PAUSED: &str = "accepting is paused";

/// How often the acceptor looks, while it is paused, whether another process has notify_capacity descriptors.
const RETRIES_PER_SECOND: u64 = 10;

// Descriptors.

/// The limit is known, so the program never runs into it.
#[test]
fn more_clients_than_the_descriptor_limit_allows() {
    check_famine(Daemon::spawn(
        program_with_descriptors(64).arg("--workers=1"),
    ));
}

/// Told that it may have more connections than the system allows, the program does run into it.
#[test]
fn more_clients_than_descriptors() {
    let log = check_famine(Daemon::spawn(
        program_with_descriptors(64).args(["--workers=1", "--max-connections=200"]),
    ));
    assert!(log.contains("too many open files"), "{log}");
    assert!(total(&log, "accept_errors") > 0, "{log}");
}

#[test]
fn more_clients_than_connections_allowed() {
    let log = check_famine(Daemon::start(&["--workers=1", "--max-connections=40"]));
    assert_eq!(total(&log, "accept_errors"), 0, "{log}");
}

/// 200 clients come at once; each is served as soon as there is room, and those inside notice
/// nothing.
fn check_famine(mut daemon: Daemon) -> String {
    const CLIENTS: u64 = 200;
    let start = Instant::now();
    let mut clients: Vec<Client> = (0..CLIENTS)
        .map(|_| Client::connect(daemon.address()))
        .collect();
    for (client, seed) in clients.iter_mut().zip(0..) {
        client.send(&pattern(seed, 1_000));
    }
    daemon.wait_for_log(PAUSED);
    let worked = daemon.cpu_time();
    let paused = Instant::now();
    // The first are inside. The pause lasts for as long as they are served and nobody leaves.
    clients[0].expect(&pattern(0, 1_000));
    while paused.elapsed() < Duration::from_secs(1) {
        thread::sleep(Duration::from_millis(100));
        clients[0].ping(b"still served");
    }
    let working = daemon.cpu_time().saturating_sub(worked);
    let waiting = paused.elapsed();
    assert!(working < waiting / 2, "{working:?} of work in {waiting:?}");

    clients.remove(0).close();
    for (mut client, seed) in clients.into_iter().zip(1..) {
        client.expect(&pattern(seed, 1_000));
        client.close();
    }
    let log = daemon.end();
    let seconds = start.elapsed().as_secs() + 1;
    let complaints = log.matches(PAUSED).count() as u64;
    assert!(complaints <= seconds, "{complaints} in {seconds} s: {log}");
    assert_eq!(total(&log, "accepted"), CLIENTS, "{log}");
    assert_eq!(total(&log, "closed_peer_closed"), CLIENTS, "{log}");
    // At worst a pause for each that leaves, for each batch of those who come, and for each retry.
    let tries = total(&log, "accept_pauses");
    assert!(tries <= 2 * CLIENTS + seconds * RETRIES_PER_SECOND, "{log}");
    assert!(total(&log, "accept_errors") <= tries, "{log}");
    let wakes = total(&log, "wakes");
    assert!(wakes <= 10 * CLIENTS + seconds * 20, "{log}");
    log
}

/// Descriptors can be taken away and given back without any connection closing: only a timer sees it.
#[test]
fn descriptors_freed_by_others_are_noticed() {
    let mut daemon = Daemon::start(&["--workers=1"]);
    let mut inside: Vec<Client> = (0..5).map(|_| Client::connect(daemon.address())).collect();
    for client in &mut inside {
        client.ping(b"inside");
    }
    daemon.limit_descriptors(Some(5));
    let mut outside = Client::connect(daemon.address());
    outside.send(b"outside");
    daemon.wait_for_log("too many open files");
    for client in &mut inside {
        client.ping(b"still inside");
    }
    // As it was when it was started: as this process' own.
    daemon.limit_descriptors(getrlimit(Resource::Nofile).current);
    outside.expect(b"outside");
    drop((inside, outside));
    daemon.end();
}

// Signals.

/// A signal before it is caught ends the process as signals do, and one after that in order.
#[test]
fn signals_at_the_start() {
    for step in 0..40_usize {
        let mut daemon = Daemon::launch(program().arg("--workers=2"));
        // Not to let something happen, but to meet each moment of the start.
        thread::sleep(Duration::from_micros(200 * step as u64));
        let signal = [Signal::TERM, Signal::INT][step % 2];
        daemon.signal(signal);
        let (status, log) = (daemon.wait(), daemon.log());
        if log.is_empty() {
            continue;
        }
        assert_eq!(status.code(), Some(0), "{status} after: {log}");
        assert!(log.contains("counters balance: "), "{log}");
    }
    for signal in [Signal::TERM, Signal::INT] {
        let mut daemon = Daemon::start(&[]);
        daemon.signal(signal);
        daemon.wait_in_order();
    }
}

/// What has arrived is answered, whether it was accepted and read before the signal or not: all of
/// it arrives here while the program is stopped, and the signal with it.
#[test]
fn a_drain_answers_what_has_arrived() {
    let mut daemon = Daemon::start(&["--workers=2", "--drain-timeout=60s"]);
    let bytes = pattern(1, 30_000);
    let connect = || Client::connect(daemon.address());
    let mut clients: Vec<Client> = (0..150).map(|_| connect()).collect();
    for client in &mut clients {
        client.ping(b"inside");
    }
    daemon.stop();
    clients.extend((0..350).map(|_| connect()));
    for client in &mut clients {
        client.send(&bytes);
    }
    until_arrived(&clients);
    daemon.signal(Signal::TERM);
    daemon.signal(Signal::CONT);
    for client in &mut clients {
        client.expect(&bytes);
        client.expect_end();
    }
    drop(clients);
    let log = daemon.wait_in_order();
    assert_eq!(total(&log, "closed_shutdown"), 500, "{log}");
    assert_eq!(total(&log, "discarded"), 0, "{log}");
}

/// Clients in the midst of sending get a part of their answer and then an end, but no reset.
#[test]
fn a_drain_under_load_ends_every_stream_in_order() {
    const CLIENTS: usize = 100;
    // Who never stops sending is listened to for half of it.
    let mut daemon = Daemon::start(&["--workers=2", "--drain-timeout=8s"]);
    let (moving, moved) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            let (client, moving) = (Client::connect(daemon.address()), moving.clone());
            scope.spawn(move || send_until_the_end(client, &moving));
        }
        // All are in mid-transfer, or some of them for the third time.
        for _ in 0..3 * CLIENTS {
            moved.recv().expect("they run");
        }
        daemon.signal(Signal::TERM);
    });
    let log = daemon.wait_in_order();
    assert_eq!(total(&log, "accepted"), CLIENTS as u64, "{log}");
    assert_eq!(total(&log, "closed_drain_timeout"), 0, "{log}");
}

/// Sends the same again and again, and checks what comes back until it ends, in order. Tells each
/// time that all of it came back.
fn send_until_the_end(mut client: Client, moving: &Sender<()>) {
    let piece = pattern(2, 50_000);
    let (mut sender, over) = (client.twin(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            // The server may go away while this sends.
            let mut taken = true;
            while taken && !over.load(SeqCst) {
                taken = sender.0.write_all(&piece).is_ok();
            }
            let _gone = sender.0.shutdown(Shutdown::Write);
        });
        let mut place = 0;
        let mut chunk = vec![0; piece.len()];
        loop {
            let room = piece.len() - place;
            let count = client.0.read(&mut chunk[..room]).expect("no reset");
            if count == 0 {
                break;
            }
            assert!(chunk[..count] == piece[place..place + count], "other bytes");
            place = (place + count) % piece.len();
            if place == 0 {
                // Not listened to for ever.
                let _deaf = moving.send(());
            }
        }
        over.store(true, SeqCst);
    });
}

/// A client with an answer that is stuck, because it doesn't read.
fn stuck_client(daemon: &Daemon) -> Client {
    let mut client = Client::connect_narrow(daemon.address());
    let timeout = Some(Duration::from_millis(300));
    client.0.set_write_timeout(timeout).expect("it is not zero");
    let bytes = pattern(3, 100_000);
    loop {
        match client.0.write(&bytes) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return client,
            Err(error) => panic!("the server takes what it can: {error}"),
        }
    }
}

#[test]
fn a_drain_waits_for_the_timeout_and_no_longer() {
    let mut daemon = Daemon::start(&["--workers=1", "--drain-timeout=500ms"]);
    let stuck = stuck_client(&daemon);
    daemon.signal(Signal::TERM);
    let log = daemon.wait_in_order();
    assert_eq!(total(&log, "closed_drain_timeout"), 1, "{log}");
    assert!(total(&log, "discarded_drain_timeout") > 0, "{log}");
    drop(stuck);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    for (first, second, code) in [
        (Signal::TERM, Signal::TERM, 143),
        (Signal::INT, Signal::INT, 130),
        (Signal::INT, Signal::TERM, 143),
    ] {
        // The test itself would not wait for so long.
        let mut daemon = Daemon::start(&["--workers=1", "--drain-timeout=1h"]);
        let stuck = stuck_client(&daemon);
        daemon.signal(first);
        daemon.wait_for_log(": draining");
        daemon.signal(second);
        assert_eq!(daemon.wait().code(), Some(code));
        drop(stuck);
    }
}

#[test]
fn being_stopped_and_continued_loses_nothing() {
    let daemon = Daemon::start(&["--workers=2"]);
    let bytes = pattern(4, 8_000_000);
    thread::scope(|scope| {
        let transfers: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| check_echo(daemon.address(), &bytes)))
            .collect();
        let mut rounds = 0;
        while rounds < 10 || transfers.iter().any(|transfer| !transfer.is_finished()) {
            daemon.stop();
            daemon.signal(Signal::CONT);
            until("the server goes on", || daemon.state() != 'T');
            rounds += 1;
        }
    });
    daemon.end();
}

#[test]
fn sigpipe_is_nothing() {
    let daemon = Daemon::start(&[]);
    daemon.signal(Signal::PIPE);
    check_echo(daemon.address(), b"still here");
    daemon.end();
}

// The log.

/// The program with the longest log that it has.
fn loquacious() -> Command {
    let mut command = program();
    command.arg("--log-format=json").env("RUST_LOG", "trace");
    command
}

/// Enough connections, each of them logged, to fill a pipe and the queue in front of it.
fn log_much(daemon: &Daemon, connections: usize) {
    for _ in 0..connections {
        Client::connect(daemon.address()).ping(b"x");
    }
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let (_reader, writer) = io::pipe().unwrap();
    let mut daemon = Daemon::spawn_unheard(loquacious().arg("--workers=1"), writer);
    log_much(&daemon, 6_000);
    check_echo(daemon.address(), &pattern(5, 1_000_000));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn a_log_that_is_read_late_says_what_is_missing() {
    let (reader, writer) = io::pipe().unwrap();
    let mut daemon = Daemon::spawn_unheard(loquacious().arg("--workers=1"), writer);
    log_much(&daemon, 6_000);
    let (found, finding) = mpsc::channel();
    let reading = thread::spawn(move || {
        for line in BufReader::new(reader).lines().map_while(Result::ok) {
            let line: Map<String, Value> = serde_json::from_str(&line).expect("an object");
            let message = line["message"].as_str().expect("it has a message");
            if message.contains("log lines were dropped") {
                assert_eq!(
                    (&line["level"], &line["target"]),
                    (&"WARN".into(), &"echoserver".into())
                );
                // Only the first one is waited for.
                let _unheard = found.send(());
            }
        }
    });
    finding.recv_timeout(PATIENCE).expect("it says so");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
    reading.join().unwrap();
}

/// Fills a pipe, so that whoever writes to it next waits for a reader.
fn fill(pipe: &mut PipeWriter) {
    ioctl_fionbio(&*pipe, true).expect("it is a pipe");
    for size in [4096, 1] {
        while pipe.write(&vec![b'x'; size]).is_ok() {}
    }
    ioctl_fionbio(&*pipe, false).expect("it is a pipe");
}

#[test]
fn a_failure_ends_it_though_nobody_reads_why() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap().to_string();
    let (_reader, mut writer) = io::pipe().unwrap();
    fill(&mut writer);
    // Once the log is silent, and once its thread is stuck by then.
    for level in ["-qqq", "-vv"] {
        let stderr = writer.try_clone().unwrap();
        let mut command = program();
        command.args([level, "--listen", &taken]);
        // Too many connections: a warning comes first.
        let mut daemon = Daemon::launch_with(command.arg("-c1000000000"), stderr);
        assert_eq!(daemon.wait().code(), Some(1), "{level}");
    }
}

#[test]
fn a_broken_log_stops_nothing() {
    let (reader, writer) = io::pipe().unwrap();
    let mut daemon = Daemon::spawn_unheard(loquacious().arg("--workers=1"), writer);
    drop(reader);
    log_much(&daemon, 500);
    check_echo(daemon.address(), &pattern(6, 1_000_000));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
}

impl Daemon {
    /// Sets the number of descriptors that it may have.
    fn limit_descriptors(&self, current: Option<u64>) {
        let limits = Rlimit {
            current,
            maximum: getrlimit(Resource::Nofile).maximum,
        };
        prlimit(Some(self.pid()), Resource::Nofile, limits).expect("it is a child");
    }

    /// Stops it, until it is told to continue.
    fn stop(&self) {
        self.signal(Signal::STOP);
        until("the server is stopped", || self.state() == 'T');
    }

    /// Its state, as the kernel tells it: `T` is stopped.
    fn state(&self) -> char {
        let words = self.stat();
        words[0].chars().next().expect("a state is a letter")
    }

    /// The time it has worked for, in user and system mode.
    fn cpu_time(&self) -> Duration {
        const TICKS_PER_SECOND: u64 = 100;
        let words = self.stat();
        let ticks = |place: usize| words[place].parse::<u64>().expect("a number");
        Duration::from_millis((ticks(11) + ticks(12)) * 1_000 / TICKS_PER_SECOND)
    }

    /// The fields of its `stat`, from the state on: its name may hold anything.
    fn stat(&self) -> Vec<String> {
        let path = format!("/proc/{}/stat", self.pid().as_raw_nonzero());
        let stat = fs::read_to_string(path).expect("it runs");
        let (_, fields) = stat.rsplit_once(')').expect("its name is in parentheses");
        fields.split_whitespace().map(str::to_owned).collect()
    }
}
