//! The command line: its options, the values they accept, and one-line error messages.

use std::env;
use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};
use echoserver::Address;

use crate::error::escape_control;
use crate::output::{Exit, SUCCESS, USAGE, shorten};
use crate::pages::GeneratedFile;
use crate::{check, load, plot, serve};

/// The most characters of a value that an error repeats.
const MAX_VALUE: usize = 200;

/// A TCP echo server that returns every byte, from a pool of event-loop threads.
#[derive(Debug, Parser)]
#[command(name = "echoserver", version, max_term_width = 100)]
#[command(mut_args(common_settings), mut_subcommands(|it| it.mut_args(common_settings)))]
#[command(args_conflicts_with_subcommands = true, propagate_version = true)]
#[command(after_help = "\
    Times are seconds, or have a unit: 5, 500ms, 1m30s. Sizes may have one: 4096, 64K, 1MiB.\n\
    Every option has an environment variable such as ECHOSERVER_MAX_CONNECTIONS.\n\
    Signals: SIGTERM, SIGINT or SIGHUP drains and exits 0; a second one exits at once.\n\
    Man pages: --generate man, man-check, man-load or man-plot. Completions: bash, zsh or fish.")]
pub(crate) struct CommandLine {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    #[command(flatten)]
    pub(crate) serve: serve::Options,

    /// Print a man page or shell completions, and exit
    #[arg(long, value_name = "WHAT", value_enum, hide = true)]
    pub(crate) generate: Option<GeneratedFile>,
}

/// What the program does instead of serving.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Check(check::Options),
    Load(load::Options),
    Plot(plot::Options),
}

impl CommandLine {
    /// Checks what depends on several options.
    fn check(self) -> Result<Self, clap::Error> {
        let listen = self.serve.listen();
        let mut addresses = listen.iter().chain(&self.serve.metrics);
        let has_file = addresses.any(|address| matches!(address, Address::UnixPath(_)));
        if self.serve.unix_mode.is_none() || has_file {
            return Ok(self);
        }
        let problem = "--unix-mode needs a socket file: --listen unix:PATH or --metrics unix:PATH";
        let mut error = Self::command().error(ErrorKind::ArgumentConflict, problem);
        let option = ContextValue::String("--unix-mode".to_owned());
        error.insert(ContextKind::InvalidArg, option);
        Err(error)
    }
}

/// Parses the command line and the environment. An empty variable counts as unset, and commands do not read any.
pub(crate) fn parse() -> Result<CommandLine, Exit> {
    let first = env::args_os().nth(1).unwrap_or_default();
    let mut command = CommandLine::command();
    if command.find_subcommand(&first).is_none() && first != "help" {
        command = command.mut_args(read_variable);
    }
    if env::var_os("COLUMNS").is_some_and(|columns| columns == "0") {
        // The width is unknown. Otherwise clap would put each word on a line of its own.
        command = command.term_width(100);
    }
    let matches = command.try_get_matches();
    let parsed = matches.and_then(|matches| CommandLine::from_arg_matches(&matches)?.check());
    parsed.map_err(|error| {
        if error.use_stderr() {
            return Exit(USAGE, Some(one_line(error)));
        }
        // The help or the version. A closed stdout is not a failure.
        let _closed = error.print();
        Exit(SUCCESS, None)
    })
}

/// Has an option take its value from the environment, unless its variable is empty.
fn read_variable(option: Arg) -> Arg {
    let long = option.get_long().filter(|_| !option.is_hide_set());
    let variable = long.map(variable_name);
    match variable.filter(|name| env::var_os(name).is_some_and(|value| !value.is_empty())) {
        Some(variable) => option.env(variable),
        None => option,
    }
}

/// Settings of every option.
fn common_settings(argument: Arg) -> Arg {
    // A value that starts with a hyphen is then reported as an invalid value of its option.
    let is_option = argument.get_action().takes_values() && !argument.is_positional();
    argument.hide_env(true).allow_hyphen_values(is_option)
}

/// Formats an error of the command line as one line, with clap's suggestions. The line names the environment
/// variable that an invalid value comes from.
fn one_line(mut error: clap::Error) -> String {
    if error.kind() == ErrorKind::InvalidUtf8 {
        return format!("invalid UTF-8 in '{}'", invalid_utf8().to_string_lossy());
    }
    // Shortened, so that the error fits into a line.
    let short = error.context().filter_map(|(kind, value)| match value {
        ContextValue::String(text) => Some((kind, shorten(&escape_control(text), MAX_VALUE))),
        _ => None,
    });
    for (kind, text) in short.collect::<Vec<_>>() {
        error.insert(kind, ContextValue::String(text));
    }
    let text = error.to_string();
    // The first paragraph is the error; suggestions and usage follow.
    let paragraph = text.split("\n\n").next().unwrap_or(&text);
    let paragraph = paragraph.strip_prefix("error: ").unwrap_or(paragraph);
    let lines: Vec<_> = paragraph.lines().map(str::trim).collect();
    let mut line = lines.join(" ");
    let hint = port_hint(&error);
    let suggestions = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("tip: "))
        .filter(|_| hint.is_none());
    let source = variable_of(&error).map(|variable| format!("from {variable}"));
    for note in suggestions.chain(hint.as_deref()).chain(source.as_deref()) {
        line.extend([" (", note, ")"]);
    }
    line
}

/// Returns how to give a port, if an argument was meant to be one.
fn port_hint(error: &clap::Error) -> Option<String> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        _ => "",
    };
    let is_option = ["-p", "--port"].contains(&text(ContextKind::InvalidArg));
    let argument = text(ContextKind::InvalidSubcommand);
    match error.kind() {
        ErrorKind::InvalidSubcommand if argument.parse::<Address>().is_ok() => {
            Some(format!("to listen there: --listen {argument}"))
        }
        ErrorKind::UnknownArgument if is_option => {
            let first = env::args_os().nth(1).unwrap_or_default();
            Some(match CommandLine::command().find_subcommand(first) {
                Some(command) => format!("the server is an argument: {command} HOST:PORT"),
                None => "to listen on a port: --listen PORT".to_owned(),
            })
        }
        _ => None,
    }
}

/// Returns the first argument, or the name of the first variable, that is not valid UTF-8.
fn invalid_utf8() -> OsString {
    let argument = env::args_os().find(|argument| argument.to_str().is_none());
    let is_invalid = |(name, value): &(OsString, OsString)| {
        name.to_string_lossy().starts_with("ECHOSERVER_") && value.to_str().is_none()
    };
    let variable = || env::vars_os().find(is_invalid).map(|(name, _)| name);
    argument.or_else(variable).unwrap_or_default()
}

/// Returns the environment variable that an invalid value comes from, unless it comes from the command line.
///
/// Clap does not report the source of an invalid value, so this parses the command line without the environment.
fn variable_of(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let option = argument.split_whitespace().next()?.trim_end_matches("...");
    // An invalid argument fails here as well. What is left is an invalid variable, or an error that only all options together have.
    let matches = CommandLine::command().try_get_matches().ok()?;
    let id = option.trim_start_matches('-').replace('-', "_");
    let is_argument = matches.ids().any(|given| given.as_str() == id)
        && matches.value_source(&id) == Some(ValueSource::CommandLine);
    let variable = variable_name(option);
    (!is_argument && env::var_os(&variable).is_some()).then_some(variable)
}

/// Returns the environment variable of an option such as `--max-connections`.
fn variable_name(option: &str) -> String {
    let name = option.trim_start_matches('-').replace('-', "_");
    format!("ECHOSERVER_{}", name.to_uppercase())
}

#[cfg(test)]
mod tests;
