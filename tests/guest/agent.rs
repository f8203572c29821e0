//! The real guest agent in a real guest: frozen and thawed by hand, and what `virtioblkctl snapshot` does when the
//! agent is missing, refuses, is somebody else's, is late, or dies; and when it dies itself. Whatever happens, nothing
//! is left behind, the disk goes on, and the guest is thawed.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use kit::guest::qemu::Vm;
use kit::guest::server::program;
use kit::guest::{Server, mortal, qemu, run, scratch, sparse_image, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use virtioblkd::engine::cache::CacheMode;

/// A guest that runs, with the filesystem of a served disk at /disk.
struct Rig {
    dir: tempfile::TempDir,
    server: Server,
    vm: Vm,
}

impl Rig {
    fn start() -> Rig {
        let dir = scratch();
        let image = sparse_image(dir.path(), 64 << 20);
        run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&image).env("PATH", "/usr/sbin:/sbin"));
        let server = Server::start(&image, CacheMode::None, &["--serial", "disk", "--logical-block-size", "512"]);
        let mut vm = qemu::linux_with_agent("").vhost_user_disk(&server.socket(), "").start_shell();
        vm.sh("mount_disk disk /disk");
        Rig { dir, server, vm }
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("snapshot")
    }

    /// `virtioblkctl snapshot` at level filesystem.
    fn command(&self, to: &str, more: &[&str]) -> Command {
        let mut command = mortal(program("virtioblkctl"));
        command.args(["--json", "snapshot", "--level", "filesystem", "--to", to, "--disk"]).arg(self.server.control());
        command.arg("--qga").arg(self.vm.agent_socket()).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start_snapshot(&self, more: &[&str]) -> Child {
        self.command(&format!("copy:{}", self.target().display()), more).spawn().expect("virtioblkctl starts")
    }

    fn snapshot(&self, more: &[&str]) -> Output {
        ended(self.start_snapshot(more))
    }

    /// Starts a snapshot and waits until the guest is frozen and the disk is held. It ends when told to.
    fn snapshot_in_the_middle(&self, more: &[&str]) -> Held {
        let [held, go_on] = ["held", "go-on"].map(|name| self.dir.path().join(name));
        let script = format!("exec:touch {}; until [ -e {} ]; do sleep 0.05; done", held.display(), go_on.display());
        let child = self.command(&script, more).spawn().expect("virtioblkctl starts");
        wait_until("the guest is frozen and its disk is held", || held.exists());
        Held { child, go_on }
    }

    /// A snapshot that was not taken left nothing behind.
    fn assert_not_taken(&self, output: &Output, why: &str) {
        let said = format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(why), "'{why}' is not in: {said}");
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON, as asked for");
        assert!(answer["error"].is_object() && answer.get("level").is_none(), "a receipt for no snapshot: {answer}");
        let mut left = fs::read_dir(self.dir.path()).expect("ours").map(|entry| entry.expect("ours").file_name());
        assert!(left.all(|name| name != "snapshot" && name != "snapshot.partial"), "something was left behind");
    }

    /// The guest's filesystem takes writes, and its disk makes them durable; waits for both.
    fn assert_goes_on(&mut self) {
        self.vm.sh("echo on | dd of=/disk/on conv=fsync 2>/dev/null");
        assert!(!self.vm.agent().is_frozen());
        assert_eq!(self.holders(), 0, "somebody holds the disk");
    }

    /// How many hold the disk.
    fn holders(&self) -> usize {
        let status = self.server.status();
        status["quiesce"]["holders"].as_array().unwrap_or_else(|| panic!("no holders in {status}")).len()
    }

    /// A snapshot works as if nothing had been.
    fn assert_snapshot_works(&self) {
        let taken = self.snapshot(&[]);
        assert!(taken.status.success(), "{}", String::from_utf8_lossy(&taken.stderr));
        let receipt: Value = serde_json::from_slice(&taken.stdout).expect("a receipt");
        assert_eq!((&receipt["level"], &receipt["filesystems-frozen"]), (&"filesystem".into(), &1.into()), "{receipt}");
        assert!(self.target().exists());
    }
}

/// A snapshot that is being taken.
struct Held {
    child: Child,
    go_on: PathBuf,
}

impl Held {
    fn go_on(self) -> Output {
        fs::write(&self.go_on, "").expect("room");
        ended(self.child)
    }
}

/// Waits for the tool: that it does not hang is a part of what this file looks for.
fn ended(mut child: Child) -> Output {
    wait_until("virtioblkctl ends", || child.try_wait().expect("our own child").is_some());
    child.wait_with_output().expect("our own child")
}

