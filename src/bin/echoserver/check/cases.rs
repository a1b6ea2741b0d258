//! What an echo server must be able to bear, one case each: plain functions of an address.
//!
//! They speak TCP and know nothing of the server behind it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

use super::client::{Client, Count, Verdict, data, side_by_side};

pub(crate) type Case = fn(SocketAddr) -> Verdict;

// Data of every shape and size.

pub(crate) fn every_byte_value(target: SocketAddr) -> Verdict {
    let client = Client::connect(target)?;
    for byte in 0..=u8::MAX {
        client.echo(&[byte])?;
    }
    let all: Vec<u8> = (0..=u8::MAX).collect();
    client.echo(&all)
}

pub(crate) fn every_size(target: SocketAddr) -> Verdict {
    let client = Client::connect(target)?;
    let around = (0..=20).flat_map(|power| [-1, 0, 1].map(|step| (1 << power) + step));
    for size in around.filter(|&size: &i32| size > 0) {
        let bytes = data(u64::from(size.unsigned_abs()), size.unsigned_abs() as usize);
        let echoed = client.both(|client| client.send(&bytes), |client| client.expect(&bytes));
        echoed.map_err(|fault| format!("in a message of {} bytes: {fault}", Count(bytes.len())))?;
    }
    Ok(())
}

/// Many event loops stop in the middle of what one read could not take.
pub(crate) fn burst(target: SocketAddr) -> Verdict {
    for length in [20_000, 70_000, 200_000] {
        let client = Client::connect(target)?;
        let bytes = data(1, length);
        client.both(|client| client.send(&bytes), |client| client.expect(&bytes))?;
    }
    Ok(())
}

pub(crate) fn byte_by_byte(target: SocketAddr) -> Verdict {
    let client = Client::connect(target)?;
    let bytes = data(2, 20_000);
    client.both(
        |client| bytes.iter().try_for_each(|byte| client.send(&[*byte])),
        |client| client.expect(&bytes),
    )
}

pub(crate) fn pieces_of_every_size(target: SocketAddr) -> Verdict {
    let client = Client::connect(target)?;
    let bytes = data(3, 2_000_000);
    client.both(
        |client| {
            let mut rest = &bytes[..];
            for size in (1..).map(|step: usize| step * step % 4_099 + 1) {
                let (piece, behind) = rest.split_at(size.min(rest.len()));
                client.send(piece)?;
                rest = behind;
                if rest.is_empty() {
                    break;
                }
            }
            client.end()
        },
        |client| client.expect(&bytes).and_then(|()| client.expect_end()),
    )
}

pub(crate) fn bulk(target: SocketAddr) -> Verdict {
    Client::connect(target)?.exchange(&data(4, 20_000_000))
}

/// No byte means anything to an echo server.
pub(crate) fn commands(target: SocketAddr) -> Verdict {
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
    for word in words {
        let fault = |fault| format!("after {:?}: {fault}", String::from_utf8_lossy(word));
        let client = Client::connect(target).map_err(fault)?;
        client.echo(word).map_err(fault)?;
        let within = [&data(5, 3_000)[..], b"\n", word, &data(6, 3_000)].concat();
        client.exchange(&within).map_err(fault)?;
    }
    Ok(())
}

pub(crate) fn never_speaks_first(target: SocketAddr) -> Verdict {
    let client = Client::connect(target)?;
    client.expect_silence()?;
    client.echo(b"now")?;
    client.expect_silence()?;
    client.end()?;
    client.expect_end()
}

// Half-close, in every order.

pub(crate) fn half_close_at_once(target: SocketAddr) -> Verdict {
    let client = Client::connect(target)?;
    client.end()?;
    client.expect_end()
}

pub(crate) fn half_close_after_all_is_read(target: SocketAddr) -> Verdict {
    for length in [1, 4_096, 16_384, 65_536] {
        let client = Client::connect(target)?;
        client.echo(&data(7, length))?;
        client.end()?;
        client.expect_end()?;
    }
    Ok(())
}

/// Data and FIN may reach the server in one event.
pub(crate) fn half_close_with_the_data(target: SocketAddr) -> Verdict {
    for round in 0..300 {
        let length = 1 + round * 331 % 40_000;
        let client = Client::connect(target)?;
        client.exchange(&data(round as u64, length))?;
    }
    Ok(())
}

pub(crate) fn half_close_at_a_buffers_edge(target: SocketAddr) -> Verdict {
    for power in 9..=18 {
        for length in [(1 << power) - 1, 1 << power, (1 << power) + 1] {
            let client = Client::connect(target)?;
            client.exchange(&data(8, length))?;
        }
    }
    Ok(())
}

