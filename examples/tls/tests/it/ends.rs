//! How connections end: half-close, truncation, shutdown, alerts and timeouts.

use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use echoserver::{Action, CloseReason, Config, Context, Echo, Event, Handler, Waker};
use echoserver_tls::Tls;
use rustls::{AlertDescription, Error};

use crate::harness::{
    Client, DEADLINE, End, FnHandler, Identity, TestServer, config, random_bytes, wait_until,
};

fn closed(server: TestServer, reason: CloseReason) -> u64 {
    server.stop().total().closed.get(reason)
}

/// Connects without TLS.
fn connect_plain(server: &TestServer) -> TcpStream {
    let client = TcpStream::connect(server.address).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client
}

#[test]
fn half_closed_client_still_reads() {
    // Answers only at the end.
    let server = TestServer::start(config(), || {
        FnHandler(|event, context: &mut Context<'_>| match event {
            Event::Eof => Echo.process(event, context),
            _ => Action::Continue,
        })
    });
    let mut client = server.connect();
    client.send(b"the end is the question");
    client.half_close();
    client.expect(b"the end is the question");
    client.expect_end(&End::Clean);
}

#[test]
fn end_of_tcp_without_close_notify_is_reset() {
    let server = TestServer::start(config(), || {
        FnHandler(|event, context: &mut Context<'_>| {
            assert_ne!(event, Event::Eof);
            Echo.process(event, context)
        })
    });
    let mut client = server.connect();
    client.send(b"cut");
    client.expect(b"cut");
    client.socket.shutdown(Shutdown::Write).unwrap();
    client.expect_end(&End::Reset);
    assert_eq!(closed(server, CloseReason::HandlerReset), 1);
}

#[test]
fn end_of_tcp_in_the_middle_of_a_record_is_reset() {
    let server = TestServer::start(config(), || Echo);
    let mut client = server.connect();
    client.tls.writer().write_all(b"a record").unwrap();
    let mut record = Vec::new();
    client.tls.write_tls(&mut record).unwrap();
    client
        .socket
        .write_all(&record[..record.len() - 1])
        .unwrap();
    client.socket.shutdown(Shutdown::Write).unwrap();
    client.expect_end(&End::Reset);
    assert_eq!(closed(server, CloseReason::HandlerReset), 1);
}

/// A server whose only worker can be blocked, so that input and events accumulate.
struct BlockedServer {
    server: TestServer,
    release: Sender<()>,
    is_blocked: Arc<AtomicBool>,
}

impl BlockedServer {
    fn start<H: Handler + 'static>(inner: impl Fn() -> H + Send + Sync + 'static) -> Self {
        let (release, released) = mpsc::channel();
        let is_blocked = Arc::new(AtomicBool::new(false));
        let shared: Arc<(_, Mutex<Receiver<()>>)> =
            Arc::new((Arc::clone(&is_blocked), Mutex::new(released)));
        let server = TestServer::start(config(), move || {
            let (shared, mut inner) = (Arc::clone(&shared), inner());
            FnHandler(move |event, context: &mut Context<'_>| {
                if context.input.data() == b"block" {
                    shared.0.store(true, SeqCst);
                    let _released = shared.1.lock().unwrap().recv_timeout(DEADLINE);
                    return Action::Close;
                }
                inner.process(event, context)
            })
        });
        Self {
            server,
            release,
            is_blocked,
        }
    }

    /// Blocks the worker until the result is used.
    fn block(&self) -> impl FnOnce() {
        let mut blocking = self.server.connect();
        blocking.send(b"block");
        wait_until("the worker is blocked", || self.is_blocked.load(SeqCst));
        move || {
            self.release.send(()).unwrap();
            wait_until("the worker goes on", || {
                blocking.pump();
                blocking.end.is_some()
            });
        }
    }
}

#[test]
fn shutdown_answers_what_has_arrived_then_sends_close_notify() {
    // As much as the server's kernel receives before it is read.
    const LENGTHS: [usize; 5] = [0, 1, 1000, 20_000, 50_000];
    let blocked = BlockedServer::start(|| Echo);
    let mut clients = LENGTHS.map(|_| blocked.server.connect());
    let release = blocked.block();
    let bytes = random_bytes(3, 50_000);
    for (client, length) in clients.iter_mut().zip(LENGTHS) {
        client.send(&bytes[..length]);
    }
    blocked.server.handle.shut_down();
    release();
    for (client, length) in clients.iter_mut().zip(LENGTHS) {
        client.expect(&bytes[..length]);
        client.expect_end(&End::Clean);
    }
    drop(clients);
    let total = blocked.server.stop().total();
    assert_eq!(total.closed.get(CloseReason::DrainTimeout), 0, "{total:?}");
}

