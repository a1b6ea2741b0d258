//! All tests that go through sockets or run the program, in one crate with one [`harness`].
//!
//! * [`contract`]: a module for each promise of the README, tested on a server of the library and on the program.
//! * [`handler`]: each way in which a handler is called.
//! * [`program`]: command line, greeting, listeners, signals, log, metrics, resources, and clients that people use.
//! * [`deploy`]: systemd, containers, Kubernetes, HAProxy, Unix-domain sockets, man page and completions.
//! * [`network`]: the program at the far end of a slow link that loses and reorders packets.
//! * [`examples`], [`soak`], and [`project`]: rules about the sources.
//!
//! No test sleeps: it waits for a condition with [`harness::wait_until`], and every read and write has a timeout.
//! Where a tool is not installed, its tests print that they are skipped.

mod contract;
#[cfg(all(unix, feature = "cli"))]
mod deploy;
mod examples;
mod handler;
#[cfg_attr(
    not(all(target_os = "linux", feature = "cli")),
    allow(
        dead_code,
        unused_imports,
        reason = "the tests of the program use all of it"
    )
)]
mod harness;
#[cfg(all(target_os = "linux", feature = "cli"))]
mod network;
#[cfg(all(unix, feature = "cli"))]
mod program;
mod project;
#[cfg(all(target_os = "linux", feature = "cli"))]
mod soak;
