//! The example `memcached`, beside Debian's memcached and with clients that know the protocol.

use std::thread;

use super::{check, connect, exchange, start, text};
use crate::harness::{Client, Process, command, free_address, installed, run, wait_until};

/// The largest value of the example.
const MAX_VALUE: usize = 1 << 20;

/// Returns a command that stores a value, with its value.
fn put(line: &str, value: &[u8]) -> Vec<u8> {
    let line = format!("{line} {}\r\n", value.len());
    [line.as_bytes(), value, b"\r\n"].concat()
}

/// Returns an item of an answer to `get`, without flags.
fn item(key: &str, value: &[u8]) -> Vec<u8> {
    put(&format!("VALUE {key} 0"), value)
}

/// Requests, and the answers of memcached 1.6.18 to them, in this order.
const CONVERSATION: &[(&str, &str)] = &[
    // Storage commands. The number of the third change of an item is 3.
    ("get a\r\n", "END\r\n"),
    ("set a 0 0 5\r\nvalue\r\n", "STORED\r\n"),
    ("get a\r\n", "VALUE a 0 5\r\nvalue\r\nEND\r\n"),
    ("set a 4294967295 0 3\r\nnew\r\n", "STORED\r\n"),
    ("get a\r\n", "VALUE a 4294967295 3\r\nnew\r\nEND\r\n"),
    ("set a 7 100 0\r\n\r\n", "STORED\r\n"),
    ("gets a\r\n", "VALUE a 7 0 3\r\n\r\nEND\r\n"),
    ("cas a 8 0 1 2\r\nx\r\n", "EXISTS\r\n"),
    ("cas a 8 0 1 3\r\nx\r\n", "STORED\r\n"),
    ("cas a 9 0 1 3\r\ny\r\n", "EXISTS\r\n"),
    ("get a\r\n", "VALUE a 8 1\r\nx\r\nEND\r\n"),
    ("cas b 0 0 1 3\r\nx\r\n", "NOT_FOUND\r\n"),
    ("add a 0 0 1\r\ny\r\n", "NOT_STORED\r\n"),
    ("add b 0 0 1\r\ny\r\n", "STORED\r\n"),
    ("replace c 0 0 1\r\nz\r\n", "NOT_STORED\r\n"),
    ("append c 0 0 1\r\nz\r\n", "NOT_STORED\r\n"),
    ("prepend c 0 0 1\r\nz\r\n", "NOT_STORED\r\n"),
    ("replace b 5 0 1\r\nz\r\n", "STORED\r\n"),
    ("append b 6 0 2\r\n>>\r\n", "STORED\r\n"),
    ("prepend b 6 0 2\r\n<<\r\n", "STORED\r\n"),
    (
        "get a c b\r\n",
        "VALUE a 8 1\r\nx\r\nVALUE b 5 5\r\n<<z>>\r\nEND\r\n",
    ),
    // Values are bytes.
    ("set d 0 0 9\r\nget a\r\n\0\n\r\n", "STORED\r\n"),
    ("get d\r\n", "VALUE d 0 9\r\nget a\r\n\0\n\r\nEND\r\n"),
    // Lines may have more blanks, and end with a line feed only.
    ("  get   a  \r\n", "VALUE a 8 1\r\nx\r\nEND\r\n"),
    ("get a\n", "VALUE a 8 1\r\nx\r\nEND\r\n"),
    ("set e 0 0 1\n1\r\n", "STORED\r\n"),
    // Numbers.
    ("incr e 9\r\n", "10\r\n"),
    ("get e\r\n", "VALUE e 0 2\r\n10\r\nEND\r\n"),
    ("decr e 1\r\n", "9\r\n"),
    ("decr e 10\r\n", "0\r\n"),
    ("set e 3 0 20\r\n18446744073709551615\r\n", "STORED\r\n"),
    ("incr e 2\r\n", "1\r\n"),
    ("set e 3 0 20\r\n18446744073709551616\r\n", "STORED\r\n"),
    (
        "incr e 1\r\n",
        "CLIENT_ERROR cannot increment or decrement non-numeric value\r\n",
    ),
    (
        "decr a 1\r\n",
        "CLIENT_ERROR cannot increment or decrement non-numeric value\r\n",
    ),
    ("incr c 1\r\n", "NOT_FOUND\r\n"),
    (
        "incr e -1\r\n",
        "CLIENT_ERROR invalid numeric delta argument\r\n",
    ),
    // An item keeps its flags when its number changes.
    ("set e 3 0 1\r\n1\r\n", "STORED\r\n"),
    ("incr e 1\r\n", "2\r\n"),
    ("get e\r\n", "VALUE e 3 1\r\n2\r\nEND\r\n"),
    // Times: the past, the far future, after 100 seconds.
    ("set f 0 -1 1\r\n1\r\n", "STORED\r\n"),
    ("get f\r\n", "END\r\n"),
    ("set f 0 1000000000 1\r\n1\r\n", "STORED\r\n"),
    ("get f\r\n", "END\r\n"),
    ("add f 0 2147483647 1\r\n2\r\n", "STORED\r\n"),
    ("touch f 100\r\n", "TOUCHED\r\n"),
    ("get f\r\n", "VALUE f 0 1\r\n2\r\nEND\r\n"),
    ("touch f -1\r\n", "TOUCHED\r\n"),
    ("touch f 0\r\n", "NOT_FOUND\r\n"),
    ("incr f 1\r\n", "NOT_FOUND\r\n"),
    ("delete f\r\n", "NOT_FOUND\r\n"),
    ("append f 0 0 1\r\n1\r\n", "NOT_STORED\r\n"),
    ("gat 0 f\r\n", "END\r\n"),
    ("set f 0 0 1\r\n1\r\n", "STORED\r\n"),
    (
        "gat -1 f a\r\n",
        "VALUE f 0 1\r\n1\r\nVALUE a 8 1\r\nx\r\nEND\r\n",
    ),
    ("get f a\r\n", "END\r\n"),
    // An item that is appended to keeps its time.
    ("set f 0 -1 1\r\n1\r\n", "STORED\r\n"),
    ("set f 0 100 1\r\n1\r\n", "STORED\r\n"),
    ("append f 0 -1 1\r\n2\r\n", "STORED\r\n"),
    ("get f\r\n", "VALUE f 0 2\r\n12\r\nEND\r\n"),
    ("delete f\r\n", "DELETED\r\n"),
    ("delete f 0\r\n", "NOT_FOUND\r\n"),
    ("set f 0 0 1\r\n1\r\n", "STORED\r\n"),
    ("flush_all 100\r\n", "OK\r\n"),
    ("get f\r\n", "VALUE f 0 1\r\n1\r\nEND\r\n"),
    ("flush_all 0\r\n", "OK\r\n"),
    ("get f\r\n", "END\r\n"),
    ("set f 0 0 1\r\n1\r\n", "STORED\r\n"),
    ("get f\r\n", "VALUE f 0 1\r\n1\r\nEND\r\n"),
    ("flush_all\r\n", "OK\r\n"),
    ("get f\r\n", "END\r\n"),
    // No answer is wanted.
    ("set g 0 0 1 noreply\r\n1\r\n", ""),
    ("add g 0 0 1 noreply\r\n2\r\n", ""),
    ("replace g 0 0 1 noreply\r\n3\r\n", ""),
    ("append g 0 0 1 noreply\r\n4\r\n", ""),
    ("prepend g 0 0 1 noreply\r\n5\r\n", ""),
    ("cas g 0 0 1 0 noreply\r\n5\r\n", ""),
    ("incr g 1 noreply\r\n", ""),
    ("decr g 2 noreply\r\n", ""),
    ("decr c 2 noreply\r\n", ""),
    ("touch g 0 noreply\r\n", ""),
    ("get g\r\n", "VALUE g 0 3\r\n533\r\nEND\r\n"),
    ("delete g noreply\r\n", ""),
    ("get g\r\n", "END\r\n"),
    ("set g 0 0 1\r\n1\r\n", "STORED\r\n"),
    ("flush_all noreply\r\n", ""),
    ("flush_all 100 noreply\r\n", ""),
    ("flush_all 0 noreply\r\n", ""),
    ("verbosity noreply\r\n", ""),
    ("verbosity 1 noreply\r\n", ""),
    ("get g\r\n", "END\r\n"),
    // It is a key here.
    ("set noreply 0 0 1\r\n1\r\n", "STORED\r\n"),
    ("get noreply\r\n", "VALUE noreply 0 1\r\n1\r\nEND\r\n"),
    ("delete noreply\r\n", "DELETED\r\n"),
    // The rest.
    ("verbosity 1\r\n", "OK\r\n"),
    ("verbosity\r\n", "ERROR\r\n"),
    ("\r\n", "ERROR\r\n"),
    (" \n", "ERROR\r\n"),
    ("nonsense\r\n", "ERROR\r\n"),
    ("GET a\r\n", "ERROR\r\n"),
    ("get\r\n", "ERROR\r\n"),
    ("set a 0 0\r\n", "ERROR\r\n"),
    ("cas a 0 0 1\r\n", "ERROR\r\n"),
    ("incr a\r\n", "ERROR\r\n"),
    ("touch a\r\n", "ERROR\r\n"),
    ("delete\r\n", "ERROR\r\n"),
    ("stats noreply\r\n", "ERROR\r\n"),
    (
        "set a 0 0 -1\r\n",
        "CLIENT_ERROR bad command line format\r\n",
    ),
    (
        "set a 0 0 x\r\n",
        "CLIENT_ERROR bad command line format\r\n",
    ),
    (
        "set a 0 x 1\r\n",
        "CLIENT_ERROR bad command line format\r\n",
    ),
    (
        "set a x 0 1\r\n",
        "CLIENT_ERROR bad command line format\r\n",
    ),
    (
        "cas a 0 0 1 x\r\n",
        "CLIENT_ERROR bad command line format\r\n",
    ),
    ("touch g x\r\n", "CLIENT_ERROR invalid exptime argument\r\n"),
    ("gat x g\r\n", "CLIENT_ERROR invalid exptime argument\r\n"),
    (
        "flush_all x\r\n",
        "CLIENT_ERROR invalid exptime argument\r\n",
    ),
    // The end of the value is not where it should be, so its rest is taken for a command.
    (
        "set a 0 0 3\r\nabcde\r\n",
        "CLIENT_ERROR bad data chunk\r\nERROR\r\n",
    ),
    ("get a\r\n", "END\r\n"),
];

