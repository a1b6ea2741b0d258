//! Clients of every kind at once against one server process, every byte checked; then descriptors,
//! memory and books are compared with the start.
//!
//! `SOAK_SECONDS=600 cargo test --release --test soak -- --nocapture` runs for ten minutes. What the
//! clients do follows from `SOAK_SEED`, which is printed; when they do it is up to the scheduler.

#![cfg(target_os = "linux")]

#[path = "conformance/client.rs"]
#[allow(dead_code, reason = "the conformance suite uses all of it")]
mod client;
#[path = "integration/daemon.rs"]
mod daemon;

use std::env;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use client::{Client, Verdict, data};
use daemon::{Daemon, total, wait_until};
use echoserver::Config;

const WORKERS: usize = 2;
const MAX_CONNECTIONS: usize = 400;
const BUFFER_SIZE: usize = 16 << 10;

/// Clients of each kind at a time.
const CLIENTS: u64 = 2;

/// What a process may grow by beyond its buffers: the tables of connections, and what the system's
/// allocator keeps for each thread.
const MAX_GROWTH_KIB: u64 = 8 << 10;

/// One client from its start to its end.
type Kind = fn(SocketAddr, &mut Random) -> Verdict;

const KINDS: [(&str, Kind); 10] = [
    ("echoes", echoes),
    ("half-closes", half_closes),
    ("late reader", late_reader),
    ("slow reader", slow_reader),
    ("never reader", never_reader),
    ("reset", reset),
    ("connect-and-run", connect_and_run),
    ("flood", flood),
    ("churn", churn),
    ("crowd", crowd),
];

/// A xorshift generator: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        // Its high bits are the better ones.
        (self.next() >> 16) % bound
    }

    /// From 1 to `length_max` bytes, of every order of magnitude alike often.
    fn data(&mut self, length_max: usize) -> Vec<u8> {
        let magnitude = self.below(u64::from(length_max.ilog2()) + 1);
        let length = (1 << magnitude) + self.below(1 << magnitude);
        data(self.next(), length_max.min(length as usize))
    }
}

fn echoes(target: SocketAddr, random: &mut Random) -> Verdict {
    let client = Client::connect(target)?;
    for _ in 0..random.below(50) {
        let bytes = random.data(50_000);
        client.both(|client| client.send(&bytes), |client| client.expect(&bytes))?;
    }
    client.exchange(&random.data(50_000))
}

fn half_closes(target: SocketAddr, random: &mut Random) -> Verdict {
    Client::connect(target)?.exchange(&random.data(2_000_000))
}

fn late_reader(target: SocketAddr, random: &mut Random) -> Verdict {
    let client = Client::connect_with_window(target, 16_384)?;
    let bytes = random.data(3_000_000);
    client.both(
        |client| client.send(&bytes).and_then(|()| client.end()),
        |client| {
            client.come_late();
            client.expect(&bytes)?;
            client.expect_end()
        },
    )
}

fn slow_reader(target: SocketAddr, random: &mut Random) -> Verdict {
    let client = Client::connect_with_window(target, 2_048)?;
    let bytes = random.data(200_000);
    client.both(
        |client| client.send(&bytes).and_then(|()| client.end()),
        |client| {
            client.expect_in_sips(&bytes, 1 + random.below(2_000) as usize)?;
            client.expect_end()
        },
    )
}

fn never_reader(target: SocketAddr, random: &mut Random) -> Verdict {
    let client = Client::connect_with_window(target, 4_096)?;
    let bytes = data(random.next(), 32 << 20);
    let sent = client.send_until_stuck(&bytes)?;
    match random.below(3) {
        0 => client.reset(),
        // Leaves what came unread.
        1 => drop(client),
        _ => client.expect(&bytes[..sent])?,
    }
    Ok(())
}

fn reset(target: SocketAddr, random: &mut Random) -> Verdict {
    let client = Client::connect(target)?;
    let bytes = random.data(500_000);
    let sent = client.send_until_stuck(&bytes)?;
    if random.below(2) == 0 {
        client.end()?;
    }
    client.expect(&bytes[..random.below(sent as u64 + 1) as usize])?;
    client.reset();
    Ok(())
}

fn connect_and_run(target: SocketAddr, random: &mut Random) -> Verdict {
    for _ in 0..10 {
        let client = Client::connect(target)?;
        match random.below(3) {
            0 => client.reset(),
            1 => client.send(b"and run")?,
            _ => {}
        }
    }
    // Not faster than they are served.
    Client::connect(target)?.exchange(b"and stay")
}

