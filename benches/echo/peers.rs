//! The peers: servers that people write, each as good as its kind can be, in a process of its own.
//!
//! All get the same listener, whose sockets inherit `TCP_NODELAY`, and the same number of workers
//! (but one thread per connection, which knows no such number).

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};
use slab::Slab;
use socket2::{Domain, Socket, Type};

/// Every built-in peer, and what it is.
pub(crate) const PEERS: [(&str, &str); 5] = [
    (
        "epoll",
        "a raw epoll loop that does nothing else: the reference",
    ),
    (
        "tokio-16k",
        "tokio, multi-threaded, with the customary 16 KiB buffers",
    ),
    ("tokio-64k", "tokio, multi-threaded, with 64 KiB buffers"),
    ("threads", "one thread per connection, blocking"),
    (
        "original",
        "an event loop per connection: N workers serve N connections at once",
    ),
];

/// What a peer reads at a time, but for tokio's small one.
const BUFFER: usize = 64 << 10;

/// Becomes the peer of that name. Ends with the process that started it.
pub(crate) fn serve(name: &str, workers: usize) -> io::Result<()> {
    let listener = listen()?;
    eprintln!("listening on {}", listener.local_addr()?);
    thread::spawn(|| {
        // Its writing end is held by the benchmark, and never written to.
        let _ended = io::stdin().read(&mut [0]);
        process::exit(0);
    });
    match name {
        "epoll" => serve_by_epoll(&listener, workers),
        "tokio-16k" => serve_by_tokio(listener, workers, 16 << 10),
        "tokio-64k" => serve_by_tokio(listener, workers, BUFFER),
        "threads" => serve_by_threads(&listener),
        "original" => serve_by_original(&listener, workers),
        _ => Err(io::Error::other(format!("no peer is called {name}"))),
    }
}

fn listen() -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_tcp_nodelay(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

fn serve_by_tokio(listener: TcpListener, workers: usize, buffer: usize) -> io::Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_io()
        .build()?;
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            let (mut stream, _) = listener.accept().await?;
            tokio::spawn(async move {
                let mut buffer = vec![0; buffer];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&buffer[..count]).await.is_err() {
                        break;
                    }
                }
            });
        }
    })
}

fn serve_by_threads(listener: &TcpListener) -> io::Result<()> {
    loop {
        let (mut stream, _) = listener.accept()?;
        // Without room for another thread the connection is refused: dropped.
        let _refused = thread::Builder::new().spawn(move || {
            let mut buffer = vec![0; BUFFER];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
        });
    }
}

/// The design of 2012: connections wait in a queue until one of N workers is free, which makes an
/// event loop for this one connection and stays with it to its end.
fn serve_by_original(listener: &TcpListener, workers: usize) -> io::Result<()> {
    let (queue, waiting) = crossbeam_channel::unbounded::<TcpStream>();
    for _ in 0..workers {
        let waiting = waiting.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; BUFFER];
            for stream in waiting {
                // What becomes of one connection is no concern of the next.
                let _broken = serve_alone(stream, &mut buffer);
            }
        });
    }
    loop {
        let (stream, _) = listener.accept()?;
        queue.send(stream).map_err(io::Error::other)?;
    }
}

fn serve_alone(stream: TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut connection = Echo::new(stream.into());
    epoll::add(
        &epoll,
        &connection.socket,
        EventData::new_u64(0),
        EVERYTHING,
    )?;
    let mut events = Vec::with_capacity(1);
    loop {
        wait(&epoll, &mut events)?;
        for event in &events {
            if !connection.turn(event.flags, buffer)? {
                return Ok(());
            }
        }
    }
}

/// All that may ever matter of a connection, told once per change.
const EVERYTHING: EventFlags = EventFlags::IN
    .union(EventFlags::OUT)
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);

