//! Each way in which a handler is called, through a socket.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use echoserver::{Action, CloseReason, Config, Context, Echo, Event, Handler, Waker, WorkQueue};

use self::masked::Masked;
use crate::harness::{Client, FnHandler, TestServer, bind, config, random_bytes, wait_until};

#[allow(dead_code)] // it is a program
#[path = "../../examples/masked.rs"]
mod masked;

/// What handlers share with a test: the events that they have seen, and a waker.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    events: Vec<Event>,
    waker: Option<Waker>,
}

impl Shared {
    /// A server whose handlers record their events and then do what `process` does.
    fn serve(
        &self,
        config: Config,
        process: impl Fn(Event, &mut Context<'_>) -> Action + Clone + Send + Sync + 'static,
    ) -> TestServer {
        let shared = self.clone();
        TestServer::run(bind(config), move |_peer| {
            let (shared, process) = (shared.clone(), process.clone());
            FnHandler::new(move |event, context| {
                let action = process(event, context);
                let mut seen = shared.0.lock().unwrap();
                seen.events.push(event);
                if action == Action::Pending {
                    seen.waker = Some(context.waker());
                }
                action
            })
        })
    }

    fn wait_for(&self, events: &[Event]) {
        wait_until("the handler is called", || {
            self.0.lock().unwrap().events == events
        });
    }

    fn waker(&self) -> Waker {
        let waker = self.0.lock().unwrap().waker.clone();
        waker.expect("an answer is pending")
    }

    fn wake(&self) {
        self.waker().wake();
    }
}

/// Answers `a` when it is woken, and nothing before.
fn answer_when_woken(event: Event, context: &mut Context<'_>) -> Action {
    if event == Event::Wake {
        assert!(context.output.push(b"a"));
        context.input.consume(1);
    }
    match context.input.is_empty() {
        true => Action::Continue,
        false => Action::Pending,
    }
}

#[test]
fn handler_is_called_for_open_input_sent_and_eof() {
    let shared = Shared::default();
    let server = shared.serve(config(), |event, context| {
        if event == Event::Input {
            assert!(context.output.push(b"part"));
            context.input.consume(1);
            return Action::Flush;
        }
        if event == Event::Sent {
            assert!(context.output.push(b"rest"));
        }
        if event == Event::Eof {
            assert!(context.output.push(b"bye"));
        }
        Action::Continue
    });
    let client = server.connect();
    client.send(b"x");
    client.expect(b"partrest");
    shared.wait_for(&[Event::Open, Event::Input, Event::Sent]);
    client.shutdown_write();
    client.expect(b"bye");
    client.expect_eof();
    shared.wait_for(&[Event::Open, Event::Input, Event::Sent, Event::Eof]);
    drop(client);
    assert_eq!(server.stop().total().closed.get(CloseReason::PeerClosed), 1);
}

#[test]
fn timer_calls_the_handler_once() {
    let shared = Shared::default();
    let server = shared.serve(config(), |event, context| {
        match event {
            Event::Open => context.set_timer(Some(Duration::from_secs(3600))),
            // An earlier time replaces it.
            Event::Input => context.set_timer(Some(Duration::from_millis(20))),
            _ => assert!(context.output.push(b"late")),
        }
        Echo.process(event, context)
    });
    let client = server.connect();
    client.ping(b"ping");
    client.expect(b"late");
    let client_without_timer = server.connect();
    client_without_timer.ping(b"");
    shared.wait_for(&[Event::Open, Event::Input, Event::Timer, Event::Open]);
}

/// By the clock that the timer goes by.
#[test]
fn timer_does_not_expire_early() {
    const TIMEOUT: Duration = Duration::from_millis(20);
    let opened = Arc::new(Mutex::new(Duration::ZERO));
    let server = Shared::default().serve(config(), move |event, context| {
        let mut opened = opened.lock().unwrap();
        match event {
            Event::Open => {
                *opened = context.now();
                context.set_timer(Some(TIMEOUT));
            }
            Event::Timer if context.now() >= *opened + TIMEOUT => {
                assert!(context.output.push(b"in time"));
            }
            _ => {}
        }
        Action::Continue
    });
    server.connect().expect(b"in time");
}

/// Resets its connection when the client asks for it, and when it has filled the output for 50 ms.
fn reset_or_fill(event: Event, context: &mut Context<'_>) -> Action {
    match event {
        Event::Open => return Action::Continue,
        Event::Timer => return Action::Reset,
        Event::Input if context.input.data() == b"reset" => return Action::Reset,
        Event::Input => context.set_timer(Some(Duration::from_millis(50))),
        _ => {}
    }
    let part = vec![7; context.output.room()];
    assert!(context.output.push(&part));
    Action::Flush
}

/// Without output, and with output that the client does not read.
#[test]
fn handler_can_reset_the_connection() {
    let server = Shared::default().serve(config(), reset_or_fill);
    let client = server.connect();
    client.send(b"reset");
    client.expect_reset();
    let stuck = Client::connect_with_receive_buffer(server.address, 8 << 10);
    stuck.send(b"fill");
    wait_until("it is reset", || server.stats().total().closed.total() == 2);
    stuck.expect_reset();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::HandlerReset), 2);
    assert!(total.discarded.total() > 9, "{total:?}");
}

