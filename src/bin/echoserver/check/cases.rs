//! The cases. Each is a function of the server's address, and returns what the server gets wrong.

use std::iter;
use std::net::Shutdown;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::client::{CaseResult, Client, TestedServer, data, quoted};
use crate::figures::Count;

/// The class of a case that always counts: a stream comes back, whatever other clients do.
const REQUIRED: &str = "required";
/// The class of what many servers get wrong. Counts only with `--strict`.
pub(crate) const STRICT: &str = "strict";

#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) class: &'static str,
    /// The function's name.
    function: &'static str,
    pub(crate) description: &'static str,
    pub(crate) run: fn(&TestedServer) -> CaseResult,
}

impl Case {
    pub(crate) fn name(&self) -> String {
        self.function.replace('_', "-")
    }

    /// Unix-domain sockets have no urgent data.
    pub(crate) fn needs_tcp(&self) -> bool {
        self.function.starts_with("urgent")
    }
}

macro_rules! cases {
    ($($class:ident $function:ident: $description:literal,)*) => {
        pub(crate) static CASES: &[Case] = &[$(Case {
            class: $class,
            function: stringify!($function),
            description: $description,
            run: $function,
        }),*];
    };
}

cases! {
    REQUIRED every_byte_value: "each byte value alone, then all 256 in one message",
    REQUIRED every_size: "messages of 1 byte to 1 MiB, around the powers of two",
    REQUIRED burst: "20 to 200 kB in one write, more than one read takes",
    REQUIRED byte_by_byte: "20,000 writes of one byte",
    REQUIRED pieces_of_every_size: "2 MB in pieces of 1 to 4,099 bytes",
    REQUIRED bulk: "20 MB and a half-close",
    REQUIRED commands: "bytes that mean something in other protocols: quit, HTTP, telnet, TLS",
    REQUIRED never_speaks_first: "no byte and no EOF before the client has sent something",
    REQUIRED half_close_at_once: "a half-close before any byte",
    REQUIRED half_close_after_all_is_read: "a half-close when nothing is in flight",
    REQUIRED half_close_with_the_data: "data and FIN together, 300 times",
    REQUIRED half_close_at_buffer_boundaries: "a half-close after 512 to 262,145 bytes",
    REQUIRED half_close_then_read_late: "up to 20 MB and a half-close before the first read",
    REQUIRED half_close_then_read_late_with_a_small_window: "the same with a receive buffer of 4 KiB",
    REQUIRED half_close_by_fifty_late_readers: "the same on 50 connections",
    REQUIRED half_close_of_the_reading_side_first: "a client that never reads its answer closes both halves",
    REQUIRED late_reader: "12 MB sent before the first read, without a half-close",
    REQUIRED slow_reader: "300 kB read 700 bytes at a time",
    STRICT backpressure: "a server must not accept without limit from a client that never reads",
    STRICT urgent_data_with_bytes_after_it: "urgent bytes (TCP's URG flag) come back in place, and those after them",
    STRICT urgent_data_in_a_stream: "100 urgent bytes in 500 kB",
    REQUIRED resets_at_any_point: "168 clients that reset, before, between and after bytes; others are unaffected",
    REQUIRED close_with_unread_answers: "60 clients that close without reading; others are unaffected",
    REQUIRED connect_and_leave: "600 clients that connect and leave, some with a reset",
    REQUIRED churn: "800 short connections, 4 at a time",
    REQUIRED crowd: "300 connections open at once",
    REQUIRED crowd_in_bulk: "500 kB on each of 40 connections at once",
    REQUIRED flood_beside_a_ping: "100 small messages beside 6 connections that flood",
    REQUIRED never_readers_beside_a_ping: "100 small messages beside 10 clients that never read",
}

// Data of every shape and size.

fn every_byte_value(server: &TestedServer) -> CaseResult {
    let client = server.connect()?;
    let all: Vec<u8> = (0..=u8::MAX).collect();
    all.iter().try_for_each(|byte| client.echo(&[*byte]))?;
    client.echo(&all)
}

