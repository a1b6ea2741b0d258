//! Clients of every kind at once against one server process, every byte checked; then descriptors, memory and
//! counters are compared with the start.
//!
//! `SOAK_SECONDS=600 cargo test --release --test it soak -- --nocapture` runs for ten minutes. What the clients do
//! follows from `SOAK_SEED`, which is printed; when they do it depends on the scheduler.

use std::env;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use echoserver::Config;
use fastrand::Rng;

use crate::harness::{Client, Process, SetOnDrop, random_bytes, total, wait_until};

const WORKERS: usize = 2;
const MAX_CONNECTIONS: usize = 400;
const BUFFER_SIZE: usize = 16 << 10;

/// Clients of each kind that run at the same time.
const CLIENTS: u64 = 2;

/// What a process may grow by in addition to its buffers: the connection tables, and what the system's allocator
/// keeps for each thread.
const MAX_GROWTH_KIB: u64 = 8 << 10;

/// One client from its start to its end.
type Kind = fn(SocketAddr, &mut Rng);

const KINDS: [(&str, Kind); 10] = [
    ("echo", echo),
    ("half-close", half_close),
    ("late reader", late_reader),
    ("slow reader", slow_reader),
    ("never reader", never_reader),
    ("reset", reset),
    ("connect and close", connect_and_close),
    ("flood", flood),
    ("churn", churn),
    ("crowd", crowd),
];

/// Returns from 1 to `max_length` bytes, of every order of magnitude equally often.
fn any_bytes(rng: &mut Rng, max_length: usize) -> Vec<u8> {
    let magnitude = rng.u32(0..=max_length.ilog2());
    let length = rng.usize(1 << magnitude..2 << magnitude);
    random_bytes(rng.u64(..), length.min(max_length))
}

fn echo(address: SocketAddr, rng: &mut Rng) {
    let client = Client::connect(address);
    for _ in 0..rng.u32(0..50) {
        send_and_expect(&client, &any_bytes(rng, 50_000));
    }
    client.check_echo(&any_bytes(rng, 50_000));
}

/// Sends `bytes` on another thread while reading them back.
fn send_and_expect(client: &Client, bytes: &[u8]) {
    thread::scope(|scope| {
        scope.spawn(|| client.send(bytes));
        client.expect(bytes);
    });
}

fn half_close(address: SocketAddr, rng: &mut Rng) {
    Client::connect(address).check_echo(&any_bytes(rng, 2_000_000));
}

/// Sends and half-closes on another thread, and runs `read` meanwhile.
fn half_close_during(client: &Client, bytes: &[u8], read: impl FnOnce()) {
    thread::scope(|scope| {
        scope.spawn(|| {
            client.send(bytes);
            client.shutdown_write();
        });
        read();
        client.expect_eof();
    });
}

fn late_reader(address: SocketAddr, rng: &mut Rng) {
    let client = Client::connect_with_receive_buffer(address, 16_384);
    let bytes = any_bytes(rng, 3_000_000);
    let (start, delay) = (Instant::now(), Duration::from_millis(rng.u64(0..2_000)));
    half_close_during(&client, &bytes, || {
        wait_until("it is late", || start.elapsed() > delay);
        client.expect(&bytes);
    });
}

fn slow_reader(address: SocketAddr, rng: &mut Rng) {
    let client = Client::connect_with_receive_buffer(address, 2_048);
    let bytes = any_bytes(rng, 200_000);
    half_close_during(&client, &bytes, || {
        let pieces = bytes.chunks(rng.usize(1..=2_000));
        pieces.for_each(|piece| client.expect(piece));
    });
}

fn never_reader(address: SocketAddr, rng: &mut Rng) {
    let client = Client::connect_with_receive_buffer(address, 4_096);
    let bytes = random_bytes(rng.u64(..), 32 << 20);
    let sent = client.send_until_stuck(&bytes);
    match rng.u32(0..3) {
        0 => client.reset(),
        // With unread bytes.
        1 => drop(client),
        _ => client.expect(&bytes[..sent]),
    }
}

fn reset(address: SocketAddr, rng: &mut Rng) {
    let client = Client::connect(address);
    let bytes = any_bytes(rng, 500_000);
    let sent = client.send_until_stuck(&bytes);
    if rng.bool() {
        client.shutdown_write();
    }
    client.expect(&bytes[..rng.usize(0..=sent)]);
    client.reset();
}