/// The client has sent all of it, and reads only after the shutdown has begun.
#[test]
fn shutdown_waits_for_a_late_reader() {
    let config = Config {
        drain_timeout: DEADLINE,
        ..config()
    };
    let seen = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&seen);
    let server = TestServer::start(config, move || {
        let seen = Arc::clone(&shared);
        FnHandler(move |event, context: &mut Context<'_>| {
            seen.lock().unwrap().push(event);
            Echo.process(event, context)
        })
    });
    let bytes = random_bytes(4, 20_000_000);
    let mut client = Client::connect(server.address, Some(64 << 10));
    let _rest = client.send_until_stuck(&bytes);
    server.wait_until_stuck();
    let read = server.handle.stats().total().bytes_in as usize;
    server.handle.shut_down();
    wait_until("the shutdown has begun", || {
        seen.lock().unwrap().contains(&Event::Shutdown)
    });
    // It does not wake itself while it waits for the client.
    server.wait_until_stuck();
    wait_until("the connection ends", || {
        client.pump();
        client.end.is_some()
    });
    // TLS adds little to large records.
    let count = client.received.len();
    assert!(count > read * 99 / 100, "{count} bytes of at least {read}");
    client.expect(&bytes[..count]);
    client.expect_end(&End::Clean);
}

#[test]
fn shutdown_during_a_handshake_ends_it() {
    let server = TestServer::start(config(), || Echo);
    let mut client = connect_plain(&server);
    wait_until("the client is served", || {
        server.handle.stats().total().assigned == 1
    });
    server.handle.shut_down();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    // A warning in a record of alerts: close_notify.
    assert_eq!(answer, [21, 3, 3, 0, 2, 1, 0]);
    drop(client);
    server.stop();
}

/// The end of the handshake arrives in time, and is read only after the shutdown has begun.
#[test]
fn connection_that_opens_in_a_shutdown_is_served() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&seen);
    let blocked = BlockedServer::start(move || {
        let (seen, mut parts) = (Arc::clone(&shared), vec!["3", "2", "1"]);
        FnHandler(move |event, context: &mut Context<'_>| {
            seen.lock().unwrap().push(event);
            match event {
                Event::Open | Event::Sent => match parts.pop() {
                    Some(part) if context.output.push(part.as_bytes()) => Action::Flush,
                    _ => Action::Continue,
                },
                Event::Input => Echo.process(event, context),
                _ => Action::Continue,
            }
        })
    });
    let mut client = Client::begin(blocked.server.address, None);
    client.finish_handshake_later();
    let release = blocked.block();
    seen.lock().unwrap().clear();
    client.send(b"4");
    blocked.server.handle.shut_down();
    release();
    client.expect(b"1234");
    client.expect_end(&End::Clean);
    drop(client);
    blocked.server.stop();
    let mut events = seen.lock().unwrap().clone();
    events.retain(|event| *event != Event::Wake);
    let sent = [Event::Sent; 3];
    let due = [&[Event::Open, Event::Shutdown][..], &sent, &[Event::Input]].concat();
    assert_eq!(events, due);
}

#[test]
fn inner_handler_says_goodbye() {
    let server = TestServer::start(config(), || {
        FnHandler(|event, context: &mut Context<'_>| match event {
            Event::Shutdown if context.output.push(b"goodbye") => Action::Close,
            _ => Echo.process(event, context),
        })
    });
    let mut client = server.connect();
    client.send(b"hello");
    client.expect(b"hello");
    server.handle.shut_down();
    client.expect(b"goodbye");
    client.expect_end(&End::Clean);
    drop(client);
    server.stop();
}

/// Answers when it is told to, by another thread.
struct Job {
    seen: Arc<Mutex<Vec<Event>>>,
    answer: Arc<Mutex<Option<(Waker, bool)>>>,
}

impl Handler for Job {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        self.seen.lock().unwrap().push(event);
        if event == Event::Input {
            context.input.consume(context.input.len());
            *self.answer.lock().unwrap() = Some((context.waker(), false));
        }
        match &mut *self.answer.lock().unwrap() {
            Some((_, is_done @ true)) => {
                *is_done = false;
                assert!(context.output.push(b"done"));
                Action::Close
            }
            Some(_) => Action::Pending,
            None => Action::Continue,
        }
    }
}

#[test]
fn shutdown_waits_for_an_answer() {
    let (seen, answer) = (Arc::default(), Arc::default());
    let job = (Arc::clone(&seen), Arc::clone(&answer));
    let server = TestServer::start(config(), move || Job {
        seen: Arc::clone(&job.0),
        answer: Arc::clone(&job.1),
    });
    let mut client = server.connect();
    client.send(b"a job");
    client.half_close();
    wait_until("the client's end has come", || {
        seen.lock().unwrap().contains(&Event::Eof)
    });
    server.handle.shut_down();
    wait_until("the shutdown has begun", || {
        seen.lock().unwrap().contains(&Event::Shutdown)
    });
    let waker = {
        let answer = &mut *answer.lock().unwrap();
        let (waker, is_done) = answer.as_mut().expect("the job has come");
        *is_done = true;
        waker.clone()
    };
    waker.wake();
    client.expect(b"done");
    client.expect_end(&End::Clean);
    drop(client);
    let events = [
        Event::Open,
        Event::Input,
        Event::Eof,
        Event::Shutdown,
        Event::Wake,
    ];
    assert_eq!(*seen.lock().unwrap(), events);
    server.stop();
}

