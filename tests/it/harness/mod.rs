//! What the tests share: one way to wait, random bytes, servers that clean up after themselves, clients whose
//! calls end in time, and child processes.

mod client;
#[cfg(feature = "cli")]
pub(crate) mod http;
mod process;
mod server;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{env, thread};

#[cfg(all(target_os = "linux", feature = "cli"))]
pub(crate) use client::never_readers;
pub(crate) use client::{Client, expect_all, ping_all, send_all, wait_until_received};
#[cfg(feature = "cli")]
pub(crate) use process::{
    BALANCED, READY, cases_with, error_line, number, program, program_after, report, total,
};
pub(crate) use process::{Process, command, run};
pub(crate) use server::{
    BlockedServer, FnHandler, TestServer, address_of, bind, config, stuck_clients,
};

/// Time limit of every wait, far longer than any takes: it only keeps a broken server from blocking the tests.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Polls until `condition`, which `what` describes, holds. Panics after the [`DEADLINE`].
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(what, || condition().then_some(()));
}

/// Polls until there is a value. Panics after the [`DEADLINE`].
pub(crate) fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "timed out waiting until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Returns random bytes, in which a byte lost, doubled or out of order shows. Equal seeds give equal bytes.
pub(crate) fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// Sets a flag when it is dropped, so that threads end even if the test panics.
pub(crate) struct SetOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Returns how many of `wanted` connections the descriptor limit allows this process, and prints if not all.
pub(crate) fn possible_connections(wanted: usize) -> usize {
    /// For the tests that run at the same time.
    const RESERVED: u64 = 3_000;
    let limit = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(0);
    let room = usize::try_from(limit.saturating_sub(RESERVED)).unwrap_or(usize::MAX);
    let possible = wanted.min(room.max(50));
    if possible < wanted {
        println!("{possible} connections instead of {wanted}: the descriptor limit is {limit}");
    }
    possible
}

/// Returns whether all of these programs are installed, and prints which is not.
pub(crate) fn installed(programs: &[&str]) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    programs.iter().all(|program| {
        let is_installed = env::split_paths(&path).any(|folder| folder.join(program).is_file());
        if !is_installed {
            println!("skipped: {program} is not installed");
        }
        is_installed
    })
}

/// Returns a loopback address whose port was free a moment ago, for programs that cannot choose one.
pub(crate) fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound")
}
