use std::time::Duration;

use echoserver::{Address, Config};
use log::LevelFilter;

use super::*;

fn parse(arguments: &[&str]) -> Result<serve::Options, String> {
    let arguments = ["echoserver"].iter().chain(arguments);
    CommandLine::try_parse_from(arguments)
        .and_then(CommandLine::check)
        .map(|command_line| command_line.serve)
        .map_err(one_line)
}

#[test]
fn option_definitions_are_consistent() {
    CommandLine::command().debug_assert();
}

#[test]
fn option_values_reach_the_config() {
    let options = parse(&[
        "-w7",
        "--listen=:7",
        "-l",
        "127.0.0.1:0",
        "--buffer-size=1MiB",
        "--backlog=9",
        "--idle-timeout=90s",
        "--drain-timeout=1m",
    ])
    .unwrap();
    let config = options.config(false);
    assert_eq!((config.workers, config.backlog), (7, 9));
    assert_eq!(
        config.listen,
        [Address::AnyInterface(7), "127.0.0.1:0".parse().unwrap()]
    );
    assert_eq!(config.buffer_size, 1 << 20);
    assert_eq!(config.idle_timeout, Some(Duration::from_secs(90)));
    assert_eq!(config.drain_timeout, Duration::from_secs(60));
    assert_eq!(
        parse(&["--idle-timeout=0s"])
            .unwrap()
            .config(true)
            .idle_timeout,
        None
    );
}

#[test]
fn keepalive_reaches_the_config() {
    let keepalive =
        |arguments: &[&str]| parse(arguments).map(|options| options.config(false).tcp_keepalive);
    assert_eq!(keepalive(&[]), Ok(Config::default().tcp_keepalive));
    assert_eq!(keepalive(&["--tcp-keepalive=0"]), Ok(None));
    let second = Some(Duration::from_secs(1));
    assert_eq!(keepalive(&["--tcp-keepalive=1"]), Ok(second));
}

#[test]
fn verbose_and_quiet_adjust_the_log_level() {
    for (arguments, level) in [
        (&["-qqqqq"][..], Some(LevelFilter::Off)),
        (&["-q"], Some(LevelFilter::Warn)),
        (&[], None),
        (&["-v", "-q"], Some(LevelFilter::Info)),
        (&["-v"], Some(LevelFilter::Debug)),
        (&["-vvvv"], Some(LevelFilter::Trace)),
    ] {
        assert_eq!(
            parse(arguments).unwrap().log_level(),
            level,
            "{arguments:?}"
        );
    }
}
