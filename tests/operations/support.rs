//! What every test needs: timeout_of that ends, clients that cannot hang, directories that vanish.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// For so long anything is waited for: far longer than it takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `condition` holds; `what` says in the present what is waited for.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether all of these programs are installed; says so if not.
pub(crate) fn installed(programs: &[&str]) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let places: Vec<_> = env::split_paths(&path).collect();
    let missing = |program: &&&str| !places.iter().any(|place| place.join(program).is_file());
    match programs.iter().find(missing) {
        Some(program) => println!("skipped: {program} is not installed"),
        None => return true,
    }
    false
}

/// Bytes in which neighbours differ, so that one lost, doubled or out of order shows.
pub(crate) fn pattern(seed: usize, len: usize) -> Vec<u8> {
    let word = |index: usize| (seed * 0x9e37 + index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len).map(|index| (word(index) >> 24) as u8).collect()
}

/// A stream of which one half can be ended, and whose calls end in time.
pub(crate) trait Client: Read + Write + Sized {
    fn twin(&self) -> Self;
    fn end(&self);
}

impl Client for TcpStream {
    fn twin(&self) -> Self {
        self.try_clone().expect("a descriptor is free")
    }

    fn end(&self) {
        self.shutdown(Shutdown::Write).expect("it is connected");
    }
}

impl Client for UnixStream {
    fn twin(&self) -> Self {
        self.try_clone().expect("a descriptor is free")
    }

    fn end(&self) {
        self.shutdown(Shutdown::Write).expect("it is connected");
    }
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, PATIENCE).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

pub(crate) fn connect_unix(path: &Path) -> UnixStream {
    bounded(UnixStream::connect(path).expect("it listens"))
}

pub(crate) fn bounded(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends `bytes` and reads them back; there should be few of them.
pub(crate) fn ping(client: &mut impl Client, bytes: &[u8]) {
    client.write_all(bytes).expect("it takes bytes");
    let mut back = vec![0; bytes.len()];
    client.read_exact(&mut back).expect("it answers");
    assert!(back == bytes, "other bytes came back");
}

/// Sends `bytes`, and ends its half, while it reads: all of them come back, and then the end.
pub(crate) fn check_echo<C: Client + Send>(mut client: C, bytes: &[u8]) {
    let mut sender = client.twin();
    let mut back = Vec::new();
    thread::scope(|scope| {
        scope.spawn(move || {
            sender.write_all(bytes).expect("it takes bytes");
            sender.end();
        });
        client.read_to_end(&mut back).expect("no reset");
    });
    assert_eq!(back.len(), bytes.len());
    assert!(back == bytes, "other bytes came back");
}

/// A directory that is removed when this is dropped. Its path is short: those of sockets must be.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Relaxed);
        let path = env::temp_dir().join(format!("echoserver-{}-{count}", std::process::id()));
        fs::create_dir(&path).expect("a directory can be made");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _kept = fs::remove_dir_all(&self.0);
    }
}

/// A port of loopback that was free a moment ago, for programs that can't pick one themselves.
pub(crate) fn free_address() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound")
}

/// A file of the `packaging` directory.
pub(crate) fn packaged(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("packaging")
        .join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `text` with each of the words on the left, which must be there, replaced by that on the right.
pub(crate) fn replaced(text: &str, words: &[(&str, &str)]) -> String {
    words.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "no {from} in {text}");
        text.replace(from, to)
    })
}
