//! A client that writes and never reads holds a bounded part of the server's memory, and costs no CPU.

use std::mem;
use std::thread;

use echoserver::Config;

use crate::harness::{TestServer, config, random_bytes, stuck_clients, wait_until};

#[test]
fn clients_that_never_read_hold_at_most_two_buffers() {
    for buffer_size in [5000, 64 << 10] {
        let server = TestServer::echo_with(Config {
            buffer_size,
            ..config()
        });
        let bytes = random_bytes(1, 40 << 20);
        let clients = stuck_clients(&server, 50, &bytes);

        let buffered = server.stats().total().buffered;
        assert!(buffered > 0, "the server holds some of the bytes");
        assert!(buffered <= 50 * 2 * buffer_size as u64, "{buffered}");

        // Another connection of the same worker is served, and causes all of its wake-ups. A late acknowledgement of
        // a stuck client may add some at first.
        let other = server.connect();
        other.ping(b"first");
        let (mut ticks, mut pings) = (server.stats().total().ticks, 0);
        wait_until("100 pings in a row cause one wake-up each", || {
            other.ping(b"ping");
            let before = mem::replace(&mut ticks, server.stats().total().ticks);
            pings = if ticks == before + 1 { pings + 1 } else { 0 };
            pings == 100
        });

        // All at once. The kernel of a client that does not read drops what the server's kernel repeats, at intervals
        // that double, so the wait for the next attempt is as long as the client has not read.
        thread::scope(|scope| {
            for (client, sent) in &clients {
                scope.spawn(|| {
                    client.shutdown_write();
                    client.expect(&bytes[..*sent]);
                    client.expect_eof();
                });
            }
        });
        other.close();
    }
}

#[cfg(all(target_os = "linux", feature = "cli"))]
mod program {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::{self, Command};

    use crate::harness::{
        Client, Process, READY, error_line, never_readers, program, program_after, total,
        wait_until,
    };

    /// Limits the address space, in KiB.
    const LIMIT_MEMORY: &str = "ulimit -v 300000";
    const WARNING: &str = "buffer memory may exceed the available memory: at most ";

    #[test]
    fn out_of_memory_closes_only_the_connection_that_needs_it() {
        let mut command = program_after(LIMIT_MEMORY);
        let server = Process::start(command.args([
            "--listen=127.0.0.1:0",
            "--workers=2",
            "--buffer-size=1MiB",
        ]));
        let other = Client::connect(server.address());
        other.ping(b"before");
        let clients = never_readers(server.address(), 200, 600_000);
        other.ping(b"after");
        drop(clients);
        other.close();
        let log = server.terminate();
        assert!(total(&log, "closed_out_of_memory") > 0, "{log}");
        assert!(total(&log, "discarded_out_of_memory") > 0, "{log}");
    }

    #[test]
    fn buffers_that_do_not_fit_into_memory_prevent_the_start() {
        let mut command = program_after(LIMIT_MEMORY);
        command.args(["--listen=127.0.0.1:0", "--buffer-size=1GiB"]);
        let error = error_line(&mut command, 1);
        let reason = "cannot allocate buffers of 1073741824 bytes: cannot allocate memory";
        assert!(error.ends_with(reason), "{error}");
    }

    /// Returns the log of a server that is started and ended, and the line in it that contains `text`.
    fn log_with(command: &mut Command, text: &str) -> (String, Option<String>) {
        let command = command.args(["--listen=127.0.0.1:0", "--workers=1"]);
        let log = Process::start(command).terminate();
        let line = log.lines().find(|line| line.contains(text));
        let line = line.map(str::to_owned);
        (log, line)
    }

