//! Without descriptors, or at the connection limit, accepting pauses: clients wait in the backlog, and open
//! connections are unaffected.
//!
//! That the pause costs no CPU is counted: in log lines, failed accepts and wake-ups.

use echoserver::Config;

use crate::harness::{TestServer, config, ping_all, send_all, wait_until};

fn server_with_limit(max_connections: usize, workers: usize) -> TestServer {
    TestServer::echo_with(Config {
        max_connections,
        workers,
        ..config()
    })
}

#[test]
fn clients_beyond_the_limit_wait_for_a_free_place() {
    let server = server_with_limit(10, 2);
    let clients = server.connect_many(50);
    send_all(&clients, b"question");
    // They are served in the order in which they connected, each once an earlier one has closed.
    for client in clients {
        client.expect(b"question");
        assert!(server.stats().open() <= 10);
        client.close();
    }
    let stats = server.stop();
    assert_eq!(stats.accepted, 50);
    assert!(stats.accept_pauses > 0);
    assert_eq!(stats.accept_errors, 0);
}

#[test]
fn pause_does_not_affect_open_connections() {
    let server = server_with_limit(5, 1);
    let mut clients = server.connect_many(5);
    ping_all(&clients, b"open");
    let waiting = server.connect_many(100);
    wait_until("accepting pauses", || server.stats().accept_pauses == 1);
    let ticks = server.stats().total().ticks;
    for _ in 0..200 {
        for client in &clients {
            client.ping(b"ping");
        }
    }
    let stats = server.stats();
    assert_eq!((stats.accepted, stats.open()), (5, 5));
    assert_eq!(stats.total().ticks, ticks + 1000);
    assert_eq!(stats.accept_pauses, 1, "it tries again during the pause");

    // Each close lets one of them in.
    for client in waiting {
        clients.remove(0).close();
        client.ping(b"open");
        clients.push(client);
    }
    assert!(server.stop().accept_pauses > 1);
}

/// Resets free a place too, and so do clients that have closed before they are accepted.
#[test]
fn every_kind_of_close_frees_a_place() {
    let server = server_with_limit(1, 1);
    for round in 0..100 {
        let first = server.connect();
        first.ping(b"open");
        let (second, third) = (server.connect(), server.connect());
        match round % 2 {
            0 => first.reset(),
            _ => drop(first),
        }
        match round % 3 {
            0 => second.reset(),
            _ => drop(second),
        }
        third.ping(b"open");
        third.close();
    }
}

#[test]
fn limit_of_one_connection_serves_one_after_the_other() {
    let server = server_with_limit(1, 3);
    for _ in 0..100 {
        let client = server.connect();
        client.ping(b"ping");
        client.close();
    }
    assert_eq!(server.stop().accepted, 100);
}

/// Exactly at the limit, without a client that waits, there is nothing to pause.
#[test]
fn full_server_without_waiting_clients_does_not_pause() {
    let server = server_with_limit(3, 1);
    let clients = server.connect_many(3);
    ping_all(&clients, b"open");
    let stats = server.stats();
    assert_eq!((stats.accept_pauses, stats.open()), (0, 3));
    let waiting = server.connect();
    wait_until("accepting pauses", || server.stats().accept_pauses == 1);
    drop(clients);
    waiting.ping(b"open");
}

#[cfg(all(target_os = "linux", feature = "cli"))]
mod program {
    use std::time::{Duration, Instant};

    use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

    use crate::harness::{
        Client, Process, ping_all, program_after, random_bytes, total, wait_until,
    };

    const PAUSED: &str = "accept paused";

    /// How often the paused acceptor tries whether descriptors have become free in other ways.
    const RETRIES_PER_SECOND: u64 = 10;

