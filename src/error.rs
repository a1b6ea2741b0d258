//! Error messages of one line: without the system's error number, and with what was attempted.

use std::io;

/// Returns the message of `error` without the `(os error 98)` that `io::Error` appends.
pub(crate) fn error_text(error: &io::Error) -> String {
    let text = error.to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    let mut text = text[..end].to_owned();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    text
}

/// Returns an error of the same kind whose message starts with `context`.
pub(crate) fn with_context(error: &io::Error, context: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{context}: {}", error_text(error)))
}
