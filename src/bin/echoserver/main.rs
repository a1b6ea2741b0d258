//! The `echoserver` program: parse the command line, set up, run the server, report the result.

mod cli;
mod serve;

use std::env;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use crate::serve::Environment;
use crate::serve::logging::{Log, Style};

/// Exit statuses other than 0.
const FAILURE: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let options = match cli::parse() {
        Ok(options) => options,
        Err(error) if error.use_stderr() => return fail(USAGE, cli::one_line(error)),
        Err(help_or_version) => {
            // A closed stdout is not a failure.
            let _closed = help_or_version.print();
            return ExitCode::SUCCESS;
        }
    };
    if let Some(file) = options.generate {
        return match file.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(FAILURE, format_args!("cannot write to stdout: {error}")),
        };
    }

    let environment = match Environment::take() {
        Ok(environment) => environment,
        Err(error) => return fail(FAILURE, error),
    };
    let log = match Log::start(options.log_level(), options.log_format) {
        Ok(log) => log,
        Err(error) => return fail(FAILURE, format_args!("cannot start the log: {error}")),
    };

    for warning in cli::misspelled_variables(env::vars_os().map(|(name, _)| name)) {
        log::warn!("{warning}");
    }

    match serve::run(&options, &log, environment) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(FAILURE),
    }
}

/// Prints an error and returns its exit status. For errors before the log thread runs.
fn fail(status: u8, error: impl Display) -> ExitCode {
    let line = Style::new(cli::log_format()).error(&error);
    let _closed = io::stderr().write_all(line.as_bytes());
    ExitCode::from(status)
}