/// Sends all and half-closes before it reads a byte.
fn read_late(client: &Client, bytes: &[u8]) -> Verdict {
    client.both(
        |client| client.send(bytes).and_then(|()| client.end()),
        |client| {
            client.come_late();
            client.expect(bytes)?;
            client.expect_end()
        },
    )
}

pub(crate) fn half_close_then_read_late(target: SocketAddr) -> Verdict {
    read_late(&Client::connect(target)?, &data(9, 3_000_000))?;
    read_late(&Client::connect(target)?, &data(10, 20_000_000))
}

/// With a small window most of the answer is still in the server when the half-close reaches it.
pub(crate) fn half_close_then_read_late_by_a_small_window(target: SocketAddr) -> Verdict {
    for length in [100_000, 400_000, 1_000_000] {
        let client = Client::connect_with_window(target, 4_096)?;
        read_late(&client, &data(11, length))?;
    }
    Ok(())
}

pub(crate) fn half_close_by_fifty_late_readers(target: SocketAddr) -> Verdict {
    side_by_side(50, |index| {
        read_late(&Client::connect(target)?, &data(index, 400_000))
    })
}

/// Nobody will read the answer, and both ends are closed in turn.
pub(crate) fn half_close_of_the_reading_side_first(target: SocketAddr) -> Verdict {
    let neighbour = Client::connect(target)?;
    for length in [0, 1, 10_000] {
        let client = Client::connect(target)?;
        client.stop_reading()?;
        // The answer may be answered with a reset, which may be first.
        let _reset = client.send(&data(12, length));
        let _reset = client.end();
    }
    neighbour.echo(b"still here")
}

// Late and slow readers.

pub(crate) fn late_reader(target: SocketAddr) -> Verdict {
    let client = Client::connect(target)?;
    let bytes = data(13, 12_000_000);
    client.both(
        |client| client.send(&bytes),
        |client| {
            client.come_late();
            client.expect(&bytes)
        },
    )?;
    client.echo(b"and goes on")
}

pub(crate) fn slow_reader(target: SocketAddr) -> Verdict {
    let client = Client::connect_with_window(target, 2_048)?;
    let bytes = data(14, 300_000);
    client.both(
        |client| client.send(&bytes).and_then(|()| client.end()),
        |client| {
            client.expect_in_sips(&bytes, 700)?;
            client.expect_end()
        },
    )
}

/// A server that takes whatever comes can be filled until it bursts.
pub(crate) fn backpressure(target: SocketAddr) -> Verdict {
    let client = Client::connect_with_window(target, 65_536)?;
    let bytes = data(15, 64 << 20);
    let sent = client.send_until_stuck(&bytes)?;
    if sent == bytes.len() {
        let sent = Count(sent);
        return Err(format!(
            "no bound: {sent} bytes were taken from a client that reads nothing"
        ));
    }
    Client::connect(target)?.echo(b"a neighbour")?;
    client.expect(&bytes[..sent])?;
    client.end()?;
    client.expect_end()
}

// Urgent data.

/// A read stops at the urgent mark, and no event tells of what is behind it.
pub(crate) fn urgent_data_with_bytes_behind(target: SocketAddr) -> Verdict {
    for round in 0..100 {
        let client = Client::connect(target)?;
        let (before, behind) = (vec![b'b'; round * 37], vec![b'a'; 1 + round * 53]);
        client.send(&before)?;
        client.send_urgent(b'!')?;
        client.send(&behind)?;
        let place = Count(before.len());
        client.expect(&before)?;
        client.expect(b"!").map_err(|fault| {
            format!("the urgent byte behind {place} bytes did not come back in its place: {fault}")
        })?;
        client
            .expect(&behind)
            .map_err(|fault| format!("behind an urgent byte: {fault}"))?;
        client.end()?;
        client.expect_end()?;
    }
    Ok(())
}

pub(crate) fn urgent_data_in_a_stream(target: SocketAddr) -> Verdict {
    let client = Client::connect(target)?;
    let bytes = data(16, 500_000);
    client.both(
        |client| {
            for piece in bytes.chunks(5_000) {
                let (last, first) = piece.split_last().expect("no piece is empty");
                client.send(first)?;
                client.send_urgent(*last)?;
            }
            client.end()
        },
        |client| client.expect(&bytes).and_then(|()| client.expect_end()),
    )
}

// Resets, and clients that run away.

