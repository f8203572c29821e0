//! What libvirt waits for: the hook ends in time although something that it asks does not answer. In `make check-libvirt` only,
//! because the hook's own limits are seconds. tests/guest has a store that does not answer the daemon.

use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use kit::programs;

use crate::host_crash::World;

#[test]
fn a_filesystem_that_answers_no_request_for_a_lock_fails_the_start() {
    if std::env::var_os("VIRTIOBLKD_LIBVIRT").is_none_or(|value| value != "long") {
        eprintln!("SKIPPED: a long test of libvirt's hook: make check-libvirt runs it");
        return;
    }
    let mut world = World::new();
    // In the place of virtioblkctl, whose call does not return.
    let directory = tempfile::tempdir().expect("room");
    symlink(programs::virtioblkd(), directory.path().join("virtioblkd")).expect("room");
    programs::make_script(&directory.path().join("virtioblkctl"), "#!/bin/sh\nexec sleep 1000\n");
    world.host.launcher.program = directory.path().join("virtioblkd");
    let began = Instant::now();
    let error = world.call("prepare", "begin").expect_err("it is not known whether the image is used");
    assert!(error.contains("disk vda") && error.contains("does not answer a request for a lock"), "{error}");
    // START_TIMEOUT, the end of the call and of the daemon, and room for a busy machine.
    assert!(began.elapsed() < Duration::from_secs(20 + 4 + 5 + 60), "{:?}", began.elapsed());
    assert_eq!(world.left(), Vec::<String>::new());
}
