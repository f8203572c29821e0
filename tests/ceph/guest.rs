//! A Linux guest on disks of a real Ceph cluster, through a real QEMU, judged by what `rbd export` finds there.

use std::fs;

use kit::ceph::{Cluster, serve};
use kit::guest::ext4::e2fsprogs;
use kit::guest::files::{FILES_JOB, check_snapshot, promised_so_far};
use kit::guest::{qemu, run, scratch, wait_until};
use virtioblkd::engine::cache::{CacheMode, CachePolicy};

const MIB: u64 = 1 << 20;

#[test]
fn an_fsync_is_in_the_cluster_when_it_returns() {
    for mode in CacheMode::ALL {
        let image = Cluster::shared().image(16 * MIB);
        let server = serve(&image, mode.name(), &[]);
        let job = qemu::fsync_job("echo \"discards: $(cat queue/discard_granularity)\"");
        let mut vm = qemu::linux(1, &job).vhost_user_disk(&server.socket(), "").start();
        let seen = vm.until_asked("before");
        let cache = if CachePolicy::from(mode).guest_sees_write_cache() { "write back" } else { "write through" };
        assert_eq!(seen, [&format!("cache: {cache}"), "bytes: 16777216", "discards: 65536"], "{mode}");
        vm.go();
        // The guest waits: every fsync has returned, and nothing else writes the cache out.
        vm.until_asked("after");
        let export = image.content();
        vm.go();
        vm.finish();
        let (status, log) = server.terminate();
        assert!(status.success(), "{mode}: {log}");
        let at_the_end = image.content();
        for block in 1..=16usize {
            let line = format!("block {block}\n");
            let expected: Vec<u8> = line.bytes().cycle().take(4096).collect();
            let place = block * 4096..(block + 1) * 4096;
            assert!(at_the_end[place.clone()] == expected, "{mode}: block {block} at the end");
            assert!(mode == CacheMode::Unsafe || export[place] == expected, "{mode}: block {block} after its fsync");
        }
    }
}

#[test]
fn every_snapshot_by_the_rbd_command_holds_every_file_that_was_fsynced() {
    for mode in ["none", "writeback", "directsync"] {
        let image = Cluster::shared().image(64 * MIB);
        let server = serve(&image, mode, &[]);
        let mut vm = qemu::linux(1, FILES_JOB).vhost_user_disk(&server.socket(), "").start();
        vm.until_asked("stop");
        let dir = scratch();
        for round in 0..3 {
            let promised = promised_so_far(&mut vm);
            let name = format!("snapshot-{round}");
            let taken = image.take_snapshot(&name, &[]);
            assert!(taken.status.success(), "{mode}: {}", String::from_utf8_lossy(&taken.stderr));
            let copy = dir.path().join(&name);
            fs::write(&copy, image.snapshot(&name)).expect("space for a copy");
            check_snapshot(&copy, promised, mode);
        }
        vm.go();
        vm.until_line("@last");
        vm.finish();
        let (status, log) = server.terminate();
        assert!(status.success(), "{mode}: {log}");
        let copy = dir.path().join("at-the-end");
        fs::write(&copy, image.content()).expect("space for a copy");
        run(e2fsprogs("e2fsck").arg("-fn").arg(&copy));
    }
}

#[test]
fn a_guest_sees_its_image_resized() {
    const JOB: &str = r#"
cat /sys/block/vda/size
ask grow
while [ "$(cat /sys/block/vda/size)" != 49152 ]; do sleep 0.1; done
yes grown | head -c 4096 | dd of=/dev/vda bs=4k seek=6143 count=1 iflag=fullblock conv=notrunc,fsync 2>/tmp/error || { cat /tmp/error; exit 1; }
"#;
    let image = Cluster::shared().image(16 * MIB);
    let server = serve(&image, "none", &[]);
    let mut vm = qemu::linux(1, JOB).vhost_user_disk(&server.socket(), "").start();
    assert_eq!(vm.until_asked("grow"), ["32768"]);
    image.cluster.rbd(&["resize", "--no-progress", "--size", "24M", &image.spec]);
    wait_until("the status has the new size", || server.status()["size"] == 24 * MIB);
    vm.go();
    vm.finish();
    let expected: Vec<u8> = "grown\n".bytes().cycle().take(4096).collect();
    assert!(image.content()[6143 * 4096..] == expected);
}
