//! What a command leaves behind: an exit status, text on stdout, or an error of one line.

use std::io::{self, Write};

use crate::error::error_text;

/// Exit statuses.
pub(crate) const SUCCESS: u8 = 0;
pub(crate) const FAILURE: u8 = 1;
pub(crate) const USAGE: u8 = 2;
/// No connection to the server can be made.
pub(crate) const UNREACHABLE: u8 = 3;
/// This machine has too few descriptors, ports or threads, which says nothing about the server.
pub(crate) const NOT_RUN: u8 = 4;

/// Why a command ended: its exit status, and an error unless there is none or the output already contains it.
#[derive(Debug)]
pub(crate) struct Exit(pub(crate) u8, pub(crate) Option<String>);

impl From<io::Error> for Exit {
    fn from(error: io::Error) -> Self {
        Self(FAILURE, Some(error_text(&error)))
    }
}

impl From<String> for Exit {
    fn from(error: String) -> Self {
        Self(FAILURE, Some(error))
    }
}

/// Cuts a part out of a text that has more than `limit` characters, such as one with a value of 100 kB.
pub(crate) fn shorten(text: &str, limit: usize) -> String {
    let length = text.chars().count();
    if length <= limit {
        return text.to_owned();
    }
    let kept = limit / 2;
    let start = text.chars().take(kept);
    let end = text.chars().skip(length - kept);
    start.chain("...".chars()).chain(end).collect()
}

/// Prints to stdout. A closed stdout is not an error.
pub(crate) fn print(text: impl AsRef<[u8]>) -> Result<(), Exit> {
    let mut stdout = io::stdout();
    let written = stdout.write_all(text.as_ref());
    match written.and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let error = format!("cannot write to stdout: {error}");
            Err(Exit(FAILURE, Some(error)))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