#[test]
fn plain_text_gets_an_alert() {
    let server = TestServer::start(config(), || Echo);
    let mut client = connect_plain(&server);
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer[..6], [21, 3, 3, 0, 2, 2], "{answer:?}");
    drop(client);
    assert_eq!(closed(server, CloseReason::Handler), 1);
}

#[test]
fn forged_record_gets_an_alert() {
    let server = TestServer::start(config(), || Echo);
    let mut client = server.connect();
    client.send(b"before");
    client.expect(b"before");
    let forged = [&[23, 3, 3, 0, 32][..], &[0; 32]].concat();
    client.socket.write_all(&forged).unwrap();
    let alert = Error::AlertReceived(AlertDescription::BadRecordMac);
    client.expect_end(&End::Tls(alert));
}

#[test]
fn handshake_that_does_not_go_on_is_idle() {
    let config = Config {
        idle_timeout: Some(Duration::from_millis(500)),
        ..config()
    };
    let server = TestServer::start(config, || Echo);
    let mut client = connect_plain(&server);
    client.write_all(&[22, 3, 1, 2]).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    drop(client);
    assert_eq!(closed(server, CloseReason::IdleTimeout), 1);
}

/// The inner handler's wait ends with an answer that has no byte.
#[test]
fn idle_timeout_applies_after_a_wait() {
    let config = Config {
        idle_timeout: Some(Duration::from_millis(500)),
        ..config()
    };
    let server = TestServer::start(config, || {
        FnHandler(|event, context: &mut Context<'_>| match event {
            Event::Input => {
                context.waker().wake();
                Action::Pending
            }
            Event::Wake => {
                context.input.consume(context.input.len());
                Action::Continue
            }
            Event::Resumed => panic!("nothing has yielded"),
            _ => Action::Continue,
        })
    });
    let mut client = server.connect();
    client.send(b"no answer");
    client.expect_end(&End::Cut);
    drop(client);
    assert_eq!(closed(server, CloseReason::IdleTimeout), 1);
}

#[test]
fn inner_reset_resets() {
    let server = TestServer::start(config(), || {
        FnHandler(|event, _context: &mut Context<'_>| match event {
            Event::Input => Action::Reset,
            _ => Action::Continue,
        })
    });
    let mut client = server.connect();
    client.send(b"reset me");
    client.expect_end(&End::Reset);
    assert_eq!(closed(server, CloseReason::HandlerReset), 1);
}

#[test]
fn inner_message_that_is_too_long_closes() {
    let config = Config {
        buffer_size: 100,
        ..config()
    };
    let server = TestServer::start(config, || {
        FnHandler(|_event, _context: &mut Context<'_>| Action::Continue)
    });
    let mut client = server.connect();
    client.send(&[0; 100]);
    client.expect_end(&End::Clean);
}

/// The inner handler is called when its output is sent, and not when it is encrypted.
#[test]
fn inner_output_is_sent_before_the_next() {
    const ANSWERS: usize = 500;
    const LENGTH: usize = 1000;
    let tls = Identity::get().server_config();
    let server = TestServer::start_without_tls(config(), move || {
        let (mut left, calls) = (ANSWERS, Rc::new(Cell::new(0)));
        let sent = Rc::clone(&calls);
        let inner = FnHandler(move |event, context: &mut Context<'_>| {
            match event {
                Event::Input => context.input.consume(context.input.len()),
                Event::Sent => sent.set(sent.get() + 1),
                _ => return Action::Continue,
            }
            if left == 0 {
                return Action::Close;
            }
            left -= 1;
            assert!(context.output.push(&[left as u8; LENGTH]));
            Action::Flush
        });
        let mut outer = Tls::new(inner, Arc::clone(&tls)).unwrap();
        FnHandler(move |event, context: &mut Context<'_>| {
            let max = usize::from(event == Event::Sent && context.output.is_empty());
            let before = calls.get();
            let action = outer.process(event, context);
            assert!(calls.get() - before <= max, "{event:?}");
            action
        })
    });
    let mut client = server.connect();
    client.send(b"go");
    for left in (0..ANSWERS).rev() {
        client.expect(&[left as u8; LENGTH]);
    }
    client.expect_end(&End::Clean);
}