fn check_conversation(client: &Client) {
    for (request, answer) in CONVERSATION {
        check(client, request.as_bytes(), answer.as_bytes());
    }
}

#[test]
fn memcached_answers_commands() {
    let server = start("memcached", &[]);
    check_conversation(&connect(&server));
}

/// Checks the expectations themselves.
#[test]
fn memcached_answers_as_the_original_does() {
    if !installed(&["memcached"]) {
        return;
    }
    let address = free_address();
    let mut original = command("memcached");
    original.args(["-u", "nobody", "-U", "0", "-l", "127.0.0.1", "-p"]);
    let _original = Process::launch_with_stdout(original.arg(address.port().to_string()));
    wait_until("memcached listens", || {
        std::net::TcpStream::connect(address).is_ok()
    });
    check_conversation(&Client::connect(address));
}

#[test]
fn memcached_parses_fragmented_and_pipelined_requests() {
    let (requests, answers): (Vec<_>, Vec<_>) = CONVERSATION.iter().copied().unzip();
    let (requests, answers) = (requests.concat(), answers.concat());
    for size in [requests.len(), 1, 7] {
        let server = start("memcached", &[]);
        let client = connect(&server);
        for piece in requests.as_bytes().chunks(size) {
            client.send(piece);
        }
        check(&client, b"", answers.as_bytes());
    }
}