    #[test]
    fn memory_bound_is_logged() {
        let mut command = program();
        command.args(["--max-connections=1000", "--buffer-size=5000"]);
        let (log, line) = log_with(&mut command, READY);
        let line = line.expect("it serves");
        // 1000 x 2 buffers, and 129 spare pairs; buffers are whole pages.
        assert!(line.ends_with("buffer memory: at most 17.6 MiB"), "{log}");
        let mut command = program();
        command.args(["--buffer-memory=2M", "-v"]);
        let (log, line) = log_with(&mut command, "two buffers of 64.0 KiB for each");
        let kernel = "; the kernel's socket buffers are not included: \
            tcp_rmem and tcp_wmem bound them, and at most 128 KiB plus one send are unsent";
        assert!(line.is_some_and(|line| line.ends_with(kernel)), "{log}");
        assert!(log.contains("buffer memory: at most 2.0 MiB\n"), "{log}");
    }

    #[test]
    fn buffer_memory_below_what_the_workers_need_prevents_the_start() {
        let mut command = program();
        command.args([
            "--listen=127.0.0.1:0",
            "--workers=3",
            "--buffer-memory=700K",
        ]);
        let error = error_line(&mut command, 1);
        let problem = "buffer memory of 716800 bytes is less than 786432: ";
        assert!(error.starts_with(problem), "{error}");
    }

    #[test]
    fn memory_bound_beyond_the_physical_memory_is_logged() {
        let mut command = program();
        let (log, line) = log_with(
            command.args([
                "--max-connections=1000",
                "--buffer-size=1GiB",
                "--buffer-memory=1TiB",
            ]),
            WARNING,
        );
        let line = line.unwrap_or_else(|| panic!("{log}"));
        assert!(line.contains(" WARN "), "{line}");
        assert!(line.contains("at most 1.0 TiB, "), "{line}");
        assert!(line.ends_with(" available (physical memory)") || line.contains("cgroup"));

        let (_, line) = log_with(program().arg("--max-connections=1000000"), WARNING);
        assert_eq!(line, None);
    }

    /// A control group with a memory limit. It is removed on drop.
    struct MemoryCgroup(PathBuf);

    impl MemoryCgroup {
        fn new(limit: &str) -> Option<Self> {
            for (root, file) in [
                ("/sys/fs/cgroup", "memory.max"),
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ] {
                let group = Path::new(root).join(format!("echoserver-{}", process::id()));
                if fs::create_dir(&group).is_ok() {
                    let (group, file) = (Self(group.clone()), group.join(file));
                    if file.exists() && fs::write(file, limit).is_ok() {
                        return Some(group);
                    }
                }
            }
            println!("skipped: a cgroup with a memory limit cannot be created");
            None
        }
    }

    impl Drop for MemoryCgroup {
        fn drop(&mut self) {
            let _busy = fs::remove_dir(&self.0);
        }
    }

    #[test]
    fn memory_bound_depends_on_the_limit_of_the_cgroup() {
        let Some(group) = MemoryCgroup::new("67108864") else {
            return;
        };
        let setup = format!("echo $$ > {}/cgroup.procs", group.0.display());
        let mut program = program_after(&setup);
        let (log, line) = log_with(program.arg("--buffer-memory=65MiB"), WARNING);
        let limit = "at most 65.0 MiB, 64.0 MiB available (memory limit of the cgroup)";
        assert!(line.is_some_and(|line| line.ends_with(limit)), "{log}");
        let mut program = program_after(&setup);
        let (log, line) = log_with(&mut program, WARNING);
        assert_eq!(line, None);
        assert!(log.contains("buffer memory: at most 32.0 MiB\n"), "{log}");
    }

    /// In bytes.
    fn resident_memory(server: &Process) -> u64 {
        server.procfs().stat().expect("it runs").rss * procfs::page_size()
    }

    /// The second peak matters: an allocator may keep what it has learnt in the first.
    #[test]
    fn memory_returns_to_the_system_after_a_peak() {
        const MAX_GROWTH: u64 = 10 << 20;
        let server = Process::serve(&["--workers=2"]);
        let start = resident_memory(&server);
        for _ in 0..3 {
            let clients = never_readers(server.address(), 500, 600_000);
            wait_until("buffers are in use", || {
                resident_memory(&server) > start + 2 * MAX_GROWTH
            });
            for client in clients {
                client.reset();
            }
            wait_until("the memory is returned", || {
                resident_memory(&server) < start + MAX_GROWTH
            });
        }
        server.terminate();
    }
}
