//! Files generated from the definitions of the options: man pages and shell completions.

use std::io;

use clap::{Command, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::output::Failure;

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
    /// Returns the contents of the file for the program, which is `command`.
    pub(crate) fn text(self, command: Command) -> Result<String, Failure> {
        match self {
            Self::Man => man_page(command, None, include_str!("pages/server.roff")),
            Self::ManCheck => man_page(command, Some("check"), include_str!("pages/check.roff")),
            Self::ManLoad => man_page(command, Some("load"), include_str!("pages/load.roff")),
            Self::Bash => completions(command, Shell::Bash),
            Self::Zsh => completions(command, Shell::Zsh),
            Self::Fish => completions(command, Shell::Fish),
        }
    }
}

fn completions(mut command: Command, shell: Shell) -> Result<String, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "echoserver", &mut text);
    to_string(text)
}

/// Returns the man page of the server or of a command: its options, then the `sections` written by hand.
fn man_page(mut command: Command, name: Option<&str>, sections: &str) -> Result<String, Failure> {
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
