//! `virtioblkctl snapshot --to copy:`: copies of several disks, in the background, interrupted, and of a lost hold.

use std::fs;
use std::path::Path;
use std::process::Command;

use kit::snapshot::{Agent, Daemon, Mood, err, out, wait_until};
use rustix::process::Signal;

use super::scene::*;

/// A served image of `size` bytes with something in it.
fn filled(dir: &Path, name: &str, size: usize) -> (Daemon, Vec<u8>) {
    let content: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
    let image = dir.join(name);
    fs::write(&image, &content).unwrap();
    (Daemon::start(&image, "writeback"), content)
}

#[test]
fn copies_are_the_images_at_the_instant_on_any_filesystem() {
    let dir = tempfile::tempdir().unwrap();
    let disks = [filled(dir.path(), "a", 5 << 20), filled(dir.path(), "b", 3 << 20)];
    let all: Vec<&Daemon> = disks.iter().map(|(disk, _)| disk).collect();
    let to = format!("copy:{}/snap-{{}}", dir.path().display());
    let receipt = receipt(&snapshot(&all, "crash", &["--json", "--digest", "--to", &to]).output().unwrap());
    assert_eq!(receipt["detached"], false);
    for ((_, content), (at, name)) in disks.iter().zip(["snap-a", "snap-b"].into_iter().enumerate()) {
        let target = dir.path().join(name);
        assert_eq!(&fs::read(&target).unwrap(), content);
        let disk = &receipt["disks"][at];
        assert_eq!((&disk["copy"]["state"], &disk["way"]), (&"completed".into(), &"copy".into()));
        let sum = Command::new("sha256sum").arg(&target).output().unwrap();
        assert!(out(&sum).starts_with(disk["sha256"].as_str().unwrap()));
        assert!(disk["copy"]["instant"].as_f64() >= receipt["instant"].as_f64(), "{receipt}");
    }
    // The second target exists already: the first one is not made either.
    fs::remove_file(dir.path().join("snap-a")).unwrap();
    let output = snapshot(&all, "crash", &["--to", &to]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    contains(&err(&output), &["snap-b", disks[1].0.control().to_str().unwrap()]);
    wait_until("nothing is left behind", || names(dir.path()) == ["a", "b", "snap-b"]);
}

#[test]
fn a_copy_in_the_background_outlives_the_command() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, content) = filled(dir.path(), "a", 4 << 20);
    let to = format!("copy:{}/snap", dir.path().display());
    let slow = ["--json", "--background", "--bandwidth", "2000000", "--to", &to];
    let receipt = receipt(&snapshot(&[&disk], "crash", &slow).output().unwrap());
    assert_eq!((&receipt["detached"], &receipt["disks"][0]["copy"]["state"]), (&true.into(), &"running".into()));
    assert!(!disk.is_held());
    assert_eq!(names(dir.path()), ["a", "snap.partial"]);
    wait_for(&dir.path().join("snap"));
    assert_eq!(fs::read(dir.path().join("snap")).unwrap(), content);
}

#[test]
fn a_copy_in_the_background_is_watched_limited_and_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, content) = filled(dir.path(), "a", 4 << 20);
    let copies = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
        let output = command.arg("--control").arg(disk.control()).arg("copies").args(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", err(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(copies(&[]), "no copies\n");
    let name = |receipt: &serde_json::Value| receipt["disks"][0]["copy"]["copy"].as_str().unwrap().to_owned();
    let to = format!("copy:{}/first", dir.path().display());
    let slow = ["--json", "--background", "--bandwidth", "100000", "--to", &to];
    let first = name(&receipt(&snapshot(&[&disk], "crash", &slow).output().unwrap()));
    contains(&copies(&[]), &[&first, "running", "% of 4.0 MiB", "/first"]);
    // Forty seconds otherwise.
    copies(&["limit", &first, "0"]);
    wait_for(&dir.path().join("first"));
    assert_eq!(fs::read(dir.path().join("first")).unwrap(), content);
    let to = format!("copy:{}/second", dir.path().display());
    let slow = ["--json", "--background", "--bandwidth", "100000", "--to", &to];
    let second = name(&receipt(&snapshot(&[&disk], "crash", &slow).output().unwrap()));
    contains(&copies(&["cancel", &second]), &["is cancelled; its partial file is removed"]);
    wait_until("nothing of it is left", || names(dir.path()) == ["a", "first"]);
    contains(&copies(&[]), &[&first, "completed", &second, "cancelled"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
    let output = command.arg("--control").arg(disk.control()).args(["copies", "cancel", "nonsense"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    contains(&err(&output), &["no copy of this name"]);
}

#[test]
fn a_copy_that_is_interrupted_or_fails_leaves_nothing() {
    for how in [Signal::INT, Signal::TERM, Signal::KILL] {
        let dir = tempfile::tempdir().unwrap();
        let disks = [filled(dir.path(), "a", 4 << 20), filled(dir.path(), "b", 1 << 16)];
        let all: Vec<&Daemon> = disks.iter().map(|(disk, _)| disk).collect();
        let to = format!("copy:{}/snap-{{}}", dir.path().display());
        let mut child = snapshot(&all, "crash", &["--bandwidth", "100000", "--to", &to]).spawn().unwrap();
        // One is complete, the other takes half a minute yet.
        wait_for(&dir.path().join("snap-b"));
        signal(&child, how);
        assert_ne!(child.wait().unwrap().code(), Some(0));
        if how == Signal::KILL {
            // Nobody knows any more that the complete one belongs to what failed.
            wait_until("the daemon gives up", || names(dir.path()) == ["a", "b", "snap-b"]);
        } else {
            assert_eq!(names(dir.path()), ["a", "b"], "{how:?}");
        }
    }
    // A daemon that dies takes its copy with it, and the snapshot.
    let dir = tempfile::tempdir().unwrap();
    let mut disks = [filled(dir.path(), "a", 4 << 20), filled(dir.path(), "b", 1 << 16)];
    let all: Vec<&Daemon> = disks.iter().map(|(disk, _)| disk).collect();
    let to = format!("copy:{}/snap-{{}}", dir.path().display());
    let child = snapshot(&all, "crash", &["--bandwidth", "100000", "--to", &to]).spawn().unwrap();
    wait_for(&dir.path().join("snap-b"));
    disks[0].0.child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &[disks[0].0.control().to_str().unwrap(), "lost"]);
    assert_eq!(names(dir.path()), ["a", "b", "snap-a.partial"], "a partial file of a dead daemon looks unfinished");
}

#[test]
fn copies_that_were_started_are_cancelled_if_a_hold_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _) = filled(dir.path(), "a", 4 << 20);
    let agent = Agent::start(Mood::ThawsEarly, &[disk.control()]);
    let to = format!("copy:{}/snap", dir.path().display());
    let options = ["--background", "--bandwidth", "100000", "--to", &to, "--qga", agent.path.to_str().unwrap()];
    let output = snapshot(&[&disk], "filesystem", &options).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &["thawed by another program"]);
    assert_eq!(names(dir.path()), ["a"]);
}
