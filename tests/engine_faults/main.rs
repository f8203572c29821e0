//! The oracles of the engine's explorer (`src/engine/explore.rs`) find every fault of a list.
//!
//! Each fault is a change of the engine's text. The engine needs nothing but std, so a changed copy of it is a crate of
//! its own, which compiles in a second; its explorer then runs with one oracle at a time. The engine's own source stays
//! free of test code. The faults: `faults.rs`.

mod faults;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use faults::{FAULTS, Fault};

#[test]
fn every_planted_fault_is_found_by_its_oracles() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let next = AtomicUsize::new(0);
    let survivors = Mutex::new(Vec::new());
    let work = || {
        while let Some(fault) = FAULTS.get(next.fetch_add(1, Ordering::Relaxed)) {
            let place =
                scratch.path().join(FAULTS.iter().position(|other| other.name == fault.name).unwrap().to_string());
            survivors.lock().unwrap().extend(survived(fault, &place));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(4);
    thread::scope(|scope| (0..threads).for_each(|_| _ = scope.spawn(work)));
    let survivors = survivors.into_inner().unwrap();
    assert!(survivors.is_empty(), "{}", survivors.join("\n"));
}

#[test]
fn an_engine_without_a_fault_fails_no_oracle() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let sound = Fault { name: "none", changes: &[], oracles: &["QuietNotDurable"], failures_are_retained: false };
    assert_eq!(survived(&sound, scratch.path()).len(), 1);
}

/// What did not find the fault, a line each.
fn survived(fault: &Fault, place: &Path) -> Vec<String> {
    let explorer = compile(fault, place);
    if fault.oracles.is_empty() {
        let output = explore(&explorer, "no_order_of_events_breaks_a_promise", &[]);
        let refused = !output.status.success();
        return refused
            .then(|| format!("an oracle failed for a legal engine: {}: {}", fault.name, text(&output)))
            .into_iter()
            .collect();
    }
    let retained = if fault.failures_are_retained { "yes" } else { "no" };
    let find = |oracle: &&&str| {
        let variables = [("VIRTIOBLKD_ORACLE", **oracle), ("VIRTIOBLKD_RETAIN", retained)];
        let output = explore(&explorer, "the_wanted_oracle_fails", &variables);
        (!output.status.success())
            .then(|| format!("{} survived: {oracle} did not find it: {}", fault.name, text(&output)))
    };
    fault.oracles.iter().collect::<Vec<_>>().iter().filter_map(find).collect()
}

/// The changed engine's test program.
fn compile(fault: &Fault, place: &Path) -> PathBuf {
    let engine = place.join("engine");
    copy_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/engine"), &engine);
    for change in fault.changes {
        let file = engine.join(change.file);
        let source = fs::read_to_string(&file).unwrap();
        let found = source.matches(change.old).count();
        assert_eq!(found, 1, "{}: in src/engine/{} this must occur once:\n{}", fault.name, change.file, change.old);
        fs::write(&file, source.replace(change.old, change.new)).unwrap();
    }
    fs::write(place.join("lib.rs"), "#![allow(warnings)]\npub mod engine;\n").unwrap();
    let program = place.join("explorer");
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(compiler)
        .args([
            "--test",
            "--edition",
            "2024",
            "-Copt-level=1",
            "-Cdebug-assertions=on",
            "-Cdebuginfo=0",
            "lib.rs",
            "-o",
        ])
        .arg(&program)
        .current_dir(place)
        .output()
        .expect("rustc runs");
    assert!(output.status.success(), "{} does not compile: {}", fault.name, text(&output));
    program
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_folder(&entry.path(), &target),
            false => {
                fs::copy(entry.path(), target).unwrap();
            }
        }
    }
}

fn explore(explorer: &Path, test: &str, variables: &[(&str, &str)]) -> Output {
    let name = format!("engine::explore::{test}");
    let mut command = Command::new(explorer);
    command.args(["--include-ignored", "--exact", &name]).envs(variables.iter().copied());
    let output = command.output().expect("the explorer runs");
    assert!(String::from_utf8_lossy(&output.stdout).contains("running 1 test"), "there is no test {name}");
    output
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
