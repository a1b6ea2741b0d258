//! Servers to be tested: a correct one with a thread for each connection, and the same with a fault that this server has no
//! option for.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

use rustix::net::{SendFlags, send};
use socket2::SockRef;

/// Faults, each with the cases of `check` that detect it, and what their errors contain: ` | ` is an "or".
macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident $($case:literal: $error:literal)*;)*) => {
        /// What is wrong with a server.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Fault {
            $($(#[$doc])* $fault,)*
        }

        /// A fault, the name of a case, and what its error contains.
        pub(crate) const DETECTED: &[(Fault, &str, &str)] =
            &[$($((Fault::$fault, $case, $error),)*)*];
    };
}

faults! {
    None;
    /// Closes when the client half-closes, with an answer still to be sent.
    DropsLastBytes
        "half-close-then-read-late": "of 3,000,000 bytes came back, then EOF"
        "half-close-then-read-late-with-a-small-window": "bytes came back, then EOF";
    InterpretsQuit "commands": r#"after "quit\n": 0 of 5 bytes came back, then EOF"#;
    /// Answers anything with an error of HTTP.
    SpeaksHttp
        "every-byte-value":
        r#"came back as 0x48; the answer starts with "HTTP/1.1 400 Bad Request", which looks like HTTP/1.1"#
        "burst": "which looks like HTTP/1.1";
    SendsFirst
        "burst": r#"came back as 0x32; the answer starts with "220 ready""#
        "never-speaks-first": r#"the server spoke first: "220 ready\r\n""#;
    /// Ignores the result of a partial write.
    DropsRestOfPartialWrite "late-reader": "of 12,000,000 was sent as";
    /// Reads without limit, and keeps what cannot be sent at once.
    HasNoLimit
        "backpressure": "no limit: 67,108,864 bytes were accepted from a client that never reads";
    /// Receives urgent bytes out of band, and loses them.
    LosesUrgentData
        "urgent-data-with-bytes-after-it":
        "the urgent byte after 0 bytes did not come back in its place";
    /// Serves one connection after the other.
    ServesOneAtATime
        "crowd": "among 300 open connections: 0 of 399 bytes came back, then nothing for 5s";
    EndsAfterAReset "resets-at-any-point": "cannot connect | 0 of 1 bytes came back, then";
    /// This and the following faults change one place of each stream, far from its start.
    SwapsTwoReads;
    RepeatsARead;
    /// Replaces one byte by one of another connection.
    MixesConnections;
}

const BUFFER: usize = 16 << 10;

/// Where a stream is wrong.
pub(crate) const WRONG_PLACE: usize = 29_999_000;

/// Listens at a free loopback port; returns the address too.
pub(crate) fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let address = listener.local_addr().expect("it is bound").to_string();
    (listener, address)
}

/// Starts a server that lives as long as the process; returns its address.
pub(crate) fn start(fault: Fault) -> String {
    // For hundreds of connections. If it stays low, a case reports that it cannot connect.
    let _limit = rlimit::increase_nofile_limit(u64::MAX);
    let (listener, address) = listen();
    // The standard library's backlog is 128.
    SockRef::from(&listener).listen(1_024).expect("it listens");
    let has_failed: &AtomicBool = Box::leak(Box::default());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = move || {
                let failed = serve(&stream, fault).is_err();
                has_failed.fetch_or(failed, SeqCst);
            };
            match fault {
                Fault::EndsAfterAReset if has_failed.load(SeqCst) => return,
                Fault::ServesOneAtATime => serve(),
                _ => drop(thread::spawn(serve)),
            }
        }
    });
    address
}

/// What a connection has read last, for [`Fault::MixesConnections`].
static LAST_READ: Mutex<Vec<u8>> = Mutex::new(Vec::new());

fn serve(mut stream: &TcpStream, fault: Fault) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(fault != Fault::LosesUrgentData)?;
    match fault {
        Fault::SendsFirst => stream.write_all(b"220 ready\r\n")?,
        // Otherwise the kernel can accept all of the last bytes, and send them.
        Fault::DropsLastBytes => socket.set_send_buffer_size(64 << 10)?,
        _ => {}
    }
    let mut buffer = [0; BUFFER];
    let mut unsent = VecDeque::new();
    let mut echoed = 0;
    loop {
        let count = stream.read(&mut buffer)?;
        let bytes = &mut buffer[..count];
        if let Some(place) = WRONG_PLACE.checked_sub(echoed)
            && place < count
        {
            distort(stream, bytes, fault)?;
        }
        match (fault, count) {
            (Fault::HasNoLimit, 0) => return stream.write_all(unsent.make_contiguous()),
            (_, 0) => return Ok(()),
            (Fault::SpeaksHttp, _) => {
                return stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            }
            (Fault::InterpretsQuit, _) if bytes.starts_with(b"quit\n") => return Ok(()),
            (Fault::DropsRestOfPartialWrite, _) => {
                let _partial = send(stream, bytes, SendFlags::DONTWAIT);
            }
            (Fault::DropsLastBytes | Fault::HasNoLimit, _) => {
                unsent.extend(&*bytes);
                let sent = send(stream, unsent.as_slices().0, SendFlags::DONTWAIT);
                unsent.drain(..sent.unwrap_or(0));
            }
            _ => stream.write_all(bytes)?,
        }
        if fault == Fault::MixesConnections {
            *LAST_READ.lock().expect("no thread panics") = bytes.to_vec();
        }
        echoed += count;
    }
}

/// Changes a byte of `bytes`, or sends other bytes in front of them.
fn distort(mut stream: &TcpStream, bytes: &mut [u8], fault: Fault) -> io::Result<()> {
    match fault {
        Fault::SwapsTwoReads => {
            let mut next = vec![0; bytes.len()];
            stream.read_exact(&mut next)?;
            stream.write_all(&next)?;
        }
        Fault::RepeatsARead => stream.write_all(bytes)?,
        Fault::MixesConnections => {
            let other = LAST_READ.lock().expect("no thread panics");
            let mut pairs = bytes.iter_mut().zip(&*other);
            let different = pairs.find(|(own, other)| own != other);
            let (own, other) = different.expect("reads differ");
            *own = *other;
        }
        _ => {}
    }
    Ok(())
}
