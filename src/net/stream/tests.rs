use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;

use super::*;

/// What the other end does can take a moment to arrive.
fn wait_until(mut condition: impl FnMut() -> bool) {
    let mut attempts = 0..1_000;
    while !condition() {
        attempts.next().expect("it happens within 10 s");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Returns a Unix-domain socket, and its client.
fn unix_pair() -> (Socket, UnixStream) {
    let (stream, client) = UnixStream::pair().unwrap();
    stream.set_nonblocking(true).unwrap();
    let socket = Socket {
        stream: OwnedFd::from(stream).into(),
        is_tcp: false,
    };
    (socket, client)
}

fn check_unread(mut socket: Socket, mut client: impl Write) {
    assert_eq!(socket.unread(), 0);
    client.write_all(b"12345").unwrap();
    wait_until(|| socket.unread() == 5);
    assert_eq!(socket.read(&mut [0; 2]).unwrap(), 2);
    assert_eq!(socket.unread(), 3);
    drop(client);
    assert_eq!(socket.unread(), 3, "the EOF does not count");
}

#[test]
fn unread_bytes_are_counted() {
    let (socket, client) = Socket::with_client();
    check_unread(socket, client);
    let (socket, client) = unix_pair();
    check_unread(socket, client);
}

#[test]
fn output_is_delivered_once_it_is_acknowledged() {
    let (mut socket, mut client) = Socket::with_client();
    assert!(socket.poll_delivery(), "there is none");
    let mut written = 0;
    let error = loop {
        match socket.write(&[0; 4096]) {
            Ok(count) => written += count as u64,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(!socket.poll_delivery(), "the client does not read");
    let read = io::copy(&mut (&mut client).take(written), &mut io::sink());
    assert_eq!(read.unwrap(), written);
    wait_until(|| socket.poll_delivery());
}

#[test]
fn unix_socket_delivers_at_once_and_cannot_be_reset() {
    let (mut socket, mut client) = unix_pair();
    assert_eq!(socket.write(b"1").unwrap(), 1);
    assert!(socket.poll_delivery(), "the client does not read");
    socket.reset_on_close();
    drop(socket);
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    assert_eq!(received, b"1");
}

/// A read of a Unix-domain socket also ends where descriptors were passed.
#[test]
fn short_read_means_drained_on_tcp_only() {
    assert!(Socket::with_client().0.short_read_means_drained());
    assert!(!unix_pair().0.short_read_means_drained());
}
