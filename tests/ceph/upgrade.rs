//! Upgrades in place on Ceph RBD: the image's lock and the state file go along, librbd's cache is empty when they do, and
//! nothing acknowledged is missing.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kit::ceph::{Cluster, serve, virtioblkd};
use kit::driver::load::{Load, SIZE, holds};
use kit::guest;
use kit::guest::{Server, tell};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

#[test]
fn an_image_goes_over_with_its_lock_in_every_mode() {
    let cluster = Cluster::shared();
    let image = cluster.image(SIZE as u64);
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).into_os_string().into_string().expect("a plain path");
    let (pid_file, state_file) = (path("pid"), path("state"));
    let more = ["--pid-file", &pid_file, "--rbd-state-file", &state_file, "--rbd-lock", "exclusive"];
    let server = serve(&image, "none", &more);
    let load = Load::start(&server.socket());
    load.wait_for(50);
    let mut pauses = Vec::new();
    for mode in ["writeback", "writethrough", "unsafe", "directsync", "none"] {
        pauses.push(server.upgrade(&["--cache", mode]));
        load.wait_for(50);
        let status = server.status();
        assert_eq!(status["cache-mode"], json!(mode));
        assert_eq!(status["rbd"]["lock"], "held", "{status}");
    }
    // A program that does not take over costs neither the lock nor the state file.
    assert!(!server.ctl(&["upgrade", "--", "--rbd", "rbd/no-such-image"]).status.success());
    load.wait_for(50);
    assert_eq!(server.status()["rbd"]["lock"], "held");
    let token = server.ctl_ok(&["quiesce"]);
    let acknowledged = load.acknowledged();
    holds(&image.content(), &acknowledged, "after the upgrades");
    server.ctl_ok(&["resume", token.trim()]);
    let acknowledged = load.stop();
    server.quit();
    assert!(!fs::exists(pid_file).expect("a directory of ours"), "the pid file is left behind");
    holds(&image.content(), &acknowledged, "at the end");
    pauses.sort_by(f64::total_cmp);
    let (median, longest) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
    tell(&format!("{} upgrades, paused for {median:.0} ms in the median, {longest:.0} ms at most", pauses.len()));
}

/// Has the new daemon killed after it took the lock, while the one before it is stopped. Which goes on then; `None`: that
/// was stopped too late, and the guest has gone over.
fn dies_with_the_lock(server: &Server, mut new: Command, log: &Path) -> Option<i32> {
    let old = server.status()["daemon"]["pid"].as_i64().expect("a number") as i32;
    let pid = Pid::from_raw(old).expect("a process");
    let mut new = new
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(log).expect("a log"))
        .spawn()
        .expect("virtioblkd");
    let said = |words: &str| fs::read_to_string(log).expect("a log").contains(words);
    let end = Instant::now() + guest::WAIT_TIMEOUT;
    while !said("state is taken over") {
        assert!(Instant::now() < end, "{}", fs::read_to_string(log).expect("a log"));
        std::thread::yield_now();
    }
    // It hears that the lock is taken, and says that the guest goes over, after this only.
    kill_process(pid, Signal::STOP).expect("the old daemon");
    guest::wait_until("the image is claimed", || said("the image is claimed"));
    std::thread::sleep(Duration::from_millis(300));
    let too_late = said("queue 0 runs");
    if !too_late {
        new.kill().expect("our own child");
    }
    // One that serves ends with the test.
    let ended = std::thread::spawn(move || new.wait());
    if !too_late {
        ended.join().expect("no panic").expect("our own child");
    }
    kill_process(pid, Signal::CONT).expect("the old daemon");
    (!too_late).then_some(old)
}

/// The new daemon is killed when it has the image's lock and not yet the guest: the old one takes both back. Without a
/// state file nobody can say that the lock's owner is dead, and Ceph finds out by itself.
#[test]
fn a_new_daemon_that_dies_with_the_lock_gives_it_back() {
    // As it may be stopped, killed and fenced: a cluster of its own.
    let cluster = Cluster::start(&[]);
    // Half a minute else. Clients say something every 5 s: with less, one that lives is dropped as well.
    cluster.ceph(&["tell", "osd.0", "config", "set", "osd_client_watch_timeout", "12"]);
    for with_state_file in [true, false] {
        let image = cluster.image(SIZE as u64);
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name).into_os_string().into_string().expect("a plain path");
        let state_file = path("state");
        let state = ["--rbd-state-file", &state_file];
        let more = if with_state_file { &state[..] } else { &[] };
        let server = serve(&image, "writeback", &[more, &["--log-level", "debug"]].concat());
        let load = Load::start(&server.socket());
        load.wait_for(50);
        let new = || {
            let mut new = virtioblkd(&cluster, &image.spec, "writeback", &server.socket(), &server.control());
            new.args(more).args(["--log-level", "debug", "--take-over"]).arg(server.control());
            new
        };
        let pid = (0..10).find_map(|_| dies_with_the_lock(&server, new(), Path::new(&path("new.log"))));
        let (pid, since) = (pid.expect("the old daemon is stopped in time"), Instant::now());
        load.wait_for(50);
        let waited = since.elapsed().as_secs_f32();
        let status = server.status();
        assert_eq!((&status["rbd"]["lock"], &status["daemon"]["pid"]), (&json!("held"), &json!(pid)), "{status}");
        server.wait_for_log(&["the upgrade failed"]);
        server.ctl_ok(&["quiesce"]);
        holds(&image.content(), &load.acknowledged(), "after an upgrade that failed");
        server.ctl_ok(&["resume", "--all"]);
        load.stop();
        tell(&format!("state file {with_state_file}: the guest goes on after {waited:.1} s"));
    }
}
