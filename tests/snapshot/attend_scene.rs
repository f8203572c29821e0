//! A guest with two disks that `virtioblkctl attend` attends, and a store that takes snapshots of them.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::Receiver;

use kit::control::Served;
use kit::snapshot::{Agent, Mood, WAIT_TIMEOUT, ctl, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use virtioblkd::backend::Notices;
use virtioblkd::engine::Errno;

pub(crate) const BUSY: Result<(), Errno> = Err(Errno(libc::EBUSY));

/// A guest with two disks, and somebody who attends them.
pub(crate) struct Scene {
    pub(crate) disks: [Served; 2],
    pub(crate) agent: Agent,
    pub(crate) attendant: Child,
    pub(crate) lines: BufReader<ChildStdout>,
    pub(crate) dir: tempfile::TempDir,
}

impl Scene {
    pub(crate) fn new(mood: Mood, more: &[&str]) -> Scene {
        let disks = [Served::new(), Served::new()];
        let agent = Agent::start(mood, &[disks[0].path.clone(), disks[1].path.clone()]);
        let dir = tempfile::tempdir().unwrap();
        let (attendant, lines) = start(&disks, &agent, dir.path(), more);
        Scene { disks, agent, attendant, lines, dir }
    }

    /// In the place of the one that is gone.
    pub(crate) fn attend_again(&mut self) {
        (self.attendant, self.lines) = start(&self.disks, &self.agent, self.dir.path(), &["--level", "filesystem"]);
    }

    /// Somebody begins a snapshot of all disks (`rbd group snap create`).
    pub(crate) fn ask_all(&self) -> Vec<Receiver<Result<(), Errno>>> {
        self.disks.iter().map(Served::store_asks).collect()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.attendant), signal).unwrap();
    }

    /// What the attendant says of the freeze that ended.
    pub(crate) fn receipt(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}: {}", self.log()))
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// Nothing is held or frozen, and nobody waits.
    pub(crate) fn is_over(&self) {
        for disk in &self.disks {
            disk.notices.unquiesce();
            disk.disk.wait_closed(false);
        }
        wait_until("the guest is thawed", || !self.agent.is_frozen());
    }

    pub(crate) fn freezes(&self) -> usize {
        self.agent.asked("guest-fsfreeze-freeze")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // Both fail only if it is gone.
        let _ = self.attendant.kill();
        let _ = self.attendant.wait();
        if std::thread::panicking() {
            eprintln!("--- attend said:\n{}", self.log());
        }
    }
}

pub(crate) fn start(disks: &[Served], agent: &Agent, dir: &Path, more: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let mut command = attend(disks, agent, more);
    command.stderr(File::create(dir.join("log")).unwrap());
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap());
    wait_until("it attends", || {
        assert!(child.try_wait().unwrap().is_none(), "{}", std::fs::read_to_string(dir.join("log")).unwrap());
        disks.iter().all(|disk| attended(disk)["present"] == true)
    });
    (child, lines)
}

pub(crate) fn attend(disks: &[Served], agent: &Agent, more: &[&str]) -> Command {
    let mut command = ctl();
    command.args(["--json", "attend"]).args(more).arg("--qga").arg(&agent.path);
    for disk in disks {
        command.arg("--disk").arg(&disk.path);
    }
    command.env("JOURNAL", agent.journal()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn attended(disk: &Served) -> Value {
    disk.client().ask("query-status", json!({})).unwrap()["attendant"].take()
}

pub(crate) fn wait(answer: &Receiver<Result<(), Errno>>) -> Result<(), Errno> {
    answer.recv_timeout(WAIT_TIMEOUT).expect("an answer")
}
