//! The contract, tested from outside: through sockets, with a server of the library or the program.
//!
//! A module for each promise. No test sleeps to let something happen: it waits for what it needs,
//! with a deadline ([`support::until`]), and every read has one too.

mod byte_exact;
mod complete;
mod drain;
mod isolated;
#[cfg(target_os = "linux")]
mod resources;
mod support;
