use super::*;

fn error(text: &str) -> String {
    text.parse::<Address>().expect_err(text).to_string()
}

#[test]
fn errors_name_the_problem() {
    for (text, problem) in [
        ("", "expected IP:PORT"),
        ("localhost", "expected IP:PORT"),
        ("[::1]", "expected IP:PORT"),
        ("127.0.0.1", "expected IP:PORT"),
        ("7x", "expected IP:PORT"),
        ("tcp://localhost:7", "leave out 'tcp://'"),
        ("tcp://localhost", "leave out 'tcp://'"),
        (" :7", "blanks before and after"),
        ("unix:/echo ", "blanks before and after"),
        ("unix:", "expected unix:PATH"),
        ("unix:@", "expected unix:PATH"),
    ] {
        assert!(error(text).contains(problem), "{text}: {}", error(text));
    }
}

#[test]
fn invalid_ports_are_named() {
    for (text, port) in [
        ("99999", "99999"),
        ("-1", "-1"),
        ("+80", "+80"),
        ("localhost:99999", "99999"),
        ("host:x", "x"),
        ("host:", ""),
        (":-1", "-1"),
        ("127.0.0.1:", ""),
        ("127.0.0.1:+80", "+80"),
        ("127.0.0.1:99999", "99999"),
        ("[::1]:65536", "65536"),
        ("127.1:x", "x"),
        ("a\nb:x\ny", r"x\ny"),
    ] {
        let expected = format!("invalid port '{port}': expected 0 to 65535");
        assert_eq!(error(text), expected, "{text}");
    }
}

#[test]
fn invalid_hosts_are_named() {
    for host in [
        "127.0.0.1:7",
        "x::y",
        "[:",
        "[::1%]",
        "[::1%a%b]",
        "[%lo]",
        "[localhost]",
        "[127.0.0.1]",
        "*",
        "local host",
        "a/b",
        "fe80::1%",
        "256.1.1.1",
        "127.1",
        "1",
    ] {
        assert_eq!(
            error(&format!("{host}:7")),
            format!("invalid host '{host}'")
        );
    }
    assert_eq!(error("a\nb:7"), r"invalid host 'a\nb'");
    assert_eq!(error("a\x1bb:7"), r"invalid host 'a\u{1b}b'");
    assert_eq!(error("[::1%a\nb]:7"), r"invalid host '[::1%a\nb]'");
}

#[test]
fn longest_name_of_a_host_is_accepted() {
    let name = "a".repeat(MAX_NAME);
    let address = format!("{name}:7").parse();
    assert_eq!(address, Ok(Address::Host(name.clone(), 7)));
    let start = &name[..100];
    assert_eq!(
        error(&format!("{name}a:7")),
        format!("invalid host '{start}...'")
    );
}

#[test]
fn long_texts_are_not_repeated_whole() {
    let long = "a".repeat(100_000);
    let start = &long[..100];
    let port = format!("invalid port '{start}...': expected 0 to 65535");
    assert_eq!(error(&format!("localhost:{long}")), port);
    assert_eq!(
        error(&format!("{long}:7")),
        format!("invalid host '{start}...'")
    );
    let zone = error(&format!("[::1%{long}]:7"));
    assert_eq!(zone, format!("invalid host '[::1%{}...'", &long[..95]));
    let forms = [long.clone(), format!("unix:{long}"), format!("{long}://")];
    for text in forms {
        assert!(error(&text).len() < 200, "{}", error(&text));
    }
}

#[test]
#[cfg(unix)]
fn longest_unix_path_can_be_bound() {
    use crate::net::listener::{ListenOptions, Listener};

    let max = platform::MAX_UNIX_PATH;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().display();
    let path = format!("unix:{folder}/{}", "a".repeat(max));
    let longest = &path[..5 + max];
    let options = ListenOptions {
        backlog: 1,
        unix_mode: None,
        keepalive: None,
        reuse_port: false,
    };
    Listener::bind(&[longest.parse().unwrap()], options).unwrap();
    for too_long in [&path[..6 + max], &format!("unix:@{}", "a".repeat(200))] {
        let error = too_long.parse::<Address>().unwrap_err().to_string();
        assert!(error.contains("at most"), "{error}");
    }
}

#[test]
fn control_characters_are_displayed_escaped() {
    let address: Address = "unix:/a\nb".parse().unwrap();
    assert_eq!(address, Address::UnixPath("/a\nb".into()));
    assert_eq!(address.to_string(), "unix:/a\\nb");
}

#[test]
fn ipv6_addresses_without_brackets_get_a_hint() {
    for text in [
        "::1",
        "::",
        ":::7",
        "::1:7",
        "1:2:3:4:5:6:7:8:9",
        "::ffff:127.0.0.1:7",
        "fe80::1%eth0",
        "fe80::1%eth0:7",
    ] {
        let hint = "an IPv6 address needs brackets, such as [::1]:5555";
        assert_eq!(error(text), hint, "{text}");
    }
}

#[test]
fn zone_names_are_left_to_the_resolver() {
    let address: Address = "[fe80::1%eth0]:7".parse().unwrap();
    assert_eq!(address, Address::Host("fe80::1%eth0".to_owned(), 7));
    // The resolver of the standard library parses numeric zones itself.
    let address: Address = "[fe80::1%1]:7".parse().unwrap();
    assert_eq!(address.to_string(), "[fe80::1%1]:7");
}

#[test]
fn ipv4_mapped_addresses_resolve_to_ipv4() {
    for (text, resolved) in [
        ("[::ffff:127.0.0.1]:7", "127.0.0.1:7"),
        ("[::ffff:0:0]:7", "0.0.0.0:7"),
        ("[::1]:7", "[::1]:7"),
        ("127.0.0.1:7", "127.0.0.1:7"),
    ] {
        let addresses = text.parse::<Address>().unwrap().resolve().unwrap();
        assert_eq!(addresses, [resolved.parse().unwrap()]);
    }
}

#[test]
fn host_resolves_to_its_addresses() {
    for (host, resolved) in [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7")] {
        // As a host: the resolver of the standard library parses it, and asks no server.
        let addresses = Address::Host(host.to_owned(), 7).resolve().unwrap();
        assert_eq!(addresses, [resolved.parse().unwrap()]);
    }
}

#[test]
fn displayed_addresses_parse() {
    for text in [
        "[::]:5555",
        "127.0.0.1:0",
        "localhost:7",
        "[::1]:7",
        "[fe80::1%eth0]:7",
        "[fe80::1%2]:7",
        "unix:/run/echo.sock",
        "unix:@echo",
    ] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
    }
}

#[test]
fn only_an_ip_address_is_a_socket_address() {
    let address: SocketAddr = "127.0.0.1:5555".parse().unwrap();
    assert_eq!(Address::Ip(address).socket_addr(), Some(address));
    assert_eq!(Address::UnixAbstract("echo".into()).socket_addr(), None);
}
