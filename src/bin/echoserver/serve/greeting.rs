//! `--greeting`: a text that is sent once when a client connects. After it, another handler serves the connection.

use std::io::Write;
use std::process;
use std::str::FromStr;

use echoserver::{Action, Context, Event, Handler, NewConnection};

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
        let hostname = gethostname::gethostname().to_string_lossy().into_owned();
        let known = [
            (r"\n", Part::Text("\n".to_owned())),
            (r"\r", Part::Text("\r".to_owned())),
            (r"\t", Part::Text("\t".to_owned())),
            (r"\\", Part::Text("\\".to_owned())),
            (r"\{", Part::Text("{".to_owned())),
            ("{hostname}", Part::Text(hostname)),
            ("{pid}", Part::Text(process::id().to_string())),
            ("{peer}", Part::Peer),
            ("{local}", Part::Local),
        ];
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (part, length) = match rest.find(['\\', '{']).unwrap_or(rest.len()) {
                0 => {
                    let found = known.iter().find(|(name, _)| rest.starts_with(name));
                    let (name, part) = found.ok_or_else(|| unknown(rest))?;
                    (part.clone(), name.len())
                }
                length => (Part::Text(rest[..length].to_owned()), length),
            };
            parts.push(part);
            rest = &rest[length..];
        }
        Ok(Self(parts))
    }
}

/// Returns what is wrong with the beginning of `text`.
fn unknown(text: &str) -> String {
    if text.starts_with('\\') {
        return r"expected n, r, t, \ or { after \".to_owned();
    }
    let name = text.split_inclusive('}').next().unwrap_or(text);
    format!(
        r"expected {{hostname}}, {{peer}}, {{local}} or {{pid}}, or \{{ for a brace, not {name:?}"
    )
}

impl Greeting {
    /// Returns the text for a connection. Only a greeting that contains the local address asks for it.
    pub(crate) fn text(&self, connection: &NewConnection<'_>) -> Vec<u8> {
        let text = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Peer => connection.peer().to_string(),
            Part::Local => match connection.local_address() {
                Ok(address) => address.to_string(),
                Err(_) => "unknown".to_owned(),
            },
        };
        self.0.iter().map(text).collect::<String>().into_bytes()
    }
}

/// Sends a greeting, if there is one, then leaves the connection to another handler.
pub(crate) struct GreetingHandler<H> {
    pub(crate) unsent: Vec<u8>,
    pub(crate) inner: H,
}

impl<H: Handler> Handler for GreetingHandler<H> {
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
        self.inner.process(event, context)
    }
}

#[cfg(test)]
mod tests;
