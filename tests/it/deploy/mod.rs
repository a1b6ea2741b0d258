//! Deployment: each test runs the program, and the tools that surround it in production.

#[cfg(target_os = "linux")]
mod container;
mod haproxy;
mod pages;
mod systemd;
mod unix_sockets;

use std::fs;
use std::path::Path;

/// Reads a file of the `packaging` folder.
fn packaged(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
    fs::read_to_string(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Replaces each text on the left, which must occur, by the one on the right.
fn replace_all(text: &str, replacements: &[(&str, &str)]) -> String {
    replacements
        .iter()
        .fold(text.to_owned(), |text, (from, to)| {
            assert!(text.contains(from), "no {from} in {text}");
            text.replace(from, to)
        })
}
