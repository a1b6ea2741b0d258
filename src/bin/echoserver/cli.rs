//! The command line: its options, the values they accept, and one-line error messages.

use std::env;
use std::ffi::OsString;
use std::iter;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};
use echoserver::Address;

use crate::error::escape_control;
use crate::pages::GeneratedFile;
use crate::serve::logging::Format;
use crate::{check, load, serve};

/// A TCP echo server that returns every byte, from a pool of event-loop threads.
#[derive(Debug, Parser)]
#[command(name = "echoserver", version, max_term_width = 100)]
#[command(mut_args(common_settings))]
#[command(
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true,
    propagate_version = true
)]
#[command(after_help = "\
    Times are seconds, or have a unit: 5, 500ms, 1m30s. Sizes may have one: 4096, 64K, 1MiB.\n\
    Every option has an environment variable such as ECHOSERVER_MAX_CONNECTIONS.\n\
    Signals: SIGTERM, SIGINT or SIGHUP drains and exits 0; a second one exits at once.\n\
    Man pages: --generate man, man-check or man-load. Completions: --generate bash, zsh or fish.")]
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
}

impl CommandLine {
    /// Checks what depends on several options.
    fn check(self) -> Result<Self, clap::Error> {
        #[cfg(unix)]
        if self.serve.unix_mode.is_some()
            && !(self.serve.listen.iter().chain(&self.serve.metrics))
                .any(|address| matches!(address, Address::UnixPath(_)))
        {
            let mut error = Self::command().error(
                ErrorKind::ArgumentConflict,
                "--unix-mode needs a socket file: --listen unix:PATH or --metrics unix:PATH",
            );
            let option = ContextValue::String("--unix-mode".to_owned());
            error.insert(ContextKind::InvalidArg, option);
            return Err(error);
        }
        Ok(self)
    }
}

/// Parses the command line and the environment. An empty variable counts as unset, and commands do not read any.
pub(crate) fn parse() -> Result<CommandLine, clap::Error> {
    let command = CommandLine::command();
    let command = match is_command(&command) {
        true => without_environment(command),
        false => command.mut_args(|argument| {
            let value = argument.get_env().and_then(env::var_os);
            match value.is_some_and(|value| value.is_empty()) {
                true => argument.env(Resettable::Reset),
                false => argument,
            }
        }),
    };
    CommandLine::from_arg_matches(&command.try_get_matches()?)?.check()
}

/// Whether the first argument is a command, such as `check`.
fn is_command(command: &clap::Command) -> bool {
    let first = env::args_os().nth(1);
    let mut names = command.get_subcommands().map(clap::Command::get_name);
    first.is_some_and(|first| names.any(|name| first == name))
}

/// Returns a warning for each variable whose name is nearly that of an option. Others are not worth one:
/// Kubernetes sets `ECHOSERVER_PORT` and more for a service called echoserver.
pub(crate) fn misspelled_variables(names: impl Iterator<Item = OsString>) -> Vec<String> {
    const MAX_EDITS: usize = 2;
    let command = CommandLine::command();
    let variables = command.get_arguments().filter_map(Arg::get_env);
    let variables: Vec<_> = variables.filter_map(|name| name.to_str()).collect();
    let names = names.filter_map(|name| name.into_string().ok());
    names
        .filter(|name| name.starts_with("ECHOSERVER_") && !variables.contains(&name.as_str()))
        .filter_map(|name| {
            let edits = |variable: &&&str| strsim::levenshtein(&name, variable);
            let nearest = variables.iter().min_by_key(edits)?;
            let is_near = edits(&nearest) <= MAX_EDITS;
            is_near.then(|| format!("the variable {name} is unknown; did you mean {nearest}?"))
        })
        .collect()
}

/// Returns the log format that the command line or the environment requests, even if they are invalid
/// otherwise.
pub(crate) fn log_format() -> Format {
    if is_command(&CommandLine::command()) {
        return Format::Text;
    }
    let mut format = env::var_os("ECHOSERVER_LOG_FORMAT");
    let mut arguments = env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--log-format" {
            format = arguments.next();
        } else if let Some(value) = argument.to_string_lossy().strip_prefix("--log-format=") {
            format = Some(value.into());
        }
    }
    match format.is_some_and(|format| format == "json") {
        true => Format::Json,
        false => Format::Text,
    }
}

