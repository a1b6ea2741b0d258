//! A worker that panics ends the server with an error, after the other workers have drained.
//!
//! The server contains the panics of handlers. What is left is the log of the process, which can only be set
//! once: hence a crate with one test.

#[allow(dead_code, unused_imports, reason = "only a part is needed")]
#[path = "it/harness/mod.rs"]
mod harness;

use std::thread;

use echoserver::{Config, Echo};
use harness::{Client, address_of, bind, config};

/// A log that panics when a connection closes.
struct PanickingLog;

impl log::Log for PanickingLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let is_worker = thread::current().name() == Some("worker-0");
        assert!(
            !is_worker || record.target() != "echoserver::access",
            "intended"
        );
    }

    fn flush(&self) {}
}

#[test]
fn worker_panic_stops_the_server_and_drains_other_workers() {
    log::set_logger(&PanickingLog).expect("the only one");
    log::set_max_level(log::LevelFilter::Debug);
    let server = bind(Config {
        workers: 2,
        ..config()
    });
    let address = address_of(&server);
    let serving = thread::spawn(move || server.run(|_peer| Echo));
    let connect = || {
        let client = Client::connect(address);
        client.ping(b"ping");
        client
    };
    // The first connection belongs to worker 0.
    let (first, second) = (connect(), connect());
    drop(first);
    second.expect_eof();
    drop(second);
    let error = serving.join().unwrap().expect_err("a worker has panicked");
    assert_eq!(error.to_string(), "worker 0 panicked: intended");
}
