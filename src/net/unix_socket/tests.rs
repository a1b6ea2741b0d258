use std::os::unix::net::{UnixDatagram, UnixListener as StdListener};

use super::*;

fn listen_at(path: &Path) -> io::Result<(Option<SocketFile>, UnixListener)> {
    listen(&Address::UnixPath(path.to_owned()), 16, None)
}

/// Lets `count` threads listen at `path` at once; returns the listeners of those that succeed.
#[cfg(target_os = "linux")]
fn race(path: &Path, count: usize) -> Vec<(Option<SocketFile>, UnixListener)> {
    let start = std::sync::Barrier::new(count);
    let bind = || {
        start.wait();
        listen_at(path)
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
        let _client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        listeners[0].1.accept().unwrap();
    }
}

/// Returns the error of binding `path`, which must stay as it is.
fn refusal_at(path: &Path) -> String {
    let before = identity(path).unwrap();
    let error = listen_at(path).unwrap_err();
    assert_eq!(identity(path).unwrap(), before);
    error.to_string()
}

#[test]
fn only_a_socket_without_a_listener_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo");
    drop(StdListener::bind(&path).unwrap());
    let listener = listen_at(&path).unwrap();
    assert_eq!(refusal_at(&path), "address in use");
    let connect = || {
        let socket = RawSocket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(&path)?)?;
        Ok(socket)
    };
    let backlog: Vec<io::Result<_>> = (0..20).map(|_| connect()).collect();
    assert!(backlog[19].is_err(), "the backlog is full");
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
    let listener = listen_at(&path).unwrap();
    // The link keeps the file, so that its inode number is not used again.
    fs::hard_link(&path, directory.path().join("first")).unwrap();
    fs::remove_file(&path).unwrap();
    let _other = StdListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists());
}

#[test]
#[cfg(target_os = "linux")]
fn lock_of_a_directory_is_exclusive_and_optional() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo");
    let held = platform::lock_directory(&path, 3);
    assert!(held.is_some() && platform::lock_directory(&path, 3).is_none());
    drop(held);
    assert!(platform::lock_directory(&path, 3).is_some());
    assert!(platform::lock_directory(&directory.path().join("missing/echo"), 3).is_none());
    assert!(
        platform::lock_directory(Path::new("echo"), 3).is_some(),
        "the working directory"
    );
}