/// Settings of every option.
fn common_settings(argument: Arg) -> Arg {
    // A value that starts with a hyphen is then reported as an invalid value of its option.
    let takes_values = argument.get_action().takes_values();
    argument.hide_env(true).allow_hyphen_values(takes_values)
}

/// Formats an error of the command line as one line, with clap's suggestions. The line names the environment
/// variable that an invalid value comes from.
pub(crate) fn one_line(mut error: clap::Error) -> String {
    if error.kind() == ErrorKind::InvalidUtf8 {
        return format!("invalid UTF-8 in {}", invalid_utf8());
    }
    for (kind, text) in error.context().map(escaped_text).collect::<Vec<_>>() {
        error.insert(kind, text);
    }
    let text = error.to_string();
    // The first paragraph is the error; suggestions and usage follow.
    let first = text.split("\n\n").next().unwrap_or(&text);
    let line = first.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    let suggestions = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("tip: "));
    let variable = variable_of(&error).map(|variable| format!("from {variable}"));
    let notes = suggestions
        .map(str::to_owned)
        .chain(comma_hint(&error))
        .chain(variable);
    let notes = notes.map(|note| format!("({note})"));
    iter::once(line.to_owned())
        .chain(notes)
        .collect::<Vec<_>>()
        .join(" ")
}

fn escaped_text((kind, value): (ContextKind, &ContextValue)) -> (ContextKind, ContextValue) {
    let value = match value {
        ContextValue::String(text) => ContextValue::String(escape_control(text)),
        other => other.clone(),
    };
    (kind, value)
}

/// Returns the first argument, or the name of the first variable, that is not valid UTF-8.
fn invalid_utf8() -> String {
    let argument = env::args_os().find(|argument| argument.to_str().is_none());
    let is_invalid = |(name, value): &(OsString, OsString)| {
        name.to_string_lossy().starts_with("ECHOSERVER_") && value.to_str().is_none()
    };
    let variable = || env::vars_os().find(is_invalid).map(|(name, _)| name);
    let culprit = argument.or_else(variable).unwrap_or_default();
    escape_control(&format!("'{}'", culprit.to_string_lossy()))
}

/// Returns the environment variable that an invalid value comes from, unless it comes from the command line.
///
/// Clap does not report the source of an invalid value, so this parses the command line without the environment.
fn variable_of(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let option = argument.split_whitespace().next()?.trim_end_matches("...");
    let command = without_environment(CommandLine::command());
    let matches = command.try_get_matches_from(env::args_os()).ok()?;
    let id = option.trim_start_matches('-').replace('-', "_");
    let is_argument = matches.ids().any(|given| given.as_str() == id)
        && matches.value_source(&id) == Some(ValueSource::CommandLine);
    let variable = variable_name(option);
    (!is_argument && env::var_os(&variable).is_some()).then_some(variable)
}

/// Returns a hint if an unexpected argument follows one that ends with a comma, as in `-l :1, :2`.
fn comma_hint(error: &clap::Error) -> Option<String> {
    let unexpected = [ContextKind::InvalidArg, ContextKind::InvalidSubcommand];
    let unexpected = unexpected
        .iter()
        .find_map(|kind| error.get(*kind))?
        .to_string();
    let arguments: Vec<_> = env::args_os().collect();
    let follows_comma = arguments.windows(2).any(|pair| {
        pair[0].to_string_lossy().ends_with(',') && pair[1].to_string_lossy() == unexpected
    });
    follows_comma.then(|| "no blank is allowed after a comma".to_owned())
}

fn without_environment(command: clap::Command) -> clap::Command {
    command
        .mut_args(|argument| argument.env(Resettable::Reset))
        .mut_subcommands(without_environment)
}

/// Returns the environment variable of an option such as `--max-connections`.
fn variable_name(option: &str) -> String {
    let name = option.trim_start_matches('-').replace('-', "_");
    format!("ECHOSERVER_{}", name.to_uppercase())
}

#[cfg(test)]
mod tests;
