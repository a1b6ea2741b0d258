//! The packaged manifest for Kubernetes.

use super::{option_of, packaged, root};
use crate::harness::{Process, READY, command, http, installed, program, run};
use crate::program::command_line::help_options;

/// Returns the variables of the program that the manifest sets, and their values.
fn variables() -> Vec<(String, String)> {
    let text = packaged("kubernetes.yaml");
    let variable = |line: &str| {
        let variable = line
            .trim()
            .strip_prefix("- {name: ECHOSERVER_")?
            .strip_suffix('}')?;
        let (name, value) = variable.split_once(", value: ")?;
        Some((
            format!("ECHOSERVER_{name}"),
            value.trim_matches('"').to_owned(),
        ))
    };
    text.lines().filter_map(variable).collect()
}

fn value_of(name: &str) -> String {
    let variable = variables().into_iter().find(|(found, _)| found == name);
    variable.unwrap_or_else(|| panic!("{name} is not set")).1
}

/// Returns the text between two texts.
fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    let rest = text
        .split_once(before)
        .unwrap_or_else(|| panic!("no {before} in {text}"))
        .1;
    rest.split_once(after)
        .unwrap_or_else(|| panic!("no {after} in {rest}"))
        .0
}

#[test]
fn manifest_is_valid() {
    if !installed(&["kubernetes-validate"]) {
        return;
    }
    let file = root().join("packaging/kubernetes.yaml");
    let output = run(command("kubernetes-validate").arg("--strict").arg(file));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{text}");
    assert_eq!(text.matches(" passed for resource ").count(), 4, "{text}");
}

/// With the variables of the manifest, the program serves, and its buffers fit into the memory limit.
#[test]
fn program_runs_with_the_variables_of_the_manifest() {
    let options = help_options(&["--help"]);
    let mut variables = variables();
    assert!(variables.len() >= 5, "{variables:?}");
    for (name, _) in &variables {
        assert!(options.contains(&option_of(name)), "{name}");
    }
    variables.retain(|(name, _)| name != "ECHOSERVER_METRICS");
    let mut command = program();
    command
        .envs(variables)
        .args(["--listen=127.0.0.1:0", "--metrics=127.0.0.1:0"]);
    let server = Process::start(&mut command);
    let memory = server.lines_with(READY).remove(0);
    let memory: f64 = between(&memory, "at most ", " MiB").parse().unwrap();
    let manifest = packaged("kubernetes.yaml");
    let limit: f64 = between(&manifest, "limits: {memory: ", "Mi}")
        .parse()
        .unwrap();
    assert!(memory <= limit / 1.5, "{memory} of {limit} MiB");
    server.terminate();
}

#[test]
fn grace_period_of_the_manifest_exceeds_the_drain() {
    let seconds = |text: &str| -> u32 { text.trim_end_matches('s').parse().unwrap() };
    let drain = ["ECHOSERVER_DRAIN_DELAY", "ECHOSERVER_DRAIN_TIMEOUT"].map(value_of);
    let drain: u32 = drain.iter().map(|time| seconds(time)).sum();
    let manifest = packaged("kubernetes.yaml");
    let grace = between(&manifest, "terminationGracePeriodSeconds: ", "\n");
    assert!(seconds(grace) > drain, "{grace} s for {drain} s");
    assert!(manifest.contains("enableServiceLinks: false"), "{manifest}");
}

#[test]
fn probes_of_the_manifest_succeed() {
    let mut server = Process::serve(&["--metrics=127.0.0.1:0"]);
    let address = server.metrics_address();
    let manifest = packaged("kubernetes.yaml");
    let paths: Vec<_> = manifest.split("httpGet: {path: ").skip(1).collect();
    assert_eq!(paths.len(), 3);
    for path in paths {
        let path = path.split(',').next().unwrap();
        assert_eq!(http::get(address, path).status, 200, "{path}");
    }
    server.terminate();
}
