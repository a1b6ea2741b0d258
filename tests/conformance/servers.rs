//! Servers to try the cases on: the simplest one that is right, and what goes wrong with such.

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
    DropsTheTail,
    /// Forgets what is behind a read that filled its buffer.
    StallsAfterABurst,
    ObeysQuit,
    SpeaksFirst,
    /// Takes a write for complete that was not.
    LosesThePartialWritesRest,
    ChangesAByte,
    /// Closes with a reset in place of a FIN.
    ResetsOnClose,
    /// Leaves the connection open when the client has half-closed it.
    NeverEnds,
    /// Takes whatever comes, whether or not it can be sent on.
    KnowsNoBound,
    /// Reads up to the urgent mark, over which the urgent byte is lost.
    LosesUrgentData,
    /// Serves one connection after the other.
    ServesOneAtATime,
    DiesOfAReset,
    /// These change one place in each stream, at [`WRONG_PLACE`].
    FlipsABit,
    SwapsTwoReads,
    RepeatsARead,
    /// Replaces one byte by one of another connection.
    MixesConnections,
}

const WRONG_PLACE: usize = 29_999_000;

/// A thread for each connection, which reads, and writes what it has read.
#[derive(Debug)]
pub(crate) struct ThreadPerConnection {
    address: SocketAddr,
    over: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl ThreadPerConnection {
    pub(crate) fn start(fault: Fault) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback is there");
        let address = listener.local_addr().expect("it is bound");
        // For 300 connections at once; the standard library's backlog is 128.
        SockRef::from(&listener).listen(1_024).expect("it listens");
        let over = Arc::new(AtomicBool::new(false));
        let accepting = thread::spawn({
            let over = Arc::clone(&over);
            move || accept(listener, fault, &over)
        });
        Self {
            address,
            over,
            accepting: Some(accepting),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Connections end with their clients, which are gone by then.
impl Drop for ThreadPerConnection {
    fn drop(&mut self) {
        end(&self.over, self.address);
        if let Some(accepting) = self.accepting.take() {
            let ended = accepting.join();
            assert!(ended.is_ok() || thread::panicking(), "the server panicked");
        }
    }
}

fn end(over: &AtomicBool, address: SocketAddr) {
    over.store(true, SeqCst);
    // Wakes the acceptor; one that is gone needs no waking.
    let _gone = TcpStream::connect(address);
}

fn accept(listener: TcpListener, fault: Fault, over: &AtomicBool) {
    let address = listener.local_addr().expect("it is bound");
    let other = Mutex::new(Vec::new());
    thread::scope(|scope| {
        // Closed once nothing more is accepted, and not only when the last connection ends.
        let listener = listener;
        loop {
            let accepted = listener.accept();
            if over.load(SeqCst) {
                return;
            }
            let Ok((stream, _)) = accepted else {
                continue;
            };
            let other = &other;
            let serve = move || {
                let served = serve(&stream, fault, over, other);
                if fault == Fault::DiesOfAReset && served.is_err() {
                    end(over, address);
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
    over: &AtomicBool,
    other: &Mutex<Vec<u8>>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_out_of_band_inline(fault != Fault::LosesUrgentData)?;
    match fault {
        Fault::DropsTheTail | Fault::KnowsNoBound => {
            return serve_with_a_queue(stream, fault == Fault::DropsTheTail);
        }
        Fault::SpeaksFirst => stream.write_all(b"220 ready\r\n")?,
        Fault::LosesThePartialWritesRest => {
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
            Fault::ObeysQuit if bytes.windows(5).any(|word| word == b"quit\n") => break,
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
            Fault::LosesThePartialWritesRest => match stream.write(bytes) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => {}
            },
            _ => stream.write_all(bytes)?,
        }
        if fault == Fault::StallsAfterABurst && count == buffer.len() {
            // Reads on only to see the client go.
            return io::copy(&mut stream, &mut io::sink()).map(drop);
        }
    }
    match fault {
        Fault::ResetsOnClose => SockRef::from(stream).set_linger(Some(Duration::ZERO))?,
        Fault::NeverEnds => {
            while !over.load(SeqCst) {
                thread::sleep(Duration::from_millis(10));
            }
        }
        _ => {}
    }
    Ok(())
}

/// Reads and writes on threads of their own, with a queue of any length between them.
fn serve_with_a_queue(mut stream: &TcpStream, drops_the_tail: bool) -> io::Result<()> {
    let (queue, pieces) = mpsc::channel::<Vec<u8>>();
    if drops_the_tail {
        // Otherwise the kernel may take the whole tail, and send it after all.
        SockRef::from(stream).set_send_buffer_size(64 << 10)?;
    }
    // Moving the queue closes it when reading ends, which ends the writing thread.
    thread::scope(move |scope| {
        scope.spawn(move || pieces.iter().try_for_each(|piece| stream.write_all(&piece)));
        let mut buffer = [0; 16 << 10];
        loop {
            match stream.read(&mut buffer)? {
                0 if drops_the_tail => return stream.shutdown(Shutdown::Both),
                0 => return Ok(()),
                count => drop(queue.send(buffer[..count].to_vec())),
            }
        }
    })
}

/// Echoes `bytes`, and perhaps those of the next read, as the fault has it.
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
