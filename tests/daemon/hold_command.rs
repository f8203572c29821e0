//! `virtioblkctl quiesce`: the disk is held until a token is given back, or while a command runs.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use kit::control::{Served, Settle};
use kit::unread::Unread;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use virtioblkd::engine::Errno;

use crate::virtioblkctl::{contains, ctl, err, ok, out, run, start};

#[test]
fn a_quiesce_outlives_the_command() {
    let served = Served::new();
    let output = run(&served, &["quiesce", "--lease", "1m", "--timeout", "30000ms", "--who", "me"]);
    contains(&err(&output), &["12 requests drained in 1.5 ms", "8.0 KiB synced in 3.2 ms", "1 holder"]);
    let text = out(&output);
    let token = text.strip_suffix('\n').unwrap();
    assert_eq!(token.len(), 16, "the token alone, for TOKEN=$(...)");
    assert!(served.disk.closed().is_some());
    let second: Value = serde_json::from_str(&ok(&served, &["--json", "quiesce"])).unwrap();
    assert_eq!(second["holders"], 2);
    contains(&ok(&served, &["resume", token]), &["1 holder left"]);
    contains(&ok(&served, &["resume", "--all"]), &["writes continue"]);
    assert!(served.disk.closed().is_none());
    let again = run(&served, &["resume", token]);
    assert_eq!(again.status.code(), Some(1));
    contains(&err(&again), &["resumed already"]);
    let again = run(&served, &["--json", "resume", token]);
    assert_eq!(serde_json::from_str::<Value>(&out(&again)).unwrap()["error"]["code"], "not-held");
}

#[test]
fn a_quiesce_that_fails_says_why() {
    let served = Served::new();
    served.disk.set(Settle::Fail(Errno(28)));
    let output = run(&served, &["quiesce"]);
    assert_eq!(output.status.code(), Some(1));
    contains(&err(&output), &["No space left on device", "writes continue"]);
    served.disk.set(Settle::ByHand);
    let output = run(&served, &["quiesce", "--timeout", "30ms", "--", "touch", "/nonexistent/never-run"]);
    assert_eq!(output.status.code(), Some(125));
    contains(&err(&output), &["in time", "--timeout", "virtioblkctl stats"]);
    assert!(served.disk.closed().is_none());
}

// With a command under it.

