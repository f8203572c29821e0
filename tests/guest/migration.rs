//! Live migration between two QEMUs and two servers on one image, under load: what a read stored in the guest's memory
//! arrives, to the byte, fio's verification never fails, and the image's locks go along.
//!
//! The kernel's `init_on_alloc` hides what is missing from the dirty log, since it writes each page before we do; Debian
//! has it on, and here it is off.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kit::guest;
use kit::guest::{Qmp, Server, Vm, oracle, output, qemu, scratch, tell, wait_until};
use serde_json::json;
use virtioblkd::engine::cache::CacheMode;

const MIB: u64 = 1 << 20;
/// What the guest reads through its page cache.
const READ: u64 = 16 * MIB;

/// Reads the first part of the disk into the page cache again and again, and looks at what is cached more than once
/// before it drops it: some of it is read on one host and looked at on the other. Meanwhile fio verifies what it writes.
const JOB: &str = r#"
cat >/tmp/fio.job <<'FIO'
[verified]
filename=/dev/vda
direct=1
ioengine=libaio
iodepth=8
rw=randrw
bs=4k
offset=16m
size=8m
verify=crc32c
verify_backlog=64
verify_fatal=1
serialize_overlap=1
time_based
runtime=5
FIO
# Else the last reader's close would drop the page cache.
exec 3</dev/vda
wanted=$(dd if=/dev/vda bs=1M count=16 iflag=direct 2>/dev/null | md5sum)
look() {
    found=$(dd if=/dev/vda bs=1M count=16 2>/dev/null | md5sum)
    [ "$found" = "$wanted" ] || { echo "@@exit: what is cached differs"; exit 1; }
}
( while [ ! -e /tmp/stop ]; do
    echo 1 >/proc/sys/vm/drop_caches
    for n in 1 2 3 4 5 6; do look; sleep 0.3; done
    echo "@looked"
  done ) &
looks=$!
( while [ ! -e /tmp/stop ]; do
    fio --eta=never --output=/tmp/fio.out /tmp/fio.job || { cat /tmp/fio.out; echo "@@exit: fio"; exit 1; }
  done ) &
writes=$!
ask stop
touch /tmp/stop
wait $looks || exit 1
wait $writes || exit 1
sync
sha256sum </dev/vda
ask compare
"#;

fn served(image: &Path) -> Server {
    Server::start(image, CacheMode::None, &["--locking", "in-use"])
}

/// A machine for the job; the other one must be the same.
fn machine(server: &Server) -> qemu::Qemu {
    let options = format!("{} init_on_alloc=0", qemu::KERNEL_OPTIONS);
    qemu::linux_full(2, JOB).vhost_user_disk(&server.socket(), "").args(["-append", &options])
}

/// The first part of it has no page like another.
fn image(dir: &tempfile::TempDir) -> PathBuf {
    let image = dir.path().join("disk.img");
    let content: Vec<u8> = (0..READ / 8).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect();
    fs::write(&image, content).expect("room");
    fs::File::options().write(true).open(&image).and_then(|file| file.set_len(32 * MIB)).expect("room");
    image
}

/// How often QEMU has asked what was written.
fn passes(monitor: &mut Qmp) -> u64 {
    monitor.execute("query-migrate", json!({}))["ram"]["dirty-sync-count"].as_u64().unwrap_or(0)
}

/// Both servers are followed by others after a first pass over the guest's memory. That the log goes along is shown by
/// tests/upgrade/front_end.rs: here the memory that is read into is dirty for other reasons, too.
fn move_during_upgrades(vm: &Vm, server: &Server, next_server: &Server, uri: &str) {
    let mut monitor = vm.qmp();
    qemu::limit_migration(&mut monitor, 50 * MIB, 1);
    monitor.execute("migrate", json!({"uri": uri}));
    wait_until("all memory was copied once", || passes(&mut monitor) >= 2);
    qemu::limit_migration(&mut monitor, MIB, 1);
    server.upgrade(&[]);
    next_server.upgrade(&[]);
    let reads = server.total("reads");
    wait_until("the guest reads on", || server.total("reads") > reads + 100);
    assert!(!qemu::has_left(&mut monitor), "the guest has moved before the upgrades");
    qemu::limit_migration(&mut monitor, 200 * MIB, 2000);
    wait_until("the guest has moved", || qemu::has_left(&mut monitor));
}

