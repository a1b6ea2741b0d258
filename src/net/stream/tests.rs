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
    let (socket, client) = UnixStream::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    let socket = Socket {
        stream: OwnedFd::from(socket).into(),
        is_tcp: false,
    };
    check_unread(socket, client);
}

#[test]
fn output_is_delivered_once_it_is_acknowledged() {
    let (mut socket, mut client) = Socket::with_client();
    assert!(socket.await_delivery(), "there is none");
    let mut written = 0;
    let error = loop {
        match socket.write(&[0; 4096]) {
            Ok(count) => written += count as u64,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(!socket.await_delivery(), "the client does not read");
    let read = io::copy(&mut (&mut client).take(written), &mut io::sink());
    assert_eq!(read.unwrap(), written);
    wait_until(|| socket.await_delivery());
}