#[test]
fn memcached_passes_the_cases_of_memccapable() {
    if !installed(&["memccapable"]) {
        return;
    }
    let server = start("memcached", &[]);
    let port = server.address().port().to_string();
    let mut memccapable = command("memccapable");
    let output = run(memccapable.args(["-a", "-v", "-h", "127.0.0.1", "-p", &port]));
    let results = text(&output.stdout);
    assert_eq!(results.matches("[pass]").count(), 27, "{results}");
    assert!(results.ends_with("All tests passed\n"), "{results}");
    assert_eq!(text(&output.stderr), "");
    assert!(output.status.success());
}

/// With Debian's Python, which finds Debian's packages.
#[test]
fn memcached_serves_a_python_client() {
    let python = "/usr/bin/python3";
    let import = ["-c", "import pymemcache"];
    if !installed(&[python]) || !run(command(python).args(import)).status.success() {
        println!("skipped: pymemcache is not installed");
        return;
    }
    let server = start("memcached", &["2"]);
    let port = server.address().port().to_string();
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/it/examples/memcached_client.py"
    );
    let output = run(command(python).args([script, &port]));
    assert_eq!(text(&output.stderr), "");
    assert!(output.status.success());
}

#[test]
fn memcached_stores_values_of_a_mebibyte() {
    let server = start("memcached", &["1"]);
    let client = connect(&server);
    let values: Vec<_> = (0..3).map(|n| vec![b'0' + n; MAX_VALUE]).collect();
    for (key, value) in ["a", "b", "c"].iter().zip(&values) {
        check(
            &client,
            &put(&format!("set {key} 0 0"), value),
            b"STORED\r\n",
        );
    }
    check(&client, b"append a 0 0 1\r\n1\r\n", TOO_LARGE);

    // Neither all answers nor all items of one fit into the output. No command is executed twice.
    let items = [
        item("a", &values[0]),
        item("b", &values[1]),
        item("c", &values[2]),
        b"END\r\n".to_vec(),
    ];
    check(&client, b"set n 0 0 1\r\n0\r\n", b"STORED\r\n");
    let requests = b"get a b none c\r\nincr n 1\r\n".repeat(20);
    let rounds = (1..=20).map(|round| [items.concat(), format!("{round}\r\n").into()].concat());
    let answers = rounds.collect::<Vec<_>>().concat();
    let answer = exchange(&connect(&server), &requests);
    assert!(
        answer == answers,
        "{} bytes of {}",
        answer.len(),
        answers.len()
    );

    // An item expires only once it is sent.
    check(&client, b"gat -1 a b c\r\n", &items.concat());
    check(&client, b"get a b c\r\n", b"END\r\n");
}

