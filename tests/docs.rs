//! The docs name the tests that pin each rule of the event loop: these tests must exist.

use std::fs;
use std::path::Path;

#[test]
fn the_tests_that_the_docs_name_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut sources, mut docs) = (String::new(), String::new());
    read_all(&root.join("src"), &mut sources);
    read_all(&root.join("tests"), &mut sources);
    read_into(&root.join("src/lib.rs"), &mut docs);

    let rules = docs.split("# The rules of an event loop\n").nth(1);
    let rules = rules.and_then(|rest| rest.split("//! # ").next());
    let code = rules
        .expect("the section exists")
        .split('`')
        .skip(1)
        .step_by(2);
    // No system call, and nothing else that a rule speaks of, has two underscores in its name.
    let names: Vec<_> = code.filter(|word| word.matches('_').count() > 1).collect();
    assert!(names.len() > 13, "each rule has a test: {names:?}");
    for name in names {
        assert!(
            sources.contains(&format!("fn {name}(")),
            "no test is called {name}"
        );
    }
}

fn read_all(directory: &Path, text: &mut String) {
    for entry in fs::read_dir(directory).expect("a directory of sources") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => read_all(&path, text),
            false => read_into(&path, text),
        }
    }
}

fn read_into(path: &Path, text: &mut String) {
    text.push_str(&fs::read_to_string(path).expect("a source in UTF-8"));
}