/// Lets the job end: the guest's digest of the disk is the image's.
fn ends_with_the_image(mut vm: Vm, image: &Path) {
    vm.go();
    let sum = vm.until_asked("compare");
    assert_eq!(sum.last(), Some(&format!("{}  -", oracle::digest(image))));
    vm.go();
    vm.finish();
}

#[test]
fn a_guest_moves_to_another_server_under_load() {
    let dir = scratch();
    let image = image(&dir);

    let mut server = served(&image);
    let mut vm = machine(&server).start();
    vm.until_asked("stop");
    let rounds = 3;
    for round in 0..rounds {
        wait_until("the guest looks at what it read", || vm.said_so_far("@looked").is_some());
        let next_server = served(&image);
        let way = dir.path().join(format!("way{round}"));
        let uri = format!("unix:{}", way.display());
        let next = machine(&next_server).args(["-incoming", &uri]).start();
        wait_until("the other QEMU listens", || way.exists() && next_server.status()["connected"] == true);
        let writes = server.total("writes");
        wait_until("the guest writes", || server.total("writes") > writes);
        if round == 0 {
            qemu::migrate(&mut vm.qmp(), 200 * MIB, &uri);
        } else {
            move_during_upgrades(&vm, &server, &next_server, &uri);
        }
        (vm, server) = (next, next_server);
        if round == 2 {
            server.upgrade(&[]);
        }
        wait_until("the guest writes on", || server.total("writes") > 10);
        // The image is the second server's now: nobody else may have it.
        let third = output(
            Command::new(guest::server::program("virtioblkd"))
                .args(["--socket-path".as_ref(), dir.path().join("third").as_os_str(), "--blk-file".as_ref()])
                .arg(&image),
        );
        assert_eq!(third.status.code(), Some(1), "{third:?}");
        assert!(String::from_utf8_lossy(&third.stderr).contains("another process uses the image"), "{third:?}");
        // What was cached on the one host is looked at on the other.
        vm.until_line("@looked");
        vm.until_line("@looked");
    }
    ends_with_the_image(vm, &image);
    tell(&format!("a guest moved {rounds} times under load, two times while both servers were upgraded, to the byte"));
}

/// What `virsh save` and `restore` do: the guest goes to a file, its QEMU and its server end, and others go on with it.
#[test]
fn a_guest_is_saved_and_restored_under_load() {
    let dir = scratch();
    let image = image(&dir);
    let saved = dir.path().join("saved");
    let server = served(&image);
    let mut vm = machine(&server).start();
    vm.until_asked("stop");
    vm.until_line("@looked");
    let mut monitor = vm.qmp();
    // As libvirt does: paused first, then there is no hurry.
    monitor.execute("stop", json!({}));
    qemu::migrate(&mut monitor, 1000 * MIB, &format!("exec:cat >{}", saved.display()));
    drop((monitor, vm));
    let (status, log) = server.terminate();
    assert!(status.success(), "{status}\n{log}");

    let server = served(&image);
    let mut vm = machine(&server).args(["-incoming", &format!("exec:cat {}", saved.display())]).start();
    wait_until("QEMU is there", || server.status()["connected"] == true);
    let mut monitor = vm.qmp();
    wait_until("the guest is restored", || {
        let status = monitor.execute("query-status", json!({}));
        status["status"] == "paused"
    });
    monitor.execute("cont", json!({}));
    vm.until_line("@looked");
    ends_with_the_image(vm, &image);
}
