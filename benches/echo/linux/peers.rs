//! The built-in servers: this one, and those that it is compared with, each as its kind is usually written.
//!
//! The others have the same listener, whose sockets inherit `TCP_NODELAY`, and the same number of workers (except
//! `threads`, which starts a thread for each connection).

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};
use rustix::process::{Signal, set_parent_process_death_signal};
use slab::Slab;
use socket2::SockRef;

/// The name of each, and what it is. The first is the reference of all ratios.
pub(crate) const SERVERS: [(&str, &str); 7] = [
    ("epoll", "a raw epoll loop, with one read for each event"),
    ("echoserver", "this server"),
    ("busy-poll", "this server with --busy-poll 50us"),
    ("tokio-64k", "tokio, multi-threaded, buffers of 64 KiB"),
    ("tokio-16k", "tokio, multi-threaded, buffers of 16 KiB"),
    ("threads", "one blocking thread for each connection"),
    ("original", "an event loop for each of N connections"),
];

/// What a server reads at a time, unless its name says otherwise.
const BUFFER: usize = 64 << 10;

/// Becomes the server with this name. The kernel kills it when its parent process ends.
pub(crate) fn serve(name: &str, port: u16, workers: usize) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    match name {
        "epoll" => serve_by_epoll(&listen(port)?, workers),
        "echoserver" => serve_by_echoserver(port, workers, &[]),
        "busy-poll" => serve_by_echoserver(port, workers, &["--busy-poll=50us"]),
        "tokio-64k" => serve_by_tokio(listen(port)?, workers, BUFFER),
        "tokio-16k" => serve_by_tokio(listen(port)?, workers, 16 << 10),
        "threads" => serve_by_threads(&listen(port)?),
        "original" => serve_by_original(&listen(port)?, workers),
        _ => Err(io::Error::other(format!("there is no server {name}"))),
    }
}

fn listen(port: u16) -> io::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let socket = SockRef::from(&listener);
    socket.set_tcp_nodelay(true)?;
    // std has chosen a shorter backlog.
    socket.listen(4096)?;
    eprintln!("listening on {}", listener.local_addr()?);
    Ok(listener)
}

fn serve_by_echoserver(port: u16, workers: usize, options: &[&str]) -> io::Result<()> {
    Err(Command::new(env!("CARGO_BIN_EXE_echoserver"))
        .env_clear()
        .arg(format!("--listen=127.0.0.1:{port}"))
        .arg(format!("--workers={workers}"))
        .args(options)
        .exec())
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
/// this one connection, and runs it until the connection ends. N workers serve N connections at once.
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
    epoll.run(None)
}

/// The reference: level-triggered, one read of at most 64 KiB for each event. Each worker accepts for itself.
fn serve_by_epoll(listener: &TcpListener, workers: usize) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let serve = || -> io::Result<()> {
        let epoll = EventLoop::new()?;
        let flags = EventFlags::IN | EventFlags::EXCLUSIVE;
        epoll::add(&epoll.fd, listener, EventData::new_u64(LISTENER), flags)?;
        epoll.run(Some(listener))
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

    /// Runs until there is neither a listener nor a connection.
    fn run(mut self, listener: Option<&TcpListener>) -> io::Result<()> {
        let mut events = Vec::with_capacity(1024);
        while listener.is_some() || !self.connections.is_empty() {
            events.clear();
            epoll::wait(&self.fd, spare_capacity(&mut events), None)?;
            for event in &events {
                match (event.data.u64(), listener) {
                    (LISTENER, Some(listener)) => self.accept(listener)?,
                    _ => self.serve(event.data)?,
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self, listener: &TcpListener) -> io::Result<()> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        loop {
            match accept_with(listener, flags) {
                Ok(socket) => self.add(socket)?,
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn serve(&mut self, token: EventData) -> io::Result<()> {
        let key = token.u64() as usize;
        let connection = &mut self.connections[key];
        let was_blocked = !connection.pending.is_empty();
        if connection.transfer(&mut self.buffer).is_err() {
            self.connections.remove(key);
            return Ok(());
        }
        let flags = match (was_blocked, !connection.pending.is_empty()) {
            (false, true) => EventFlags::OUT,
            (true, false) => EventFlags::IN,
            _ => return Ok(()),
        };
        Ok(epoll::modify(&self.fd, &connection.socket, token, flags)?)
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
