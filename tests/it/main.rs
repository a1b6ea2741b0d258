//! All tests that go through sockets or run the program, in one crate with one [`harness`].
//!
//! `tests/README.md` says what each module shows.
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
