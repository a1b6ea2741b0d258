//! What goes wrong on one connection ends that one, and its neighbours notice nothing.

use echoserver::{Action, Reason};

use crate::support::{Protocol, TestServer, config};

#[test]
fn a_panic_in_a_handler_ends_its_connection_only() {
    let server = TestServer::serve(config(), |_peer| {
        Protocol::new(|input, output| {
            assert_ne!(input.data(), b"panic", "asked for by the test");
            output.append(input);
            Action::Continue
        })
    });
    let (mut neighbour, mut victim) = (server.connect(), server.connect());
    neighbour.ping(b"one");
    victim.ping(b"one");
    victim.send(b"panic");
    victim.expect_gone();
    neighbour.ping(b"two");
    neighbour.close();
    let total = server.stop().total();
    assert_eq!(total.closed_for(Reason::Panic), 1);
    assert_eq!(total.closed_for(Reason::Done), 1);
    assert_eq!(total.discarded_in_all(), 5);
}
