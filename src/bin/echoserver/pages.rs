//! Files generated from the definitions of the options: man pages and shell completions.

use std::io;

use clap::{Command, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;

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
    pub(crate) fn text(self, command: Command) -> io::Result<Vec<u8>> {
        match self {
            Self::Man => man_page(command, None, include_str!("pages/server.roff")),
            Self::ManCheck => man_page(command, Some("check"), include_str!("pages/check.roff")),
            Self::ManLoad => man_page(command, Some("load"), include_str!("pages/load.roff")),
            Self::Bash => Ok(completions(command, Shell::Bash)),
            Self::Zsh => Ok(completions(command, Shell::Zsh)),
            Self::Fish => Ok(completions(command, Shell::Fish)),
        }
    }
}

fn completions(mut command: Command, shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "echoserver", &mut text);
    text
}

/// Returns the man page of the server or of a command: its options, then the `sections` written by hand.
fn man_page(mut command: Command, name: Option<&str>, sections: &str) -> io::Result<Vec<u8>> {
    command.build();
    let found = name.and_then(|name| command.find_subcommand(name));
    let command = found.unwrap_or(&command).clone();
    let mut page = Vec::new();
    // The sections contain what stands below the options in the help.
    Man::new(command.after_help(None::<&str>)).render(&mut page)?;
    page.extend(sections.bytes());
    Ok(page)
}
