//! Listening sockets, TCP or Unix-domain.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use mio::{Interest, Registry, Token};
#[cfg(any(target_os = "linux", target_os = "android"))]
use rustix::event::{PollFd, PollFlags, Timespec};
#[cfg(any(target_os = "linux", target_os = "android"))]
use socket2::SockFilter;
use socket2::{Domain, Protocol, SockRef, Socket as RawSocket, TcpKeepalive, Type};

use crate::connection::Stream;
use crate::error::{error_text, with_context};
use crate::net::Register;
use crate::net::address::{Address, to_canonical};
use crate::net::stream::Socket;
#[cfg(unix)]
use crate::net::unix::UnixListener;
use crate::peer::Peer;

/// Unsent bytes that the kernel accepts for one connection. A small limit makes "written" mean nearly
/// "sent": a slow reader makes progress visibly, in small steps.
#[cfg(any(target_os = "linux", target_os = "android"))]
const MAX_UNSENT: u32 = 128 << 10;

/// TCP keepalive probes, and their interval, before an unresponsive client counts as gone.
const KEEPALIVE_PROBES: u32 = 6;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// A source of connections.
pub(crate) trait Listen {
    type Stream: Stream;

    /// Accepts the next connection. Never blocks.
    fn accept(&self) -> io::Result<(Self::Stream, Peer)>;

    /// Whether a client waits to be accepted. After `false`, the next client raises an event.
    fn has_waiting_client(&self) -> bool;

    /// Tries to make the kernel ignore new clients, while handshakes in progress still complete. Returns
    /// whether it does.
    fn stop_handshakes(&self) -> bool {
        false
    }
}

/// Options of the listening sockets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ListenOptions {
    pub(crate) backlog: u32,
    /// Permissions of a Unix-domain socket's file.
    #[cfg_attr(not(unix), expect(dead_code))]
    pub(crate) unix_mode: Option<u32>,
    /// Idle time before the first TCP keepalive probe.
    pub(crate) keepalive: Option<Duration>,
}

/// A listening socket.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(mio::net::TcpListener),
    /// A socket that was created elsewhere. Other processes may accept from it too.
    AdoptedTcp(mio::net::TcpListener),
    #[cfg(unix)]
    Unix(UnixListener),
}

impl Listener {
    /// Listens on every socket address that `address` resolves to.
    ///
    /// # Errors
    ///
    /// The message names the address: `cannot listen on 127.0.0.1:5555: address in use`.
    pub(crate) fn bind(address: &Address, options: ListenOptions) -> io::Result<Vec<Self>> {
        let bound = match address {
            #[cfg(unix)]
            Address::UnixPath(path) => UnixListener::bind(path, options.backlog, options.unix_mode)
                .map(|listener| vec![Self::Unix(listener)]),
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Address::UnixAbstract(name) => UnixListener::bind_abstract(name, options.backlog)
                .map(|listener| vec![Self::Unix(listener)]),
            _ => bind_tcp(address, options),
        };
        bound.map_err(|error| with_context(&error, &format!("cannot listen on {address}")))
    }

    /// Takes over a TCP socket that already listens.
    pub(crate) fn from_tcp(
        listener: std::net::TcpListener,
        options: ListenOptions,
    ) -> io::Result<Self> {
        check_listening(
            &SockRef::from(&listener),
            &[Domain::IPV4, Domain::IPV6],
            "TCP",
        )?;
        listener.set_nonblocking(true)?;
        set_options(&SockRef::from(&listener), options)?;
        Ok(Self::AdoptedTcp(mio::net::TcpListener::from_std(listener)))
    }

    /// Takes over a Unix-domain socket that already listens. Its file is kept on drop.
    #[cfg(unix)]
    pub(crate) fn from_unix(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        UnixListener::from_std(listener).map(Self::Unix)
    }