pub(crate) fn resets_at_any_point(target: SocketAddr) -> Verdict {
    let neighbour = Client::connect(target)?;
    let bytes = data(17, 1_000_000);
    for sent in [0, 1, 100, 20_000, 1_000_000] {
        for (read, ends) in [(0, false), (0, true), (1, false), (sent / 2, true)] {
            for _ in 0..10 {
                let client = Client::connect(target)
                    .map_err(|fault| format!("after a reset at byte {}: {fault}", Count(sent)))?;
                let sent = client.send_until_stuck(&bytes[..sent])?;
                if ends {
                    client.end()?;
                }
                client.expect(&bytes[..read.min(sent)])?;
                client.reset();
            }
        }
        neighbour
            .echo(b"still here")
            .map_err(|fault| format!("a neighbour of resets: {fault}"))?;
    }
    Client::connect(target)?.exchange(&bytes)
}

/// The system answers what such a server still writes with a reset, and its process with SIGPIPE.
pub(crate) fn close_with_unread_answers(target: SocketAddr) -> Verdict {
    let neighbour = Client::connect(target)?;
    for _ in 0..60 {
        let client = Client::connect(target)
            .map_err(|fault| format!("after clients that left unread: {fault}"))?;
        client.send(&data(18, 50_000))?;
    }
    neighbour.echo(b"still here")
}

pub(crate) fn connect_and_run(target: SocketAddr) -> Verdict {
    for round in 0..600 {
        let client = Client::connect(target)?;
        if round % 3 == 0 {
            client.reset();
        }
    }
    Client::connect(target)?.exchange(b"still here")
}

pub(crate) fn churn(target: SocketAddr) -> Verdict {
    side_by_side(4, |index| {
        for round in 0..200 {
            let client = Client::connect(target)?;
            let message = data(index * 1_000 + round, 10);
            match round % 2 {
                0 => client.exchange(&message)?,
                _ => client.echo(&message)?,
            }
        }
        Ok(())
    })
}

// Crowds and floods.

pub(crate) fn crowd(target: SocketAddr) -> Verdict {
    const CROWD: usize = 300;
    let crowd: Vec<Client> = (0..CROWD)
        .map(|_| Client::connect(target))
        .collect::<Verdict<_>>()?;
    let among = |fault| format!("among {CROWD} open connections: {fault}");
    for round in 0..3 {
        let message = |index: usize| data((round * CROWD + index) as u64, 100 + index);
        for (index, client) in crowd.iter().enumerate() {
            client.send(&message(index)).map_err(among)?;
        }
        for (index, client) in crowd.iter().enumerate().rev() {
            client.expect(&message(index)).map_err(among)?;
        }
    }
    for client in crowd
        .iter()
        .step_by(2)
        .chain(crowd.iter().skip(1).step_by(2))
    {
        client.end()?;
        client.expect_end().map_err(among)?;
    }
    Ok(())
}

pub(crate) fn crowd_in_bulk(target: SocketAddr) -> Verdict {
    side_by_side(40, |index| {
        Client::connect(target)?.exchange(&data(index, 500_000))
    })
}

/// Connections that never wait may not keep a polite one from being served.
pub(crate) fn flood_beside_a_ping(target: SocketAddr) -> Verdict {
    let over = AtomicBool::new(false);
    let bytes = data(19, 1 << 20);
    let flood = || {
        let client = Client::connect(target)?;
        while !over.load(SeqCst) {
            client.both(|client| client.send(&bytes), |client| client.expect(&bytes))?;
        }
        Ok(())
    };
    let ping = || {
        let client = Client::connect(target)?;
        for round in 0..100 {
            client
                .echo(&data(round, 64))
                .map_err(|fault| format!("a ping beside floods: {fault}"))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let floods: Vec<_> = (0..6).map(|_| scope.spawn(flood)).collect();
        let pinged = ping();
        over.store(true, SeqCst);
        let flooded = floods
            .into_iter()
            .map(|flood| flood.join().expect("floods don't panic"));
        pinged.and(flooded.collect::<Vec<_>>().into_iter().collect())
    })
}

pub(crate) fn never_readers_beside_a_ping(target: SocketAddr) -> Verdict {
    let bytes = data(20, 64 << 20);
    let clients: Vec<Client> = (0..10)
        .map(|_| Client::connect_with_window(target, 16_384))
        .collect::<Verdict<_>>()?;
    side_by_side(clients.len() as u64, |index| {
        clients[index as usize].send_until_stuck(&bytes).map(drop)
    })?;
    let ping = Client::connect(target)?;
    for round in 0..100 {
        ping.echo(&data(round, 64))
            .map_err(|fault| format!("a ping beside clients that never read: {fault}"))?;
    }
    Ok(())
}
