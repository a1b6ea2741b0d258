//! A small parser of Rust sources: which paths they name, and which modules they declare in files elsewhere.

use std::mem;
use std::path::{Component, Path, PathBuf};

/// A position in the tree of modules.
pub(super) type Module = Vec<String>;

/// What a source imports and declares.
#[derive(Debug, Default)]
pub(super) struct Source {
    pub(super) imports: Vec<Import>,
    /// Modules below it whose files an attribute `path` determines.
    pub(super) elsewhere: Vec<(Module, String)>,
}

/// A path of at least two parts, and the inline modules around it.
#[derive(Debug, PartialEq)]
pub(super) struct Import {
    pub(super) inside: Module,
    pub(super) path: Vec<String>,
    /// What it is called here, if it is in a `use`.
    pub(super) name: Option<String>,
}

/// An inline module around the current token.
struct Inline {
    name: String,
    /// Braces around it.
    depth: usize,
    /// The folder of its modules, if an attribute determines it.
    folder: Option<PathBuf>,
}

/// Parses the source in `file`.
pub(super) fn parse(file: &str, text: &str) -> Source {
    let tokens = tokens(text);
    let mut source = Source::default();
    let (mut inlines, mut depth, mut is_use, mut paths) = (Vec::<Inline>::new(), 0, false, vec![]);
    let mut rest = &tokens[..];
    while let [token, after @ ..] = rest {
        rest = after;
        match (*token, rest) {
            ("path", ["=", path, ..]) if path.starts_with('"') => {
                paths.push(path.trim_matches('"'));
            }
            ("mod", [name, "{", ..]) => inlines.push(Inline {
                name: (*name).to_owned(),
                depth,
                folder: files_elsewhere(file, &inlines, &mem::take(&mut paths)).pop(),
            }),
            ("mod", [name, ";", ..]) => {
                let mut files = files_elsewhere(file, &inlines, &paths);
                let folder = inlines.last().and_then(|inline| inline.folder.as_ref());
                if let (true, Some(folder)) = (files.is_empty(), folder) {
                    files.push(folder.join(name).with_extension("rs"));
                }
                let module = [names(&inlines), vec![(*name).to_owned()]].concat();
                let files = files.iter().map(|file| (module.clone(), normalize(file)));
                source.elsewhere.extend(files);
            }
            ("use", _) => is_use = true,
            (";", _) => {
                is_use = false;
                paths.clear();
            }
            ("{", _) => depth += 1,
            ("}", _) => {
                depth -= 1;
                inlines.pop_if(|inline| inline.depth == depth);
            }
            (name, _) if is_name(name) => {
                let inside = names(&inlines);
                let mut found = Vec::new();
                rest = read_paths(vec![name.to_owned()], rest, &mut found);
                let import = |(path, name)| Import {
                    inside: inside.clone(),
                    path,
                    name: Some(name).filter(|_| is_use),
                };
                source.imports.extend(
                    found
                        .into_iter()
                        .filter(|(path, _)| path.len() > 1)
                        .map(import),
                );
            }
            _ => {}
        }
    }
    source
}

fn names(inlines: &[Inline]) -> Module {
    inlines.iter().map(|inline| inline.name.clone()).collect()
}

/// Returns the files or folders at `paths`, which are relative to the folder of the module around them.
fn files_elsewhere(file: &str, inlines: &[Inline], paths: &[&str]) -> Vec<PathBuf> {
    let outer = inlines.last().and_then(|inline| inline.folder.as_deref());
    let folder = outer.or(Path::new(file).parent()).expect("a folder");
    paths.iter().map(|path| folder.join(path)).collect()
}

/// Resolves `..` in a path.
fn normalize(path: &Path) -> String {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(parts.pop()),
            other => parts.push(other.as_os_str().to_str().expect("a plain name")),
        }
    }
    parts.join("/")
}

/// Reads the rest of a path that starts with `path`, or of several if there are braces, each with the name that it gets.
/// Returns the tokens after it.
fn read_paths<'a>(
    mut path: Vec<String>,
    mut rest: &'a [&'a str],
    paths: &mut Vec<(Vec<String>, String)>,
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
    // `a::{self}` is `a`.
    path.pop_if(|last| last == "self");
    let (name, after) = match rest {
        ["as", name, after @ ..] => ((*name).to_owned(), after),
        _ => (path.last().cloned().unwrap_or_default(), rest),
    };
    paths.push((path, name));
    after
}

fn is_part_of_name(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

fn is_name(token: &str) -> bool {
    token.starts_with(is_part_of_name)
}

/// Splits a source into names, `::`, texts and single characters, without comments, letters and blanks.
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
        if skipped == 0 || first == '"' {
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
    let imports = parse("src/lib.rs", source).imports;
    let paths: Vec<_> = imports.iter().map(|it| it.path.join("::")).collect();
    let expected = "crate::a::b crate::a::c crate::a::c::d crate::a::f::* super::g::h super::i j::k crate::l::m::*";
    assert_eq!(paths.join(" "), expected);
    let names: Vec<_> = imports.iter().filter_map(|it| it.name.as_deref()).collect();
    assert_eq!(names.join(" "), "b c e * h i");
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
fn files_elsewhere_are_found() {
    let source = r#"
        #[cfg_attr(unix, path = "unix.rs")]
        #[cfg_attr(not(unix), path = "other.rs")]
        mod platform;
        #[path = "../.."]
        mod shared {
            mod error;
        }
        mod plain;
        const A: B = B { path: 0 };
    "#;
    let found = parse("src/bin/x/main.rs", source).elsewhere;
    let found: Vec<_> = found
        .iter()
        .map(|(module, file)| format!("{} {file}", module.join("::")))
        .collect();
    let expected = [
        "platform src/bin/x/unix.rs",
        "platform src/bin/x/other.rs",
        "shared::error src/error.rs",
    ];
    assert_eq!(found, expected);
}
