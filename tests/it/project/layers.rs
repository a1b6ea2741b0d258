//! The layers: files and modules of `src/` import each other in one direction only.
//!
//! An import is a path, in a `use` or in code, that leads to another file: from `crate`, `self`, `super` or a child
//! module, and in the program also from `echoserver`, the library. Unit tests import what they like.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;

use super::{read, root, sources};

/// Files that are in a circle today. None may be added, and one that is in none any more must be removed here.
const KNOWN: [&str; 20] = [
    "src/bin/echoserver/check.rs",
    "src/bin/echoserver/check/cases.rs",
    "src/bin/echoserver/check/client.rs",
    "src/bin/echoserver/cli.rs",
    "src/bin/echoserver/load.rs",
    "src/bin/echoserver/load/report.rs",
    "src/bin/echoserver/load/worker.rs",
    "src/bin/echoserver/main.rs",
    "src/bin/echoserver/pages.rs",
    "src/bin/echoserver/serve.rs",
    "src/bin/echoserver/serve/limits.rs",
    "src/bin/echoserver/serve/logging.rs",
    "src/bin/echoserver/serve/metrics.rs",
    "src/bin/echoserver/serve/reports.rs",
    "src/bin/echoserver/serve/service.rs",
    "src/bin/echoserver/serve/signals.rs",
    "src/bin/echoserver/serve/watchdog.rs",
    "src/net/listener.rs",
    "src/net/stream.rs",
    "src/net/unix.rs",
];

/// For each file or module, what it imports.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// A position in the tree of modules, from the root of the crate.
type Module = Vec<String>;

#[test]
fn files_import_in_one_direction() {
    let graph = imports_between_files();
    assert!(graph.len() > 40, "{graph:#?}");
    let circles = circles(&graph);
    let found: Vec<_> = circles.keys().map(|file| file.as_str()).collect();
    assert_eq!(found, KNOWN, "files that import themselves: {circles:#?}");
}

/// A module at the root of a crate is one node, with everything below it.
#[test]
fn top_level_modules_import_in_one_direction() {
    let module = |file: &String| {
        let folder = if file.starts_with(PROGRAM) {
            PROGRAM
        } else {
            LIBRARY
        };
        let end = folder.len() + file[folder.len()..].find(['/', '.']).expect("a source");
        file[..end].to_owned()
    };
    let mut graph = Graph::new();
    for (file, imported) in imports_between_files() {
        let node = module(&file);
        let others: BTreeSet<_> = imported
            .iter()
            .map(module)
            .filter(|other| *other != node)
            .collect();
        graph.entry(node).or_default().extend(others);
    }
    let known = KNOWN.map(|file| module(&file.to_owned()));
    let mut circles = circles(&graph);
    circles.retain(|node, _| !known.contains(node));
    assert!(
        circles.is_empty(),
        "modules that import themselves: {circles:#?}"
    );
}

