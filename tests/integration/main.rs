//! The contract, tested from outside: through sockets, with a server of the library or the program.
//!
//! A module for each promise. No test sleeps to let something happen: it waits for what it needs,
//! with a deadline ([`support::until`]), and every read has one too.

mod bounded;
mod byte_exact;
#[cfg(unix)]
mod cli;
mod complete;
#[cfg(target_os = "linux")]
mod counts;
#[cfg(unix)]
mod daemon;
mod drain;
mod fair;
#[cfg(target_os = "linux")]
mod faults;
mod idle;
mod isolated;
mod limit;
#[cfg(unix)]
mod programs;
#[cfg(target_os = "linux")]
mod resources;
mod support;
