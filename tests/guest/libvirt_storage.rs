//! `virsh start` on storage that does not answer: it fails within the hook's own bounds, with our sentence, and the storage's
//! return leaves nothing of the failed start. SKIPPED where libvirt or FUSE is missing or if we are not root; in `make
//! check-libvirt` only.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use kit::guest::libvirt::DOMAIN;
use kit::guest::system_libvirt::SystemLibvirt;
use kit::guest::wait_until;
use kit::stall::directory::Stopping;

use crate::libvirt_hook::{domain, image, is_long_run, status};
use crate::libvirt_systemd::units;

/// `START_TIMEOUT` of the hook, its `END_TIMEOUT`, which is for `release` of a libvirt that gives no reason, and room for a busy
/// machine. Nothing else on the way waits for the image.
const BOUND: Duration = Duration::from_secs(20 + 60 + 60);

fn starts_and_ends_in_time(libvirt: &SystemLibvirt, storage: &Stopping) {
    let path = storage.path().join("hung.img");
    fs::File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("it answers");
    let good = format!("file='{}'", image(libvirt, "good.img").display());
    let hung = format!("file='{}' cache='writeback' user='root' locking='off'", path.display());
    let disks = [("vda", good.as_str()), ("vdb", hung.as_str())];
    libvirt.virsh_ok(&["define", &domain(libvirt, "exit", &disks)]);
    storage.stop();
    let began = Instant::now();
    let failed = libvirt.virsh(&["start", DOMAIN]);
    let took = began.elapsed();
    let error = String::from_utf8_lossy(&failed.stderr).into_owned();
    let words = [&format!("domain {DOMAIN}"), "disk vdb", "was not ready in time", "does its image answer?"];
    assert!(!failed.status.success() && words.iter().all(|word| error.contains(*word)), "{error}");
    assert!(took < BOUND, "{took:?}");
    kit::guest::tell(&format!("a start on storage that does not answer failed after {took:?}"));
    assert!(storage.waiting() > 0, "the daemon never reached its storage");
    assert!(!libvirt.left().iter().any(|name| name.contains("vda")), "of the good disk: {:?}", libvirt.left());

    // The daemon cannot even be killed before its storage answers. Then it is gone, and the domain starts.
    storage.go_on();
    libvirt.virsh_ok(&["start", DOMAIN]);
    for target in ["vda", "vdb"] {
        wait_until("QEMU has its disk", || status(libvirt, target)["connected"] == true);
    }
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
}

fn storage() -> Option<Stopping> {
    let mounted = Stopping::mount();
    mounted.map_err(|why| kit::guest::tell(&format!("SKIPPED: no storage that hangs: {why}"))).ok()
}

#[test]
fn a_start_on_storage_that_does_not_answer_fails_in_time() {
    if !is_long_run() {
        return;
    }
    let Some(storage) = storage() else { return };
    let Some(libvirt) = SystemLibvirt::start(50) else { return };
    starts_and_ends_in_time(&libvirt, &storage);
}

#[test]
fn a_unit_on_storage_that_does_not_answer_fails_in_time() {
    if !is_long_run() {
        return;
    }
    let Some(storage) = storage() else { return };
    let shared: &Path = &storage.path();
    let Some(libvirt) = SystemLibvirt::start_on_systemd_with(51, &[shared]) else { return };
    starts_and_ends_in_time(&libvirt, &storage);
    assert_eq!(units(&libvirt), Vec::<String>::new());
}
