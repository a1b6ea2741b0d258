//! SIGTERM and SIGINT, at any moment and repeatedly.

use std::hint;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{BALANCED, Client, Process, program, random_bytes};

/// A signal ends the process by its default action until it is caught, and cleanly from then on.
#[test]
fn signals_during_startup_end_it() {
    for step in 0..40 {
        let server = Process::launch(program().args(["--listen=127.0.0.1:0", "--workers=2"]));
        // Hits a different moment of the startup each time.
        let moment = Instant::now() + Duration::from_micros(200 * step);
        while Instant::now() < moment {
            hint::spin_loop();
        }
        server.signal(if step % 2 == 0 {
            Signal::TERM
        } else {
            Signal::INT
        });
        let (status, log) = server.wait();
        if !log.is_empty() {
            assert_eq!(status.code(), Some(0), "{status}: {log}");
            assert!(log.contains(BALANCED), "{log}");
        }
    }
}

#[test]
fn signals_drain_a_running_server() {
    for signal in [Signal::TERM, Signal::INT] {
        let server = Process::serve(&[]);
        server.signal(signal);
        server.wait_for_success();
    }
}

#[test]
fn second_signal_exits_at_once() {
    for (first, second, code) in [
        (Signal::TERM, Signal::TERM, 143),
        (Signal::INT, Signal::INT, 130),
        (Signal::INT, Signal::TERM, 143),
    ] {
        // Longer than any test waits.
        let mut server = Process::serve(&["--workers=1", "--drain-timeout=1h"]);
        let client = Client::connect_with_receive_buffer(server.address(), 64 << 10);
        client.send_until_stuck(&random_bytes(1, 40 << 20));
        server.signal(first);
        server.wait_for_log(": draining");
        server.signal(second);
        assert_eq!(server.wait().0.code(), Some(code));
    }
}
