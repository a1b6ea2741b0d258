use super::*;

#[test]
fn errors_name_the_problem() {
    for (text, problem) in [
        ("", "an address is missing"),
        ("99999", "port 99999 is not between 0 and 65535"),
        ("localhost:99999", "port 99999"),
        ("-1", "expected IP:PORT"),
        ("localhost", "expected IP:PORT"),
        ("127.0.0.1:", "expected IP:PORT"),
        ("127.0.0.1:7:8", "expected IP:PORT"),
        ("x::y:7", "expected IP:PORT"),
        ("[::1", "expected IP:PORT"),
        ("[::1]", "expected IP:PORT"),
        ("[::1%]:7", "[::1%] is not an IPv6 address in brackets"),
        ("[%lo]:7", "[%lo] is not an IPv6 address in brackets"),
        ("[localhost]:7", "[localhost] is not an IPv6 address"),
        ("[zz]:1", "[zz] is not an IPv6 address"),
        ("tcp://localhost:7", "'localhost:7' without 'tcp://'"),
        ("*:7", "':7' means every interface"),
        (" :7", "blanks before and after"),
        ("unix:/echo ", "blanks before and after"),
        ("local host:7", "'local host' is not a host name"),
        ("a/b:7", "'a/b' is not a host name"),
        ("a\nb:7", "'a\\nb' is not a host name"),
        ("[a\n\nb]:7", "[a\\n\\nb] is not an IPv6 address"),
        ("256.1.1.1:7", "256.1.1.1 is not an IPv4 address"),
        ("127.1:7", "127.1 is not an IPv4 address"),
        ("1:7", "1 is not an IPv4 address"),
        #[cfg(unix)]
        ("unix:", "expected unix:PATH"),
        #[cfg(unix)]
        ("unix:@", "expected unix:PATH"),
    ] {
        let error = text.parse::<Address>().expect_err(text);
        assert!(error.to_string().contains(problem), "{text}: {error}");
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
    };
    Listener::bind(&longest.parse().unwrap(), options).unwrap();
    for too_long in [&path[..6 + max], &format!("unix:@{}", "a".repeat(200))] {
        let error = too_long.parse::<Address>().unwrap_err().to_string();
        assert!(error.contains("at most"), "{error}");
    }
}

#[test]
#[cfg(unix)]
fn control_characters_are_displayed_escaped() {
    let address: Address = "unix:/a\nb".parse().unwrap();
    assert_eq!(address, Address::UnixPath("/a\nb".into()));
    assert_eq!(address.to_string(), "unix:/a\\nb");
}

#[test]
fn ipv6_addresses_without_brackets_get_a_hint() {
    for (text, forms) in [
        ("::1", "[::1]:PORT"),
        ("::", "[::]:PORT"),
        (":::7", "[::]:7"),
        ("::1:7", "[::1]:7, or [::1:7]:PORT"),
        ("1:2:3:4:5:6:7:8:9", "[1:2:3:4:5:6:7:8]:9"),
        ("::ffff:127.0.0.1:7", "[::ffff:127.0.0.1]:7"),
        ("fe80::1%eth0", "[fe80::1%eth0]:PORT"),
        ("fe80::1%eth0:7", "[fe80::1%eth0]:7"),
    ] {
        let error = text.parse::<Address>().expect_err(text).to_string();
        assert_eq!(error, format!("an IPv6 address needs brackets: {forms}"));
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
        let (addresses, fallback) = text.parse::<Address>().unwrap().resolve().unwrap();
        assert_eq!(addresses, [resolved.parse().unwrap()]);
        assert_eq!(fallback, None);
    }
}

#[test]
fn every_interface_has_an_ipv4_fallback() {
    for text in ["7", ":7"] {
        let (addresses, fallback) = text.parse::<Address>().unwrap().resolve().unwrap();
        assert_eq!(addresses, ["[::]:7".parse().unwrap()]);
        assert_eq!(fallback, Some("0.0.0.0:7".parse().unwrap()));
    }
}

#[test]
fn host_resolves_to_its_addresses() {
    for (host, resolved) in [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7")] {
        // As a host: the resolver of the standard library parses it, and asks no server.
        let (addresses, fallback) = Address::Host(host.to_owned(), 7).resolve().unwrap();
        assert_eq!(addresses, [resolved.parse().unwrap()]);
        assert_eq!(fallback, None);
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
    ] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
    }
    #[cfg(target_os = "linux")]
    for text in ["unix:/run/echo.sock", "unix:@echo"] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
    }
}
