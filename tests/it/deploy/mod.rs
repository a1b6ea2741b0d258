//! Deployment: each test runs the program, and the tools that surround it in production.

#[cfg(target_os = "linux")]
mod container;
mod haproxy;
mod kubernetes;
#[cfg(target_os = "linux")]
mod packet_filter;
mod pages;
mod recipes;
mod systemd;
mod unix_sockets;

use std::fs;
use std::path::Path;

use crate::harness::{Process, http, program};
use crate::program::command_line::help_options;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Reads a file of the `packaging` folder.
fn packaged(name: &str) -> String {
    let path = root().join("packaging").join(name);
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Returns the name of the option that a variable sets, for example `max-connections`.
fn option_of(variable: &str) -> String {
    let name = variable
        .strip_prefix("ECHOSERVER_")
        .expect("it is a variable of the program");
    name.to_lowercase().replace('_', "-")
}

/// Checks that variables which a package sets belong to options, and that the user's variables replace them.
fn check_defaults(defaults: &[(&str, &str)]) {
    let options = help_options(&["--help"]);
    for (name, value) in defaults {
        assert!(options.contains(&option_of(name)), "{name}={value}");
    }
    let mut command = program();
    command.envs(defaults.iter().copied());
    command
        .env("ECHOSERVER_METRICS", "127.0.0.1:0")
        .arg("--listen=127.0.0.1:0");
    let mut server = Process::start(&mut command);
    assert_eq!(http::get(server.metrics_address(), "/healthz").status, 200);
    server.terminate();
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