    /// Returns the local address, with the port the system chose.
    pub(crate) fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => listener
                .local_addr()
                .map(Address::Ip)
                .map_err(|error| with_context(&error, "cannot get the address of a listener")),
            #[cfg(unix)]
            Self::Unix(listener) => Ok(listener.address()),
        }
    }
}

impl Listen for Listener {
    type Stream = Socket;

    fn accept(&self) -> io::Result<(Socket, Peer)> {
        match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => {
                let (stream, address) = listener.accept()?;
                // On Linux, accepted sockets inherit the options of the listener.
                #[cfg(not(any(target_os = "linux", target_os = "android")))]
                let _already_reset = set_common_options(&SockRef::from(&stream));
                Ok((Socket::Tcp(stream), Peer::Ip(to_canonical(address))))
            }
            #[cfg(unix)]
            Self::Unix(listener) => Ok((Socket::Unix(listener.accept()?), Peer::Unix)),
        }
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn has_waiting_client(&self) -> bool {
        let mut socket = [match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => {
                PollFd::new(listener, PollFlags::IN)
            }
            Self::Unix(listener) => PollFd::new(listener, PollFlags::IN),
        }];
        // After an error, assume that there is one.
        !matches!(
            rustix::event::poll(&mut socket, Some(&Timespec::default())),
            Ok(0)
        )
    }

    /// Attaches a filter that drops packets with the SYN flag. A client repeats its SYN after a second.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn stop_handshakes(&self) -> bool {
        // Classic BPF: load the byte with TCP's flags; is SYN set? Then keep nothing, otherwise everything.
        const DROP_SYN: [SockFilter; 4] = [
            SockFilter::new(0x30, 0, 0, 13),
            SockFilter::new(0x45, 0, 1, 0x02),
            SockFilter::new(0x06, 0, 0, 0),
            SockFilter::new(0x06, 0, 0, u32::MAX),
        ];
        match self {
            Self::Tcp(listener) => SockRef::from(listener).attach_filter(&DROP_SYN).is_ok(),
            // A filter would outlive this process. A Unix-domain socket connects without a handshake.
            Self::AdoptedTcp(_) | Self::Unix(_) => false,
        }
    }

    /// Other systems do not tell without an `accept`.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    fn has_waiting_client(&self) -> bool {
        true
    }
}

impl Register for Listener {
    fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => {
                registry.register(listener, token, Interest::READABLE)
            }
            #[cfg(unix)]
            Self::Unix(listener) => listener.register(registry, token),
        }
    }
}

/// Checks that a socket that was created elsewhere is a stream socket of one of `families`, called `name`
/// in errors, and that it is listening.
pub(super) fn check_listening(
    socket: &RawSocket,
    families: &[Domain],
    name: &str,
) -> io::Result<()> {
    let is_stream = socket.r#type()? == Type::STREAM;
    let problem = if !is_stream || !families.contains(&socket.local_addr()?.domain()) {
        format!("not a {name} stream socket")
    } else if !is_listening(socket)? {
        format!("the {name} socket is not listening")
    } else {
        return Ok(());
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, problem))
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn is_listening(socket: &RawSocket) -> io::Result<bool> {
    socket.is_listener()
}

/// Other systems do not tell.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn is_listening(_socket: &RawSocket) -> io::Result<bool> {
    Ok(true)
}

/// Listens on every socket address of `address`, or on its fallback if the system has no IPv6.
fn bind_tcp(address: &Address, options: ListenOptions) -> io::Result<Vec<Listener>> {
    let (addresses, fallback) = address.resolve()?;
    let bind = |address| bind_socket(address, options);
    match (bind_existing(&addresses, bind), fallback) {
        (Err(error), Some(ipv4)) if is_missing(&error) => Ok(vec![bind(ipv4)?]),
        (bound, _) => bound,
    }
}

