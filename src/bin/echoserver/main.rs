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
mod plot;
mod serve;
mod target;
mod values;
/// Files of the library that are compiled into the program as well. The path is relative to the folder of this file, so
/// `error` is `src/error.rs`.
#[path = "../.."]
mod shared {
    #[expect(dead_code, reason = "the library uses the rest")]
    pub(crate) mod error;
}

use std::process::ExitCode;

use clap::CommandFactory;

use crate::cli::{Command, CommandLine};
use crate::output::{Exit, print};
use crate::serve::logging::{self, Format};
/// For all modules, as `crate::error`.
use crate::shared::error;

fn main() -> ExitCode {
    match cli::parse().and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Exit(status, error)) => {
            if let Some(error) = error {
                logging::print_error(Format::Text, &error);
            }
            ExitCode::from(status)
        }
    }
}

fn run(command_line: CommandLine) -> Result<(), Exit> {
    match (command_line.command, command_line.generate) {
        (Some(Command::Check(options)), _) => check::run(&options),
        (Some(Command::Load(options)), _) => load::run(&options),
        (Some(Command::Plot(options)), _) => plot::run(&options),
        (None, Some(file)) => print(file.text(CommandLine::command())?),
        (None, None) => serve::run(&command_line.serve),
    }
}
