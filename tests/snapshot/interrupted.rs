//! Snapshots whose client, guard, hold or disk is lost at whatever step: every disk goes on and every guest is thawed.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use kit::snapshot::{Daemon, Mood, err, hooks, wait_until};
use rustix::process::{Pid, Signal, kill_process};

use super::scene::*;

#[test]
fn a_hold_that_is_lost_makes_no_snapshot() {
    let scene = Scene::new(Mood::Good);
    let resumes = r#"exec:"$CTL" --control "$VIRTIOBLK_CONTROLS" resume --all >&2"#;
    scene.fails("filesystem", &["--to", resumes], &["was not held", "resumed already"]);
    // We sleep longer than the lease, and nobody notices but the daemon.
    let exec = "exec:touch $PLACE/here; while [ ! -e $PLACE/over ]; do sleep 0.02; done";
    let mut child = scene.command("crash", &["--lease", "5s", "--to", exec]).spawn().unwrap();
    wait_for(&scene.path("here"));
    signal(&child, Signal::STOP);
    wait_until("the lease ran out", || !scene.disk.is_held());
    File::create(scene.path("over")).unwrap();
    signal(&child, Signal::CONT);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    scene.is_over();
}

#[test]
fn a_disk_that_misses_the_deadline_releases_all_disks() {
    let dir = tempfile::tempdir().unwrap();
    let disks = ["a", "b", "c"].map(|name| Daemon::with_image(dir.path(), name, 1 << 20));
    let all: Vec<&Daemon> = disks.iter().collect();
    let target = dir.path().join("target");
    let exec = format!("exec:echo $VIRTIOBLK_DISKS > {0}; echo $VIRTIOBLK_DISK_3 >> {0}", target.display());
    // Stopped once all have answered the first question: a hook is the place.
    let stop = format!("kill -STOP {}", disks[1].child.id());
    let directory = hooks(dir.path(), &stop, "true");
    let late = ["--timeout", "5s", "--to", &exec, "--hooks", directory.to_str().unwrap()];
    let output = snapshot(&all, "crash", &late).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &[disks[1].control().to_str().unwrap(), "does not answer in time"]);
    assert!(!disks[0].is_held() && !disks[2].is_held(), "released");
    assert!(!target.exists());
    signal(&disks[1].child, Signal::CONT);
    wait_until("the late one goes on, too", || !disks[1].is_held());
    // And now well.
    let receipt = receipt(&snapshot(&all, "crash", &["--json", "--to", &exec]).output().unwrap());
    let images: Vec<String> = disks.iter().map(|disk| disk.image.display().to_string()).collect();
    assert_eq!(fs::read_to_string(&target).unwrap(), format!("{}\n{}\n", images.join(" "), images[2]));
    assert_eq!(receipt["disks"].as_array().unwrap().len(), 3);
}

/// Kills the client with `how` once `marker` is there; then everything goes on and is thawed. What it printed.
pub(super) fn killed(scene: &Scene, mut command: Command, marker: &Path, how: Signal) -> Output {
    let child = command.spawn().unwrap();
    wait_for(marker);
    signal(&child, how);
    let output = child.wait_with_output().unwrap();
    assert_ne!(output.status.code(), Some(0), "{output:?}");
    scene.is_over();
    output
}

#[test]
fn a_client_killed_at_any_step_leaves_nothing_held_or_frozen() {
    for how in [Signal::KILL, Signal::TERM, Signal::INT, Signal::HUP] {
        if how == Signal::HUP && kit::ignores_sighup() {
            continue;
        }
        // In the host's hook: the guest was never frozen, the hook's thaw is called.
        let scene = Scene::new(Mood::Good);
        let thaw = "echo thawed >> $JOURNAL";
        let directory = hooks(scene.dir.path(), "touch $PLACE/here; sleep 100", thaw);
        let options = ["--hooks", directory.to_str().unwrap(), "--to", "exec:true"];
        killed(&scene, scene.command("application", &options), &scene.path("here"), how);
        wait_until("the hook thaws", || scene.agent.journaled() == ["thawed"]);
        // While the guest freezes.
        let scene = Scene::new(Mood::Late(Duration::from_secs(3)));
        let child = scene.command("filesystem", &["--to", "exec:true"]).spawn().unwrap();
        scene.agent.wait_for("guest-fsfreeze-freeze");
        signal(&child, how);
        let output = child.wait_with_output().unwrap();
        assert_ne!(output.status.code(), Some(0), "{output:?}");
        scene.agent.wait_thawed();
        assert_eq!(scene.agent.journaled(), ["freeze", "thaw"]);
        scene.is_over();
        // While the disks are held, with a command that would go on.
        let scene = Scene::new(Mood::Good);
        let directory = hooks(scene.dir.path(), "true", thaw);
        let exec = "exec:touch $PLACE/here; exec sleep 100";
        let options = ["--hooks", directory.to_str().unwrap(), "--to", exec];
        let output = killed(&scene, scene.command("application", &options), &scene.path("here"), how);
        wait_until("guest and hook are thawed", || scene.agent.journaled() == ["freeze", "thaw", "thawed"]);
        if how != Signal::KILL {
            assert_eq!(output.status.code(), Some(1));
            contains(&err(&output), &["interrupted by a signal"]);
        }
        // While the guest thaws.
        let scene = Scene::new(Mood::LateThaw(Duration::from_millis(500)));
        let child = scene.command("filesystem", &["--to", "exec:true"]).spawn().unwrap();
        scene.agent.wait_for("guest-fsfreeze-thaw");
        signal(&child, how);
        child.wait_with_output().unwrap();
        scene.agent.wait_thawed();
        scene.is_over();
    }
}

#[test]
fn a_guard_that_is_killed_is_replaced() {
    let scene = Scene::new(Mood::Good);
    let mut command = scene.command(
        "filesystem",
        &["--json", "--to", "exec:touch $PLACE/here; while [ -e $PLACE/here ]; do sleep 0.02; done"],
    );
    let child = command.spawn().unwrap();
    wait_for(&scene.path("here"));
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let guard = children
        .split_whitespace()
        .find(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().contains("snapshot-guard"));
    kill_process(Pid::from_raw(guard.expect("a guard").parse().unwrap()).unwrap(), Signal::KILL).unwrap();
    fs::remove_file(scene.path("here")).unwrap();
    let receipt = receipt(&child.wait_with_output().unwrap());
    assert_eq!(receipt["level"], "filesystem");
    scene.agent.wait_thawed();
    scene.is_over();
}

#[test]
fn a_client_that_stands_still_does_not_keep_the_guest_frozen() {
    let scene = Scene::new(Mood::Good);
    let exec = "exec:touch $PLACE/here; while [ ! -e $PLACE/over ]; do sleep 0.02; done";
    let short = ["--timeout", "5s", "--lease", "5s", "--to", exec];
    let mut child = scene.command("filesystem", &short).spawn().unwrap();
    wait_for(&scene.path("here"));
    signal(&child, Signal::STOP);
    scene.agent.wait_thawed();
    File::create(scene.path("over")).unwrap();
    signal(&child, Signal::CONT);
    assert_eq!(child.wait().unwrap().code(), Some(1), "the lease ran out");
    scene.is_over();
}