/// The map in `src/lib.rs` lists every module, and each above those that it imports.
#[test]
fn modules_import_only_what_the_map_lists_below_them() {
    let docs = read(&root().join("src/lib.rs"));
    let section = docs.split("\n//! # The map\n").nth(1).expect("a heading");
    let section = section.split("\n//! # ").next().expect("more comes");
    let rows = section
        .lines()
        .filter_map(|line| line.strip_prefix("//! | `")?.split_once('`'));
    let rows: Vec<_> = rows.map(|(module, _)| module.replace("::", "/")).collect();
    for row in &rows {
        let is_its = |file: &String| module_of(file, LIBRARY).join("/").starts_with(row);
        assert!(files().iter().any(is_its), "there is no module {row}");
    }
    // The longest name that fits is the module's own; the roots of the crates have none.
    let place = |file: &str| {
        let path = file.strip_prefix(LIBRARY)?.strip_suffix(".rs")?;
        let fits = |row: &String| {
            path.strip_prefix(row.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let fitting = rows.iter().enumerate().filter(|(_, row)| fits(row));
        fitting
            .max_by_key(|(_, row)| row.len())
            .map(|(place, _)| place)
    };
    for (file, imported) in imports_between_files() {
        if file == "src/lib.rs" {
            continue;
        }
        let own = place(&file).unwrap_or_else(|| panic!("{file} is not in the map"));
        for other in imported {
            let is_below = place(&other).is_none_or(|place| place >= own);
            assert!(
                is_below,
                "{file} imports {other}, which the map lists above it"
            );
        }
    }
}

const LIBRARY: &str = "src/";
const PROGRAM: &str = "src/bin/echoserver/";

fn imports_between_files() -> Graph {
    let files = files().into_iter();
    let (program, library): (Vec<_>, Vec<_>) = files.partition(|file| file.starts_with(PROGRAM));
    let mut graph = Graph::new();
    for (folder, files) in [(LIBRARY, library), (PROGRAM, program)] {
        let modules = files
            .into_iter()
            .map(|file| (module_of(&file, folder), file));
        let modules: BTreeMap<Module, String> = modules.collect();
        for (module, file) in &modules {
            let imported = imports(&read(&root().join(file)));
            let imported = imported
                .iter()
                .filter_map(|import| match import.path[0].as_str() {
                    "echoserver" if folder == PROGRAM => Some("src/lib.rs".to_owned()),
                    _ => import.file(module, &modules),
                });
            graph.insert(
                file.clone(),
                imported.filter(|other| other != file).collect(),
            );
        }
    }
    graph
}

/// Returns the sources without unit tests, relative to the root.
fn files() -> Vec<String> {
    let is_test = |path: &PathBuf| path.ends_with("tests.rs") || path.ends_with("loom_tests.rs");
    let mut paths = sources(&root().join("src"));
    paths.retain(|path| !is_test(path));
    let relative = |path: PathBuf| Some(path.strip_prefix(root()).ok()?.to_str()?.to_owned());
    paths.into_iter().filter_map(relative).collect()
}

/// Returns the module that a file is; `lib.rs` and `main.rs` are the roots.
fn module_of(file: &str, folder: &str) -> Module {
    let path = file.strip_prefix(folder).expect("it is in the folder");
    let path = path.strip_suffix(".rs").expect("a source");
    match path {
        "lib" | "main" => vec![],
        _ => path.split('/').map(str::to_owned).collect(),
    }
}

/// A path of at least two parts, and the inline modules around it.
#[derive(Debug, PartialEq)]
struct Import {
    inside: Module,
    path: Vec<String>,
}

impl Import {
    /// Returns the file that it leads to from `module`, unless that is in another crate.
    fn file(&self, module: &Module, modules: &BTreeMap<Module, String>) -> Option<String> {
        let here = [&module[..], &self.inside].concat();
        let mut path = &self.path[..];
        let mut target = match path[0].as_str() {
            "crate" => vec![],
            "self" | "super" => here,
            _ if modules.contains_key(&[&here[..], &path[..1]].concat()) => here,
            _ => return None,
        };
        while let [first, rest @ ..] = path {
            match first.as_str() {
                "crate" | "self" => {}
                "super" => drop(target.pop()),
                _ => break,
            }
            path = rest;
        }
        target.extend_from_slice(path);
        // The last parts are names of items.
        while !modules.contains_key(&target) {
            target.pop()?;
        }
        modules.get(&target).cloned()
    }
}

/// Returns the paths in a source.
fn imports(source: &str) -> Vec<Import> {
    let tokens = tokens(source);
    let (mut imports, mut inside, mut depth) = (vec![], vec![], 0);
    let mut rest = &tokens[..];
    while let [token, after @ ..] = rest {
        rest = after;
        match (*token, rest) {
            ("mod", [name, "{", ..]) => inside.push((depth, (*name).to_owned())),
            ("{", _) => depth += 1,
            ("}", _) => {
                depth -= 1;
                inside.pop_if(|(start, _)| *start == depth);
            }
            (name, _) if is_name(name) => {
                let mut paths = Vec::new();
                rest = read_paths(vec![name.to_owned()], rest, &mut paths);
                let inside: Vec<_> = inside.iter().map(|(_, name)| name.clone()).collect();
                let import = |path| Import {
                    inside: inside.clone(),
                    path,
                };
                imports.extend(paths.into_iter().filter(|it| it.len() > 1).map(import));
            }
            _ => {}
        }
    }
    imports
}

/// Reads the rest of a path that starts with `path`, or of several if there are braces. Returns the tokens after it.
fn read_paths<'a>(
    mut path: Vec<String>,
    mut rest: &'a [&'a str],
    paths: &mut Vec<Vec<String>>,
) -> &'a [&'a str] {
    while let ["::", after @ ..] = rest {
        match after {
            ["{", after @ ..] => {
                rest = after;
                loop {
                    match rest {
                        ["}", after @ ..] => return after,
                        [name, after @ ..] if is_name(name) => {
                            let path = [&path[..], &[(*name).to_owned()]].concat();
                            rest = read_paths(path, after, paths);
                        }
                        // A comma, or the star of a glob.
                        [_, after @ ..] => rest = after,
                        [] => panic!("a brace is not closed after {path:?}"),
                    }
                }
            }
            [name, after @ ..] if is_name(name) => {
                path.push((*name).to_owned());
                rest = after;
            }
            // The star of a glob, or arguments of a generic type.
            _ => {
                path.push("*".to_owned());
                rest = after;
            }
        }
    }
    paths.push(path);
    match rest {
        ["as", _name, after @ ..] => after,
        _ => rest,
    }
}

