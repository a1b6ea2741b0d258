//! What operators do with the program: count, scrape, supervise, confine, balance. Each test runs
//! the program itself, and the real tools around it; where a tool isn't installed, it says so.
#![cfg(unix)]

#[cfg(feature = "metrics")]
mod companion;
#[cfg(target_os = "linux")]
mod container;
mod daemon;
#[cfg(feature = "metrics")]
mod http;
#[cfg(feature = "metrics")]
mod load_balancer;
mod log;
#[cfg(feature = "metrics")]
mod metrics;
mod pages;
mod service_manager;
mod support;
mod unix_sockets;