#[cfg(unix)]
#[test]
fn reset_of_a_unix_socket_is_an_eof() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let mut config = config();
    config
        .listen
        .push(echoserver::Address::UnixPath(path.clone()));
    let server = Shared::default().serve(config, reset_or_fill);
    let client = Client::connect_unix(&path);
    client.send(b"reset");
    client.expect_eof();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::HandlerReset), 1);
}

/// Whichever of two workers serves them.
#[test]
fn connections_are_numbered_in_the_order_of_accepts() {
    let two_workers = Config {
        workers: 2,
        ..config()
    };
    let server = TestServer::run(bind(two_workers), |connection| {
        let number = connection.number() as u8;
        FnHandler::new(move |_, context| {
            assert!(context.output.push(&[number]));
            Action::Close
        })
    });
    for number in 1..=5 {
        server.connect().expect(&[number]);
    }
}

#[test]
fn waker_calls_the_handler_from_another_thread() {
    let shared = Shared::default();
    let server = shared.serve(config(), answer_when_woken);
    let client = server.connect();
    client.send(b"?");
    shared.wait_for(&[Event::Open, Event::Input]);
    shared.wake();
    client.expect(b"a");
    shared.wait_for(&[Event::Open, Event::Input, Event::Wake]);
}

#[test]
fn waker_of_a_closed_connection_does_nothing() {
    let shared = Shared::default();
    let server = shared.serve(config(), answer_when_woken);
    let client = server.connect();
    client.send(b"?");
    shared.wait_for(&[Event::Open, Event::Input]);
    client.reset();
    wait_until("it is closed", || server.stats().open() == 0);
    // The next connection has the same token.
    let next = server.connect();
    wait_until("it is open", || server.stats().open() == 1);
    shared.wake();
    next.send(b"?");
    shared.wake();
    wait_until("it is answered", || {
        shared.wake();
        server.stats().total().bytes_out == 1
    });
    next.expect(b"a");
}

#[test]
fn pending_answer_survives_a_half_close() {
    let shared = Shared::default();
    let server = shared.serve(config(), answer_when_woken);
    let client = server.connect();
    client.send(b"?");
    client.shutdown_write();
    let before = [Event::Open, Event::Input, Event::Eof];
    shared.wait_for(&before);
    assert_eq!(server.stats().open(), 1);
    shared.wake();
    client.expect(b"a");
    client.expect_eof();
}

#[test]
fn pending_answer_survives_a_drain() {
    let shared = Shared::default();
    let server = shared.serve(config(), answer_when_woken);
    let (client, other) = (server.connect(), server.connect());
    client.send(b"?");
    wait_until("it is read", || server.stats().total().bytes_in == 1);
    server.shut_down();
    other.expect_eof();
    drop(other);
    wait_until("the other is closed", || server.stats().open() == 1);
    shared.wake();
    client.expect(b"a");
    client.expect_eof();
    drop(client);
    assert_eq!(server.stop().total().discarded.total(), 0);
}