/// The second item of an answer begins where the buffer ends, or a little earlier.
#[test]
fn memcached_splits_no_item() {
    let server = start("memcached", &[]);
    let client = connect(&server);
    let first = vec![b'1'; 1_000_000];
    check(&client, &put("set a 0 0", &first), b"STORED\r\n");
    let first = item("a", &first);
    let buffer = (64 << 10) + MAX_VALUE + 2;
    for room in (0..150).step_by(10) {
        let second = vec![b'2'; buffer - first.len() - room];
        check(&client, &put("set b 0 0", &second), b"STORED\r\n");
        let answer = [&*first, &item("b", &second), b"END\r\n"].concat();
        check(&client, b"get a b\r\n", &answer);
    }
}

#[test]
fn memcached_sends_answers_that_are_longer_than_its_buffer() {
    let server = start("memcached", &["1"]);
    let answer = exchange(&connect(&server), &b"stats\n".repeat(10_000));
    let answers: Vec<_> = text(&answer).split_inclusive("END\r\n").collect();
    assert_eq!(answers.len(), 10_000);
    for answer in answers {
        assert!(answer.starts_with("STAT version "), "{answer}");
        assert!(answer.ends_with("\r\nEND\r\n"), "{answer}");
        assert_eq!(answer.lines().count(), 11, "{answer}");
    }
}

