//! The connection limit that the process's descriptor limit allows, and the backlog that the system allows.

use std::fs;
use std::io;
use std::num::NonZeroUsize;

use echoserver::Config;

use crate::platform;
use crate::serve::metrics;

/// Descriptors reserved for files that a process opens occasionally.
const RESERVED_DESCRIPTORS: u64 = 12;

/// Upper bound if the descriptor limit is unlimited; it keeps the memory arithmetic in range.
const MAX_CONNECTIONS: u64 = 10_000_000;

/// Raises the descriptor limit to its maximum, and returns the connection limit of a server with this configuration:
/// the requested one, but at most what the descriptor limit allows.
pub(crate) fn max_connections(
    config: &Config,
    requested: Option<NonZeroUsize>,
    has_metrics: bool,
) -> io::Result<usize> {
    let Some(limit) = platform::raise_descriptor_limit()? else {
        return Ok(requested.map_or(config.max_connections, usize::from));
    };
    let available = limit.saturating_sub(other_descriptors(config, has_metrics));
    let available = available.min(MAX_CONNECTIONS) as usize;
    if available == 0 {
        let error = format!("the descriptor limit of {limit} is too low for any connection");
        return Err(io::Error::other(error));
    }
    let requested = requested.map_or(available, usize::from);
    if requested > available {
        log::warn!(
            "max connections reduced from {requested} to {available}: the descriptor limit is {limit}"
        );
    }
    Ok(requested.min(available))
}

/// Returns the backlog that the system uses where this one is requested.
pub(crate) fn backlog(requested: u32) -> u32 {
    let max = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default();
    let max = max.trim().parse().unwrap_or(u32::MAX);
    if requested > max {
        log::info!("backlog reduced from {requested} to {max}: net.core.somaxconn");
    }
    requested.min(max)
}

/// Descriptors for everything except connections: those already open, a poll and a waker per
/// thread, the listeners (a name can stand for two addresses), the metrics endpoint, which has two threads and connections,
/// and some in reserve.
fn other_descriptors(config: &Config, has_metrics: bool) -> u64 {
    let open = fs::read_dir("/dev/fd").map_or(8, Iterator::count) as u64;
    let threads = config.workers as u64 + 1;
    let listeners = config.listen.len().max(1) as u64 * 2;
    let of_metrics = 2 * 2 + 2 + metrics::MAX_CONNECTIONS as u64;
    let of_metrics = if has_metrics { of_metrics } else { 0 };
    open + 2 * threads + listeners + of_metrics + RESERVED_DESCRIPTORS
}
