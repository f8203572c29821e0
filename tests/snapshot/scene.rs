//! One disk, a guest and a directory, for tests of `virtioblkctl snapshot` as a process.

use std::fs::{self};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use kit::snapshot::{Agent, Daemon, Mood, ctl, err, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// One disk, a guest, and a place.
pub(super) struct Scene {
    pub(super) disk: Daemon,
    pub(super) agent: Agent,
    pub(super) dir: tempfile::TempDir,
}

impl Scene {
    pub(super) fn new(mood: Mood) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let disk = Daemon::with_image(dir.path(), "a.raw", 1 << 20);
        let agent = Agent::start(mood, &[disk.control()]);
        Scene { disk, agent, dir }
    }

    /// The command with the disk, the level and the agent.
    pub(super) fn command(&self, level: &str, more: &[&str]) -> Command {
        let mut command = snapshot(&[&self.disk], level, more);
        if level != "crash" {
            command.arg("--qga").arg(&self.agent.path);
        }
        command.env("JOURNAL", self.agent.journal()).env("CTL", env!("CARGO_BIN_EXE_virtioblkctl"));
        command.env("PLACE", self.dir.path());
        command
    }

    pub(super) fn run(&self, level: &str, more: &[&str]) -> Output {
        self.command(level, more).output().unwrap()
    }

    /// It fails with status 1 and says all of this; nothing is held, frozen or left behind.
    pub(super) fn fails(&self, level: &str, more: &[&str], words: &[&str]) {
        let output = self.run(level, more);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        contains(&err(&output), words);
        self.is_over();
    }

    pub(super) fn is_over(&self) {
        wait_until("the disk goes on", || !self.disk.is_held());
        wait_until("the guest is thawed", || !self.agent.is_frozen());
        assert!(!self.agent.held_at_thaw(), "a thaw came while the disk was held: it would hang in a real guest");
        assert!(!self.path("target").exists() && !self.path("target.partial").exists(), "something is left behind");
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

pub(super) fn snapshot(disks: &[&Daemon], level: &str, more: &[&str]) -> Command {
    let mut command = ctl();
    command.args(["snapshot", "--level", level]);
    for disk in disks {
        command.arg("--disk").arg(disk.control());
    }
    command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(super) fn receipt(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

pub(super) fn contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "'{word}' is not in:\n{text}");
    }
}

pub(super) fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Waits for a file that a hook or a command makes.
pub(super) fn wait_for(path: &Path) {
    wait_until(&path.display().to_string(), || path.exists());
}

/// What is in a directory, sorted.
pub(super) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