/// A farewell reaches the client, and a request that was in the kernel is still answered.
#[test]
fn shutdown_calls_each_handler_once() {
    let shared = Shared::default();
    let server = shared.serve(config(), |event, context| {
        if event == Event::Shutdown {
            assert!(context.output.push(b"bye"));
        }
        Echo.process(event, context)
    });
    let client = server.connect();
    client.ping(b"ping");
    server.shut_down();
    client.expect(b"bye");
    client.expect_eof();
    drop(client);
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::Shutdown), 1);
    shared.wait_for(&[Event::Open, Event::Input, Event::Shutdown]);
}

/// Answers a line with `done`, after slices of work, of which `has_more` tells whether there is another.
fn work_in_slices(
    has_more: impl Fn() -> bool + Clone + Send + Sync + 'static,
) -> impl Fn(Event, &mut Context<'_>) -> Action + Clone {
    move |event, context| match event {
        Event::Input if context.input.line().is_some() => Action::Yield,
        Event::Resumed if has_more() => Action::Yield,
        Event::Resumed => {
            let length = context.input.len();
            context.input.consume(length);
            assert!(context.output.push(b"done"));
            Action::Continue
        }
        _ => Action::Continue,
    }
}

/// The work ends when the other connection was served, on the same worker.
#[test]
fn handler_that_yields_lets_others_have_a_turn() {
    let pings = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&pings);
    let work = work_in_slices(move || seen.load(SeqCst) == 0);
    let server = Shared::default().serve(config(), move |event, context| {
        if context.input.data() == b"ping" {
            pings.store(1, SeqCst);
            return Echo.process(event, context);
        }
        work(event, context)
    });
    let (busy, other) = (server.connect(), server.connect());
    busy.send(b"work\n");
    wait_until("it has turns", || server.stats().total().bulk_turns > 10);
    other.ping(b"ping");
    busy.expect(b"done");
}

#[test]
fn work_that_is_left_survives_a_half_close_and_a_drain() {
    let slices = Arc::new(AtomicUsize::new(0));
    let (done, has_ended) = (Arc::clone(&slices), Arc::new(AtomicUsize::new(0)));
    let may_end = Arc::clone(&has_ended);
    let work = work_in_slices(move || {
        done.fetch_add(1, SeqCst);
        may_end.load(SeqCst) == 0
    });
    let server = Shared::default().serve(config(), work);
    let client = server.connect();
    client.send(b"work\n");
    client.shutdown_write();
    server.shut_down();
    let before = slices.load(SeqCst);
    wait_until("the drain goes on with it", || {
        slices.load(SeqCst) > before + 100
    });
    has_ended.store(1, SeqCst);
    client.expect(b"done");
    client.expect_eof();
}

#[test]
fn work_that_is_left_is_reset_at_the_deadline_of_a_drain() {
    let drain_timeout = Duration::from_millis(200);
    let config = Config {
        drain_timeout,
        ..config()
    };
    let server = Shared::default().serve(config, work_in_slices(|| true));
    let client = server.connect();
    client.send(b"work\n");
    wait_until("it has turns", || server.stats().total().bulk_turns > 10);
    server.shut_down();
    client.expect_reset();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::DrainTimeout), 1);
}

#[test]
fn shutdown_calls_no_handler_that_is_done() {
    let shared = Shared::default();
    let server = shared.serve(config(), |event, _| match event {
        Event::Input => Action::Close,
        _ => Action::Continue,
    });
    let client = server.connect();
    client.send(b"x");
    client.expect_eof();
    server.shut_down();
    drop(client);
    server.stop();
    shared.wait_for(&[Event::Open, Event::Input]);
}

/// There is a place for one connection, and the first keeps it until it is woken.
#[test]
fn connection_that_is_opened_in_a_shutdown_is_told_after_its_first_call() {
    let shared = Shared::default();
    let one_place = Config {
        max_connections: 1,
        ..config()
    };
    let server = shared.serve(one_place, |event, context| {
        match (event, context.input.data()) {
            (Event::Wake, _) => Action::Close,
            (_, b"hold") => Action::Pending,
            _ => Echo.process(event, context),
        }
    });
    let first = server.connect();
    first.send(b"hold");
    shared.wait_for(&[Event::Open, Event::Input]);
    let second = server.connect();
    second.send(b"late");
    server.shut_down();
    let told = [Event::Open, Event::Input, Event::Shutdown];
    shared.wait_for(&told);
    shared.wake();
    first.expect_eof();
    drop(first);
    second.expect(b"late");
    second.expect_eof();
    drop(second);
    server.stop();
    let later = [Event::Wake, Event::Open, Event::Shutdown, Event::Input];
    shared.wait_for(&[&told[..], &later].concat());
}

