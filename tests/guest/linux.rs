//! A Linux guest on disks that virtioblkd serves, through a real QEMU, judged from the host's side: what the guest is
//! told in each cache mode, that a guest's fsync is durable when it returns, that a quiesced disk holds still and holds
//! what was promised, and that `stop`/`cont` and quiesce/resume under load corrupt nothing.

use std::fs;
use std::path::Path;

use kit::guest::ext4::e2fsprogs;
use kit::guest::files::{FILES_JOB, check_snapshot, promised_so_far};
use kit::guest::oracle::{self, LoopDevice};
use kit::guest::qemu::FSYNCS;
use kit::guest::{Qmp, Server, qemu, run, scratch, sparse_image, tell, wait_until};
use serde_json::json;
use virtioblkd::engine::cache::{CacheMode, CachePolicy};

const MIB: u64 = 1 << 20;

/// Shows the disk, then fsyncs blocks.
fn fsync_job() -> String {
    qemu::fsync_job("echo \"serial: $(cat serial)\"; echo \"logical block: $(cat queue/logical_block_size)\"")
}

fn check_fsync_job_content(image: &Path) {
    for block in 1..=FSYNCS {
        let line = format!("block {block}\n");
        let expected: Vec<u8> = line.bytes().cycle().take(4096).collect();
        assert_eq!(oracle::read_at(image, block * 4096, 4096), expected, "block {block}");
    }
}

#[test]
fn each_mode_shows_its_cache_and_an_fsync_is_durable_when_it_returns() {
    for mode in CacheMode::ALL {
        let dir = scratch();
        let image = sparse_image(dir.path(), 64 * MIB);
        let server = Server::start(&image, mode, &["--serial", "kit-42", "--logical-block-size", "512"]);
        let mut vm = qemu::linux(1, &fsync_job()).vhost_user_disk(&server.socket(), "").start();

        let seen = vm.until_asked("before");
        let sees_write_cache = CachePolicy::from(mode).guest_sees_write_cache();
        let cache = if sees_write_cache { "write back" } else { "write through" };
        let expected = [&format!("cache: {cache}"), "bytes: 67108864", "serial: kit-42", "logical block: 512"];
        assert_eq!(seen, expected, "{mode}");
        let figures = || ["writes", "flushes", "syncs"].map(|figure| server.total(figure));
        let before = figures();
        vm.go();

        // The guest waits: every fsync has returned, and nothing else makes the image clean.
        vm.until_asked("after");
        let dirty = oracle::dirty_pages(&image);
        let after = figures();
        let [writes, flushes, syncs] = [0, 1, 2].map(|figure| after[figure] - before[figure]);
        assert!(writes >= FSYNCS, "{mode}: {writes} writes");
        assert_eq!(flushes, if sees_write_cache { FSYNCS } else { 0 }, "{mode}: flushes of the guest");
        match mode {
            CacheMode::None | CacheMode::Writeback => assert_eq!(syncs, FSYNCS, "{mode}: one sync a flush"),
            CacheMode::Unsafe => assert_eq!(syncs, 0, "{mode}"),
            // Each write is durable by itself, by a sync or natively: the page cache tells, and below the device does.
            CacheMode::Directsync | CacheMode::Writethrough => {}
        }
        if mode != CacheMode::Unsafe {
            assert_eq!(dirty.unwrap_or(0), 0, "{mode}: pages that an fsync in the guest left dirty on the host");
        }
        check_fsync_job_content(&image);
        vm.go();
        vm.finish();
    }
}

