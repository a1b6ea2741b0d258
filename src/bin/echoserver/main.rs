//! The `echoserver` program: parse the command line, set up, run the server or a command, report the result.

mod check;
mod cli;
mod figures;
mod load;
mod output;
mod pages;
mod payload;
#[cfg_attr(unix, path = "unix.rs")]
#[cfg_attr(not(unix), path = "other.rs")]
mod platform;
mod serve;
mod target;
mod values;
/// Files that the program shares with the library.
#[path = "../.."]
mod shared {
    #[expect(dead_code, reason = "the library uses the rest")]
    pub(crate) mod error;
}

use std::process::ExitCode;

use clap::CommandFactory;

use crate::cli::{Command, CommandLine};
use crate::output::{Failure, USAGE, print};
use crate::serve::logging::{self, Format};
use crate::shared::error;

fn main() -> ExitCode {
    match cli::parse() {
        Ok(command_line) => match run(command_line) {
            Ok(()) => ExitCode::SUCCESS,
            Err(Failure(status, error)) => fail(status, error.as_deref()),
        },
        Err(error) if error.use_stderr() => fail(USAGE, Some(&cli::one_line(error))),
        Err(help_or_version) => {
            // A closed stdout is not a failure.
            let _closed = help_or_version.print();
            ExitCode::SUCCESS
        }
    }
}

fn run(command_line: CommandLine) -> Result<(), Failure> {
    match (command_line.command, command_line.generate) {
        (Some(Command::Check(options)), _) => check::run(&options),
        (Some(Command::Load(options)), _) => load::run(&options),
        (None, Some(file)) => print(file.text(CommandLine::command())?),
        (None, None) => serve::run(&command_line.serve),
    }
}

/// Returns the exit status of a failure, after it has printed its error.
fn fail(status: u8, error: Option<&str>) -> ExitCode {
    if let Some(error) = error {
        logging::print_error(Format::Text, error);
    }
    ExitCode::from(status)
}