const TOO_LARGE: &[u8] = b"SERVER_ERROR object too large for cache\r\n";

#[test]
fn memcached_discards_values_that_are_too_large() {
    let server = start("memcached", &[]);
    let client = connect(&server);
    // In the value there are commands.
    for size in [MAX_VALUE + 1, 3 * MAX_VALUE] {
        let value = &b"flush_all\r\n".repeat(size / 11 + 1)[..size];
        check(&client, b"set a 0 0 1\r\n1\r\n", b"STORED\r\n");
        check(&client, &put("add a 0 0", value), TOO_LARGE);
        check(&client, b"get a\r\n", b"VALUE a 0 1\r\n1\r\nEND\r\n");
        check(&client, &put("set a 0 0", value), TOO_LARGE);
        check(&client, b"get a\r\n", b"END\r\n");
    }
    // The refusal does not wait for the value.
    check(&client, b"set a 0 0 4294967295\r\n", TOO_LARGE);
}

#[test]
fn memcached_refuses_long_keys() {
    let server = start("memcached", &[]);
    let client = connect(&server);
    let long = "k".repeat(250);
    let set = put(&format!("set {long} 0 0"), b"1");
    check(&client, &set, b"STORED\r\n");
    let get = format!("get {long}\r\n");
    let answer = [item(&long, b"1"), b"END\r\n".to_vec()].concat();
    check(&client, get.as_bytes(), &answer);

    let longer = "k".repeat(251);
    let problem = b"CLIENT_ERROR bad command line format\r\n";
    // The value is not taken for a command.
    check(
        &client,
        &put(&format!("set {longer} 0 0"), b"flush_all"),
        problem,
    );
    for line in [
        format!("get {long} {longer}\r\n"),
        format!("touch {longer} 0\r\n"),
        format!("delete {longer}\r\n"),
        format!("incr {longer} 1\r\n"),
    ] {
        check(&client, line.as_bytes(), problem);
    }
    check(&client, get.as_bytes(), &answer);
}

#[test]
fn memcached_closes_at_a_line_that_is_too_long() {
    let server = start("memcached", &[]);
    // The longest line.
    let keys = " k".repeat((64 << 10) / 2 - 4);
    let line = format!("get{keys} x \r\n");
    assert_eq!(line.len(), 64 << 10);
    let client = connect(&server);
    check(&client, line.as_bytes(), b"END\r\n");
    let answer = exchange(&client, &vec![b'x'; 64 << 10]);
    assert_eq!(text(&answer), "CLIENT_ERROR line too long\r\n");
}

#[test]
fn memcached_quits_after_its_last_answer() {
    let server = start("memcached", &[]);
    let answer = exchange(&connect(&server), b"get a\r\nquit\r\nget a\r\n");
    assert_eq!(text(&answer), "END\r\n");
}

#[test]
fn memcached_workers_share_one_store() {
    let server = start("memcached", &["2"]);
    check(&connect(&server), b"set n 0 0 1\r\n0\r\n", b"STORED\r\n");
    let increments = b"incr n 1 noreply\r\n".repeat(1000);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| exchange(&connect(&server), &increments));
        }
    });
    let answer = b"VALUE n 0 4\r\n8000\r\nEND\r\n";
    check(&connect(&server), b"get n\r\n", answer);
}

/// Returns the answer to `get`, up to its last line.
fn get(client: &Client, key: &str) -> String {
    client.send(format!("get {key}\r\n").as_bytes());
    read_answer(client)
}