#[test]
fn a_guest_that_another_client_froze_is_left_frozen() {
    let mut rig = Rig::start();
    rig.vm.sh("start_agent");
    let mut agent = rig.vm.agent();
    assert!(!agent.is_frozen());
    assert_eq!(agent.freeze(), 1);
    assert!(agent.is_frozen());
    rig.vm.sh("{ echo one >/disk/file; } & sleep 1; [ -d /proc/$! ]");
    // The channel has room for one.
    drop(agent);
    rig.assert_not_taken(&rig.snapshot(&[]), "already");

    let mut agent = rig.vm.agent();
    assert!(agent.is_frozen(), "what somebody else froze was thawed");
    assert_eq!(agent.thaw(), 1);
    drop(agent);
    rig.vm.sh("wait; [ \"$(cat /disk/file)\" = one ]");
    rig.assert_goes_on();
    rig.assert_snapshot_works();
}

#[test]
fn a_freeze_that_waits_for_a_held_disk_is_given_up_and_thawed_when_it_comes() {
    let mut rig = Rig::start();
    rig.vm.sh("start_agent");
    // Somebody holds the disk: the freeze wants to write, and waits. The guest has something to write.
    let token = rig.server.ctl_ok(&["quiesce", "--lease", "600s"]).trim().to_owned();
    rig.vm.sh("echo late >/disk/file");
    let output = rig.snapshot(&["--freeze-timeout", "2s"]);
    rig.assert_not_taken(&output, "MAY BE FROZEN");
    assert_eq!(rig.holders(), 1, "not ours to resume");

    rig.server.ctl_ok(&["resume", &token]);
    // Now the freeze happens, and nobody but the guard is there to thaw.
    rig.assert_goes_on();
    rig.assert_snapshot_works();
}

#[test]
fn an_agent_killed_while_the_guest_is_frozen_is_awaited_and_told_to_thaw() {
    let mut rig = Rig::start();
    rig.vm.sh("start_agent");
    let held = rig.snapshot_in_the_middle(&["--freeze-timeout", "2s"]);
    rig.vm.sh("stop_agent -KILL");
    rig.assert_not_taken(&held.go_on(), "MAY BE FROZEN");
    assert_eq!(rig.holders(), 0, "the disk is held still");
    rig.vm.sh("{ echo one >/disk/file; } & sleep 1; [ -d /proc/$! ]");

    // As the guest's init would.
    rig.vm.sh("start_agent; wait; [ \"$(cat /disk/file)\" = one ]");
    rig.assert_goes_on();
    rig.assert_snapshot_works();
}

#[test]
fn an_agent_that_refuses_hangs_dies_or_is_missing_is_no_snapshot() {
    let mut rig = Rig::start();
    // Missing.
    rig.assert_not_taken(&rig.snapshot(&["--freeze-timeout", "2s"]), "does not answer");
    let weaker = rig.snapshot(&["--freeze-timeout", "2s", "--or-weaker"]);
    let said = String::from_utf8_lossy(&weaker.stderr);
    assert!(weaker.status.success() && said.contains("WEAKER"), "{said}");
    let receipt: Value = serde_json::from_slice(&weaker.stdout).expect("a receipt");
    assert_eq!(receipt["level"], "crash", "{receipt}");
    fs::remove_file(rig.target()).expect("the snapshot");

    // A hook in the guest refuses.
    rig.vm.sh("printf '#!/bin/sh\\nexit 3\\n' >/tmp/refuses; chmod +x /tmp/refuses; start_agent -F/tmp/refuses");
    rig.assert_not_taken(&rig.snapshot(&[]), "refuses");
    rig.assert_goes_on();

    // A hook in the guest hangs, and the agent is killed under it.
    rig.vm.sh("printf '#!/bin/sh\\n>/run/hangs; exec sleep 1000\\n' >/tmp/hangs; chmod +x /tmp/hangs");
    rig.vm.sh("stop_agent; start_agent -F/tmp/hangs");
    let child = rig.start_snapshot(&["--freeze-timeout", "3s"]);
    rig.vm.sh("until [ -e /run/hangs ]; do sleep 0.1; done; stop_agent -KILL; killall sleep");
    rig.assert_not_taken(&ended(child), "does not answer");
    rig.vm.sh("start_agent");
    rig.assert_goes_on();
    rig.assert_snapshot_works();
}

#[test]
fn a_tool_killed_in_the_middle_leaves_the_guest_thawed_and_the_disk_free() {
    let mut rig = Rig::start();
    rig.vm.sh("start_agent");
    for signal in [Signal::KILL, Signal::TERM] {
        let mut held = rig.snapshot_in_the_middle(&[]);
        kill_process(Pid::from_child(&held.child), signal).expect("our own child");
        let status = held.child.wait().expect("our own child");
        assert!(!status.success());
        rig.assert_goes_on();
        // Only the command that waits is left, if at all.
        held.go_on();
        for name in ["held", "go-on"] {
            fs::remove_file(rig.dir.path().join(name)).expect("made above");
        }
    }
    rig.assert_snapshot_works();
}
