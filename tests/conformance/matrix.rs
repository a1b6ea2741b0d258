//! The table in `docs/recipes.md`: what `check` and `load` say about each fault on request.

use std::collections::BTreeSet;
use std::thread;

use crate::harness::{Process, program, run};

/// Returns the rows of the table: the server's options, the command and what it says.
fn rows() -> Vec<[&'static str; 3]> {
    let text = include_str!("../../docs/recipes.md");
    let table = text.split("<!-- table: matrix -->\n").nth(1);
    let table = table.and_then(|rest| rest.split("<!-- end -->").next());
    let lines = table.expect("the table is marked").lines().skip(2);
    let row = |line: &'static str| {
        let cells: Vec<_> = line.trim_matches('|').split('|').collect();
        let cells: [&str; 3] = cells.try_into().expect("three cells");
        cells.map(|cell| cell.trim().trim_matches('`'))
    };
    lines.map(row).collect()
}

#[test]
fn commands_say_what_the_documents_show() {
    let rows = rows();
    let faults: BTreeSet<_> = rows
        .iter()
        .map(|[fault, ..]| fault.split('@').next())
        .collect();
    // Eight kinds and three options, one of which has a pause.
    assert_eq!(faults.len(), 11, "{faults:?}");
    // A few at a time, because other tests with timeouts run beside them.
    for some in rows.chunks(4) {
        thread::scope(|scope| {
            for row in some {
                scope.spawn(|| check_row(row));
            }
        });
    }
}

fn check_row([fault, arguments, sentence]: &[&str; 3]) {
    let options: Vec<_> = fault.split(' ').collect();
    let server = Process::serve(&options);
    let arguments = arguments.replace("SERVER", &server.address().to_string());
    let output = run(program().args(arguments.split(' ')));
    let text = String::from_utf8_lossy(&output.stdout);
    let is_named = text.lines().any(|line| line.contains(sentence));
    assert!(is_named, "{fault}: {arguments} says {text}");
    assert_eq!(output.status.code(), Some(1), "{fault}: {arguments}");
}
