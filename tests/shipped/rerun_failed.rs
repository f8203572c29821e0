//! `scripts/rerun-failed`: which tests it finds in a log, and when it runs none again.

use std::process::{Command, Output};

/// What `make --keep-going check` prints where these tests of one program fail.
fn log_of(program: &str, failed: &[&str], count: usize, end: &str) -> String {
    let dashes: String = failed.iter().map(|name| format!("---- {name} stdout ----\nthread panicked\n\n")).collect();
    let names: String = failed.iter().map(|name| format!("    {name}\n")).collect();
    format!(
        "     Running unittests src/lib.rs (target/debug/deps/virtioblkd-0)\n\
         test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s\n\
         \x20    Running {program}\n\
         failures:\n\n{dashes}\nfailures:\n{names}\n\
         test result: FAILED. 2 passed; {count} failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s\n{end}"
    )
}

fn rerun(arguments: &[&str], log: &str) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, log).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/rerun-failed");
    // A cargo that fails: whatever is run again fails again.
    Command::new(script).args(arguments).arg(&path).env("PATH", path_with_failing_cargo(dir.path())).output().unwrap()
}

fn path_with_failing_cargo(dir: &std::path::Path) -> String {
    kit::programs::make_script(&dir.join("cargo"), "#!/bin/sh\necho \"cargo $*\"\nexit 101\n");
    format!("{}:{}", dir.display(), std::env::var("PATH").unwrap())
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

const UPGRADE: &str = "tests/upgrade/main.rs (target/debug/deps/upgrade-0)";
const CHECK_TESTS: &str = "make: *** [Makefile:70: check-tests] Error 101\n";

#[test]
fn failed_tests_are_listed_with_the_arguments_that_run_them() {
    let list = |program: &str, failed: &[&str], count| text(&rerun(&["--list"], &log_of(program, failed, count, "")));
    assert_eq!(list(UPGRADE, &["a::b", "c"], 2), "--test upgrade\ta::b\n--test upgrade\tc\n");
    assert_eq!(list("unittests src/lib.rs (x)", &["a::b"], 1), "--lib\ta::b\n");
    assert_eq!(
        list("unittests src/lib.rs (x)", &["a::interleavings::b"], 1),
        "--lib --features model\ta::interleavings::b\n"
    );
    // A program that does not name all that failed.
    assert!(list(UPGRADE, &["a::b"], 2).contains("UNKNOWN"));
}

#[test]
fn a_test_that_fails_again_fails_the_run() {
    let output = rerun(&[], &log_of(UPGRADE, &["a::b"], 1, CHECK_TESTS));
    assert_eq!(output.status.code(), Some(1));
    let text = text(&output);
    assert!(text.contains("cargo test --test upgrade -- --exact a::b"), "{text}");
    assert!(text.contains("failed again") && !text.contains("FLAKY"), "{text}");
}

#[test]
fn nothing_is_run_again_where_more_than_a_test_or_two_failed() {
    let lint = "make: *** [Makefile:140: check-lint] Error 101\n";
    let signal = "error: test failed, to rerun pass `--test x`\n\nCaused by:\n  process didn't exit successfully\n";
    let logs = [
        log_of(UPGRADE, &["a", "b", "c"], 3, CHECK_TESTS),
        log_of(UPGRADE, &["a"], 2, CHECK_TESTS),
        log_of(UPGRADE, &["a"], 1, &[CHECK_TESTS, lint].concat()),
        log_of(UPGRADE, &["a"], 1, &[signal, CHECK_TESTS].concat()),
        lint.to_owned(),
        "make: *** [Makefile:1: check-tests] Error 101\n".to_owned(),
    ];
    for log in logs {
        let output = rerun(&[], &log);
        assert_eq!(output.status.code(), Some(1), "{log}");
        let text = text(&output);
        assert!(text.contains("run again") && !text.contains("cargo test"), "{log}\n{text}");
    }
}
