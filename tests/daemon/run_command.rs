//! `--run`: a daemon that serves its disk as long as a command runs.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kit::programs;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// A daemon with a RAM disk of 1 MiB.
fn virtioblkd(temporary: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
    command.args(["--backend", "mem:1048576"]).args(arguments).env("TMPDIR", temporary).stdin(Stdio::null());
    command
}

fn run(temporary: &Path, arguments: &[&str]) -> Output {
    virtioblkd(temporary, arguments).output().expect("the program starts")
}

/// Waits until the condition holds.
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).expect("a directory").next().is_none()
}

/// Starts a command that writes the daemon's status and sleeps.
fn sleeping(temporary: &Path, pids: &Path) -> Child {
    sleeping_with(temporary, pids, &[])
}

/// [`sleeping`] with more options of the daemon.
fn sleeping_with(temporary: &Path, pids: &Path, options: &[&str]) -> Child {
    let control = pids.with_extension("ctl");
    let (control, pids) = (control.to_str().expect("UTF-8"), pids.to_str().expect("UTF-8"));
    let ctl = programs::virtioblkctl();
    let status = format!("{} --control {{control}} --json status", ctl.display());
    let command = format!("trap 'exit 7' TERM; {status} >{pids}.new; mv {pids}.new {pids}; sleep 60 & wait");
    virtioblkd(temporary, &[options, &["--control-path", control, "--run", &command]].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts")
}

/// The daemon's process, by the status that the command wrote.
fn daemon(pids: &Path) -> Pid {
    wait_until("the command runs", || pids.exists());
    let status: serde_json::Value = serde_json::from_slice(&fs::read(pids).expect("it exists")).expect("JSON");
    Pid::from_raw(status["daemon"]["pid"].as_i64().expect("a number") as i32).expect("a process")
}

#[test]
fn the_command_finds_the_listening_sockets_and_its_status_is_passed_on() {
    let temporary = tempfile::tempdir().expect("room");
    let output = run(temporary.path(), &["--run", "test -S {socket} && echo {socket} && exit 3"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let socket = String::from_utf8(output.stdout).expect("text");
    assert!(socket.starts_with(temporary.path().to_str().expect("UTF-8")), "{socket}");
    assert!(is_empty(temporary.path()), "the directory of the socket is removed");
    // The daemon may remove its sockets only from a directory without others beneath it.
    let own = tempfile::tempdir().expect("room");
    let (socket, control) = (own.path().join("a.sock"), own.path().join("a.ctl"));
    let text = format!("{} --control {{control}} status && test -S {{socket}}", programs::virtioblkctl().display());
    let paths = [&socket, &control].map(|path| path.to_str().expect("UTF-8"));
    let output = run(temporary.path(), &["--socket", paths[0], "--control-path", paths[1], "--run", &text]);
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("cache mode"), "{output:?}");
    assert!(is_empty(own.path()), "the daemon removed its sockets: it ended in order");
}

#[test]
fn a_command_that_a_signal_ends_and_one_that_does_not_exist_have_the_statuses_of_a_shell() {
    let temporary = tempfile::tempdir().expect("room");
    assert_eq!(run(temporary.path(), &["--run", "kill -9 $$"]).status.code(), Some(128 + 9));
    assert_eq!(run(temporary.path(), &["--run", "/does/not/exist"]).status.code(), Some(127));
}

#[test]
fn a_daemon_that_cannot_start_runs_no_command() {
    let temporary = tempfile::tempdir().expect("room");
    let ran = temporary.path().join("ran");
    let command = format!("touch {}", ran.display());
    for (status, arguments) in [(1, ["--socket-path", "/does/not/exist/d.sock"]), (2, ["--cache", "fast"])] {
        let output = run(temporary.path(), &[&arguments[..], &["--run", &command]].concat());
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        assert!(!ran.exists() && !output.stderr.is_empty(), "{output:?}");
    }
    for (arguments, word) in [(["--fd", "3"], "--fd"), (["--serial", "a"], "{control}")] {
        let output = run(temporary.path(), &[&arguments[..], &["--run", "echo {control}"]].concat());
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(word), "{output:?}");
    }
}

#[test]
fn sigterm_reaches_the_command_and_then_the_daemon_ends() {
    let temporary = tempfile::tempdir().expect("room");
    let pids = temporary.path().join("pids");
    let mut runner = sleeping(temporary.path(), &pids);
    let daemon = daemon(&pids);
    kill_process(Pid::from_child(&runner), Signal::TERM).expect("it runs");
    assert_eq!(runner.wait().expect("it ends").code(), Some(7), "the command's own status");
    assert!(test_kill_process(daemon).is_err(), "the daemon has ended");
}

#[test]
fn a_runner_that_is_killed_takes_the_daemon_with_it() {
    let temporary = tempfile::tempdir().expect("room");
    let pids = temporary.path().join("pids");
    let runner = sleeping(temporary.path(), &pids);
    daemon(&pids);
    kill_runner(runner, &pids);
}

/// A change of the user would have the kernel forget that the daemon ends with its parent.
#[test]
fn a_runner_that_is_killed_takes_the_daemon_of_another_user_with_it() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: a daemon of another user (--user): only root can start one");
    }
    let temporary = tempfile::tempdir().expect("room");
    let pids = temporary.path().join("pids");
    let runner = sleeping_with(temporary.path(), &pids, &["--user", "nobody"]);
    daemon(&pids);
    kill_runner(runner, &pids);
}

/// Kills the runner and waits for the daemon's end.
fn kill_runner(mut runner: Child, pids: &Path) {
    runner.kill().expect("it runs");
    assert_eq!(runner.wait().expect("it ends").signal(), Some(9));
    // A process that nobody waits for may remain as a zombie, whose control socket gets no connection.
    let control = pids.with_extension("ctl");
    wait_until("the daemon ends", || std::os::unix::net::UnixStream::connect(&control).is_err());
}

#[test]
fn the_command_is_ended_when_the_daemon_dies() {
    let temporary = tempfile::tempdir().expect("room");
    let pids = temporary.path().join("pids");
    let mut runner = sleeping(temporary.path(), &pids);
    kill_process(daemon(&pids), Signal::KILL).expect("it runs");
    assert_eq!(runner.wait().expect("it ends").code(), Some(7));
}
