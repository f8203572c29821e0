//! Upgrades between this build and another one, such as a release's or that of the commit before.

use std::fs;
use std::path::Path;

use kit::driver::load::{Load, holds};
use kit::programs;
use kit::upgrade::Disk;

/// `VIRTIOBLKD_OTHER` names the other build's virtioblkd; `make check-upgrade COMMIT=...` makes one.
#[test]
fn a_guest_under_load_goes_to_another_build_and_back_in_every_mode() {
    let Some(other) = std::env::var_os("VIRTIOBLKD_OTHER") else {
        return kit::guest::tell("SKIPPED: no other build (VIRTIOBLKD_OTHER): make check-upgrade makes one");
    };
    let ours = programs::virtioblkd();
    for mode in ["none", "directsync", "writeback", "writethrough", "unsafe"] {
        let disk = Disk::serve(&["--cache", mode]);
        let load = Load::start(&disk.path("vhost"));
        for binary in [Path::new(&other), &ours, Path::new(&other), &ours] {
            load.wait_for(50);
            let figures = disk.ctl_ok(&["upgrade", "--json", "--binary", binary.to_str().expect("a plain path")]);
            let serves = fs::read_link(format!("/proc/{}/exe", disk.pid().as_raw_nonzero())).expect("it runs");
            assert_eq!(serves, fs::canonicalize(binary).expect("a program"), "{mode}: {figures}");
            load.wait_for(50);
            let token = disk.ctl_ok(&["quiesce"]);
            holds(&disk.image(), &load.acknowledged(), &format!("{mode}: {}", binary.display()));
            disk.ctl_ok(&["resume", token.trim()]);
        }
        load.stop();
        assert_eq!(disk.status()["total"]["errors"], 0, "{mode}");
        disk.end();
    }
}