fn every_size(server: &TestedServer) -> CaseResult {
    let client = server.connect()?;
    around_powers_of_2(1..=20).try_for_each(|size| {
        let echoed = client.echo(&data(size, size));
        echoed.map_err(|error| format!("in a message of {} bytes: {error}", Count(size)))
    })
}

fn around_powers_of_2(powers: RangeInclusive<u32>) -> impl Iterator<Item = usize> {
    powers.flat_map(|power| (1 << power) - 1..=(1 << power) + 1)
}

/// Many event loops stop after what one read returns.
fn burst(server: &TestedServer) -> CaseResult {
    let mut lengths = [20_000, 70_000, 200_000].into_iter();
    lengths.try_for_each(|length| server.connect()?.echo(&data(1, length)))
}

fn byte_by_byte(server: &TestedServer) -> CaseResult {
    let client = server.connect()?;
    let bytes = data(2, 20_000);
    client.both(
        || bytes.iter().try_for_each(|byte| client.send(&[*byte])),
        || client.expect(&bytes),
    )
}

fn pieces_of_every_size(server: &TestedServer) -> CaseResult {
    const ROOM: usize = 100_000;
    let client = server.connect()?;
    let bytes = data(3, 2_000_000);
    let mut rest = &bytes[..];
    let mut sizes = (1..).map(|step: usize| step * step % 4_099 + 1);
    let mut pieces: Vec<_> = iter::from_fn(|| rest.split_off(..sizes.next()?)).collect();
    pieces.push(rest);
    if server.room(ROOM)? < ROOM {
        // Two directions full of small segments can block each other within TCP, if the buffers of the sockets are small.
        return pieces.iter().try_for_each(|piece| client.echo(piece));
    }
    let send = || pieces.iter().try_for_each(|piece| client.send(piece));
    client.both_to_eof(send, || client.expect(&bytes))
}

fn bulk(server: &TestedServer) -> CaseResult {
    server.connect()?.exchange(&data(4, 20_000_000))
}

/// No byte means anything to an echo server.
fn commands(server: &TestedServer) -> CaseResult {
    let telnet = b"\xff\xf4\xff\xfd\x06 \xff\xfb\x01";
    let words: [&[u8]; 12] = [
        b"quit\n",
        b"QUIT\r\n",
        b"exit\n",
        b"bye\n",
        b"shutdown\n",
        b".\r\n",
        b"\x04",
        b"\0\0\0\0",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        telnet,
    ];
    words.into_iter().try_for_each(|word| {
        let error = |error| format!("after {}: {error}", quoted(word));
        let client = server.connect().map_err(error)?;
        client.echo(word).map_err(error)?;
        let within = [&data(5, 3_000)[..], b"\n", word, &data(6, 3_000)].concat();
        client.exchange(&within).map_err(error)
    })
}

fn never_speaks_first(server: &TestedServer) -> CaseResult {
    let client = server.connect()?;
    client.expect_silence()?;
    client.echo(b"now")?;
    client.expect_silence()?;
    client.finish()
}

// Half-close, in every order.

fn half_close_at_once(server: &TestedServer) -> CaseResult {
    server.connect()?.finish()
}

fn half_close_after_all_is_read(server: &TestedServer) -> CaseResult {
    for length in [1, 4_096, 16_384, 65_536] {
        let client = server.connect()?;
        client.echo(&data(7, length))?;
        client.finish()?;
    }
    Ok(())
}

/// Data and FIN may reach the server in one event.
fn half_close_with_the_data(server: &TestedServer) -> CaseResult {
    (0..300).try_for_each(|round| {
        let bytes = data(round, 1 + round * 331 % 40_000);
        server.connect()?.exchange(&bytes)
    })
}

fn half_close_at_buffer_boundaries(server: &TestedServer) -> CaseResult {
    let mut lengths = around_powers_of_2(9..=18);
    lengths.try_for_each(|length| server.connect()?.exchange(&data(8, length)))
}

/// Sends until the server is stuck, then all the rest and a FIN, before it reads a byte.
fn read_late(client: &Client, bytes: &[u8]) -> CaseResult {
    let sent = client.send_until_stuck(bytes)?;
    client.both_to_eof(|| client.send(&bytes[sent..]), || client.expect_late(bytes))
}

