//! The program: its command line, listeners, signals, log and metrics, what it costs, and clients that people use.

mod clients;
pub(crate) mod command_line;
#[cfg(target_os = "linux")]
mod faults;
#[cfg(target_os = "linux")]
mod greeting;
#[cfg(target_os = "linux")]
mod listeners;
mod log;
mod metrics;
mod plot;
#[cfg(target_os = "linux")]
pub(crate) mod resources;
#[cfg(target_os = "linux")]
mod signals;
#[cfg(target_os = "linux")]
mod snapshots;