#[test]
fn pending_answer_is_reset_at_the_deadline_of_a_drain() {
    let shared = Shared::default();
    let server = shared.serve(
        Config {
            drain_timeout: Duration::from_millis(100),
            ..config()
        },
        |event, context| {
            // The request is consumed, so the buffers are empty.
            let len = context.input.len();
            context.input.consume(len);
            match event {
                Event::Open => Action::Continue,
                _ => Action::Pending,
            }
        },
    );
    let client = server.connect();
    client.send(b"?");
    wait_until("it is read", || server.stats().total().bytes_in == 1);
    server.shut_down();
    client.expect_reset();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::DrainTimeout), 1);
}

#[test]
fn pending_answer_survives_the_idle_timeout() {
    let shared = Shared::default();
    let server = shared.serve(
        Config {
            idle_timeout: Some(Duration::from_millis(50)),
            ..config()
        },
        answer_when_woken,
    );
    let (client, idle) = (server.connect(), server.connect());
    client.send(b"?");
    wait_until("it is read", || server.stats().total().bytes_in == 1);
    idle.expect_eof();
    drop(idle);
    // Another one that comes later expires too, so the first has outlived its timeout.
    server.connect().expect_eof();
    wait_until("only the pending one is open", || {
        server.stats().open() == 1
    });
    shared.wake();
    client.expect(b"a");
    client.expect_eof();
}

/// Answers `a` when it is woken for the second time.
fn answer_second_wake_up() -> impl Fn(Event, &mut Context<'_>) -> Action + Clone {
    let wakes = Arc::new(AtomicUsize::new(0));
    move |event, context| match event {
        Event::Wake if wakes.fetch_add(1, SeqCst) == 0 => Action::Continue,
        _ => answer_when_woken(event, context),
    }
}

#[test]
fn pending_answer_survives_a_call_without_it() {
    let shared = Shared::default();
    let server = shared.serve(config(), answer_second_wake_up());
    let client = server.connect();
    client.send(b"?");
    shared.wait_for(&[Event::Open, Event::Input]);
    shared.wake();
    shared.wait_for(&[Event::Open, Event::Input, Event::Wake]);
    client.shutdown_write();
    shared.wait_for(&[Event::Open, Event::Input, Event::Wake, Event::Eof]);
    shared.wake();
    client.expect(b"a");
    client.expect_eof();
}

/// A handler that sends an endless answer in parts, and does nothing when it is woken.
#[test]
fn answer_in_parts_survives_a_wake_up() {
    const LENGTH: usize = 8 << 20;
    let shared = Shared::default();
    let left = Arc::new(AtomicUsize::new(LENGTH));
    let server = shared.serve(config(), move |event, context| {
        if event == Event::Open {
            return Action::Pending;
        }
        if event == Event::Wake {
            return Action::Continue;
        }
        let part = left.load(SeqCst).min(context.output.room());
        assert!(context.output.push(&vec![7; part]));
        match left.fetch_sub(part, SeqCst) - part {
            0 => Action::Close,
            _ => Action::Flush,
        }
    });
    let client = Client::connect_with_receive_buffer(server.address, 8 << 10);
    client.send(b"?");
    server.wait_until_stuck();
    shared.wake();
    wait_until("it is woken", || {
        shared.0.lock().unwrap().events.contains(&Event::Wake)
    });
    client.expect(&vec![7; LENGTH]);
    client.expect_eof();
}

/// A client that has ended its half, and one that has not.
#[test]
fn answer_that_does_not_come_is_a_reset() {
    let answer_timeout = Some(Duration::from_millis(50));
    let shared = Shared::default();
    let server = shared.serve(
        Config {
            answer_timeout,
            ..config()
        },
        |event, _context| match event {
            Event::Open => Action::Continue,
            _ => Action::Pending,
        },
    );
    let (client, ended, idle) = (server.connect(), server.connect(), server.connect());
    client.send(b"?");
    ended.send(b"?");
    ended.shutdown_write();
    client.expect_reset();
    ended.expect_reset();
    idle.ping(b"");
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::AnswerTimeout), 2);
}

