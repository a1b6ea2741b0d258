//! A certificate, servers and clients in this process, and one way to wait.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use echoserver::{Action, Address, Config, Context, Event, Handle, Handler, Server, Stats};
use echoserver_tls::Tls;
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig};
use socket2::{Socket, Type};

/// Time limit of every wait, far longer than any takes.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Once the server has taken no byte for this long, it is taken to be unable to.
const STUCK: Duration = Duration::from_millis(300);

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "timed out waiting until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Returns bytes in which one lost, doubled or out of order shows.
pub(crate) fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// The certificate of all servers, for `localhost`.
pub(crate) struct Identity {
    pub(crate) certificate: rcgen::Certificate,
    pub(crate) key: KeyPair,
}

impl Identity {
    pub(crate) fn get() -> &'static Self {
        static IDENTITY: OnceLock<Identity> = OnceLock::new();
        IDENTITY.get_or_init(|| {
            let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
            let parameters = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            let certificate = parameters.self_signed(&key).unwrap();
            Self { certificate, key }
        })
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.der().clone()]
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::try_from(self.key.serialize_der()).unwrap()
    }

    pub(crate) fn server_config(&self) -> Arc<ServerConfig> {
        let tls = ServerConfig::builder().with_no_client_auth();
        Arc::new(tls.with_single_cert(self.chain(), self.key()).unwrap())
    }

    pub(crate) fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.der().clone()).unwrap();
        roots
    }

    /// Writes the certificate and its key to files for a test with this name, and returns their paths.
    pub(crate) fn files(&self, test: &str) -> (String, String) {
        let write = |kind, text| {
            let path = format!("{}/{test}-{kind}.pem", env!("CARGO_TARGET_TMPDIR"));
            std::fs::write(&path, text).unwrap();
            path
        };
        let certificate = write("certificate", self.certificate.pem());
        (certificate, write("key", self.key.serialize_pem()))
    }
}

pub(crate) fn config() -> Config {
    Config {
        workers: 1,
        ..Config::new(Address::Ip(([127, 0, 0, 1], 0).into()))
    }
}

/// A running server. Its drop shuts it down, joins it and checks its counters.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) handle: Handle,
    serving: Option<JoinHandle<io::Result<Stats>>>,
}

impl TestServer {
    /// Starts a server whose handlers speak TLS around those of `inner`.
    pub(crate) fn start<H: Handler + 'static>(
        config: Config,
        inner: impl Fn() -> H + Send + Sync + 'static,
    ) -> Self {
        let tls = Identity::get().server_config();
        Self::start_without_tls(config, move || Tls::new(inner(), Arc::clone(&tls)).unwrap())
    }

    pub(crate) fn start_without_tls<H: Handler + 'static>(
        config: Config,
        handler: impl Fn() -> H + Send + Sync + 'static,
    ) -> Self {
        let server = Server::bind(config).unwrap();
        let [Address::Ip(address)] = *server.addresses() else {
            panic!("one IP address: {:?}", server.addresses())
        };
        let handle = server.handle();
        Self {
            address,
            handle,
            serving: Some(thread::spawn(move || server.run(|_| handler()))),
        }
    }

    pub(crate) fn connect(&self) -> Client {
        Client::connect(self.address, None)
    }

    /// Waits until the server holds output that it cannot send, and transfers nothing.
    pub(crate) fn wait_until_stuck(&self) {
        let (mut before, mut unchanged) = (self.handle.stats(), 0);
        wait_until("the server is stuck", || {
            let now = self.handle.stats();
            unchanged = if now == before { unchanged + 1 } else { 0 };
            before = now;
            unchanged >= 50 && before.total().buffered > 0
        });
    }

    /// Shuts the server down, checks its counters and returns them.
    pub(crate) fn stop(mut self) -> Stats {
        self.join()
    }

    fn join(&mut self) -> Stats {
        self.handle.shut_down();
        let serving = self.serving.take().expect("joined once");
        wait_until("the server ends", || serving.is_finished());
        let stats = serving.join().expect("no panic").expect("no error");
        assert_eq!(stats.check_final_balance(), None, "{stats:?}");
        stats
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if self.serving.is_some() && !thread::panicking() {
            self.join();
        }
    }
}

/// How a server has ended a connection.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum End {
    /// With close_notify and EOF.
    Clean,
    /// With EOF only.
    Cut,
    Reset,
    Tls(rustls::Error),
}

/// A client whose socket never blocks.
pub(crate) struct Client {
    pub(crate) tls: ClientConnection,
    pub(crate) socket: TcpStream,
    pub(crate) received: Vec<u8>,
    has_close_notify: bool,
    pub(crate) end: Option<End>,
}

impl Client {
    /// Connects, with a small receive buffer if asked for, and does the handshake.
    pub(crate) fn connect(address: SocketAddr, receive_buffer: Option<usize>) -> Self {
        let mut client = Self::begin(address, receive_buffer);
        wait_until("the handshake is complete", || {
            client.pump();
            assert_eq!(client.end, None);
            !client.tls.is_handshaking() && !client.tls.wants_write()
        });
        client
    }

