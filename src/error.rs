//! Error messages of one line: without the system's error number, and with what was attempted.

use std::any::Any;
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};

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
        if character.is_control() {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// Drops the payload of a panic. The payload belongs to user code, so its drop can panic as well; that
/// second payload is leaked.
#[cold]
pub(crate) fn dispose(panic: Box<dyn Any + Send>) {
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        mem::forget(second);
    }
}

/// Returns the message of a panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Returns the first 100 characters of `text`, control characters escaped, to quote them in an error message.
pub(crate) fn excerpt(text: &str) -> String {
    match text.char_indices().nth(100) {
        Some((end, _)) => escape_control(&text[..end]) + "...",
        None => escape_control(text),
    }
}

#[cfg(test)]
mod tests;
