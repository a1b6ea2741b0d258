//! Files generated from the definitions of the options: man pages and shell completions.

use std::io;

use clap::{CommandFactory, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::Failure;
use crate::cli::Options;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GeneratedFile {
    Man,
    ManCheck,
    ManLoad,
    Bash,
    Zsh,
    Fish,
}

impl GeneratedFile {
    /// Returns the contents of the file.
    pub(crate) fn text(self) -> Result<String, Failure> {
        match self {
            Self::Man => man_page(None, include_str!("pages/server.roff")),
            Self::ManCheck => man_page(Some("check"), include_str!("pages/check.roff")),
            Self::ManLoad => man_page(Some("load"), include_str!("pages/load.roff")),
            Self::Bash => completions(Shell::Bash),
            Self::Zsh => completions(Shell::Zsh),
            Self::Fish => completions(Shell::Fish),
        }
    }
}

fn completions(shell: Shell) -> Result<String, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Options::command(), "echoserver", &mut text);
    to_string(text)
}

/// Returns the man page of the server or of a command: its options, then the `sections` written by hand.
fn man_page(name: Option<&str>, sections: &str) -> Result<String, Failure> {
    let mut command = Options::command();
    command.build();
    let command = match name.and_then(|name| command.find_subcommand(name)) {
        Some(found) => found.clone(),
        None => command,
    };
    let mut page = Vec::new();
    // The sections contain what stands below the options in the help.
    Man::new(command.after_help(None::<&str>)).render(&mut page)?;
    page.extend(sections.bytes());
    to_string(page)
}

fn to_string(bytes: Vec<u8>) -> Result<String, Failure> {
    String::from_utf8(bytes).map_err(|error| io::Error::other(error).into())
}
