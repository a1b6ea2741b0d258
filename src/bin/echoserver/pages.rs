//! Files generated from the definitions of the options: man pages and shell completions.

use std::io;

use clap::{Command, CommandFactory, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

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

/// Sections of a man page: a title, and terms with their descriptions.
type Sections = &'static [(&'static str, &'static [(&'static str, &'static str)])];

const SERVER: Sections = &[
    (
        "EXIT STATUS",
        &[
            ("0", "The server was shut down by a signal."),
            ("1", "It cannot start, or it failed."),
            ("2", "An option or an environment variable is invalid."),
            (
                "130, 143",
                "A second SIGINT or SIGTERM ended it without draining.",
            ),
        ],
    ),
    (
        "SIGNALS",
        &[
            (
                "SIGTERM, SIGINT",
                "Drain: stop listening, answer what has arrived, close every connection and exit. \
                 The time limit is that of --drain-timeout. A second signal exits at once.",
            ),
            ("SIGUSR1", "Log the counters."),
        ],
    ),
    (
        "ENVIRONMENT",
        &[
            (
                "ECHOSERVER_LISTEN, ECHOSERVER_MAX_CONNECTIONS, ...",
                "Each option has a variable: its name in upper case, with underscores. \
                 The command line takes precedence. The commands check and load do not read them.",
            ),
            (
                "RUST_LOG",
                "Log filter such as debug. It takes precedence over --verbose and --quiet.",
            ),
            (
                "LISTEN_FDS, LISTEN_PID, NOTIFY_SOCKET",
                "Sockets inherited from a service manager, and the socket for its notifications.",
            ),
        ],
    ),
    (
        "EXAMPLES",
        &[
            ("echoserver", "Serve on port 5555 of every interface."),
            (
                "echoserver --listen 127.0.0.1:7,unix:/run/echo --metrics 127.0.0.1:9555",
                "Serve on two addresses, and metrics on a third.",
            ),
            (
                "echoserver check localhost:7",
                "Test whether a server echoes correctly.",
            ),
            (
                "echoserver load --connections 50 localhost:7",
                "Measure a server.",
            ),
        ],
    ),
];

const COMMANDS_ENVIRONMENT: (&str, &[(&str, &str)]) = (
    "ENVIRONMENT",
    &[(
        "ECHOSERVER_*",
        "Variables of the server. This command does not read them.",
    )],
);

const CHECK: Sections = &[
    (
        "CASES",
        &[
            (
                "required",
                "A TCP stream comes back complete, whatever other clients do.",
            ),
            (
                "strict",
                "Urgent data and backpressure, which many servers get wrong. A failed strict case is \
                 reported as a warning, and counts only with --strict.",
            ),
        ],
    ),
    (
        "EXIT STATUS",
        &[
            (
                "0",
                "All cases passed. Failed strict cases count only with --strict.",
            ),
            ("1", "A case failed."),
            ("2", "An argument is invalid."),
            ("3", "The server cannot be reached."),
        ],
    ),
    COMMANDS_ENVIRONMENT,
    (
        "EXAMPLES",
        &[
            (
                "echoserver check 192.0.2.7:7",
                "Test a server on another machine.",
            ),
            (
                "echoserver check --strict --json 5555",
                "Let every case count, and print JSON.",
            ),
            (
                "echoserver check --only 'half-close*' --patience 20 unix:/run/echo",
                "Test only half-closes, of a server that may be slow.",
            ),
        ],
    ),
];

const LOAD: Sections = &[
    (
        "MEASUREMENT",
        &[
            (
                "RTT",
                "The round-trip time of a message, from its first byte sent to its last byte received. \
                 With --rate it starts when the message was due, even if it was sent later; with \
                 --connect, when the connection was opened.",
            ),
            (
                "--rate",
                "Messages are sent on time to within microseconds: a thread polls without sleeping in the \
                 last millisecond before each. Above 500 messages a second it keeps one CPU busy.",
            ),
            (
                "verified",
                "Every byte is compared. The bytes of a connection depend on its number and on the offset \
                 in its stream, and never repeat.",
            ),
        ],
    ),
    (
        "EXIT STATUS",
        &[
            (
                "0",
                "Every byte that came back was right, and no connection failed.",
            ),
            (
                "1",
                "A wrong byte came back, a connection failed, or there was no answer at all.",
            ),
            ("2", "An argument is invalid."),
            ("3", "The server cannot be reached."),
            (
                "130, 143",
                "A second SIGINT or SIGTERM ended it without a summary.",
            ),
        ],
    ),
    (
        "SIGNALS",
        &[(
            "SIGINT, SIGTERM",
            "End the run, and print the summary. A second one exits at once.",
        )],
    ),
    COMMANDS_ENVIRONMENT,
    (
        "EXAMPLES",
        &[
            (
                "echoserver load -c 50 -d 30 192.0.2.7:7",
                "50 connections for 30 seconds.",
            ),
            (
                "echoserver load --rate 20000 -c 50 localhost:7",
                "20,000 messages a second. A stall of the server counts for every message that is due during it.",
            ),
            (
                "echoserver load --rate 1 -d 0 localhost:7",
                "A ping over TCP, until Ctrl-C.",
            ),
            (
                "echoserver load -n 1 --timeout 2 localhost:7",
                "A health check.",
            ),
            (
                "echoserver load --connect -c 10 localhost:7",
                "A connection for each message.",
            ),
        ],
    ),
];

impl GeneratedFile {
    /// Returns the contents of the file.
    pub(crate) fn text(self) -> Result<String, Failure> {
        let mut text = Vec::new();
        let mut complete = |shell: Shell| {
            clap_complete::generate(shell, &mut Options::command(), "echoserver", &mut text);
        };
        match self {
            Self::Man => man_page(None, SERVER, &mut text)?,
            Self::ManCheck => man_page(Some("check"), CHECK, &mut text)?,
            Self::ManLoad => man_page(Some("load"), LOAD, &mut text)?,
            Self::Bash => complete(Shell::Bash),
            Self::Zsh => complete(Shell::Zsh),
            Self::Fish => complete(Shell::Fish),
        }
        String::from_utf8(text).map_err(|error| io::Error::other(error).into())
    }
}

/// Writes the man page of the server or of a command.
fn man_page(name: Option<&str>, sections: Sections, page: &mut Vec<u8>) -> io::Result<()> {
    let mut command = Options::command();
    command.build();
    let command = match name.and_then(|name| command.find_subcommand(name)) {
        Some(found) => found.clone(),
        None => command,
    };
    // The sections contain what stands below the options in the help.
    let command: Command = command.after_help(None::<&str>);
    Man::new(command).render(page)?;
    let mut roff = Roff::new();
    for (title, terms) in sections {
        roff.control("SH", [*title]);
        for (term, description) in *terms {
            roff.control("TP", []);
            roff.text([bold(*term)]);
            roff.text([roman(*description)]);
        }
    }
    page.extend(roff.render().bytes());
    Ok(())
}
