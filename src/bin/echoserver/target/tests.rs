use std::net::TcpListener;

use super::*;

#[test]
fn socket_that_is_connected_to_itself_is_refused() {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let own = Socket::new(socket2::Domain::IPV4, Type::STREAM, None).unwrap();
    own.bind(&loopback.into()).unwrap();
    own.connect(&own.local_addr().unwrap()).unwrap();
    let error = refuse_itself(&own).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);

    let listener = TcpListener::bind(loopback).unwrap();
    let address = listener.local_addr().unwrap().into();
    let other = connect(&address, Duration::from_secs(10), |_| Ok(()));
    assert!(refuse_itself(&other.unwrap()).is_ok());
}

#[test]
fn other_errors_keep_their_text() {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1)).into();
    let refused = with_cause(ErrorKind::ConnectionRefused.into(), &address);
    assert_eq!(client_error(&refused), "connection refused");
    let no_port = with_cause(ErrorKind::AddrNotAvailable.into(), &address);
    let text = "no local port is free: closed connections hold them for a minute";
    assert_eq!(client_error(&no_port), text);
}
