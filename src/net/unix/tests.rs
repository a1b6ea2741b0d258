#[cfg(target_os = "linux")]
use std::os::unix::net::UnixStream;
use std::os::unix::net::{UnixDatagram, UnixListener as StdListener};

use super::*;

/// Lets `count` threads bind `path` at once; returns the listeners of those that succeed.
#[cfg(target_os = "linux")]
fn race(path: &Path, count: usize) -> Vec<UnixListener> {
    let start = std::sync::Barrier::new(count);
    let bind = || {
        start.wait();
        UnixListener::bind(path, 16, None)
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(bind)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let mut listeners = Vec::new();
    for result in results {
        match result {
            Ok(listener) => listeners.push(listener),
            Err(error) => assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}"),
        }
    }
    listeners
}

#[test]
#[cfg(target_os = "linux")]
fn one_of_many_that_bind_a_path_at_once_succeeds() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..40 {
        let path = directory.path().join(format!("echo{round}"));
        if round % 2 == 0 {
            drop(StdListener::bind(&path).unwrap());
        }
        let listeners = race(&path, 8);
        assert_eq!(listeners.len(), 1, "round {round}");
        let _client = UnixStream::connect(&path).unwrap();
        listeners[0].accept().unwrap();
    }
}

/// Returns the error of binding `path`, which must stay as it is.
fn refusal_at(path: &Path) -> String {
    let before = identity(path).unwrap();
    let error = UnixListener::bind(path, 1, None).unwrap_err();
    assert_eq!(identity(path).unwrap(), before);
    error.to_string()
}

#[test]
fn only_a_socket_without_a_listener_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo");
    drop(StdListener::bind(&path).unwrap());
    let listener = UnixListener::bind(&path, 1, None).unwrap();
    assert_eq!(refusal_at(&path), "address in use");
    let connect = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(&path)?)?;
        Ok(socket)
    };
    let backlog: Vec<io::Result<_>> = (0..8).map(|_| connect()).collect();
    assert!(backlog[7].is_err(), "the backlog is full");
    assert_eq!(refusal_at(&path), "address in use");
    drop(listener);
    assert!(!path.exists());

    fs::write(&path, "").unwrap();
    assert_eq!(refusal_at(&path), "file exists and is not a socket");
    fs::remove_file(&path).unwrap();
    let _datagrams = UnixDatagram::bind(&path).unwrap();
    let error = refusal_at(&path);
    assert!(error.contains("wrong type"), "{error}");
}

#[test]
fn file_of_another_socket_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo");
    let listener = UnixListener::bind(&path, 1, None).unwrap();
    // The link keeps the file, so that its inode number is not used again.
    fs::hard_link(&path, directory.path().join("first")).unwrap();
    fs::remove_file(&path).unwrap();
    let _other = StdListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists());
}

#[test]
fn sockets_that_cannot_accept_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name);
    let refusal = |socket: OwnedFd| {
        let error = UnixListener::from_std(socket.into()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        error.to_string()
    };
    let datagrams = UnixDatagram::bind(path("datagrams")).unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for socket in [datagrams.into(), tcp.into()] {
        assert_eq!(refusal(socket), "not a Unix-domain stream socket");
    }
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        let (connected, _peer) = UnixStream::pair().unwrap();
        let not_listening = "the Unix-domain socket is not listening";
        assert_eq!(refusal(connected.into()), not_listening);
    }
    let listener = StdListener::bind(path("listener")).unwrap();
    assert!(UnixListener::from_std(listener).is_ok());
}