#[test]
fn flushes_that_reach_the_device_are_as_many_as_with_qemus_own_disk() {
    let dir = scratch();
    let Some(disk) = LoopDevice::attach(&sparse_image(dir.path(), 64 * MIB)) else { return };
    let flushes_during = |mut vm: qemu::Vm| {
        vm.until_asked("before");
        let before = disk.flushes();
        vm.go();
        vm.until_asked("after");
        let flushes = disk.flushes() - before;
        vm.go();
        vm.finish();
        flushes
    };
    let mut table = format!("flushes at the device for {FSYNCS} fsyncs in the guest:\n");
    table += &format!("{:14}{:>12}{:>12}\n", "mode", "virtioblkd", "QEMU's own");
    for mode in CacheMode::ALL {
        let server = Server::start(disk.path(), mode, &[]);
        let ours = flushes_during(qemu::linux(1, &fsync_job()).vhost_user_disk(&server.socket(), "").start());
        drop(server);
        let theirs = flushes_during(qemu::linux(1, &fsync_job()).own_disk(disk.path(), mode).start());
        table += &format!("{:14}{ours:>12}{theirs:>12}\n", mode.name());
        match mode {
            CacheMode::Unsafe => assert_eq!((ours, theirs), (0, 0), "{mode}\n{table}"),
            CacheMode::None | CacheMode::Writeback => {
                assert_eq!((ours, theirs), (FSYNCS, FSYNCS), "{mode}\n{table}")
            }
            CacheMode::Directsync | CacheMode::Writethrough => {
                // A durable write may cost the device more than one flush, never less.
                assert!(ours >= FSYNCS, "{mode}\n{table}");
                // QEMU 10.0.13 does not flush the first such write after it opened the image (10.0.2 does).
                assert!(theirs >= FSYNCS - 1, "{mode}\n{table}");
            }
        }
        check_fsync_job_content(disk.path());
    }
    tell(&table);
}

/// Random writes that fio verifies while it goes on, from three processes on their own parts, on every queue.
const FIO_JOB: &str = r#"
cat >/tmp/fio.job <<'FIO'
[global]
filename=/dev/vda
direct=1
ioengine=libaio
iodepth=16
rw=randwrite
size=16m
verify=crc32c
verify_backlog=256
verify_fatal=1
serialize_overlap=1
fsync=64
time_based
runtime=12
[small]
bs=4k
offset=0
[odd]
bs=1536
offset=16m
[large]
bs=64k
offset=32m
FIO
ls /sys/block/vda/mq | wc -l
echo "@begin"
fio --eta=never --output=/tmp/fio.out /tmp/fio.job || { cat /tmp/fio.out; exit 1; }
echo "@end"
sync
sha256sum </dev/vda
ask compare
"#;

#[test]
fn fio_verifies_under_stop_and_cont_and_quiesce_and_resume() {
    let dir = scratch();
    let image = sparse_image(dir.path(), 64 * MIB);
    let server = Server::start(&image, CacheMode::None, &["--num-queues", "4"]);
    let mut vm = qemu::linux_full(2, FIO_JOB).vhost_user_disk(&server.socket(), ",num-queues=4").start();
    let queues = vm.until_line("@begin");
    // Linux uses no more queues than it has CPUs.
    assert_eq!(queues[0], "2");

    let mut monitor = vm.qmp();
    let mut control = Qmp::connect(&server.control());
    let mut quiesce = || {
        let reply = control.execute("quiesce", json!({"timeout-ms": 60_000, "lease-ms": 120_000}));
        reply["token"].as_str().expect("a token").to_owned()
    };
    let mut rounds = 0;
    let mut ended = false;
    while !ended {
        // Pause the guest under load.
        monitor.execute("stop", json!({}));
        let paused = oracle::digest(&image);
        assert_eq!(oracle::digest(&image), paused, "a stopped guest's disk changed");
        monitor.execute("cont", json!({}));
        let writes = server.total("writes");
        wait_until("fio writes on, or has ended", || {
            ended = vm.said_so_far("@end").is_some();
            ended || server.total("writes") > writes
        });

        // Hold the disk under load.
        let token = quiesce();
        assert_eq!(oracle::dirty_pages(&image).unwrap_or(0), 0, "a quiesced disk is durable");
        let held = oracle::digest(&image);
        assert_eq!(oracle::digest(&image), held, "a quiesced disk changed");
        // Pause the guest while its disk is held: must not wait for the hold's end.
        monitor.execute("stop", json!({}));
        monitor.execute("cont", json!({}));
        assert_eq!(oracle::digest(&image), held, "a quiesced disk changed at stop or cont");
        Qmp::connect(&server.control()).execute("resume", json!({ "token": token }));
        rounds += 1;
    }
    // The loop ends with fio, and a round lets it write.
    assert!(rounds >= 3, "only {rounds} rounds while fio ran");
    let sum = vm.until_asked("compare");
    assert_eq!(sum, [format!("{}  -", oracle::digest(&image))], "the guest and the host read different disks");
    vm.go();
    vm.finish();
    tell(&format!("fio verified clean over {rounds} rounds of stop, cont, quiesce, stop, cont, resume"));
}

