//! `virtioblkctl list`, and disks by their names: real daemons, one that does not answer, and a socket without one.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kit::programs;
use kit::wait::wait_until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A daemon that is killed when dropped.
pub(super) struct Daemon(Child);

impl Daemon {
    /// One whose control socket is NAME.ctl in `directory`.
    pub(super) fn start(directory: &Path, name: &str) -> Daemon {
        let path = |extension: &str| directory.join(format!("{name}.{extension}"));
        std::fs::File::create(path("img")).and_then(|file| file.set_len(1 << 20)).expect("room");
        let mut command = Command::new(programs::virtioblkd());
        command.arg("--socket-path").arg(path("sock")).arg("--control-path").arg(path("ctl"));
        command.arg("--blk-file").arg(path("img")).args(["--cache", "writeback"]).stderr(Stdio::null());
        let daemon = Daemon(command.spawn().expect("it runs"));
        let began = Instant::now();
        while !ctl(directory, &["--control", path("ctl").to_str().expect("text"), "status"]).status.success() {
            assert!(began.elapsed() < Duration::from_secs(60), "{name} does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        daemon
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("our own child");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ctl(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(programs::virtioblkctl());
    command.arg("--control-dir").arg(directory).args(arguments).current_dir(directory).stdin(Stdio::null());
    command.env_remove("VIRTIOBLK_CONTROL").output().expect("it runs")
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}

#[test]
fn the_list_shows_each_disk_and_one_that_does_not_answer_holds_it_up_by_a_second() {
    let directory = tempfile::tempdir().expect("room");
    let _good = Daemon::start(directory.path(), "good");
    let silent = Daemon::start(directory.path(), "silent");
    silent.signal(Signal::STOP);
    drop(Daemon::start(directory.path(), "stale"));
    // On a loaded machine the good one may take longer than a second, too.
    let mut table = String::new();
    wait_until("the good one answers in time", || {
        let began = Instant::now();
        table = out(&ctl(directory.path(), &["list"]));
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        table.lines().any(|line| line.starts_with("good ") && line.contains(" idle "))
    });
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "DOMAIN", "TARGET", "MODE", "STATE", "IMAGE", "CONTROL"]);
    assert_eq!(lines[1][..5], ["good", "-", "-", "writeback", "idle"]);
    assert_eq!((lines[2][0], lines[2][4]), ("silent", "no-answer"));
    assert_eq!((lines[3][0], lines[3][4]), ("stale", "stale"));
    let mut all = Value::Null;
    wait_until("the good one answers in time", || {
        all = serde_json::from_str(&out(&ctl(directory.path(), &["--json", "list"]))).expect("JSON");
        all[0]["state"] == "idle"
    });
    assert_eq!((&all[0]["name"], &all[0]["cache-mode"]), (&"good".into(), &"writeback".into()));
    assert_eq!(all[0]["control"], directory.path().join("good.ctl").to_str().expect("text"));
    assert_eq!((&all[1]["state"], &all[1]["image"]), (&"no-answer".into(), &Value::Null));
}

#[test]
fn a_disk_is_chosen_by_name_by_path_or_by_the_environment() {
    let directory = tempfile::tempdir().expect("room");
    let _good = Daemon::start(directory.path(), "good");
    let is_good = |output: Output| assert!(out(&output).contains("good.img"));
    // The last one is the old way: a path from here.
    for name in ["good", "./good.ctl", "good.ctl"] {
        is_good(ctl(directory.path(), &["--control", name, "status"]));
    }
    let mut command = Command::new(programs::virtioblkctl());
    command.args(["status", "--control-dir"]).arg(directory.path());
    is_good(command.env("VIRTIOBLK_CONTROL", "good").output().expect("it runs"));
    is_good(command.env("VIRTIOBLK_CONTROL", directory.path().join("good.ctl")).output().expect("it runs"));

    let snapshot = ["snapshot", "--disk", "good", "--level", "crash", "--to", "exec:true"];
    assert!(out(&ctl(directory.path(), &snapshot)).contains("crash"));

    let unknown = ctl(directory.path(), &["--control", "goood", "status"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("'virtioblkctl list'"), "{unknown:?}");
    let none = ctl(directory.path(), &["status"]);
    assert_eq!(none.status.code(), Some(2), "{none:?}");
    // A socket here that is called like a disk could be anybody's.
    let _other = std::os::unix::net::UnixListener::bind(directory.path().join("good")).expect("room");
    let two = ctl(directory.path(), &["--control", "good", "status"]);
    assert!(String::from_utf8_lossy(&two.stderr).contains("./good"), "{two:?}");
}