#[test]
fn the_disk_is_held_while_the_command_runs_and_its_status_is_passed_on() {
    let served = Served::new();
    let ctl = env!("CARGO_BIN_EXE_virtioblkctl");
    let script = r#""$0" --control "$1" --json status; echo "$VIRTIOBLK_QUIESCE_TOKEN" >&2; exit 7"#;
    let output = run(&served, &["quiesce", "--", "sh", "-c", script, ctl, served.path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let status: Value = serde_json::from_str(&out(&output)).unwrap();
    let holder = &status["quiesce"]["holders"][0];
    assert_eq!((&status["quiesce"]["state"], &holder["detached"]), (&json!("quiesced"), &json!(false)));
    assert_eq!(holder["who"], "virtioblkctl quiesce -- sh");
    contains(&err(&output), &[holder["token"].as_str().unwrap()]);
    assert!(served.disk.closed().is_none(), "resumed");
    assert_eq!(run(&served, &["quiesce", "--", "true"]).status.code(), Some(0));
    assert_eq!(run(&served, &["quiesce", "--", "sh", "-c", "kill -9 $$"]).status.code(), Some(128 + 9));
    assert_eq!(run(&served, &["quiesce", "--", "/nonexistent/command"]).status.code(), Some(127));
    assert_eq!(run(&served, &["quiesce", "--", "/dev/null"]).status.code(), Some(126));
    assert!(served.disk.closed().is_none());
    assert_eq!(served.disk.closings(), 5);
}

#[test]
fn a_hold_ends_with_its_command_while_nobody_reads_our_messages() {
    for unread in Unread::all() {
        let served = Served::new();
        let mut client = served.client();
        let mut child = ctl(&served.path).args(["quiesce", "--", "true"]).stderr(unread.output()).spawn().unwrap();
        client.event("QUIESCED");
        assert_eq!(client.event("RESUMED")["reason"], "resume", "{}", unread.name);
        // It waits a while for its reader, and ends.
        assert_eq!(child.wait().unwrap().code(), Some(0), "{}", unread.name);
    }
}

#[test]
fn the_lease_is_renewed_while_the_command_runs() {
    let served = Served::new();
    let output = run(&served, &["quiesce", "--lease", "6s", "--", "sleep", "8"]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert_eq!(served.disk.closings(), 1);
}

#[test]
fn signals_go_to_the_command_and_the_disk_goes_on() {
    for (signal, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT"), (Signal::HUP, "HUP")] {
        let served = Served::new();
        let script = format!("trap 'echo got {name}; exit 3' {name}; echo ready; while :; do sleep 0.05; done");
        // A shell cannot trap what whoever started these tests had ignored (nohup(1), or a shell's background).
        let mut child = start(&served, &["quiesce", "--", "env", "--default-signal", "bash", "-c", &script]);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), format!("got {name}"));
        assert_eq!(child.wait().unwrap().code(), Some(3));
        assert!(served.disk.closed().is_none());
    }
    // A command that does not catch it.
    let served = Served::new();
    let mut child = start(&served, &["quiesce", "--", "sh", "-c", "echo ready; exec sleep 100"]);
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    assert!(served.disk.closed().is_none());
}

#[test]
fn a_killed_command_releases_its_hold() {
    let served = Served::new();
    let mut child = start(&served, &["quiesce", "--", "sh", "-c", "echo $$; exec sleep 100"]);
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(served.disk.closed().is_some());
    child.kill().unwrap();
    served.disk.wait_closed(false);
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    let orphan = Pid::from_raw(line.trim().parse().unwrap()).unwrap();
    kill_process(orphan, Signal::KILL).unwrap();
}

/// A command that lasts until the test makes this file, and ends with this status.
fn until_exists(file: &Path, status: i32) -> String {
    format!("while [ ! -e '{}' ]; do sleep 0.02; done; exit {status}", file.display())
}

#[test]
fn a_lost_hold_is_a_failure_of_the_command() {
    let dir = tempfile::tempdir().unwrap();
    let over = |name: &str| dir.path().join(name);
    let end = |name: &str| std::fs::write(over(name), "").unwrap();
    // Somebody resumes everything.
    let served = Served::new();
    let mut client = served.client();
    let child = start(&served, &["quiesce", "--", "sh", "-c", &until_exists(&over("first"), 0)]);
    client.event("QUIESCED");
    client.ask("resume", json!({"all": true})).unwrap();
    end("first");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    contains(&err(&output), &["another client resumed", "cannot be trusted"]);
    // The command's own failure is kept.
    let child = start(&served, &["quiesce", "--", "sh", "-c", &until_exists(&over("second"), 9)]);
    client.event("RESUMED");
    client.event("QUIESCED");
    client.ask("resume", json!({"all": true})).unwrap();
    end("second");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(9));
    contains(&err(&output), &["cannot be trusted"]);
    // The lease runs out because we were stopped, and nobody renewed it.
    let child = start(&served, &["quiesce", "--lease", "200ms", "--", "sh", "-c", &until_exists(&over("third"), 0)]);
    client.event("RESUMED");
    client.event("QUIESCED");
    kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
    client.event("LEASE_EXPIRED");
    end("third");
    kill_process(Pid::from_child(&child), Signal::CONT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", err(&output));
    contains(&err(&output), &["lease", "ran out", "cannot be trusted"]);
    // The daemon ends.
    let mut served = Served::new();
    let child = start(&served, &["quiesce", "--", "sh", "-c", &until_exists(&over("fourth"), 0)]);
    served.disk.wait_closed(true);
    served.stop();
    end("fourth");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", err(&output));
}

// The rest.
