//! A worker that panics ends the server with an error, after the other workers have drained.
//!
//! The server contains the panics of handlers. What is left is the log of the process, which can only be set
//! once: hence a crate with one test.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use echoserver::{Address, Config, Echo, Server};

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

fn connect(address: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(address).expect("it listens");
    client
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    client.write_all(b"ping").unwrap();
    client.read_exact(&mut [0; 4]).unwrap();
    client
}

#[test]
fn worker_panic_stops_the_server_and_drains_other_workers() {
    log::set_logger(&PanickingLog).expect("the only one");
    log::set_max_level(log::LevelFilter::Debug);
    let server = Server::bind(Config {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        workers: 2.try_into().unwrap(),
        ..Config::default()
    });
    let server = server.expect("a port is free");
    let Address::Ip(address) = server.addresses()[0] else {
        panic!("not an IP address");
    };
    let serving = thread::spawn(move || server.run(|_peer| Echo));
    // The first connection belongs to worker 0.
    let (first, mut second) = (connect(address), connect(address));
    drop(first);
    assert_eq!(second.read(&mut [0]).expect("EOF"), 0);
    drop(second);
    let error = serving.join().unwrap().expect_err("a worker has panicked");
    assert_eq!(error.to_string(), "worker 0 panicked: intended");
}
