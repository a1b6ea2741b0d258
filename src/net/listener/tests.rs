use std::io::ErrorKind;
#[cfg(unix)]
use std::net::{TcpListener as StdListener, UdpSocket};
#[cfg(unix)]
use std::os::fd::OwnedFd;

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
fn ipv4_replaces_ipv6_for_every_interface_only() {
    let bind = |text: &str, error: ErrorKind| {
        let bind = |address: SocketAddr| match address {
            SocketAddr::V4(_) => Ok(address.to_string()),
            SocketAddr::V6(_) => Err(error.into()),
        };
        let address: Address = text.parse().unwrap();
        let resolved = address.resolve().map_err(|error| error.kind())?;
        bind_tcp(&address, &resolved, bind).map_err(|error| error.kind())
    };
    let (missing, in_use) = (ErrorKind::AddrNotAvailable, ErrorKind::AddrInUse);
    for text in ["7", ":7"] {
        assert_eq!(bind(text, missing), Ok(vec!["0.0.0.0:7".to_owned()]));
        assert_eq!(bind(text, in_use), Err(in_use));
    }
    assert_eq!(bind("[::]:7", missing), Err(missing));
    assert_eq!(
        bind("127.0.0.1:7", missing),
        Ok(vec!["127.0.0.1:7".to_owned()])
    );
    assert_eq!(bind("unix:/echo", missing), Err(ErrorKind::Unsupported));
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
        reuse_port: false,
    };
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
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

#[cfg(unix)]
const OPTIONS: ListenOptions = ListenOptions {
    backlog: 1,
    unix_mode: None,
    keepalive: None,
    reuse_port: false,
};

#[test]
#[cfg(target_os = "linux")]
fn listener_has_the_options_that_its_sockets_inherit() {
    let listener = bind_socket("127.0.0.1:0".parse().unwrap(), true, OPTIONS).unwrap();
    let socket = listener.socket();
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
        let mut bound = Listener::bind(&[text.parse().unwrap()], OPTIONS).unwrap();
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
    let Ok(mut ones) = Listener::bind(&["[::1]:0".parse().unwrap()], OPTIONS) else {
        return;
    };
    let one = ones.remove(0);
    assert!(one.socket().only_v6().unwrap());
    let all = Listener::bind(&[Address::AnyInterface(0)], OPTIONS).unwrap();
    assert!(!all[0].socket().only_v6().unwrap());
    // An address in use is not a missing one, which IPv4 would replace.
    let in_use = Address::AnyInterface(
        one.socket()
            .local_addr()
            .unwrap()
            .as_socket()
            .unwrap()
            .port(),
    );
    let error = Listener::bind(&[in_use], OPTIONS).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
}

#[test]
#[cfg(target_os = "linux")]
fn handshakes_in_progress_complete_and_no_others_begin() {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use rustix::event::{PollFd, PollFlags, Timespec};
    use socket2::SockFilter;

    let listener = bind_socket("127.0.0.1:0".parse().unwrap(), true, OPTIONS).unwrap();
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
    let socket = listener.socket();
    let mut sockets = [PollFd::new(&*socket, PollFlags::IN)];
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
    let tcp = StdListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let adopted = Listener::from_tcp(tcp.try_clone().unwrap(), OPTIONS).unwrap();
    assert!(!adopted.stop_handshakes());
    std::net::TcpStream::connect(address).unwrap();
}

#[test]
#[cfg(unix)]
fn sockets_that_cannot_accept_are_refused() {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    fn check(adopted: io::Result<Listener>, refusal: &str) {
        let error = adopted.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(error.to_string(), refusal);
    }
    let tcp = |socket: OwnedFd| Listener::from_tcp(socket.into(), OPTIONS);
    let unix = |socket: OwnedFd| Listener::from_unix(socket.into());
    let directory = tempfile::tempdir().unwrap();
    let tcp_listener = StdListener::bind("127.0.0.1:0").unwrap();
    let unix_listener = UnixListener::bind(directory.path().join("echo")).unwrap();
    let (connected, _peer) = UnixStream::pair().unwrap();

    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    for socket in [datagrams.into(), connected.try_clone().unwrap().into()] {
        check(tcp(socket), "not a TCP stream socket");
    }
    let datagrams = UnixDatagram::bind(directory.path().join("datagrams")).unwrap();
    for socket in [datagrams.into(), tcp_listener.try_clone().unwrap().into()] {
        check(unix(socket), "not a Unix-domain stream socket");
    }
    #[cfg(target_os = "linux")]
    {
        let bound = RawSocket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let client = std::net::TcpStream::connect(tcp_listener.local_addr().unwrap()).unwrap();
        for socket in [bound.into(), client.into()] {
            check(tcp(socket), "the TCP socket is not listening");
        }
        let not_listening = "the Unix-domain socket is not listening";
        check(unix(connected.into()), not_listening);
    }
    assert!(tcp(tcp_listener.into()).is_ok());
    assert!(unix(unix_listener.into()).is_ok());
}
