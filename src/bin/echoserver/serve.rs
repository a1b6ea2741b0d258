//! Serving: what surrounds the library's server in a process of its own.

pub(crate) mod limits;
pub(crate) mod logging;
pub(crate) mod metrics;
pub(crate) mod reports;
pub(crate) mod service;
#[cfg(unix)]
pub(crate) mod signals;
