//! How many connections the operating system's descriptor limit leaves room for.

use std::io;

use crate::cli::Options;

/// Descriptors kept free for what else a process opens now and then.
#[cfg(unix)]
const SPARE: u64 = 8;

/// The most connections: as asked for, or as the descriptor limit allows, which is raised as far as
/// this process may.
#[cfg(unix)]
pub(crate) fn max_connections(options: &Options) -> io::Result<usize> {
    let limit = rlimit::increase_nofile_limit(u64::MAX)?;
    let room = limit.saturating_sub(needed(options));
    let room = usize::try_from(room)
        .unwrap_or(usize::MAX)
        .min(MAX_CONNECTIONS);
    let wanted = options.max_connections.map_or(room, usize::from);
    if room == 0 {
        return Err(io::Error::other(format!(
            "the descriptor limit of {limit} leaves no room for connections"
        )));
    }
    if wanted > room {
        log::warn!(
            "the descriptor limit of {limit} leaves room for {room} connections, not for {wanted}"
        );
    }
    Ok(wanted)
}

/// Nobody has so many; it keeps the arithmetic of an unlimited system within reason.
#[cfg(unix)]
const MAX_CONNECTIONS: usize = 10_000_000;

/// What the server itself opens: a poll and a waker per thread, the listeners, the signals' pipe.
#[cfg(unix)]
fn needed(options: &Options) -> u64 {
    let open = std::fs::read_dir("/dev/fd").map_or(8, Iterator::count) as u64;
    let threads = options.workers().get() as u64 + 1;
    let listeners = options.listen.len().max(1) as u64 * 2;
    open + 2 * threads + listeners + 4 + metrics(options) + SPARE
}

/// What the server of the metrics opens: the same for its two threads, and its connections.
#[cfg(unix)]
fn metrics(options: &Options) -> u64 {
    let needed = 2 * 2 + 2 + crate::serve::metrics::MAX_CONNECTIONS as u64;
    options.metrics.as_ref().map_or(0, |_| needed)
}

#[cfg(not(unix))]
pub(crate) fn max_connections(options: &Options) -> io::Result<usize> {
    let default = echoserver::Config::default().max_connections;
    Ok(options.max_connections.map_or(default, usize::from))
}