/// Reads up to a line `END`.
fn read_answer(client: &Client) -> String {
    let mut answer = Vec::new();
    while !answer.ends_with(b"END\r\n") {
        let mut byte = [0];
        std::io::Read::read_exact(&mut &client.0, &mut byte).expect("an answer comes");
        answer.push(byte[0]);
    }
    text(&answer).to_owned()
}

#[test]
fn memcached_items_expire() {
    let server = start("memcached", &[]);
    let client = connect(&server);
    // The second one replaces the first.
    check(&client, b"flush_all 1\r\nflush_all\r\n", b"OK\r\nOK\r\n");
    let requests = "set short 0 1 1\r\n1\r\nset long 0 100 1\r\n2\r\nset late 0 0 1\r\n3\r\n";
    check(&client, requests.as_bytes(), &b"STORED\r\n".repeat(3));
    check(&client, b"touch late 1\r\n", b"TOUCHED\r\n");
    let long = "VALUE long 0 1\r\n2\r\nEND\r\n";
    wait_until("the items have expired", || {
        get(&client, "short late") == "END\r\n"
    });
    assert_eq!(get(&client, "long"), long);
    check(&client, b"flush_all 1\r\n", b"OK\r\n");
    wait_until("everything is flushed", || {
        get(&client, "long") == "END\r\n"
    });
    check(&client, b"set new 0 0 1\r\n1\r\n", b"STORED\r\n");
    assert_eq!(get(&client, "new"), "VALUE new 0 1\r\n1\r\nEND\r\n");
}

fn stat(client: &Client, name: &str) -> u64 {
    client.send(b"stats\r\n");
    let stats = read_answer(client);
    let start = format!("STAT {name} ");
    let mut values = stats.lines().filter_map(|line| line.strip_prefix(&start));
    let value = values.next().expect("it is there");
    value.parse().expect("a number")
}

#[test]
fn memcached_counts() {
    let server = start("memcached", &[]);
    let client = connect(&server);
    check(&client, b"set a 0 0 3\r\n123\r\n", b"STORED\r\n");
    get(&client, "a b c");
    for (name, value) in [
        ("curr_items", 1),
        ("bytes", 104),
        ("cmd_get", 3),
        ("get_hits", 1),
        ("get_misses", 2),
    ] {
        assert_eq!(stat(&client, name), value, "{name}");
    }
    for request in ["set a 0 0 1\r\n1\r\n", "delete a\r\n"] {
        client.send(request.as_bytes());
    }
    client.expect(b"STORED\r\nDELETED\r\n");
    assert_eq!(stat(&client, "bytes"), 0);
}

#[test]
fn memcached_refuses_values_when_it_is_full() {
    const FULL: &[u8] = b"SERVER_ERROR out of memory storing object\r\n";
    let server = start("memcached", &[]);
    let client = connect(&server);
    let value = vec![b'v'; MAX_VALUE];
    let set = |number: u64, exptime: i32| {
        client.send(&put(&format!("set {number} 0 {exptime}"), &value));
        let mut answer = vec![0; "STORED\r\n".len()];
        std::io::Read::read_exact(&mut &client.0, &mut answer).expect("an answer comes");
        answer == b"STORED\r\n"
    };
    // Items that have expired make room, at the latest when there are more than fit.
    let max_items = stat(&client, "limit_maxbytes") / MAX_VALUE as u64;
    let is_cleaned = (0..=max_items).any(|number| {
        assert!(set(number, -1), "{number}");
        stat(&client, "curr_items") <= number
    });
    assert!(is_cleaned);
    check(&client, b"flush_all\r\n", b"OK\r\n");
    let full = (0..=max_items).find(|&number| !set(number, 0));
    let full = full.expect("it is full at last");
    client.expect(&FULL["STORED\r\n".len()..]);
    assert!(stat(&client, "bytes") <= stat(&client, "limit_maxbytes"));
    for number in 0..full {
        client.send(format!("delete {number} noreply\r\n").as_bytes());
    }
    assert!(set(full, 0), "there is room again");
}