/// Binds every address. Those that do not exist on this system are skipped if another one does: `localhost`
/// usually resolves to `::1` as well, also where only IPv4 is configured.
fn bind_existing<T>(
    addresses: &[SocketAddr],
    bind: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<Vec<T>> {
    let mut bound = Vec::new();
    let mut missing = Vec::new();
    for address in addresses {
        match bind(*address) {
            Ok(listener) => bound.push(listener),
            Err(error) if is_missing(&error) => missing.push((address, error)),
            Err(error) => return Err(error),
        }
    }
    if bound.is_empty() && !missing.is_empty() {
        return Err(missing.remove(0).1);
    }
    for (address, error) in missing {
        log::info!("not listening on {address}: {}", error_text(&error));
    }
    Ok(bound)
}

/// Listens on one TCP address.
///
/// `mio::net::TcpListener::bind` has a fixed backlog and leaves it to the system whether `[::]`
/// accepts IPv4 clients.
fn bind_socket(address: SocketAddr, options: ListenOptions) -> io::Result<Listener> {
    let socket = RawSocket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // Allows a restart while old connections are in TIME_WAIT. On Windows it would let two servers
    // bind the same port.
    #[cfg(not(windows))]
    socket.set_reuse_address(true)?;
    set_options(&socket, options)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
    socket.set_nonblocking(true)?;
    Ok(Listener::Tcp(mio::net::TcpListener::from_std(
        socket.into(),
    )))
}

/// Sets the options that accepted sockets inherit on Linux.
fn set_options(socket: &RawSocket, options: ListenOptions) -> io::Result<()> {
    set_common_options(socket)?;
    set_keepalive(socket, options.keepalive).map_err(|error| {
        let time = options.keepalive.unwrap_or_default();
        with_context(&error, &format!("cannot set TCP keepalive to {time:?}"))
    })?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_notsent_lowat(MAX_UNSENT)?;
    Ok(())
}

fn set_keepalive(socket: &RawSocket, idle: Option<Duration>) -> io::Result<()> {
    let Some(idle) = idle else {
        // A socket that was created elsewhere may have it on.
        return socket.set_keepalive(false);
    };
    let keepalive = TcpKeepalive::new().with_time(idle);
    #[cfg(any(
        target_os = "linux",
        target_os = "android",
        target_vendor = "apple",
        windows
    ))]
    let keepalive = keepalive
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Small answers are sent without delay, and urgent bytes stay in the stream.
fn set_common_options(socket: &RawSocket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)
}

