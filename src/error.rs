//! Error messages of one line: without the system's error number, and with what was attempted.

use std::io;

/// Returns the message of `error` without the `(os error 98)` that `io::Error` appends.
pub(crate) fn error_text(error: &io::Error) -> String {
    let mut text = error.to_string();
    // Context may follow it, or precede it.
    while let Some(start) = text.find(" (os error ")
        && let Some(length) = text[start..].find(')')
    {
        text.replace_range(start..=start + length, "");
    }
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    text
}

/// Returns an error of the same kind whose message starts with `context`.
pub(crate) fn with_context(error: &io::Error, context: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{context}: {}", error_text(error)))
}

/// Replaces each control character by its escape sequence, so that the text stays within one line.
pub(crate) fn escape_control(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_control() {
            true => escaped.extend(character.escape_default()),
            false => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests;