fn connect_and_close(address: SocketAddr, rng: &mut Rng) {
    for _ in 0..10 {
        let client = Client::connect(address);
        match rng.u32(0..3) {
            0 => client.reset(),
            1 => client.send(b"unread"),
            _ => {}
        }
    }
    // No faster than the server accepts.
    Client::connect(address).check_echo(b"accepted");
}

fn flood(address: SocketAddr, rng: &mut Rng) {
    let bytes = random_bytes(rng.u64(..), 4_000_000);
    send_and_expect(&Client::connect(address), &bytes);
}

fn churn(address: SocketAddr, rng: &mut Rng) {
    for _ in 0..20 {
        Client::connect(address).check_echo(&any_bytes(rng, 100));
    }
}

fn crowd(address: SocketAddr, rng: &mut Rng) {
    let mut clients: Vec<_> = (0..100).map(|_| Client::connect(address)).collect();
    for _ in 0..300 {
        clients[rng.usize(..clients.len())].ping(&any_bytes(rng, 2_000));
    }
    while !clients.is_empty() {
        let client = clients.swap_remove(rng.usize(..clients.len()));
        client.check_echo(&any_bytes(rng, 100));
    }
}

fn number_from(variable: &str) -> Option<u64> {
    let value = env::var(variable).ok()?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}={value} is not a number")))
}

/// Returns `SOAK_SECONDS`; by default 20 in CI, and fewer where a person waits.
fn seconds() -> u64 {
    let is_ci = env::var("CI").is_ok_and(|ci| ci == "true");
    number_from("SOAK_SECONDS").unwrap_or(if is_ci { 20 } else { 5 })
}

/// Runs clients of every kind for `duration`, or until one fails; returns how many there were. The thread that
/// panics has the name of its kind.
fn run_clients(address: SocketAddr, seed: u64, duration: Duration) -> u64 {
    let (stop, served) = (AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    thread::scope(|scope| {
        for (place, (name, kind)) in (0..).zip(KINDS) {
            for number in 0..CLIENTS {
                let mut rng = Rng::with_seed(seed.wrapping_add(place * CLIENTS + number));
                let (stop, served) = (&stop, &served);
                let run = move || {
                    let _end = SetOnDrop(stop);
                    while start.elapsed() < duration && !stop.load(Relaxed) {
                        kind(address, &mut rng);
                        served.fetch_add(1, Relaxed);
                    }
                };
                let thread = thread::Builder::new().name(name.to_owned());
                let started = thread.spawn_scoped(scope, run);
                started.expect("a thread can be started");
            }
        }
    });
    served.into_inner()
}

#[test]
fn soak() {
    let seconds = seconds();
    let seed = number_from("SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("soak: SOAK_SECONDS={seconds} SOAK_SEED={seed}");
    let config = Config {
        workers: WORKERS,
        max_connections: MAX_CONNECTIONS,
        buffer_size: BUFFER_SIZE,
        ..Config::default()
    };
    let server = Process::serve(&[
        &format!("--workers={WORKERS}"),
        &format!("--max-connections={MAX_CONNECTIONS}"),
        &format!("--buffer-size={BUFFER_SIZE}"),
    ]);
    let descriptors = || server.procfs().fd_count().expect("it runs");
    let status = || server.procfs().status().expect("it runs");
    let (descriptors_before, before) = (descriptors(), status().vmrss.expect("KiB"));

    let clients = run_clients(server.address(), seed, Duration::from_secs(seconds));

    wait_until("the descriptors are as many as before", || {
        descriptors() == descriptors_before
    });
    let (after, peak) = (status().vmrss.expect("KiB"), status().vmhwm.expect("KiB"));
    let max_after = before + config.max_spare_memory() / 1024 + MAX_GROWTH_KIB;
    let max_peak = before + config.max_memory() / 1024 + MAX_GROWTH_KIB;
    let log = server.terminate();
    println!(
        "soak: {clients} clients in {seconds} s, {} connections, {} bytes; {descriptors_before} descriptors before and \
         after; memory: {before} KiB before, {after} after (at most {max_after}), {peak} at its peak (at most \
         {max_peak})",
        total(&log, "accepted"),
        total(&log, "bytes_in"),
    );
    assert!(after <= max_after, "{after} KiB after, {max_after} at most");
    assert!(
        peak <= max_peak,
        "{peak} KiB at the peak, {max_peak} at most"
    );
    assert_eq!(total(&log, "open"), 0, "{log}");
    assert_eq!(total(&log, "closed_error"), 0, "{log}");
}