/// Handlers that wake their own connection in each call.
#[test]
fn flood_of_wakes_does_not_starve_sockets() {
    let server = TestServer::run(bind(config()), |_peer| {
        FnHandler::new(|event, context| {
            context.waker().wake();
            Echo.process(event, context)
        })
    });
    let clients = server.connect_many(300);
    for _ in 0..20 {
        for client in &clients {
            client.ping(b"ping");
        }
    }
}

/// Other threads wake one connection as often as they can.
#[test]
fn wakes_from_many_threads_do_not_starve_sockets() {
    let shared = Shared::default();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let server = shared.serve(config(), move |event, context| {
        counted.fetch_add(usize::from(event == Event::Wake), SeqCst);
        let _echoed = Echo.process(event, context);
        Action::Pending
    });
    let (woken, other) = (server.connect(), server.connect());
    woken.ping(b"ping");
    thread::scope(|scope| {
        let (end, ended) = mpsc::channel::<()>();
        let waker = shared.waker();
        scope.spawn(move || {
            while ended.try_recv() == Err(mpsc::TryRecvError::Empty) {
                waker.wake();
            }
        });
        for _ in 0..200 {
            other.ping(b"ping");
            woken.ping(b"ping");
        }
        drop(end);
    });
    assert!(calls.load(SeqCst) > 0);
}

/// A handler that takes a request of one byte to a queue, and answers it when the queue is done.
struct Queued {
    queue: Arc<WorkQueue<(u8, mpsc::Sender<u8>, Waker)>>,
    answers: (mpsc::Sender<u8>, mpsc::Receiver<u8>),
    pending: usize,
}

impl Handler for Queued {
    fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
        while let Ok(answer) = self.answers.1.try_recv() {
            assert!(context.output.push(&[answer]));
            self.pending -= 1;
        }
        while let Some(&request) = context.input.data().first() {
            let job = (request, self.answers.0.clone(), context.waker());
            if self.queue.try_push(job).is_err() {
                // The request stays in the input.
                context.set_timer(Some(Duration::from_millis(5)));
                return Action::Pending;
            }
            context.input.consume(1);
            self.pending += 1;
        }
        match self.pending {
            0 => Action::Continue,
            _ => Action::Pending,
        }
    }
}

#[test]
fn connection_is_served_while_jobs_block_all_threads_of_the_queue() {
    const JOBS: usize = 10;
    let barrier = Arc::new(Barrier::new(3));
    let (started, jobs_started) = mpsc::channel();
    let release = Arc::clone(&barrier);
    let queue = WorkQueue::new(
        2,
        2,
        move |(request, answer, waker): (u8, mpsc::Sender<u8>, Waker)| {
            if request == b'b' {
                started.send(()).expect("the test waits");
                release.wait();
            }
            answer.send(request).expect("the handler waits");
            waker.wake();
        },
    );
    let queue = Arc::new(queue.unwrap());
    let server = TestServer::run(bind(config()), move |_peer| Queued {
        queue: Arc::clone(&queue),
        answers: mpsc::channel(),
        pending: 0,
    });
    let (blocked, other) = (server.connect(), server.connect());
    blocked.send(&[b'b'; 2]);
    for _ in 0..2 {
        jobs_started.recv().unwrap();
    }
    blocked.send(&[b'q'; JOBS - 2]);
    blocked.shutdown_write();
    wait_until("they are read", || {
        server.stats().total().bytes_in == JOBS as u64
    });
    // Nothing is answered, but the worker accepts and serves.
    let next = server.connect();
    next.shutdown_write();
    next.expect_eof();
    barrier.wait();
    let mut answers = blocked.read_to_end();
    answers.sort_unstable();
    assert_eq!(answers, [&[b'b'; 2][..], &[b'q'; JOBS - 2]].concat());
    other.send(b"q");
    other.expect(b"q");
}

/// A handler whose only job panics.
struct Panicking<'a> {
    queue: &'a WorkQueue<(mpsc::Sender<()>, Waker)>,
    answer: Option<mpsc::Receiver<()>>,
}

impl Handler for Panicking<'_> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        if event == Event::Input {
            let (sender, receiver) = mpsc::channel();
            self.answer = Some(receiver);
            self.queue.push((sender, context.waker()));
        }
        let answer = self.answer.as_ref().map(mpsc::Receiver::try_recv);
        match answer {
            Some(Err(mpsc::TryRecvError::Disconnected)) => Action::Close,
            Some(_) => Action::Pending,
            None => Action::Continue,
        }
    }
}

