//! Upgrades in place on Ceph RBD: the image's lock and the state file go along, librbd's cache is empty when they do, and
//! nothing acknowledged is missing.

mod ceph;
mod driver;
mod guest;

use std::fs;

use ceph::{Cluster, serve};
use driver::load::{Load, SIZE, holds};
use guest::tell;
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