/// Returns whether `error` means that the system has no such address, or no addresses of its family.
fn is_missing(error: &io::Error) -> bool {
    const EAFNOSUPPORT: i32 = if cfg!(windows) {
        10047
    } else if cfg!(any(target_os = "linux", target_os = "android")) {
        97
    } else {
        47
    };
    matches!(
        error.kind(),
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported
    ) || error.raw_os_error() == Some(EAFNOSUPPORT)
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    #[cfg(unix)]
    use std::net::{TcpListener, UdpSocket};

    #[cfg(target_os = "linux")]
    use socket2::SockAddr;

    use super::*;

    const V4: &str = "127.0.0.1:7";
    const V6: &str = "[::1]:7";

    /// Binds `V4` and `V6` on a system on which `errors` happen; returns what was bound.
    fn bind_with(errors: &[(&str, ErrorKind)]) -> io::Result<Vec<SocketAddr>> {
        let bind = |address: SocketAddr| {
            let error = errors.iter().find(|(text, _)| *text == address.to_string());
            error.map_or(Ok(address), |(_, kind)| Err((*kind).into()))
        };
        bind_existing(&[V4.parse().unwrap(), V6.parse().unwrap()], bind)
    }

    #[test]
    fn addresses_that_do_not_exist_are_skipped_if_one_does() {
        let missing = ErrorKind::AddrNotAvailable;
        let bound = |errors: &[_]| bind_with(errors).map_err(|error| error.kind());
        let (v4, v6) = (V4.parse().unwrap(), V6.parse().unwrap());
        assert_eq!(bound(&[]), Ok(vec![v4, v6]));
        assert_eq!(bound(&[(V6, missing)]), Ok(vec![v4]));
        assert_eq!(bound(&[(V4, missing)]), Ok(vec![v6]));
        assert_eq!(bound(&[(V4, missing), (V6, missing)]), Err(missing));
        let in_use = ErrorKind::AddrInUse;
        assert_eq!(bound(&[(V4, in_use)]), Err(in_use));
        assert_eq!(bound(&[(V4, missing), (V6, in_use)]), Err(in_use));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_missing_address_family_is_a_missing_address() {
        let no_ipv6 = rustix::io::Errno::AFNOSUPPORT.into();
        assert!(is_missing(&no_ipv6), "{no_ipv6}");
        let in_use = rustix::io::Errno::ADDRINUSE.into();
        assert!(!is_missing(&in_use), "{in_use}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn keepalive_is_set_and_cleared() {
        let options = |keepalive| ListenOptions {
            backlog: 1,
            unix_mode: None,
            keepalive,
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = SockRef::from(&listener);
        set_options(&socket, options(Some(Duration::from_secs(42)))).unwrap();
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap().as_secs(), 42);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), KEEPALIVE_INTERVAL);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), KEEPALIVE_PROBES);
        set_options(&socket, options(None)).unwrap();
        assert!(!socket.keepalive().unwrap());

        let too_long = Duration::from_secs(32_768);
        let error = set_options(&socket, options(Some(too_long))).unwrap_err();
        let text = "cannot set TCP keepalive to 32768s: invalid argument";
        assert_eq!(error.to_string(), text);
    }

    #[cfg(target_os = "linux")]
    const OPTIONS: ListenOptions = ListenOptions {
        backlog: 1,
        unix_mode: None,
        keepalive: None,
    };

    #[cfg(target_os = "linux")]
    fn tcp(listener: &Listener) -> SockRef<'_> {
        match listener {
            Listener::Tcp(listener) => SockRef::from(listener),
            other => panic!("{other:?} was not bound to a port"),
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn listener_has_the_options_that_its_sockets_inherit() {
        let listener = bind_socket("127.0.0.1:0".parse().unwrap(), OPTIONS).unwrap();
        let socket = tcp(&listener);
        assert!(socket.tcp_nodelay().unwrap());
        assert!(socket.out_of_band_inline().unwrap());
        assert_eq!(socket.tcp_notsent_lowat().unwrap(), 128 << 10);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn clients_of_every_kind_of_address_are_reported_and_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let path = format!("unix:{}/echo", directory.path().display());
        let name = format!("unix:@echoserver-test-{}", std::process::id());
        for text in ["127.0.0.1:0", &path, &name] {
            let mut bound = Listener::bind(&text.parse().unwrap(), OPTIONS).unwrap();
            assert_eq!(bound.len(), 1, "{text}");
            let mut poll = mio::Poll::new().unwrap();
            bound[0].register(poll.registry(), Token(7)).unwrap();
            assert!(!bound[0].has_waiting_client(), "{text}");

            let _client = connect(&bound[0].address().unwrap());
            let mut events = mio::Events::with_capacity(8);
            poll.poll(&mut events, Some(Duration::from_secs(10)))
                .unwrap();
            let tokens: Vec<_> = events.iter().map(mio::event::Event::token).collect();
            assert_eq!(tokens, [Token(7)], "{text}");
            assert!(bound[0].has_waiting_client(), "{text}");
            let (_stream, peer) = bound[0].accept().unwrap();
            assert_eq!(peer == Peer::Unix, text.starts_with("unix:"));
            assert!(!bound[0].has_waiting_client(), "{text}");
        }
    }

    #[cfg(target_os = "linux")]
    fn connect(address: &Address) -> RawSocket {
        let address = match address {
            Address::Ip(address) => (*address).into(),
            Address::UnixPath(path) => SockAddr::unix(path).unwrap(),
            Address::UnixAbstract(name) => SockAddr::unix(format!("\0{name}")).unwrap(),
            other => panic!("{other} is not bound"),
        };
        let socket = RawSocket::new(address.domain(), Type::STREAM, None).unwrap();
        socket.connect(&address).unwrap();
        socket
    }

    /// Without IPv6, there is nothing to test.
    #[test]
    #[cfg(target_os = "linux")]
    fn only_the_unspecified_ipv6_address_is_for_ipv4_too() {
        let Ok(one) = bind_socket("[::1]:0".parse().unwrap(), OPTIONS) else {
            return;
        };
        assert!(tcp(&one).only_v6().unwrap());
        let all = Listener::bind(&Address::AnyInterface(0), OPTIONS).unwrap();
        assert!(!tcp(&all[0]).only_v6().unwrap());
        // An address in use is not a missing one, which IPv4 would replace.
        let in_use =
            Address::AnyInterface(tcp(&one).local_addr().unwrap().as_socket().unwrap().port());
        let error = Listener::bind(&in_use, OPTIONS).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn handshakes_in_progress_complete_and_no_others_begin() {
        use std::io::{Read, Write};
        use std::net::TcpStream;

        let listener = bind_socket("127.0.0.1:0".parse().unwrap(), OPTIONS).unwrap();
        let Address::Ip(address) = listener.address().unwrap() else {
            panic!("it is a TCP listener");
        };
        // This client ignores the SYN-ACK until the filter is removed.
        let client = RawSocket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let ignore_all = [SockFilter::new(0x06, 0, 0, 0)];
        client.attach_filter(&ignore_all).unwrap();
        client.set_nonblocking(true).unwrap();
        client.connect(&address.into()).unwrap_err();

        assert!(listener.stop_handshakes());
        let refused = TcpStream::connect_timeout(&address, Duration::from_millis(100));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::TimedOut);
        client.detach_filter().unwrap();
        let timeout = Timespec::try_from(Duration::from_secs(30)).unwrap();
        let tcp = tcp(&listener);
        let mut sockets = [PollFd::new(&*tcp, PollFlags::IN)];
        rustix::event::poll(&mut sockets, Some(&timeout)).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"connected").unwrap();
        client.set_nonblocking(false).unwrap();
        let mut received = [0; 9];
        (&client).read_exact(&mut received).unwrap();
        assert_eq!(&received, b"connected");
    }

    /// Another process may continue to accept from an adopted socket, on which a filter would stay.
    #[test]
    #[cfg(target_os = "linux")]
    fn adopted_listener_keeps_its_handshakes() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let adopted = Listener::from_tcp(tcp.try_clone().unwrap(), OPTIONS).unwrap();
        assert!(!adopted.stop_handshakes());
        std::net::TcpStream::connect(address).unwrap();
    }

    #[test]
    #[cfg(unix)]
    fn sockets_that_cannot_accept_are_refused() {
        let refusal = |socket: &RawSocket| {
            check_listening(socket, &[Domain::IPV4, Domain::IPV6], "TCP").map_err(|error| {
                assert_eq!(error.kind(), ErrorKind::InvalidInput);
                error.to_string()
            })
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(refusal(&SockRef::from(&listener)), Ok(()));
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        let not_tcp = Err("not a TCP stream socket".to_owned());
        assert_eq!(refusal(&SockRef::from(&datagrams)), not_tcp);
        let (unix, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(refusal(&SockRef::from(&unix)), not_tcp);
        #[cfg(any(target_os = "linux", target_os = "android"))]
        for socket in [
            RawSocket::new(Domain::IPV4, Type::STREAM, None).unwrap(),
            std::net::TcpStream::connect(listener.local_addr().unwrap())
                .unwrap()
                .into(),
        ] {
            let not_listening = Err("the TCP socket is not listening".to_owned());
            assert_eq!(refusal(&socket), not_listening);
        }
    }
}
