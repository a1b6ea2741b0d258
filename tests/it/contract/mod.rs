//! The contract: each promise of `docs/contract.md` has the module that tests it.
//!
//! | promise | module | tested by |
//! | --- | --- | --- |
//! | Byte-exact | [`byte_exact`] | every case of `echoserver check`, with several buffer sizes and numbers of workers |
//! | Complete | [`complete`] | EOF that arrives together with data, and truncated streams; late readers in [`byte_exact`] |
//! | Bounded | [`bounded`] | clients that never read, what the server holds for them, and memory bounds in the log |
//! | Idle is free | [`idle_is_free`] | wake-ups beside 1,000 idle connections; also the suite `allocations` |
//! | Fair | [`fair`] | other connections and new ones during a flood, and beside endless output |
//! | Isolated | [`isolated`] | panics, resets, urgent data, full buffers, lingering clients, keepalive |
//! | Out of descriptors | [`out_of_descriptors`] | the connection limit, and descriptors taken and given back |
//! | Accounted | [`accounted`] | totals by reason, and every descriptor after 10,000 connections; the balances in every test |
//! | Drain | [`drain`] | connections in the backlog and in queues, bytes in the kernel, transfers, stuck clients |
//! | Fails loudly | [`fails_loudly`] | invalid options, variables and addresses, too few descriptors, a worker that panics |
//! | Robust | [`robust`] | closed streams, unread and broken logs, SIGPIPE, SIGSTOP |
//! | Timeouts depend on the client | [`timeouts_depend_on_the_client`] | slow readers, stopped readers, a pause of the process, refused clients |

mod accounted;
mod bounded;
mod byte_exact;
mod complete;
mod drain;
mod fails_loudly;
mod fair;
mod idle_is_free;
mod isolated;
mod out_of_descriptors;
mod robust;
mod timeouts_depend_on_the_client;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Returns the promises, such as "2. Complete": the headings below that of the document.
fn promises() -> Vec<&'static str> {
    let contract = include_str!("../../../docs/contract.md");
    let headings = contract.lines().filter_map(|line| line.strip_prefix("## "));
    headings.collect()
}

/// Returns the name of the module that tests a promise.
fn module(promise: &str) -> String {
    let (_number, name) = promise.split_once(". ").expect("a number");
    name.to_lowercase().replace([' ', '-'], "_")
}

#[test]
fn readme_links_to_every_promise() {
    let readme = include_str!("../../../README.md");
    let promises = promises();
    for (number, promise) in (1..).zip(&promises) {
        let name = promise.strip_prefix(&format!("{number}. "));
        let name = name.unwrap_or_else(|| panic!("{promise} is not number {number}"));
        let anchor = promise.to_lowercase().replace(". ", "-").replace(' ', "-");
        let item = format!("\n{number}. [{name}](docs/contract.md#{anchor})");
        assert!(readme.contains(&item), "README.md has no {item}");
    }
    let links = readme.matches("](docs/contract.md#").count();
    assert_eq!(links, promises.len(), "links to promises");
}

#[test]
fn every_promise_has_its_module() {
    let this = include_str!("mod.rs");
    let promises: BTreeSet<_> = promises().into_iter().map(module).collect();
    assert!(promises.len() >= 12, "{promises:?}");
    for name in &promises {
        assert!(
            this.contains(&format!("\nmod {name};\n")),
            "no module {name}"
        );
        let row = format!("| [`{name}`] |");
        assert!(this.contains(&row), "{name} is not in the map");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/contract");
        let text = fs::read_to_string(path.join(name).with_extension("rs"));
        let text = text.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(text.contains("#[test]"), "{name} has no test");
    }
    let modules = this
        .lines()
        .filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
    assert_eq!(
        modules.map(str::to_owned).collect::<BTreeSet<_>>(),
        promises
    );
}