#[test]
fn panic_of_a_job_calls_the_handler() {
    let run = |(answer, waker): (mpsc::Sender<()>, Waker)| {
        let _wake = waker.wake_on_drop();
        let _answer = answer;
        panic!("intended");
    };
    let queue = WorkQueue::new(1, 1, run).unwrap();
    let queue: &'static _ = Box::leak(Box::new(queue));
    let server = TestServer::run(bind(config()), move |_connection| Panicking {
        queue,
        answer: None,
    });
    let client = server.connect();
    client.send(b"?");
    client.expect_closed();
}

/// Each second connection is an echo, the others answer in upper case.
#[test]
fn connections_can_have_handlers_of_different_types() {
    let server = TestServer::run(bind(config()), |connection| -> Box<dyn Handler> {
        match connection.number() % 2 {
            0 => Box::new(Echo),
            _ => Box::new(FnHandler::new(|event, context| {
                context.input.data_mut().make_ascii_uppercase();
                Echo.process(event, context)
            })),
        }
    });
    let clients = server.connect_many(2);
    for (client, answer) in clients.iter().zip([b"PING", b"ping"]) {
        client.send(b"ping");
        client.expect(answer);
    }
}

/// A server whose handlers are wrapped, with buffers of 16 bytes.
fn serve_wrapped(
    process: impl Fn(Event, &mut Context<'_>) -> Action + Clone + Send + Sync + 'static,
) -> TestServer {
    TestServer::run(bind(config()), move |_connection| {
        let inner = FnHandler::new(process.clone());
        Masked::new(inner, 16).expect("memory for a test")
    })
}

fn inverted(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| !byte).collect()
}

#[test]
fn wrapped_echo_returns_every_byte() {
    let server = serve_wrapped(|event, context| Echo.process(event, context));
    server.connect().check_echo(&random_bytes(2, 1 << 20));
}

/// Its output is sent when that of the containing handler is.
#[test]
fn wrapped_handler_is_called_when_its_output_is_sent() {
    let left = Arc::new(AtomicUsize::new(1000));
    let server = serve_wrapped(move |event, context| {
        if event == Event::Open {
            return Action::Continue;
        }
        assert!(context.output.is_empty());
        let room = context.output.room();
        assert!(context.output.push(&vec![7; room]));
        match left.fetch_sub(1, SeqCst) {
            1 => Action::Close,
            _ => Action::Flush,
        }
    });
    let client = server.connect();
    client.send(b"?");
    client.expect(&inverted(&[7; 16_000]));
    client.expect_eof();
}

#[test]
fn wrapped_handler_can_answer_later_and_reset() {
    let server = serve_wrapped(|event, context| match event {
        Event::Input if context.input.data() == b"reset" => Action::Reset,
        Event::Input => {
            context.waker().wake();
            Action::Pending
        }
        Event::Wake => Action::Yield,
        Event::Resumed => Echo.process(event, context),
        // Also at the client's EOF.
        _ => Action::Continue,
    });
    let client = server.connect();
    client.send(&inverted(b"answer"));
    client.expect(&inverted(b"answer"));
    client.send(&inverted(b"reset"));
    client.expect_reset();
    drop(client);
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::HandlerReset), 1);
}

/// Frames of more than the default buffer, each answered with its length.
#[test]
fn frames_are_handled_whole() {
    let buffer_size = 1 << 20;
    let server = TestServer::run(
        bind(Config {
            buffer_size: buffer_size + 4,
            ..config()
        }),
        |_peer| {
            FnHandler::new(|_, context| {
                while let Some(frame) = context.input.frame() {
                    let length = frame.len();
                    if !context.output.push(&frame[..4]) {
                        return Action::Flush;
                    }
                    context.input.consume(length);
                }
                Action::Continue
            })
        },
    );
    let client: Client = server.connect();
    for length in [0, 1, 1000, buffer_size] {
        let header = u32::try_from(length).unwrap().to_be_bytes();
        client.send(&header);
        client.send(&random_bytes(1, length));
        client.expect(&header);
    }
}
