//! `--greeting`: a text that is sent once when a client connects. After it, the connection is an echo.

use std::io::Write;
use std::process;
use std::str::FromStr;

use echoserver::{Action, Context, Echo, Event, Handler, NewConnection};

/// Limit for a template, in bytes: each connection holds the greeting until it is sent.
const MAX_LENGTH: usize = 4096;

/// The template of a greeting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Greeting(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    /// What is the same for every connection.
    Text(String),
    Peer,
    Local,
}

impl FromStr for Greeting {
    type Err = String;

    /// Parses a text with `{hostname}`, `{peer}`, `{local}`, `{pid}`, and the escapes `\n`, `\r`, `\t`, `\\` and `\{`.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_LENGTH {
            return Err(format!("a greeting has at most {MAX_LENGTH} bytes"));
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            let (part, length) = match next {
                '\\' => parse_escape(rest)?,
                '{' => parse_placeholder(rest)?,
                _ => {
                    let length = rest.find(['\\', '{']).unwrap_or(rest.len());
                    (Part::Text(rest[..length].to_owned()), length)
                }
            };
            parts.push(part);
            rest = &rest[length..];
        }
        Ok(Self(parts))
    }
}

/// Parses the escape at the start of `text`; returns it and its length.
fn parse_escape(text: &str) -> Result<(Part, usize), String> {
    let replacement = match text.as_bytes().get(1) {
        Some(b'n') => "\n",
        Some(b'r') => "\r",
        Some(b't') => "\t",
        Some(b'\\') => "\\",
        Some(b'{') => "{",
        _ => return Err(r"expected n, r, t, \ or { after \".to_owned()),
    };
    Ok((Part::Text(replacement.to_owned()), 2))
}

/// Parses the placeholder at the start of `text`; returns it and its length.
fn parse_placeholder(text: &str) -> Result<(Part, usize), String> {
    let length = text.find('}').map_or(text.len(), |end| end + 1);
    let part = match &text[..length] {
        "{hostname}" => Part::Text(gethostname::gethostname().to_string_lossy().into_owned()),
        "{pid}" => Part::Text(process::id().to_string()),
        "{peer}" => Part::Peer,
        "{local}" => Part::Local,
        other => {
            let known = "{hostname}, {peer}, {local} or {pid}";
            return Err(format!(
                r"expected {known}, or \{{ for a brace, not {other:?}"
            ));
        }
    };
    Ok((part, length))
}

impl Greeting {
    /// Returns the handler of a connection. Only a greeting that contains the local address asks for it.
    pub(crate) fn handler(&self, connection: &NewConnection<'_>) -> GreetingHandler {
        let text = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Peer => connection.peer().to_string(),
            Part::Local => match connection.local_address() {
                Ok(address) => address.to_string(),
                Err(_) => "unknown".to_owned(),
            },
        };
        GreetingHandler {
            unsent: self.0.iter().map(text).collect::<String>().into_bytes(),
        }
    }
}

/// Sends a greeting, then echoes.
pub(crate) struct GreetingHandler {
    unsent: Vec<u8>,
}

impl Handler for GreetingHandler {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        if !self.unsent.is_empty() {
            // A write takes what fits and returns no error.
            let written = context.output.write(&self.unsent).unwrap_or(0);
            self.unsent.drain(..written);
            if !self.unsent.is_empty() {
                return Action::Flush;
            }
            // The memory is not needed any more.
            self.unsent = Vec::new();
        }
        Echo.process(event, context)
    }
}

#[cfg(test)]
mod tests;
