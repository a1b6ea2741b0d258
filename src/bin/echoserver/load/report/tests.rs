use std::net::{Ipv4Addr, SocketAddr};

use clap::Parser;

use super::*;
use crate::cli::{Command, CommandLine};

const SECOND: Duration = Duration::from_secs(1);
const MICRO: Duration = Duration::from_micros(1);

/// Returns why a load of ten seconds may be at fault, with this CPU time, and with a lateness and an RTT of one message.
fn fault(option: &str, cpu: Duration, lateness: Duration, rtt: Duration) -> Option<String> {
    let arguments = ["echoserver", "load", "127.0.0.1:1", option];
    let command_line = CommandLine::try_parse_from(arguments).unwrap();
    let Some(Command::Load(options)) = command_line.command else {
        panic!("not the load");
    };
    let target = Target {
        name: String::new(),
        address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)).into(),
    };
    let mut measured = Measured {
        cpu: Some(cpu),
        elapsed: 10 * SECOND,
        ..Measured::default()
    };
    measured.total.lateness.record(lateness);
    measured.total.rtt.record(rtt);
    own_fault(&options.plan(&target), &measured)
}

#[test]
fn saturated_cpu_is_the_fault_of_a_load_in_a_closed_loop() {
    let fault = |cpu| fault("-c=1", cpu, Duration::ZERO, SECOND);
    assert_eq!(fault(9 * SECOND), None);
    let expected = "the load used 98 % of its CPU time".to_owned();
    assert_eq!(fault(98 * SECOND / 10), Some(expected));
}

#[test]
fn lateness_is_the_fault_of_a_load_at_a_rate() {
    let fault = |lateness| fault("--rate=1", 10 * SECOND, lateness, 100 * MICRO);
    assert_eq!(fault(20 * MICRO), None);
    let text = fault(30 * MICRO).expect("a fault");
    assert!(text.starts_with("the load was late: p99 3"), "{text}");
}