#[test]
fn a_snapshot_of_a_quiesced_disk_holds_every_file_that_was_fsynced() {
    for mode in [CacheMode::None, CacheMode::Writeback, CacheMode::Directsync] {
        let dir = scratch();
        let image = sparse_image(dir.path(), 64 * MIB);
        let server = Server::start(&image, mode, &[]);
        let mut vm = qemu::linux(1, FILES_JOB).vhost_user_disk(&server.socket(), "").start();
        vm.until_asked("stop");
        for round in 0..3 {
            // Under load, and with a few more files each time. The copy is what a snapshot would be.
            let promised = promised_so_far(&mut vm);
            let snapshot = dir.path().join(format!("snapshot-{round}"));
            // Compared a moment later: a disk that is not held has changed by then.
            let copy = "cp --sparse=always \"$1\" \"$2\" && sleep 0.5 && cmp \"$1\" \"$2\"";
            let (from, to) = (image.to_str().expect("a plain path"), snapshot.to_str().expect("a plain path"));
            server.ctl_ok(&["quiesce", "--", "sh", "-c", copy, "sh", from, to]);
            check_snapshot(&snapshot, promised, mode.name());
        }
        vm.go();
        vm.until_line("@last");
        vm.finish();
        run(e2fsprogs("e2fsck").args(["-fn"]).arg(&image));
    }
}

#[test]
fn a_guest_goes_on_after_its_server_was_restarted_in_order() {
    let dir = scratch();
    let image = sparse_image(dir.path(), 64 * MIB);
    let mut server = Server::start(&image, CacheMode::None, &[]);
    let mut vm = qemu::linux(1, FILES_JOB).vhost_user_disk(&server.socket(), "").start();
    vm.until_asked("stop");
    for _ in 0..3 {
        vm.until_line("@file ");
        server = server.restart(&image, CacheMode::None, &[]);
        wait_until("QEMU comes back", || server.status()["connected"] == true);
        // Said before the restart or after it; written after it.
        wait_until("the guest writes on", || server.total("writes") > 0);
    }
    vm.until_line("@file ");
    vm.go();
    vm.until_line("@last");
    vm.finish();
    run(e2fsprogs("e2fsck").arg("-fn").arg(&image));
}

/// vda: an ordinary disk; vdb: the same read-only; vdc: sectors of 4096 bytes.
const FILESYSTEM_JOB: &str = r#"
fail() { echo "$*"; exit 1; }
cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdc/ro
cat /sys/block/vda/queue/logical_block_size /sys/block/vdc/queue/logical_block_size
cat /sys/block/vda/queue/discard_granularity /sys/block/vdc/queue/discard_granularity

dd if=/dev/zero of=/dev/vdb bs=4k count=1 2>/tmp/error && fail "a read-only disk took a write"
dd if=/dev/vdb bs=4k count=1 2>/dev/null | tr -d '\0' | grep -q "read me" || fail "a read-only disk cannot be read"

mkfs.ext4 -q -b 4096 /dev/vdc && mount -t ext4 /dev/vdc /mnt || fail "no ext4 on sectors of 4096 bytes"
yes sectors | head -c 1000000 >/mnt/file
umount /mnt
mount -t ext4 /dev/vdc /mnt || fail "no second mount"
yes sectors | head -c 1000000 | cmp - /mnt/file || fail "another file came back"
umount /mnt

mkfs.ext4 -q -E lazy_itable_init=0 /dev/vda && mount -t ext4 /dev/vda /mnt || fail "no ext4"
mkdir /mnt/small
for n in $(seq 1 200); do echo "small $n" >/mnt/small/$n; done
dd if=/dev/urandom of=/mnt/big bs=1M count=24 2>/dev/null || fail "no room"
sync
ask full
rm /mnt/big
sync
fstrim /mnt || fail "no discard"
sync
ask trimmed
umount /mnt
"#;

