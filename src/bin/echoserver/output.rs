//! What a command leaves behind: an exit status, and text on stdout.

use std::io::{self, Write};

use crate::error::error_text;

/// Exit statuses other than 0.
pub(crate) const FAILURE: u8 = 1;
pub(crate) const USAGE: u8 = 2;
/// No connection to the server can be made.
pub(crate) const UNREACHABLE: u8 = 3;

/// Why a command failed: its exit status, and an error unless the output already contains it.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) u8, pub(crate) Option<String>);

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self(FAILURE, Some(error_text(&error)))
    }
}

/// Prints to stdout. A closed stdout is not an error.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let error = format!("cannot write to stdout: {error}");
            Err(Failure(FAILURE, Some(error)))
        }
        _ => Ok(()),
    }
}