fn half_close_then_read_late(server: &TestedServer) -> CaseResult {
    read_late(&server.connect()?, &data(9, 3_000_000))?;
    read_late(&server.connect()?, &data(10, 20_000_000))
}

/// With a small window most of the answer is still in the server when the half-close reaches it.
fn half_close_then_read_late_with_a_small_window(server: &TestedServer) -> CaseResult {
    let mut lengths = [100_000, 400_000, 1_000_000].into_iter();
    lengths.try_for_each(|length| read_late(&server.connect_with_window(4_096)?, &data(11, length)))
}

fn half_close_by_fifty_late_readers(server: &TestedServer) -> CaseResult {
    server.side_by_side(50, |index| {
        read_late(&server.connect()?, &data(index, 400_000))
    })
}

/// The client does not read the answer, and closes both halves in turn.
fn half_close_of_the_reading_side_first(server: &TestedServer) -> CaseResult {
    let neighbour = server.connect()?;
    for length in [0, 1, 10_000] {
        let client = server.connect()?;
        client.shut_down(Shutdown::Read)?;
        // The server's answer may cause a reset, which may come first.
        let _reset = client.send(&data(12, length));
        let _reset = client.shut_down(Shutdown::Write);
    }
    neighbour.echo(b"still here")
}

// Late and slow readers.

fn late_reader(server: &TestedServer) -> CaseResult {
    let client = server.connect()?;
    let bytes = data(13, 12_000_000);
    let sent = client.send_until_stuck(&bytes)?;
    client.both(
        || client.send(&bytes[sent..]),
        || client.expect_late(&bytes),
    )?;
    client.echo(b"and goes on")
}

fn slow_reader(server: &TestedServer) -> CaseResult {
    let client = server.connect_with_window(2_048)?;
    let bytes = data(14, 300_000);
    client.both_to_eof(
        || client.send(&bytes),
        || client.expect_in_pieces(&bytes, 700),
    )
}

/// A server without a limit can be made to use any amount of memory.
fn backpressure(server: &TestedServer) -> CaseResult {
    let client = server.connect_with_window(65_536)?;
    let bytes = data(15, 64 << 20);
    let sent = client.send_until_stuck(&bytes)?;
    if sent == bytes.len() {
        let sent = Count(sent);
        return Err(format!(
            "no limit: {sent} bytes were accepted from a client that never reads"
        ));
    }
    server.connect()?.echo(b"a neighbour")?;
    client.expect(&bytes[..sent])?;
    client.finish()
}

// Urgent data.

/// A read stops at the urgent mark, and no event reports the bytes after it.
fn urgent_data_with_bytes_after_it(server: &TestedServer) -> CaseResult {
    (0..100).try_for_each(|round| {
        let client = server.connect()?;
        let (before, after) = (vec![b'b'; round * 37], vec![b'a'; 1 + round * 53]);
        client.send(&before)?;
        client.send_urgent(b'!')?;
        client.send(&after)?;
        client.expect(&before)?;
        client.expect(b"!").map_err(|error| {
            let place = Count(before.len());
            format!("the urgent byte after {place} bytes did not come back in its place: {error}")
        })?;
        let came_back = client.expect(&after);
        came_back.map_err(|error| format!("after an urgent byte: {error}"))?;
        client.finish()
    })
}

fn urgent_data_in_a_stream(server: &TestedServer) -> CaseResult {
    let client = server.connect()?;
    let bytes = data(16, 500_000);
    let send = |piece: &[u8]| {
        let (last, first) = piece.split_last().expect("no piece is empty");
        client.send(first)?;
        client.send_urgent(*last)
    };
    client.both_to_eof(
        || bytes.chunks(5_000).try_for_each(send),
        || client.expect(&bytes),
    )
}

// Resets, and clients that leave.

