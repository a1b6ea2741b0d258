//! A shutdown answers what has arrived, ends every connection in order, and takes a bounded time.

use echoserver::Reason;

use crate::support::{TestServer, pattern};

#[test]
fn idle_connections_end_in_order() {
    let server = TestServer::echo();
    let mut clients = server.connect_many(50);
    for client in &mut clients {
        client.ping(&pattern(1, 100));
    }
    server.shut_down();
    for mut client in clients {
        client.expect_end();
    }
    assert_eq!(server.stop().total().closed_for(Reason::Drain), 50);
}