    /// Connects 200 clients at once: each is served once there is room, and open connections are unaffected.
    fn check_pauses(mut server: Process) -> String {
        const CLIENTS: u64 = 200;
        let start = Instant::now();
        let connect = |_| Client::connect(server.address());
        let mut clients: Vec<Client> = (0..CLIENTS).map(connect).collect();
        for (client, seed) in clients.iter().zip(0..) {
            client.send(&random_bytes(seed, 1_000));
        }
        server.wait_for_log(PAUSED);
        // The first client has been accepted, and the pause lasts until a connection closes.
        clients[0].expect(&random_bytes(0, 1_000));
        check_idle_pause(&server, &clients[0]);

        clients.remove(0).close();
        for (client, seed) in clients.into_iter().zip(1..) {
            client.expect(&random_bytes(seed, 1_000));
            client.close();
        }
        let log = server.terminate();
        let seconds = start.elapsed().as_secs() + 1;
        let warnings = log.matches(PAUSED).count() as u64;
        assert!(warnings <= seconds, "{warnings} in {seconds} s: {log}");
        assert_eq!(total(&log, "accepted"), CLIENTS, "{log}");
        assert_eq!(total(&log, "closed_peer_closed"), CLIENTS, "{log}");
        // At most one pause for each close, for each batch of clients, and for each retry.
        let pauses = total(&log, "accept_pauses");
        assert!(
            pauses <= 2 * CLIENTS + seconds * RETRIES_PER_SECOND,
            "{log}"
        );
        // Without free descriptors, an accept also fails if no client waits, once for each edge of the listener.
        // There is one when the descriptors run out and one when the backlog is empty.
        assert!(total(&log, "accept_errors") <= pauses + 2, "{log}");
        let ticks = total(&log, "ticks");
        assert!(ticks <= 10 * CLIENTS + seconds * 20, "{log}");
        log
    }

    /// For a second, the paused server answers `client` and uses less than half of a CPU.
    fn check_idle_pause(server: &Process, client: &Client) {
        let cpu_time = || {
            let stat = server.procfs().stat().expect("it runs");
            let ticks = stat.utime + stat.stime;
            Duration::from_secs(ticks) / u32::try_from(procfs::ticks_per_second()).unwrap()
        };
        let (start, before) = (Instant::now(), cpu_time());
        let mut next_ping = start;
        wait_until("a second has passed", || {
            if Instant::now() > next_ping {
                client.ping(b"still served");
                next_ping += Duration::from_millis(100);
            }
            start.elapsed() >= Duration::from_secs(1)
        });
        let (used, elapsed) = (cpu_time().saturating_sub(before), start.elapsed());
        assert!(used < elapsed / 2, "{used:?} of CPU time in {elapsed:?}");
    }

    /// The program derives its connection limit from the descriptor limit, so no accept fails.
    #[test]
    fn accept_pauses_at_the_descriptor_limit() {
        let mut command = program_after("ulimit -n 64");
        check_pauses(Process::start(
            command.args(["--listen=127.0.0.1:0", "--workers=1"]),
        ));
    }

    /// If the descriptor limit is lowered below the connection limit, accepts fail.
    /// Rule 10 of the event loop.
    #[test]
    fn accept_pauses_without_descriptors() {
        let server = Process::serve(&["--workers=1", "--max-connections=200"]);
        limit_descriptors(&server, Some(64));
        let log = check_pauses(server);
        assert!(log.contains("too many open files"), "{log}");
        assert!(total(&log, "accept_errors") > 0, "{log}");
    }

    #[test]
    fn accept_pauses_at_the_connection_limit() {
        let log = check_pauses(Process::serve(&["--workers=1", "--max-connections=40"]));
        assert_eq!(total(&log, "accept_errors"), 0, "{log}");
    }

    fn limit_descriptors(server: &Process, current: Option<u64>) {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let limits = Rlimit { current, maximum };
        prlimit(Some(server.pid()), Resource::Nofile, limits).expect("it is a child");
    }

    /// If descriptors become available without a close, only a timer finds out.
    #[test]
    fn accept_resumes_on_a_timer() {
        let mut server = Process::serve(&["--workers=1"]);
        let connect = |_| Client::connect(server.address());
        let open: Vec<Client> = (0..5).map(connect).collect();
        ping_all(&open, b"open");
        limit_descriptors(&server, Some(5));
        let waiting = Client::connect(server.address());
        waiting.send(b"waiting");
        server.wait_for_log("too many open files");
        ping_all(&open, b"still open");
        // The limit that it was started with: this process' own.
        limit_descriptors(&server, getrlimit(Resource::Nofile).current);
        waiting.expect(b"waiting");
        drop((open, waiting));
        server.terminate();
    }

    #[test]
    fn end_of_a_pause_is_logged() {
        let mut server = Process::serve(&["--workers=1", "--max-connections=1"]);
        let first = Client::connect(server.address());
        first.ping(b"first");
        let second = Client::connect(server.address());
        server.wait_for_log("accept paused: connection limit reached (1)");
        first.close();
        second.ping(b"second");
        server.wait_for_log("accept resumed after ");
        second.close();
        server.terminate();
    }
}
