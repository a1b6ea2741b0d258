//! Serving: what surrounds the library's server in a process of its own.

pub(crate) mod limits;
pub(crate) mod logging;
#[cfg(feature = "metrics")]
pub(crate) mod metrics;
pub(crate) mod reports;
pub(crate) mod service;
#[cfg(unix)]
pub(crate) mod signals;
