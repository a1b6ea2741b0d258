//! The layers: files and modules of `src/` import each other in one direction only.
//!
//! An import is a path, in a `use` or in code, that leads to another file: from `crate`, `self`, `super` or a child
//! module, and in the program also from `echoserver`, the library. Unit tests import what they like.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;

use super::imports::{self, Import, Module, Source};
use super::{read, root, sources};

/// For each file or module, what it imports.
type Graph = BTreeMap<String, BTreeSet<String>>;

#[test]
fn files_import_in_one_direction() {
    let graph = imports_between_files();
    assert!(graph.len() > 40, "{graph:#?}");
    let circles = circles(&graph);
    assert!(
        circles.is_empty(),
        "files that import themselves: {circles:#?}"
    );
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
    let circles = circles(&graph);
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
    let (program, library): (Vec<_>, Vec<_>) = files()
        .into_iter()
        .partition(|file| file.starts_with(PROGRAM));
    let [library, program] =
        [(LIBRARY, library), (PROGRAM, program)].map(|(folder, files)| Crate::read(folder, files));
    let mut graph = library.graph();
    graph.extend(program.graph());
    graph
}

/// The modules of a crate, with the files of each: more than one if they differ between systems.
struct Crate {
    folder: &'static str,
    modules: BTreeMap<Module, Vec<String>>,
    sources: BTreeMap<String, Source>,
}

impl Crate {
    fn read(folder: &'static str, files: Vec<String>) -> Self {
        let source = |file: String| {
            let source = imports::parse(&file, &read(&root().join(&file)));
            (file, source)
        };
        Self::new(folder, files.into_iter().map(source).collect())
    }

    fn new(folder: &'static str, sources: BTreeMap<String, Source>) -> Self {
        let mut modules = BTreeMap::<Module, Vec<String>>::new();
        for (file, source) in &sources {
            let module = module_of(file, folder);
            for (below, path) in &source.elsewhere {
                let module = [&module[..], below].concat();
                modules.entry(module).or_default().push(path.clone());
            }
            modules.entry(module).or_default().push(file.clone());
        }
        Self {
            folder,
            modules,
            sources,
        }
    }

    fn graph(&self) -> Graph {
        let imported = |(file, source): (&String, &Source)| {
            let module = module_of(file, self.folder);
            let imported = source
                .imports
                .iter()
                .flat_map(|import| self.files(&module, import, &[]));
            (
                file.clone(),
                imported.filter(|other| other != file).collect(),
            )
        };
        self.sources.iter().map(imported).collect()
    }

    /// Returns the files to which an import in `module` leads, with `rest` after it; none if that is another crate.
    fn files(&self, module: &Module, import: &Import, rest: &[String]) -> Vec<String> {
        if self.folder == PROGRAM && import.path[0] == "echoserver" {
            return vec!["src/lib.rs".to_owned()];
        }
        let Some(mut target) = self.absolute(module, import) else {
            return vec![];
        };
        target.extend_from_slice(rest);
        // The last parts are names of items.
        let mut items = vec![];
        while !self.modules.contains_key(&target) {
            items.insert(0, target.pop().expect("the root is a file"));
        }
        let found = &self.modules[&target];
        // A name may be imported there in turn.
        if let [name, rest @ ..] = &items[..] {
            let sources = found.iter().filter_map(|file| self.sources.get(file));
            let mut imports = sources.flat_map(|source| &source.imports);
            let is_it = |other: &&Import| other.name.as_ref() == Some(name) && other != &import;
            let files = imports
                .find(is_it)
                .map(|other| self.files(&target, other, rest));
            if let Some(files) = files.filter(|files| !files.is_empty()) {
                return files;
            }
        }
        found.clone()
    }

    /// Returns the path of an import in `module` from the root of the crate, unless it is of another crate.
    fn absolute(&self, module: &Module, import: &Import) -> Option<Vec<String>> {
        let here = [&module[..], &import.inside].concat();
        let child = [&here[..], &import.path[..1]].concat();
        let mut target = match import.path[0].as_str() {
            "crate" => vec![],
            "self" | "super" => here,
            _ if self.modules.keys().any(|module| module.starts_with(&child)) => here,
            _ => return None,
        };
        for part in &import.path {
            match part.as_str() {
                "crate" | "self" => {}
                "super" => drop(target.pop()),
                _ => target.push(part.clone()),
            }
        }
        Some(target)
    }
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

#[test]
fn imports_lead_to_files() {
    let sources = [
        (
            "src/lib.rs",
            "use c::Item as Renamed; mod folder { use crate::c; }",
        ),
        (
            "src/a.rs",
            "#[path = \"a/one.rs\"] mod b; #[path = \"a/two.rs\"] mod b; use b::Item;",
        ),
        ("src/c.rs", ""),
    ];
    let source = |(file, text): (&str, &str)| (file.to_owned(), imports::parse(file, text));
    let sources = BTreeMap::from(sources.map(source));
    let library = Crate::new(LIBRARY, sources);
    let files = |from: &str, text: &str| {
        let parsed = imports::parse(from, text);
        library
            .files(&module_of(from, LIBRARY), &parsed.imports[0], &[])
            .join(" ")
    };
    for (from, text, expected) in [
        (
            "src/c.rs",
            "use crate::a::b::Type;",
            "src/a/one.rs src/a/two.rs",
        ),
        ("src/c.rs", "use crate::a::Type;", "src/a.rs"),
        (
            "src/c.rs",
            "use crate::a::Item;",
            "src/a/one.rs src/a/two.rs",
        ),
        ("src/c.rs", "use crate::Item;", "src/lib.rs"),
        ("src/a.rs", "use crate::Renamed;", "src/c.rs"),
        ("src/a/b.rs", "use super::Type;", "src/a.rs"),
        ("src/a/b.rs", "use super::super::c::Item;", "src/c.rs"),
        (
            "src/a.rs",
            "use self::b::Item;",
            "src/a/one.rs src/a/two.rs",
        ),
        ("src/a.rs", "b::function()", "src/a/one.rs src/a/two.rs"),
        (
            "src/a.rs",
            "mod inline { use super::b; }",
            "src/a/one.rs src/a/two.rs",
        ),
        ("src/c.rs", "b::function()", ""),
        ("src/a.rs", "use std::io;", ""),
    ] {
        assert_eq!(files(from, text), expected, "{text} in {from}");
    }
}
