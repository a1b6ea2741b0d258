//! `echoserver plot`: draws runs of `load --json` over each other, as an SVG file.

// Labels and counts of lines are small, and plotters passes references.
#![allow(
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss
)]
#![allow(clippy::trivially_copy_pass_by_ref)]

mod chart;
mod record;

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;

use self::record::Run;
use crate::error::{error_text, escape_control};
use crate::output::{Exit, FAILURE, USAGE};

/// So many colors can be told apart.
const MAX_RUNS: usize = 7;

/// Draw runs of load over each other: latency by percentile, and rate and p99 over time
#[derive(Debug, Args)]
#[command(max_term_width = 100)]
#[command(after_help = "\
    A run is what 'echoserver load --json HOST:PORT > RUN.json' has written.\n\
    Exit status: 0 success, 1 a file is no such run, or cannot be read or written, 2 bad usage.")]
pub(crate) struct Options {
    /// Files with a run each, at most 7
    #[arg(value_name = "RUN.json", required = true)]
    runs: Vec<PathBuf>,

    /// File to write; its name ends with .svg
    #[arg(short, long, value_name = "FILE.svg", value_parser = parse_output)]
    output: PathBuf,
}

/// Refuses other names, such as that of a run.
fn parse_output(text: &str) -> Result<PathBuf, String> {
    let is_svg = Path::new(text).extension().is_some_and(|it| it == "svg");
    let expected = || "expected a name that ends with .svg".to_owned();
    is_svg.then(|| text.into()).ok_or_else(expected)
}

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<(), Exit> {
    let count = options.runs.len();
    if count > MAX_RUNS {
        let error = format!("{count} files: at most {MAX_RUNS} runs can be drawn");
        return Err(Exit(USAGE, Some(error)));
    }
    let runs: Result<Vec<_>, _> = options.runs.iter().map(|path| read(path)).collect();
    let written = fs::write(&options.output, chart::draw(&runs?));
    written.map_err(|error| failure("cannot write ", &options.output, &error_text(&error)))
}

fn read(path: &Path) -> Result<Run, Exit> {
    let bytes = fs::read(path);
    let bytes = bytes.map_err(|error| failure("cannot read ", path, &error_text(&error)))?;
    let (name, text) = (path.to_string_lossy(), String::from_utf8_lossy(&bytes));
    let run = Run::parse(&escape_control(&name), &text);
    run.map_err(|error| failure("", path, &error))
}

fn failure(what: &str, path: &Path, error: &str) -> Exit {
    let path = escape_control(&path.to_string_lossy());
    Exit(FAILURE, Some(format!("{what}{path}: {error}")))
}
