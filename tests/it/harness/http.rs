//! An HTTP client that shows what is on the wire.

use std::io::Read;
use std::net::SocketAddr;

use super::Client;

/// A response, whose body is empty if only the head was read.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: String,
}

impl Response {
    /// Returns the value of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// Requests `path` on a new connection.
pub(crate) fn get(address: SocketAddr, path: &str) -> Response {
    let client = Client::connect(address);
    client.send(format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").as_bytes());
    read_response(&client)
}

/// Sends `request` on a new connection, and returns all that comes until EOF.
pub(crate) fn exchange(address: SocketAddr, request: &[u8]) -> String {
    let client = Client::connect(address);
    client.send(request);
    String::from_utf8(client.read_to_end()).expect("text")
}

/// Reads one response with its body, and no byte more.
pub(crate) fn read_response(client: &Client) -> Response {
    let mut response = read_head(client);
    let length = response.header("Content-Length").expect("it has a length");
    let mut body = vec![0; length.parse().expect("a length is a number")];
    (&client.0)
        .read_exact(&mut body)
        .expect("the body is complete");
    response.body = String::from_utf8(body).expect("text");
    response
}

/// Reads one response up to the end of its head.
pub(crate) fn read_head(client: &Client) -> Response {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        (&client.0).read_exact(&mut byte).expect("a head comes");
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("text");
    let status = head.strip_prefix("HTTP/1.1 ").expect("HTTP/1.1");
    Response {
        status: status[..3].parse().expect("a status is a number"),
        body: String::new(),
        head,
    }
}
