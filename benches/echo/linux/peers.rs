//! The servers that this one is compared with, each as its kind is usually written, in a process of its own.
//!
//! All have the same listener, whose sockets inherit `TCP_NODELAY`, and the same number of workers (except `threads`,
//! which starts a thread for each connection).

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::{process, thread};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};
use slab::Slab;
use socket2::{Domain, Socket, Type};

/// The name of each, and what it is. The first is the reference of all ratios.
pub(crate) const PEERS: [(&str, &str); 5] = [
    (
        "epoll",
        "a raw epoll loop: level-triggered, one read of at most 64 KiB for each event",
    ),
    ("tokio-64k", "tokio, multi-threaded, buffers of 64 KiB"),
    ("tokio-16k", "tokio, multi-threaded, buffers of 16 KiB"),
    ("threads", "one blocking thread for each connection"),
    (
        "original",
        "an event loop for each connection: N workers serve N connections at once",
    ),
];

/// What a peer reads at a time, unless its name says otherwise.
const BUFFER: usize = 64 << 10;

/// Becomes the peer with this name. The process ends when its standard input is closed.
pub(crate) fn serve(name: &str, workers: usize) -> io::Result<()> {
    let listener = listen()?;
    eprintln!("listening on {}", listener.local_addr()?);
    thread::spawn(|| {
        let _eof = io::stdin().read(&mut [0]);
        process::exit(0);
    });
    match name {
        "epoll" => serve_by_epoll(&listener, workers),
        "tokio-64k" => serve_by_tokio(listener, workers, BUFFER),
        "tokio-16k" => serve_by_tokio(listener, workers, 16 << 10),
        "threads" => serve_by_threads(&listener),
        "original" => serve_by_original(&listener, workers),
        _ => Err(io::Error::other(format!("there is no peer {name}"))),
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
        // If no thread can be started, the connection is dropped.
        let _started = thread::Builder::new().spawn(move || {
            let mut buffer = vec![0; BUFFER];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
        });
    }
}

/// The design of libevent-thread (2012): connections wait in a queue until one of N workers is free. The worker makes an event loop for
/// this one connection, and runs it until the connection ends.
fn serve_by_original(listener: &TcpListener, workers: usize) -> io::Result<()> {
    let (queue, waiting) = crossbeam_channel::unbounded::<TcpStream>();
    for _ in 0..workers {
        let waiting = waiting.clone();
        thread::spawn(move || {
            for stream in waiting {
                let _ended = serve_one(stream);
            }
        });
    }
    loop {
        let (stream, _) = listener.accept()?;
        queue.send(stream).map_err(io::Error::other)?;
    }
}

fn serve_one(stream: TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let mut epoll = EventLoop::new()?;
    epoll.add(stream.into())?;
    while !epoll.connections.is_empty() {
        epoll.run_once(|_| Ok(()))?;
    }
    Ok(())
}

/// The reference: each worker accepts for itself.
fn serve_by_epoll(listener: &TcpListener, workers: usize) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let serve = || -> io::Result<()> {
        let mut epoll = EventLoop::new()?;
        let flags = EventFlags::IN | EventFlags::EXCLUSIVE;
        epoll::add(&epoll.fd, listener, EventData::new_u64(LISTENER), flags)?;
        loop {
            epoll.run_once(|epoll| epoll.accept(listener))?;
        }
    };
    thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(serve);
        }
        serve()
    })
}

const LISTENER: u64 = u64::MAX;

struct EventLoop {
    fd: OwnedFd,
    connections: Slab<Connection>,
    events: Vec<epoll::Event>,
    buffer: Vec<u8>,
}

struct Connection {
    socket: OwnedFd,
    /// What a write has not taken. Until it is sent, nothing is read.
    pending: Vec<u8>,
}

impl EventLoop {
    fn new() -> io::Result<Self> {
        Ok(Self {
            fd: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            connections: Slab::new(),
            events: Vec::with_capacity(1024),
            buffer: vec![0; BUFFER],
        })
    }

    fn add(&mut self, socket: OwnedFd) -> io::Result<()> {
        let slot = self.connections.vacant_entry();
        let token = EventData::new_u64(slot.key() as u64);
        epoll::add(&self.fd, &socket, token, EventFlags::IN)?;
        slot.insert(Connection {
            socket,
            pending: Vec::new(),
        });
        Ok(())
    }

    fn accept(&mut self, listener: &TcpListener) -> io::Result<()> {
        loop {
            match accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => self.add(socket)?,
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn run_once(&mut self, accept: impl Fn(&mut Self) -> io::Result<()>) -> io::Result<()> {
        self.events.clear();
        epoll::wait(&self.fd, spare_capacity(&mut self.events), None)?;
        let events = std::mem::take(&mut self.events);
        for event in &events {
            let token = event.data.u64();
            if token == LISTENER {
                accept(self)?;
                continue;
            }
            let connection = &mut self.connections[token as usize];
            let was_blocked = !connection.pending.is_empty();
            if connection.transfer(&mut self.buffer).is_err() {
                self.connections.remove(token as usize);
                continue;
            }
            let flags = match (was_blocked, !connection.pending.is_empty()) {
                (false, true) => EventFlags::OUT,
                (true, false) => EventFlags::IN,
                _ => continue,
            };
            epoll::modify(&self.fd, &connection.socket, event.data, flags)?;
        }
        self.events = events;
        Ok(())
    }
}

impl Connection {
    /// Sends what is pending, or else what one read returns. An error, EOF included, ends the connection.
    fn transfer(&mut self, buffer: &mut [u8]) -> Result<(), Errno> {
        if !self.pending.is_empty() {
            let sent = send(&self.socket, &self.pending, SendFlags::NOSIGNAL)?;
            self.pending.drain(..sent);
            return Ok(());
        }
        let count = match recv(&self.socket, &mut *buffer, RecvFlags::empty()) {
            Ok((_, 0)) => return Err(Errno::PIPE),
            Ok((_, count)) => count,
            Err(Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error),
        };
        let sent = match send(&self.socket, &buffer[..count], SendFlags::NOSIGNAL) {
            Err(Errno::AGAIN) => 0,
            result => result?,
        };
        self.pending.extend_from_slice(&buffer[sent..count]);
        Ok(())
    }
}
