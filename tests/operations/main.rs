//! What operators do with the program: count, scrape, supervise, confine, balance. Each test runs
//! the program itself, and the real tools around it; where a tool isn't installed, it says so.
#![cfg(unix)]

mod companion;
#[cfg(target_os = "linux")]
mod container;
mod daemon;
mod http;
mod load_balancer;
mod log;
mod metrics;
mod pages;
mod service_manager;
mod support;
mod unix_sockets;