fn resets_at_any_point(server: &TestedServer) -> CaseResult {
    let neighbour = server.connect()?;
    let bytes = data(17, 1_000_000);
    for length in [0, 1, 100, server.room(20_000)?, 1_000_000] {
        let context = |error| format!("after a reset at byte {}: {error}", Count(length));
        for (read, ends) in [(0, false), (0, true), (1, false), (length / 2, true)] {
            // A large message can fill the buffers, which costs a wait.
            for _ in 0..if length < bytes.len() { 10 } else { 2 } {
                let client = server.connect().map_err(context)?;
                let sent = client.send_until_stuck(&bytes[..length])?;
                if ends {
                    client.shut_down(Shutdown::Write)?;
                }
                client.expect(&bytes[..read.min(sent)])?;
                client.reset();
            }
        }
        let echoed = neighbour.echo(b"still here");
        echoed.map_err(|error| format!("a neighbour of resets: {error}"))?;
    }
    server.connect()?.exchange(&bytes)
}

/// What the server still writes to such a client causes a reset, and SIGPIPE.
fn close_with_unread_answers(server: &TestedServer) -> CaseResult {
    let neighbour = server.connect()?;
    let context = |error| format!("after clients that closed without reading: {error}");
    let bytes = data(18, server.room(50_000)?);
    for _ in 0..60 {
        let client = server.connect().map_err(context)?;
        client.send(&bytes)?;
    }
    neighbour.echo(b"still here")
}

fn connect_and_leave(server: &TestedServer) -> CaseResult {
    for round in 0..600 {
        let client = server.connect()?;
        if round % 3 == 0 {
            client.reset();
        }
    }
    server.connect()?.exchange(b"still here")
}

fn churn(server: &TestedServer) -> CaseResult {
    server.side_by_side(4, |index| {
        (0..200).try_for_each(|round| {
            let client = server.connect()?;
            let message = data(index * 1_000 + round, 10);
            match round % 2 {
                0 => client.exchange(&message),
                _ => client.echo(&message),
            }
        })
    })
}

// Crowds and floods.

fn crowd(server: &TestedServer) -> CaseResult {
    const CROWD: usize = 300;
    let crowd: CaseResult<Vec<_>> = (0..CROWD).map(|_| server.connect()).collect();
    let crowd = crowd?;
    let talk = || {
        for round in 0..3 {
            let message = |index: usize| data(round * CROWD + index, 100 + index);
            let mut clients = crowd.iter().enumerate();
            clients.try_for_each(|(index, client)| client.send(&message(index)))?;
            let mut clients = crowd.iter().enumerate().rev();
            clients.try_for_each(|(index, client)| client.expect(&message(index)))?;
        }
        let (even, odd) = (crowd.iter().step_by(2), crowd.iter().skip(1).step_by(2));
        even.chain(odd).try_for_each(Client::finish)
    };
    talk().map_err(|error| format!("among {CROWD} open connections: {error}"))
}

fn crowd_in_bulk(server: &TestedServer) -> CaseResult {
    server.side_by_side(40, |index| {
        server.connect()?.exchange(&data(index, 500_000))
    })
}

/// Connections that flood must not starve another one.
fn flood_beside_a_ping(server: &TestedServer) -> CaseResult {
    let over = AtomicBool::new(false);
    let bytes = data(19, 1 << 20);
    server.side_by_side(7, |index| {
        if index == 0 {
            let pinged = ping(server, "floods");
            over.store(true, SeqCst);
            return pinged;
        }
        let client = server.connect()?;
        while !over.load(SeqCst) {
            client.echo(&bytes)?;
        }
        Ok(())
    })
}

fn never_readers_beside_a_ping(server: &TestedServer) -> CaseResult {
    let bytes = data(20, 64 << 20);
    let clients: CaseResult<Vec<Client>> = server.side_by_side(10, |_| {
        let client = server.connect_with_window(16_384)?;
        client.send_until_stuck(&bytes)?;
        Ok(client)
    });
    let _open = clients?;
    ping(server, "clients that never read")
}

/// Echoes 100 small messages on a connection of their own.
fn ping(server: &TestedServer, beside: &str) -> CaseResult {
    let client = server.connect()?;
    let pinged = (0..100).try_for_each(|round| client.echo(&data(round, 64)));
    pinged.map_err(|error| format!("a ping beside {beside}: {error}"))
}
