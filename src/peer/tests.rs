use super::*;

#[test]
fn peer_is_shown_as_its_address() {
    let address = "192.0.2.1:7".parse().unwrap();
    assert_eq!(Peer::Ip(address).to_string(), "192.0.2.1:7");
    assert_eq!(Peer::Unix.to_string(), "unix");
}