#[test]
fn ext4_discard_read_only_and_large_sectors() {
    let dir = scratch();
    let disk = |name: &str, size| {
        fs::create_dir(dir.path().join(name)).expect("a directory");
        sparse_image(&dir.path().join(name), size)
    };
    let (ordinary, read_only, large) = (disk("a", 64 * MIB), disk("b", MIB), disk("c", 64 * MIB));
    let mut read_me = b"read me".to_vec();
    read_me.resize(MIB as usize, 0);
    fs::write(&read_only, &read_me).expect("room");
    let a = Server::start(&ordinary, CacheMode::Writeback, &["--discard", "unmap"]);
    let b = Server::start(&read_only, CacheMode::Writeback, &["--read-only"]);
    let c = Server::start(&large, CacheMode::None, &["--logical-block-size", "4096", "--discard-granularity", "32K"]);
    let mut vm = qemu::linux(1, FILESYSTEM_JOB)
        .vhost_user_disk(&a.socket(), "")
        .vhost_user_disk(&b.socket(), "")
        .vhost_user_disk(&c.socket(), "")
        .start();

    assert_eq!(vm.until_asked("full"), ["0", "1", "0", "512", "4096", "4096", "32768"]);
    let full = oracle::allocated(&ordinary);
    assert!(full >= 24 * MIB, "24 MiB of random bytes take {full} bytes");
    vm.go();
    vm.until_asked("trimmed");
    let trimmed = oracle::allocated(&ordinary);
    assert!(trimmed + 20 * MIB < full, "fstrim freed too little: {full} bytes before, {trimmed} after");
    vm.go();
    vm.finish();
    for image in [&ordinary, &large] {
        run(e2fsprogs("e2fsck").arg("-fn").arg(image));
    }
    assert!(fs::read(&read_only).expect("readable") == read_me, "a read-only image changed");
    assert!(a.total("discards") > 0, "{}", a.status());
}

/// Says the size whenever it is asked to, and writes at the end of the disk.
const RESIZE_JOB: &str = r#"
end() { dd if=/dev/zero bs=512 count=1 2>/dev/null | tr '\0' "$1" |
    dd of=/dev/vda bs=512 seek=$(($(cat /sys/block/vda/size) - 1)) count=1 conv=notrunc,fsync 2>/tmp/error || { cat /tmp/error; exit 1; }; }
echo "sectors: $(cat /sys/block/vda/size)"
ask grow
while [ "$(cat /sys/block/vda/size)" != 262144 ]; do sleep 0.1; done
end g
ask restart
while [ "$(cat /sys/block/vda/size)" != 393216 ]; do
    # Something must start the rings again, and QEMU reconnects only then.
    dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null
    sleep 0.1
done
end r
"#;

#[test]
fn a_grown_image_reaches_the_running_guest() {
    let dir = scratch();
    let image = sparse_image(dir.path(), 64 * MIB);
    let server = Server::start(&image, CacheMode::None, &["--logical-block-size", "512"]);
    let mut vm = qemu::linux(1, RESIZE_JOB).vhost_user_disk(&server.socket(), "").start();
    assert_eq!(vm.until_asked("grow"), ["sectors: 131072"]);
    assert_eq!(server.ctl_ok(&["resize", "128M"]), "the guest's disk now has 128 MiB (134217728 bytes)\n");
    vm.go();
    vm.until_asked("restart");
    assert_eq!(oracle::read_at(&image, 128 * MIB - 512, 512), [b'g'; 512]);
    // While nobody serves it.
    let grow = image.clone();
    let server = server.restart_after(&image, CacheMode::None, &["--logical-block-size", "512"], move || {
        fs::File::options().write(true).open(&grow).and_then(|file| file.set_len(192 * MIB)).expect("a larger image");
    });
    vm.go();
    vm.finish();
    assert_eq!(oracle::read_at(&image, 192 * MIB - 512, 512), [b'r'; 512]);
    // A smaller one is refused.
    let shrunk = fs::File::options().write(true).open(&image).and_then(|file| file.set_len(64 * MIB));
    shrunk.expect("a smaller image");
    let refused = server.ctl(&["resize"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--force"), "{refused:?}");
    server.ctl_ok(&["resize", "--force"]);
    assert_eq!(server.status()["size"], 64 * MIB);
}
