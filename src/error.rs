//! Errors as one line: without the system's error number, and with what was attempted.

use std::io;

/// An error's message without the number that `io::Error` puts behind it.
pub(crate) fn error_text(error: &io::Error) -> String {
    let text = error.to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    let mut text = text[..end].to_owned();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    text
}

/// An error that says what it is about.
pub(crate) fn with_context(error: &io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {}", error_text(error)))
}