    pub(crate) fn begin(address: SocketAddr, receive_buffer: Option<usize>) -> Self {
        static TLS: OnceLock<Arc<ClientConfig>> = OnceLock::new();
        let tls = TLS.get_or_init(|| {
            let tls = ClientConfig::builder().with_root_certificates(Identity::get().roots());
            Arc::new(tls.with_no_client_auth())
        });
        let socket = Socket::new(socket2::Domain::IPV4, Type::STREAM, None).unwrap();
        if let Some(bytes) = receive_buffer {
            socket.set_recv_buffer_size(bytes).unwrap();
        }
        socket.connect_timeout(&address.into(), DEADLINE).unwrap();
        socket.set_tcp_nodelay(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        let name = "localhost".try_into().unwrap();
        Self {
            tls: ClientConnection::new(Arc::clone(tls), name).unwrap(),
            socket: socket.into(),
            received: Vec::new(),
            has_close_notify: false,
            end: None,
        }
    }

    /// Does the handshake, but for the client's last message, which is sent with what comes next.
    pub(crate) fn finish_handshake_later(&mut self) {
        self.flush();
        wait_until("the server's part is done", || {
            self.read();
            !self.tls.is_handshaking()
        });
    }

    /// Sends and reads what can be sent and read now.
    pub(crate) fn pump(&mut self) {
        self.flush();
        while self.end.is_none() && self.read() {}
    }

    /// Sends what can be sent now. Returns whether that was anything.
    fn flush(&mut self) -> bool {
        let mut has_moved = false;
        // An error shows when the client reads.
        while self.tls.wants_write() && self.tls.write_tls(&mut self.socket).is_ok() {
            has_moved = true;
        }
        has_moved
    }

    /// Reads once. Returns whether there can be more.
    fn read(&mut self) -> bool {
        // rustls reads nothing after close_notify.
        let read = match self.has_close_notify {
            true => self.socket.read(&mut [0]),
            false => self.tls.read_tls(&mut self.socket),
        };
        match read {
            Ok(0) if self.has_close_notify => self.end = Some(End::Clean),
            Ok(0) => self.end = Some(End::Cut),
            Ok(_) if self.has_close_notify => panic!("a byte after close_notify"),
            Ok(_) => match self.tls.process_new_packets() {
                Ok(state) => {
                    let count = state.plaintext_bytes_to_read() as u64;
                    let mut reader = self.tls.reader().take(count);
                    reader.read_to_end(&mut self.received).unwrap();
                    self.has_close_notify = state.peer_has_closed();
                }
                Err(error) => self.end = Some(End::Tls(error)),
            },
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                self.end = Some(End::Reset);
            }
            Err(error) => panic!("{error}"),
        }
        true
    }

    /// Sends all of `bytes`, and reads meanwhile.
    pub(crate) fn send(&mut self, mut bytes: &[u8]) {
        wait_until("everything is sent", || {
            let count = self.tls.writer().write(bytes).unwrap();
            bytes = &bytes[count..];
            self.pump();
            // It can end the connection when it has everything.
            let is_sent = bytes.is_empty() && !self.tls.wants_write();
            assert!(is_sent || self.end.is_none(), "{:?}", self.end);
            is_sent
        });
    }

    /// Sends `bytes` until the server takes no more, without reading. Returns what is left.
    pub(crate) fn send_until_stuck<'a>(&mut self, mut bytes: &'a [u8]) -> &'a [u8] {
        let mut progress = Instant::now();
        wait_until("the server takes no more", || {
            let count = self.tls.writer().write(bytes).unwrap();
            bytes = &bytes[count..];
            if self.flush() {
                progress = Instant::now();
            }
            progress.elapsed() > STUCK
        });
        bytes
    }

    /// Sends close_notify; the client still reads.
    pub(crate) fn half_close(&mut self) {
        self.tls.send_close_notify();
        wait_until("close_notify is sent", || {
            self.pump();
            !self.tls.wants_write()
        });
    }

    /// Reads as many bytes as `bytes` has, which must be equal.
    pub(crate) fn expect(&mut self, bytes: &[u8]) {
        wait_until("the answer has come", || {
            self.pump();
            self.received.len() >= bytes.len() || self.end.is_some()
        });
        let is_equal = self.received.starts_with(bytes);
        let (found, due) = (self.received.len(), bytes.len());
        assert!(is_equal, "{found} of {due} bytes, then {:?}", self.end);
        self.received.drain(..due);
    }

    /// Reads until the connection has ended; no byte may come.
    pub(crate) fn expect_end(&mut self, end: &End) {
        wait_until("the connection ends", || {
            self.pump();
            self.end.is_some()
        });
        assert_eq!(self.end.as_ref(), Some(end));
        assert!(
            self.received.is_empty(),
            "{} bytes came",
            self.received.len()
        );
    }
}

/// A handler made of one function.
pub(crate) struct FnHandler<F>(pub(crate) F);

impl<F: FnMut(Event, &mut Context<'_>) -> Action> Handler for FnHandler<F> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        (self.0)(event, context)
    }
}

/// Returns a command that is ended after the [`DEADLINE`], or `None` if the program is not installed.
pub(crate) fn tool(program: &str) -> Option<Command> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|folder| folder.join(program).is_file()) {
        // Not `println!`, whose text the test runner keeps to itself.
        let _written = writeln!(io::stderr(), "skipped: {program} is not installed");
        return None;
    }
    let mut command = Command::new("timeout");
    command.arg(DEADLINE.as_secs().to_string()).arg(program);
    Some(command)
}