/// The reference: an epoll per thread. The first thread accepts too, and deals sockets in turn.
fn serve_by_epoll(listener: &TcpListener, workers: usize) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let loops: io::Result<Arc<[Loop]>> = (0..workers).map(|_| Loop::new()).collect();
    let loops = loops?;
    let token = EventData::new_u64(LISTENER);
    epoll::add(&loops[0].epoll, listener, token, EventFlags::IN)?;
    for index in 1..workers {
        let loops = Arc::clone(&loops);
        thread::spawn(move || loops[index].run(|_| Ok(())));
    }
    let mut next = 0;
    loops[0].run(|own| {
        loop {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = match accept_with(listener, flags) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            match next % workers {
                0 => own.push(socket),
                other => loops[other].give(socket)?,
            }
            next += 1;
        }
    })
}

const LISTENER: u64 = u64::MAX;
const BELL: u64 = u64::MAX - 1;

struct Loop {
    epoll: OwnedFd,
    bell: OwnedFd,
    arrivals: Mutex<Vec<OwnedFd>>,
}

impl Loop {
    fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC)?;
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &bell, EventData::new_u64(BELL), flags)?;
        Ok(Self {
            epoll,
            bell,
            arrivals: Mutex::default(),
        })
    }

    /// Hands a socket over from another thread.
    fn give(&self, socket: OwnedFd) -> io::Result<()> {
        self.arrivals().push(socket);
        rustix::io::write(&self.bell, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    fn arrivals(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves for ever. `accept` collects the sockets that this thread keeps.
    fn run(&self, mut accept: impl FnMut(&mut Vec<OwnedFd>) -> io::Result<()>) -> io::Result<()> {
        let mut connections: Slab<Echo> = Slab::new();
        let mut arrivals = Vec::new();
        let mut events = Vec::with_capacity(1024);
        let mut buffer = vec![0; BUFFER];
        loop {
            wait(&self.epoll, &mut events)?;
            for event in &events {
                match event.data.u64() {
                    LISTENER => accept(&mut arrivals)?,
                    BELL => arrivals.append(&mut self.arrivals()),
                    token => {
                        let connection = &mut connections[token as usize];
                        if !matches!(connection.turn(event.flags, &mut buffer), Ok(true)) {
                            connections.remove(token as usize);
                        }
                    }
                }
            }
            for socket in arrivals.drain(..) {
                let place = connections.vacant_entry();
                let token = EventData::new_u64(place.key() as u64);
                let connection = place.insert(Echo::new(socket));
                epoll::add(&self.epoll, &connection.socket, token, EVERYTHING)?;
            }
        }
    }
}

/// One connection of a raw loop: what could not be sent is kept, and goes first.
struct Echo {
    socket: OwnedFd,
    pending: Vec<u8>,
    /// The client has ended its stream: a short read says nothing any more.
    ended: bool,
}

impl Echo {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            pending: Vec::new(),
            ended: false,
        }
    }

    /// Moves what it can. Says whether the connection is still open.
    fn turn(&mut self, flags: EventFlags, buffer: &mut [u8]) -> io::Result<bool> {
        self.ended |= flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        while self.flush()? {
            let count = match recv(&self.socket, &mut *buffer, RecvFlags::empty()) {
                Ok((_, 0)) => return Ok(false),
                Ok((_, count)) => count,
                Err(Errno::AGAIN) => return Ok(true),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let sent = self.send(&buffer[..count])?;
            self.pending.extend_from_slice(&buffer[sent..count]);
            if count < buffer.len() && self.pending.is_empty() && !self.ended {
                return Ok(true);
            }
        }
        Ok(true)
    }

    /// Sends what is pending; says whether all of it is gone.
    fn flush(&mut self) -> io::Result<bool> {
        while !self.pending.is_empty() {
            match self.send(&self.pending)? {
                0 => return Ok(false),
                sent => drop(self.pending.drain(..sent)),
            }
        }
        Ok(true)
    }

    /// Sends once; 0 is a full socket.
    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            return match send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => Ok(sent),
                Err(Errno::AGAIN) => Ok(0),
                Err(Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }
}

fn wait(epoll: &OwnedFd, events: &mut Vec<epoll::Event>) -> io::Result<()> {
    events.clear();
    match epoll::wait(epoll, spare_capacity(events), None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
