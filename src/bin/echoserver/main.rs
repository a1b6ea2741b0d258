//! The program: arguments, log, signals and exit status round the library's server.

mod cli;
mod serve;

use std::fmt::Display;
use std::io::{self, Write};
use std::panic;
use std::process::ExitCode;
use std::time::Duration;

use bytesize::ByteSize;
use echoserver::Address;
use echoserver::{Config, Echo, Server};

use crate::cli::Options;
use crate::serve::logging::Log;
use crate::serve::metrics::Metrics;
use crate::serve::reports::Reports;
use crate::serve::service::Inherited;

/// Exit statuses, as users expect them.
const FAILURE: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let options = match Options::read() {
        Ok(options) => options,
        Err(asked) if !asked.use_stderr() => {
            // Whether anyone reads the help is not our concern.
            let _closed = asked.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return complain(cli::one_line(&error), USAGE),
    };
    if let Some(page) = options.generate {
        return match page.write(&mut io::stdout()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                complain(format_args!("cannot write to stdout: {error}"), FAILURE)
            }
            _ => ExitCode::SUCCESS,
        };
    }
    // Before any thread starts.
    let inherited = Inherited::take();
    let log = match Log::start(options.log_level(), options.log_format) {
        Ok(log) => log,
        Err(error) => return complain(format_args!("cannot start the log: {error}"), FAILURE),
    };
    panic::set_hook(Box::new(|panic| {
        let payload = panic.payload();
        let what = payload.downcast_ref::<&str>().copied();
        let what = what.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let what = what.unwrap_or("no message");
        let place = panic.location().map(ToString::to_string);
        let place = place.as_deref().unwrap_or("a place unknown");
        let what = what.replace('\n', " ");
        log::error!("internal error: {what} (at {place})");
    }));
    let outcome = serve(&options, &log, inherited);
    if let Err(error) = &outcome {
        log.say(&complaint(error));
    }
    log.finish();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(FAILURE),
    }
}

/// What is wrong, in one line that says who speaks.
fn complaint(what: impl Display) -> String {
    format!("echoserver: {what}")
}

/// Says what is wrong to whoever listens, while there is no log.
fn complain(what: impl Display, status: u8) -> ExitCode {
    let _closed = writeln!(io::stderr(), "{}", complaint(what));
    ExitCode::from(status)
}

fn serve(options: &Options, log: &Log, inherited: Inherited) -> io::Result<()> {
    #[cfg(unix)]
    let signals = serve::signals::Signals::catch()?;
    let max_connections = serve::limits::max_connections(options)?;
    let config = options.config(max_connections, !inherited.is_empty());
    let mut server = Server::bind(config.clone())?;
    inherited.give_to(&mut server)?;
    announce(&server, &config);
    let watch = |address: &Address| Metrics::start(address.clone(), server.handle());
    let _metrics = options.metrics.as_ref().map(watch).transpose()?;
    #[cfg(unix)]
    let _signals = signals.obey(server.handle(), log.clone())?;
    let report = |interval| Reports::start(interval, server.handle(), log.clone());
    let _reports = options.stats_interval.map(report).transpose()?;

    #[cfg(unix)]
    serve::service::ready(&server);

    let stats = server.run(|_peer| Echo)?;

    log.stats("ended", &stats);
    match stats.check_final_balance() {
        None => {
            log::info!("balanced: every connection and every byte is accounted for");
            Ok(())
        }
        Some(fault) => {
            log::error!("not balanced: {fault}");
            Err(io::Error::other(format!("not balanced: {fault}")))
        }
    }
}

/// Says what is in force, so that the log of a server tells how it was run.
fn announce(server: &Server, config: &Config) {
    for address in server.addresses() {
        log::info!("listening on {address}");
    }
    let idle = config
        .idle_timeout
        .map_or_else(|| "off".to_owned(), |idle| format!("{idle:?}"));
    let busy_poll = match config.busy_poll {
        Duration::ZERO => "off".to_owned(),
        busy_poll => format!("{busy_poll:?}"),
    };
    log::info!(
        "workers: {}, connections: at most {}, buffers: {} each way, backlog: {}, idle timeout: {idle}, \
         drain timeout: {:?}, busy poll: {busy_poll}",
        config.workers,
        config.max_connections,
        ByteSize(config.buffer_size as u64),
        config.backlog,
        config.drain_timeout,
    );
    log::info!(
        "memory for connections: at most {} ({} x 2 x {}, and {} kept spare)",
        ByteSize(config.max_memory()),
        config.max_connections,
        ByteSize(config.buffer_size as u64),
        ByteSize(config.max_spare_memory()),
    );
}
