//! As much of an HTTP client as the tests need: it shows what is on the wire.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::support::connect;

/// An answer: its status, its header lines and its body.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<String>,
    pub(crate) body: String,
}

impl Answer {
    /// The value of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// Asks for `path` on a connection of its own.
pub(crate) fn get(address: SocketAddr, path: &str) -> Answer {
    let mut stream = connect(address);
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").expect("it takes a request");
    read_answer(&mut stream)
}

/// Sends `request` on a connection of its own, which the server then ends: returns all it sent.
pub(crate) fn ask(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = connect(address);
    stream.write_all(request).expect("it takes a request");
    read_to_end(stream)
}

/// What comes up to the end of the stream, which must be no reset.
pub(crate) fn read_to_end(mut stream: TcpStream) -> String {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it ends");
    answer
}

/// Reads one answer with its body, and no byte more.
pub(crate) fn read_answer(stream: &mut TcpStream) -> Answer {
    let mut answer = read_head(stream);
    let length = answer.header("Content-Length").expect("it has a length");
    let mut body = vec![0; length.parse().expect("a length is a number")];
    stream.read_exact(&mut body).expect("the body is whole");
    answer.body = String::from_utf8(body).expect("it is text");
    answer
}

/// Reads one answer up to the end of its headers.
pub(crate) fn read_head(stream: &mut TcpStream) -> Answer {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("there is an answer");
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("a head is text");
    let mut lines = head.trim_end().split("\r\n").map(str::to_owned);
    let status = lines.next().expect("a status line");
    let code = status.strip_prefix("HTTP/1.1 ").expect("HTTP/1.1");
    Answer {
        status: code[..3].parse().expect("a status is a number"),
        headers: lines.collect(),
        body: String::new(),
    }
}
