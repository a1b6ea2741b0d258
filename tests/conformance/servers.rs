//! Servers to be tested: a correct one with a thread for each connection, and the same with a fault.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::SockRef;

/// What is wrong with a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Closes when the client half-closes, with an answer still to be sent.
    DropsLastBytes,
    /// Stops echoing after a read that filled its buffer.
    StallsAfterABurst,
    InterpretsQuit,
    SendsFirst,
    /// Ignores the result of a partial write.
    DropsRestOfPartialWrite,
    ChangesAByte,
    /// Closes with a reset in place of a FIN.
    ResetsOnClose,
    /// Leaves the connection open when the client has half-closed it.
    NeverEnds,
    /// Reads without limit, whether or not the bytes can be sent.
    HasNoLimit,
    /// Receives urgent bytes out of band, and loses them.
    LosesUrgentData,
    /// Serves one connection after the other.
    ServesOneAtATime,
    EndsAfterAReset,
    /// These change one place in each stream, at [`WRONG_PLACE`].
    FlipsABit,
    SwapsTwoReads,
    RepeatsARead,
    /// Replaces one byte by one of another connection.
    MixesConnections,
}

const WRONG_PLACE: usize = 29_999_000;

/// A server with a thread for each connection, which writes what it has read.
#[derive(Debug)]
pub(crate) struct ThreadPerConnection {
    address: SocketAddr,
    stopped: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl ThreadPerConnection {
    pub(crate) fn start(fault: Fault) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback is there");
        let address = listener.local_addr().expect("it is bound");
        // For 300 connections at once; the standard library's backlog is 128.
        SockRef::from(&listener).listen(1_024).expect("it listens");
        let stopped = Arc::new(AtomicBool::new(false));
        let accepting = thread::spawn({
            let stopped = Arc::clone(&stopped);
            move || accept(listener, fault, &stopped)
        });
        Self {
            address,
            stopped,
            accepting: Some(accepting),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Stops accepting. The clients have left before, so that the threads of their connections end.
impl Drop for ThreadPerConnection {
    fn drop(&mut self) {
        end(&self.stopped, self.address);
        if let Some(accepting) = self.accepting.take() {
            let ended = accepting.join();
            assert!(ended.is_ok() || thread::panicking(), "the server panicked");
        }
    }
}

fn end(stopped: &AtomicBool, address: SocketAddr) {
    stopped.store(true, SeqCst);
    // Wakes the acceptor, unless it has ended.
    let _ended = TcpStream::connect(address);
}

fn accept(listener: TcpListener, fault: Fault, stopped: &AtomicBool) {
    let address = listener.local_addr().expect("it is bound");
    let other = Mutex::new(Vec::new());
    thread::scope(|scope| {
        // Closed when this loop ends, and not only when the last connection has ended.
        let listener = listener;
        loop {
            let accepted = listener.accept();
            if stopped.load(SeqCst) {
                return;
            }
            let Ok((stream, _)) = accepted else {
                continue;
            };
            let other = &other;
            let serve = move || {
                let served = serve(&stream, fault, stopped, other);
                if fault == Fault::EndsAfterAReset && served.is_err() {
                    end(stopped, address);
                }
            };
            match fault {
                Fault::ServesOneAtATime => serve(),
                _ => drop(scope.spawn(serve)),
            }
        }
    });
}

/// `other` is what another connection has read.
fn serve(
    mut stream: &TcpStream,
    fault: Fault,
    stopped: &AtomicBool,
    other: &Mutex<Vec<u8>>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_out_of_band_inline(fault != Fault::LosesUrgentData)?;
    match fault {
        Fault::DropsLastBytes | Fault::HasNoLimit => {
            return serve_with_a_queue(stream, fault == Fault::DropsLastBytes);
        }
        Fault::SendsFirst => stream.write_all(b"220 ready\r\n")?,
        Fault::DropsRestOfPartialWrite => {
            stream.set_write_timeout(Some(Duration::from_millis(1)))?;
        }
        _ => {}
    }
    let mut buffer = [0; 16 << 10];
    let mut echoed = 0;
    loop {
        let count = stream.read(&mut buffer)?;
        let bytes = &mut buffer[..count];
        match fault {
            _ if count == 0 => break,
            Fault::InterpretsQuit if bytes.windows(5).any(|word| word == b"quit\n") => break,
            Fault::ChangesAByte if (echoed..echoed + count).contains(&100_000) => {
                bytes[100_000 - echoed] ^= 0x20;
            }
            _ => {}
        }
        if (echoed..echoed + count).contains(&WRONG_PLACE) {
            echo_wrongly(stream, fault, bytes, other)?;
            echoed += count;
            continue;
        }
        if fault == Fault::MixesConnections {
            *other.lock().expect("no thread panics") = bytes.to_vec();
        }
        echoed += count;
        match fault {
            Fault::DropsRestOfPartialWrite => match stream.write(bytes) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => {}
            },
            _ => stream.write_all(bytes)?,
        }
        if fault == Fault::StallsAfterABurst && count == buffer.len() {
            // Discards the rest until the client closes.
            return io::copy(&mut stream, &mut io::sink()).map(drop);
        }
    }
    match fault {
        Fault::ResetsOnClose => SockRef::from(stream).set_linger(Some(Duration::ZERO))?,
        Fault::NeverEnds => {
            while !stopped.load(SeqCst) {
                thread::sleep(Duration::from_millis(10));
            }
        }
        _ => {}
    }
    Ok(())
}

/// Reads and writes on threads of their own, with a queue of any length between them.
fn serve_with_a_queue(mut stream: &TcpStream, drops_last_bytes: bool) -> io::Result<()> {
    let (queue, pieces) = mpsc::channel::<Vec<u8>>();
    if drops_last_bytes {
        // Otherwise the kernel can accept all of the last bytes, and send them.
        SockRef::from(stream).set_send_buffer_size(64 << 10)?;
    }
    // The queue is moved, so that it is closed when reading ends, which ends the writing thread.
    thread::scope(move |scope| {
        scope.spawn(move || pieces.iter().try_for_each(|piece| stream.write_all(&piece)));
        let mut buffer = [0; 16 << 10];
        loop {
            match stream.read(&mut buffer)? {
                0 if drops_last_bytes => return stream.shutdown(Shutdown::Both),
                0 => return Ok(()),
                count => drop(queue.send(buffer[..count].to_vec())),
            }
        }
    })
}

/// Echoes `bytes`, and for some faults those of the next read, with the fault.
fn echo_wrongly(
    mut stream: &TcpStream,
    fault: Fault,
    bytes: &mut [u8],
    other: &Mutex<Vec<u8>>,
) -> io::Result<()> {
    let mut next = vec![0; bytes.len()];
    match fault {
        Fault::FlipsABit => bytes[0] ^= 1,
        Fault::SwapsTwoReads => {
            stream.read_exact(&mut next)?;
            stream.write_all(&next)?;
        }
        Fault::RepeatsARead => {
            stream.read_exact(&mut next)?;
            stream.write_all(bytes)?;
        }
        Fault::MixesConnections => {
            let other = other.lock().expect("no thread panics");
            let mut pairs = bytes.iter_mut().zip(&*other);
            let (byte, foreign) = pairs
                .find(|(own, other)| own != other)
                .expect("they differ");
            *byte = *foreign;
        }
        _ => {}
    }
    stream.write_all(bytes)
}
