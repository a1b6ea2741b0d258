//! Files generated from the definitions of the options: man pages and shell completions.

use std::io;

use clap::{Arg, Command, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GeneratedFile {
    Man,
    ManCheck,
    ManLoad,
    ManPlot,
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
            Self::ManPlot => man_page(command, Some("plot"), include_str!("pages/plot.roff")),
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
fn man_page(command: Command, name: Option<&str>, sections: &str) -> io::Result<Vec<u8>> {
    // The command `help` has no page of its own.
    let mut program = command.disable_help_subcommand(true);
    program.build();
    let command = name.and_then(|name| program.find_subcommand(name));
    let command = command.unwrap_or(&program);
    let version = command.get_version().unwrap_or_default();
    let usage = usage(command);
    // The sections contain what stands below the options in the help.
    let command = command
        .clone()
        .after_help(None::<&str>)
        .override_usage(usage);
    let mut page = Vec::new();
    Man::new(command)
        // No date. An empty one is not written, so that the source would take its place.
        .date(" ")
        .source(format!("{} {version}", program.get_name()))
        .manual("User Commands")
        .render(&mut page)?;
    page.extend(sections.bytes());
    Ok(page)
}

/// Returns the synopsis: all options with their values, then the arguments; and each command of a command.
fn usage(command: &Command) -> String {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    let visible = command.get_arguments().filter(|it| !it.is_hide_set());
    let (arguments, options): (Vec<_>, Vec<_>) = visible.partition(|it| it.is_positional());
    let option = |option: &Arg| {
        let short = option.get_short().map(|short| format!("-{short}|"));
        let text = format!("{}{option}", short.unwrap_or_default());
        match option.is_required_set() {
            true => format!(" {text}"),
            false => format!(" [{text}]"),
        }
    };
    let options = options.into_iter().map(option).collect::<String>();
    let arguments = arguments.into_iter().map(|argument| format!(" {argument}"));
    let commands = command.get_subcommands();
    let commands = commands.map(|command| format!("\n{name} {} ...", command.get_name()));
    let arguments = arguments.chain(commands).collect::<String>();
    format!("{name}{options}{arguments}")
}