fn is_part_of_name(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

fn is_name(token: &str) -> bool {
    token.starts_with(is_part_of_name)
}

/// Splits a source into names, `::` and single characters, without comments, texts and blanks.
fn tokens(source: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = source.trim_start();
    while let Some(first) = rest.chars().next() {
        let skipped = skipped_length(rest);
        let length = match first {
            _ if skipped > 0 => skipped,
            ':' if rest.starts_with("::") => 2,
            _ if is_part_of_name(first) => rest
                .find(|letter| !is_part_of_name(letter))
                .unwrap_or(rest.len()),
            _ => first.len_utf8(),
        };
        let (token, after) = rest.split_at(length);
        if skipped == 0 {
            tokens.push(token);
        }
        rest = after.trim_start();
    }
    tokens
}

/// Returns the length of the comment, text, letter or lifetime at the start, or 0.
fn skipped_length(source: &str) -> usize {
    let until = |end: &str| source.find(end).map_or(source.len(), |at| at + end.len());
    if source.starts_with("//") {
        return until("\n");
    }
    if source.starts_with("/*") {
        return until("*/");
    }
    let text = source.trim_start_matches(['b', 'c']);
    if let Some(raw) = text.strip_prefix('r') {
        let content = raw.trim_start_matches('#');
        if content.starts_with('"') {
            let start = source.len() - content.len() + 1;
            let hashes = "#".repeat(raw.len() - content.len());
            let end = format!("\"{hashes}");
            let content = &source[start..];
            return start + content.find(&end).expect("the text ends") + end.len();
        }
    }
    let mut letters = text.char_indices();
    match letters.next() {
        Some((_, quote @ ('"' | '\''))) => {
            // A lifetime has no second quote.
            let second = text[1..].chars().next().expect("more comes");
            let is_lifetime =
                quote == '\'' && second != '\\' && !text[1 + second.len_utf8()..].starts_with('\'');
            if is_lifetime {
                return 1;
            }
            while let Some((at, letter)) = letters.next() {
                match letter {
                    '\\' => drop(letters.next()),
                    _ if letter == quote => return source.len() - text.len() + at + 1,
                    _ => {}
                }
            }
            panic!("a text does not end: {}", &text[..text.len().min(80)])
        }
        _ => 0,
    }
}

/// Returns the nodes that import themselves by way of others, each with the shortest way.
fn circles(graph: &Graph) -> BTreeMap<&String, String> {
    let circle = |start| Some((start, shortest_circle(graph, start)?));
    graph.keys().filter_map(circle).collect()
}

fn shortest_circle<'a>(graph: &'a Graph, start: &'a String) -> Option<String> {
    let mut ways = VecDeque::from([vec![start]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop_front() {
        for next in graph.get(way[way.len() - 1]).into_iter().flatten() {
            let way = [&way[..], &[next]].concat();
            if next == start {
                let names: Vec<_> = way.iter().map(|name| name.as_str()).collect();
                return Some(names.join(" -> "));
            }
            if seen.insert(next) {
                ways.push_back(way);
            }
        }
    }
    None
}

#[test]
fn every_form_of_import_is_found() {
    let source = r##"
        use crate::a::{b, c::{self, d as e}, f::*};
        pub(crate) use super::g::h;
        /* use crate::comment::no; */
        mod inline {
            use super::i; // crate::comment::no
        }
        fn test<'a>() {
            let x: &'a str = "\" crate::text::no";
            let y = (r#"" crate::raw::no"#, '"', b'\'', "");
            j::k(crate::l::m::<u8>());
        }
    "##;
    let imports = imports(source);
    let paths: Vec<_> = imports.iter().map(|it| it.path.join("::")).collect();
    let expected = "crate::a::b crate::a::c::self crate::a::c::d crate::a::f::* super::g::h super::i j::k crate::l::m::*";
    assert_eq!(paths.join(" "), expected);
    let inside: Vec<_> = imports
        .iter()
        .filter(|it| it.inside == ["inline"])
        .collect();
    assert!(
        inside.len() == 1 && inside[0].path == ["super", "i"],
        "{inside:?}"
    );
}

#[test]
fn imports_lead_to_files() {
    let names = ["", "a", "a/b", "c"];
    let module = |name: &&str| {
        name.split('/')
            .filter(|part| !part.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let modules: BTreeMap<Module, _> = names
        .iter()
        .map(|name| (module(name), format!("{name}.rs")))
        .collect();
    let file = |from: &str, source: &str| {
        let imports = imports(source);
        imports[0].file(&module(&from), &modules)
    };
    for (from, source, expected) in [
        ("c", "use crate::a::b::Item;", Some("a/b.rs")),
        ("c", "use crate::a::Item;", Some("a.rs")),
        ("c", "use crate::Item;", Some(".rs")),
        ("a/b", "use super::Item;", Some("a.rs")),
        ("a/b", "use super::super::c::Item;", Some("c.rs")),
        ("a", "use self::b::Item;", Some("a/b.rs")),
        ("a", "b::function()", Some("a/b.rs")),
        ("a", "mod inline { use super::b; }", Some("a/b.rs")),
        ("c", "b::function()", None),
        ("a", "use std::io;", None),
    ] {
        assert_eq!(
            file(from, source).as_deref(),
            expected,
            "{source} in {from}"
        );
    }
}

#[test]
fn circles_are_found() {
    let edges = [("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")];
    let mut graph = Graph::new();
    for (from, to) in edges {
        graph
            .entry(from.to_owned())
            .or_default()
            .insert(to.to_owned());
    }
    let circles: Vec<_> = circles(&graph).into_values().collect();
    assert_eq!(circles, ["b -> c -> b", "c -> b -> c"]);
}
