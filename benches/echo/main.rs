//! `cargo bench`: this server beside others, on one machine, with one load: `echoserver load`.
//!
//! In each round, each case is measured with each server in turn (A B C, then B C A), so that a slow phase of the machine
//! affects all of them. A sample starts the server as a process of its own, connects, warms up, measures, and kills
//! it. No sample is dropped. All samples are written as JSON; tables and charts are made from that file only.

// Counts and times become figures to read, and positions in a chart.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap
)]

#[cfg(target_os = "linux")]
mod linux;

#[cfg(target_os = "linux")]
fn main() {
    if let Err(error) = linux::run() {
        eprintln!("bench: {error}");
        std::process::exit(1);
    }
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("bench: the reference is an epoll loop, which only Linux has");
}
