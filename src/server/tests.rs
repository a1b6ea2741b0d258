use super::*;
use crate::system::{Poller, page_size};

fn config() -> Config {
    Config {
        workers: 1,
        ..Config::new("127.0.0.1:0".parse().unwrap())
    }
}

#[test]
fn longest_drain_timeout_is_a_shutdown_too() {
    let server = Server::bind(Config {
        drain_timeout: Duration::MAX,
        ..config()
    });
    let handle = server.unwrap().handle();
    assert!(!handle.is_shutting_down());
    handle.shut_down();
    assert!(handle.is_shutting_down());
}

#[test]
fn every_worker_can_be_woken() {
    let two_workers = Config {
        workers: 2,
        ..config()
    };
    let mut server = Server::bind(two_workers).unwrap();
    server.handle().wake_workers();
    for (poller, _) in &mut server.workers {
        Poller::<Socket>::poll(poller, Some(0)).unwrap();
        assert_eq!(Poller::<Socket>::events(poller).count(), 1);
    }
}

#[test]
fn end_of_a_worker_shuts_the_server_down() {
    let handle = Server::bind(config()).unwrap().handle();
    drop(ShutdownOnDrop(&handle));
    assert!(handle.is_shutting_down());
}

#[test]
fn failures_of_a_worker_are_named() {
    let fail = |serve: fn() -> io::Result<()>| {
        let served = thread::scope(|scope| join((3, scope.spawn(serve))));
        served.map_err(|error| error.to_string())
    };
    assert_eq!(fail(|| Ok(())), Ok(()));
    for (serve, error) in [
        (
            (|| Err(io::Error::other("no epoll"))) as fn() -> _,
            "worker 3 failed: no epoll",
        ),
        (|| panic!("a literal"), "worker 3 panicked: a literal"),
        (|| panic!("a {}", "string"), "worker 3 panicked: a string"),
        (|| std::panic::panic_any(7), "worker 3 panicked: no message"),
    ] {
        assert_eq!(fail(serve), Err(error.to_owned()));
    }
}

#[test]
fn values_beyond_a_bound_are_refused() {
    let change = |change: &dyn Fn(&mut Config)| {
        let mut config = config();
        change(&mut config);
        config.validate().map_err(|error| error.to_string())
    };
    for at_bound in [
        change(&|config| config.workers = 1),
        change(&|config| config.workers = 1024),
        change(&|config| config.buffer_size = 1),
        change(&|config| config.buffer_size = 1 << 30),
        change(&|config| config.idle_timeout = Some(Duration::from_nanos(1))),
        change(&|config| config.answer_timeout = Some(Duration::from_nanos(1))),
        change(&|config| config.max_connections = 1),
        change(&|config| config.buffer_memory = Some(2 * 2 * (64 << 10) * config.workers as u64)),
    ] {
        assert_eq!(at_bound, Ok(()));
    }
    for (beyond, problem) in [
        (
            change(&|config| config.workers = 0),
            "worker count of 0 is not between 1 and 1024",
        ),
        (
            change(&|config| config.workers = 1025),
            "worker count of 1025 is not between 1 and 1024",
        ),
        (
            change(&|config| config.buffer_size = 0),
            "buffer size of 0 bytes is not between",
        ),
        (
            change(&|config| config.buffer_size = (1 << 30) + 1),
            "buffer size of 1073741825 bytes is not",
        ),
        (
            change(&|config| config.idle_timeout = Some(Duration::ZERO)),
            "idle timeout must not be zero",
        ),
        (
            change(&|config| config.answer_timeout = Some(Duration::ZERO)),
            "answer timeout must not be zero",
        ),
        (
            change(&|config| config.max_connections = 0),
            "connection limit must not be zero",
        ),
        (
            change(&|config| (config.workers, config.buffer_memory) = (3, Some(786_431))),
            "buffer memory of 786431 bytes is less than 786432: two pairs of 65536 bytes for each worker",
        ),
    ] {
        let error = beyond.expect_err(problem);
        assert!(error.starts_with(problem), "{problem}: {error}");
    }
}

#[test]
fn stated_memory_counts_pages_and_saturates() {
    let one_byte = Config {
        buffer_size: 1,
        max_connections: 10,
        ..config()
    };
    let connections = one_byte.max_memory() - one_byte.max_spare_memory();
    assert_eq!(connections, 10 * 2 * page_size());
    let two_workers = Config {
        workers: 2,
        ..config()
    };
    // 16 spare pairs of 64 KiB each, and the pair in use.
    assert_eq!(two_workers.max_spare_memory(), 2 * 17 * 2 * (64 << 10));
    let largest = Config {
        buffer_size: Config::MAX_BUFFER_SIZE,
        max_connections: usize::MAX,
        ..config()
    };
    // Two buffers of 2^30 bytes for each connection, which fits where a pointer has 32 bits.
    let connections = (usize::MAX as u128) << 31;
    assert!(largest.max_memory() >= connections.try_into().unwrap_or(u64::MAX));
    let limited = Config {
        buffer_memory: Some(1 << 20),
        ..two_workers
    };
    assert_eq!((limited.max_memory(), limited.max_pairs()), (1 << 20, 4));
    let unlimited = Config {
        buffer_memory: None,
        ..limited
    };
    assert!(unlimited.max_pairs() as u64 >= unlimited.max_memory() / (128 << 10));
}

/// The acceptor begins by itself, and requests that of the workers later.
#[test]
#[cfg(target_os = "linux")]
fn shutdown_with_a_reused_port_begins_with_the_acceptor() {
    for reuse_port in [false, true] {
        let server = Server::bind(Config {
            reuse_port,
            ..Config::new("127.0.0.1:0".parse().unwrap())
        });
        let handle = server.unwrap().handle();
        handle.shut_down();
        assert!(handle.is_shutting_down());
        assert_eq!(handle.control.shutdown_deadline().is_none(), reuse_port);
    }
}
