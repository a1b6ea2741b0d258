//! The `echoserver` program: parse the command line, set up, run the server or a command, report the result.

mod check;
mod cli;
mod figures;
mod load;
mod output;
mod pages;
mod payload;
mod serve;
mod target;
mod values;
/// Files that the program shares with the library.
#[path = "../.."]
mod shared {
    pub(crate) mod error;
}

use std::env;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::CommandFactory;

use crate::cli::{Command, CommandLine};
use crate::output::{FAILURE, Failure, USAGE, print};
use crate::serve::Environment;
use crate::serve::logging::{Log, Style};
use crate::shared::error;

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
    let command = match (&options.command, options.generate) {
        (Some(Command::Check(options)), _) => Some(check::run(options)),
        (Some(Command::Load(options)), _) => Some(load::run(options)),
        (None, Some(file)) => Some(
            file.text(CommandLine::command())
                .and_then(|text| print(&text)),
        ),
        (None, None) => None,
    };
    match command {
        Some(Ok(())) => return ExitCode::SUCCESS,
        Some(Err(Failure(status, Some(error)))) => return fail(status, error),
        Some(Err(Failure(status, None))) => return ExitCode::from(status),
        None => {}
    }

    let environment = match Environment::take() {
        Ok(environment) => environment,
        Err(error) => return fail(FAILURE, error),
    };
    let log = match Log::start(options.serve.log_level(), options.serve.log_format) {
        Ok(log) => log,
        Err(error) => return fail(FAILURE, format_args!("cannot start the log: {error}")),
    };

    for warning in cli::misspelled_variables(env::vars_os().map(|(name, _)| name)) {
        log::warn!("{warning}");
    }

    match serve::run(&options.serve, &log, environment) {
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
