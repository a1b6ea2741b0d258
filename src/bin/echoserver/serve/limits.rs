//! The connection limit that the process's descriptor limit allows.

use std::io;

#[cfg(unix)]
use crate::error::with_context;
use crate::serve::options::Options;

/// Descriptors reserved for files that a process opens occasionally.
#[cfg(unix)]
const RESERVED_DESCRIPTORS: u64 = 8;

/// Upper bound if the descriptor limit is unlimited; it keeps the memory arithmetic in range.
#[cfg(unix)]
const MAX_CONNECTIONS: usize = 10_000_000;

/// Raises the descriptor limit to its maximum, and returns the connection limit: the requested
/// one, but at most what the descriptor limit allows.
#[cfg(unix)]
pub(crate) fn max_connections(options: &Options) -> io::Result<usize> {
    let limit = rlimit::increase_nofile_limit(u64::MAX)
        .map_err(|error| with_context(&error, "cannot raise the descriptor limit"))?;
    let available = limit.saturating_sub(other_descriptors(options));
    let available = usize::try_from(available)
        .unwrap_or(usize::MAX)
        .min(MAX_CONNECTIONS);
    let requested = options.max_connections.map_or(available, usize::from);
    if available == 0 {
        return Err(io::Error::other(format!(
            "the descriptor limit of {limit} is too low for any connection"
        )));
    }
    if requested > available {
        log::warn!(
            "max connections reduced from {requested} to {available}: the descriptor limit is {limit}"
        );
    }
    Ok(requested.min(available))
}

/// Descriptors for everything except connections: those already open, a poll and a waker per
/// thread, the listeners, the signal pipe, and the metrics endpoint.
#[cfg(unix)]
fn other_descriptors(options: &Options) -> u64 {
    let open = std::fs::read_dir("/dev/fd").map_or(8, Iterator::count) as u64;
    let threads = options.workers().get() as u64 + 1;
    let listeners = options.listen.len().max(1) as u64 * 2;
    open + 2 * threads + listeners + 4 + metrics_descriptors(options) + RESERVED_DESCRIPTORS
}

/// Descriptors for the metrics endpoint: the same for its two threads, plus its connections.
#[cfg(unix)]
fn metrics_descriptors(options: &Options) -> u64 {
    let enabled = 2 * 2 + 2 + crate::serve::metrics::MAX_CONNECTIONS as u64;
    options.metrics.as_ref().map_or(0, |_| enabled)
}

#[cfg(not(unix))]
pub(crate) fn max_connections(options: &Options) -> io::Result<usize> {
    let default = echoserver::Config::default().max_connections;
    Ok(options.max_connections.map_or(default, usize::from))
}