fn flood(target: SocketAddr, random: &mut Random) -> Verdict {
    let client = Client::connect(target)?;
    let bytes = data(random.next(), 4_000_000);
    client.both(|client| client.send(&bytes), |client| client.expect(&bytes))
}

fn churn(target: SocketAddr, random: &mut Random) -> Verdict {
    for _ in 0..20 {
        Client::connect(target)?.exchange(&random.data(100))?;
    }
    Ok(())
}

fn crowd(target: SocketAddr, random: &mut Random) -> Verdict {
    let crowd = (0..100).map(|_| Client::connect(target));
    let mut crowd = crowd.collect::<Verdict<Vec<Client>>>()?;
    for _ in 0..300 {
        let member = random.below(crowd.len() as u64) as usize;
        crowd[member].echo(&random.data(2_000))?;
    }
    while !crowd.is_empty() {
        let member = random.below(crowd.len() as u64) as usize;
        crowd.swap_remove(member).exchange(&random.data(100))?;
    }
    Ok(())
}

fn number_from(variable: &str) -> Option<u64> {
    let value = env::var(variable).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{variable}={value} is no number")),
    )
}

/// As asked for; otherwise 20 in CI, and less where a person waits.
fn seconds() -> u64 {
    let is_ci = env::var("CI").is_ok_and(|ci| ci == "true");
    number_from("SOAK_SECONDS").unwrap_or(if is_ci { 20 } else { 5 })
}

fn seed() -> u64 {
    let fresh = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |now| now.as_secs())
    };
    number_from("SOAK_SEED").unwrap_or_else(fresh)
}

/// Runs clients of every kind for so long, or until one of them is disappointed; says how many came.
fn run_clients(target: SocketAddr, seed: u64, soak: Duration) -> Verdict<u64> {
    let (over, served) = (AtomicBool::new(false), AtomicU64::new(0));
    let (failing, failure) = mpsc::channel();
    thread::scope(|scope| {
        for (place, (name, kind)) in KINDS.into_iter().enumerate() {
            for number in 0..CLIENTS {
                let (over, served, failing) = (&over, &served, failing.clone());
                let mut random = Random::new(seed * 1_000 + place as u64 * CLIENTS + number);
                scope.spawn(move || {
                    while !over.load(SeqCst) {
                        if let Err(fault) = kind(target, &mut random) {
                            // Only the first one is listened to.
                            let _unheard = failing.send(format!("{name}: {fault}"));
                            return;
                        }
                        served.fetch_add(1, SeqCst);
                    }
                });
            }
        }
        let failed = failure.recv_timeout(soak);
        over.store(true, SeqCst);
        failed.map_or(Ok(()), Err)
    })?;
    Ok(served.into_inner())
}

#[test]
fn soak() {
    let (seconds, seed) = (seconds(), seed());
    println!("soak: SOAK_SECONDS={seconds} SOAK_SEED={seed}");
    let config = Config {
        workers: NonZeroUsize::new(WORKERS).expect("not zero"),
        max_connections: MAX_CONNECTIONS,
        buffer_size: BUFFER_SIZE,
        ..Config::default()
    };
    let daemon = Daemon::start(&[
        &format!("--workers={WORKERS}"),
        &format!("--max-connections={MAX_CONNECTIONS}"),
        &format!("--buffer-size={BUFFER_SIZE}"),
    ]);
    let (descriptors, memory) = (daemon.descriptors(), daemon.memory_kib("VmRSS"));

    let served = run_clients(daemon.address(), seed, Duration::from_secs(seconds));
    let served = served.unwrap_or_else(|fault| panic!("SOAK_SEED={seed}: {fault}"));

    wait_until("descriptors are as many as at the start", || {
        daemon.descriptors() == descriptors
    });
    let (rest, peak) = (daemon.memory_kib("VmRSS"), daemon.memory_kib("VmHWM"));
    let rest_max = memory + config.max_spare_memory() / 1024 + MAX_GROWTH_KIB;
    let peak_max = memory + config.max_memory() / 1024 + MAX_GROWTH_KIB;
    let log = daemon.end();
    println!(
        "soak: {served} clients in {seconds} s, {} connections, {} bytes; descriptors: \
         {descriptors} before and after; memory: {memory} KiB before, {rest} after (at most \
         {rest_max}), {peak} at its peak (at most {peak_max})",
        total(&log, "accepted"),
        total(&log, "bytes_in"),
    );
    assert!(rest <= rest_max, "{rest} KiB after all, {rest_max} at most");
    assert!(
        peak <= peak_max,
        "{peak} KiB at the peak, {peak_max} at most"
    );
    assert_eq!(total(&log, "open"), 0, "{log}");
    assert_eq!(total(&log, "closed_error"), 0, "{log}");
}
