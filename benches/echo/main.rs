//! `cargo bench`: this server beside its peers, in one run, on one machine, with one load: `echoserver load`.
//!
//! For each case of each measure the servers take turns (A B C A B C), so that what slows the machine
//! down for a while slows all of them down. A sample is: start the server as a process of its own,
//! connect, warm up, measure, kill it. No sample is dropped.

// Counts and times become figures to read: a float is wide enough for that.
#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss)]
// Epoll, /proc.
#![cfg_attr(not(target_os = "linux"), allow(unused))]

#[cfg(target_os = "linux")]
mod chart;
#[cfg(target_os = "linux")]
mod measures;
#[cfg(target_os = "linux")]
mod options;
#[cfg(target_os = "linux")]
mod peers;
#[cfg(target_os = "linux")]
mod process;
#[cfg(target_os = "linux")]
mod report;
#[cfg(target_os = "linux")]
mod run;

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    match run::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("bench: the reference is an epoll loop, which only Linux has");
    ExitCode::SUCCESS
}
