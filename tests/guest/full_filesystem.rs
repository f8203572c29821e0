//! A filesystem that is really full under the image of a running daemon: the guest waits, the operator makes room, and
//! the guest goes on without an error.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kit::backend;
use kit::front_end::*;
use kit::guest::{Qmp, Server, Vm, oracle, qemu, tell, wait_until};
use serde_json::json;
use virtioblkd::engine::CacheMode;

const OK: u8 = 0;
const SIZE: u16 = 64;

/// A filesystem of its own, unmounted when dropped.
struct Mounted {
    at: PathBuf,
    _device: Option<backend::Loop>,
    _dir: tempfile::TempDir,
}

impl Mounted {
    /// Of `kind`, small. None, said loudly, for those who may not mount.
    fn new(kind: &str) -> Option<Mounted> {
        let dir = backend::disk_dir();
        let at = dir.path().join("mnt");
        fs::create_dir(&at).expect("a directory");
        let mut mount = Command::new("mount");
        let device = match kind {
            "tmpfs" => {
                mount.args(["-t", "tmpfs", "-o", "size=8m", "none"]);
                None
            }
            kind => {
                let file = dir.path().join("filesystem");
                fs::File::create(&file).expect("a file").set_len(64 << 20).expect("room");
                let made = Command::new(format!("mkfs.{kind}")).arg("-q").arg(&file).output();
                if !made.is_ok_and(|made| made.status.success()) {
                    return backend::skip(&format!("no mkfs.{kind}"));
                }
                let device = backend::Loop::attach(&file, 512)?;
                mount.arg(&device.0);
                Some(device)
            }
        };
        let output = mount.arg(&at).output().expect("mount");
        if !output.status.success() {
            return backend::skip(&format!("no mount: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
        Some(Mounted { at, _device: device, _dir: dir })
    }

    /// Takes all the room there is; removing the file gives it back.
    fn fill(&self) -> PathBuf {
        let ballast = self.at.join("ballast");
        let file = fs::File::create(&ballast).expect("a file");
        let (mut at, mut piece) = (0, vec![0xff; 1 << 20]);
        while !piece.is_empty() {
            match file.write_at(&piece, at) {
                Ok(written) => at += written as u64,
                Err(_) => piece.truncate(if piece.len() > 512 { piece.len() / 2 } else { 0 }),
            }
        }
        file.sync_all().expect("what was written is stored");
        ballast
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let status = Command::new("umount").arg("-l").arg(&self.at).status();
        assert!(std::thread::panicking() || status.is_ok_and(|status| status.success()), "umount failed");
    }
}

fn on_a_full_filesystem(kind: &str, mode: CacheMode) {
    let Some(filesystem) = Mounted::new(kind) else { return };
    let image: &Path = &filesystem.at.join("disk.img");
    fs::File::create(image).expect("an image").set_len(32 << 20).expect("sparse");
    let server = Server::start(image, mode, &[]);
    let mut operator = Qmp::connect(&server.control());
    let mut guest = FrontEnd::connect(&server.socket(), 2, SIZE, ALL);
    assert_eq!(guest.write(0, 0, &[1; 4096]), OK, "{kind} {mode}");
    assert_eq!(guest.flush(0), OK);
    let ballast = filesystem.fill();
    let slots: Vec<u16> = (1..=4u64).map(|n| guest.add(0, OUT, n * 4096, &[n as u8 + 1; 65536], 0)).collect();
    guest.kick(0);
    let told = &operator.event("IO_STOPPED")["data"];
    assert_eq!((&told["operation"], &told["errno"]), (&json!("write"), &json!(28)), "{kind} {mode}");
    assert_eq!(guest.used_within(0, Duration::from_millis(30)), None);
    let page = server.ctl_ok(&["status"]);
    assert!(page.contains("STOPPED") && page.contains("No space left"), "{page}");
    // No quiesce succeeds, and none takes its time.
    let refused = server.ctl(&["--json", "quiesce", "--timeout", "1h"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stdout).contains("\"stopped\""), "{refused:?}");
    // Reads go on; and so do writes of the other ring where there is room.
    assert_eq!(guest.read(0, 0, 4096), (OK, vec![1; 4096]), "{kind} {mode}");
    // Nothing was mended: it stops again.
    let again = server.ctl(&["continue", "--wait"]);
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    let why = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(why.contains("failed again") && why.contains("No space left"), "{again:?}");
    operator.event("IO_CONTINUED");
    operator.event("IO_STOPPED");
    fs::remove_file(ballast).expect("ours");
    let done = server.ctl_ok(&["continue", "--wait"]);
    assert!(done.contains("retried") && done.contains("completed"), "{done}");
    assert_eq!(server.total("kept"), 0, "nothing is left to wait for");
    let mut answered: Vec<(u16, u8)> = slots.iter().map(|_| guest.wait(0)).collect();
    answered.sort_unstable();
    assert_eq!(answered, slots.iter().map(|slot| (*slot, OK)).collect::<Vec<_>>(), "{kind} {mode}");
    assert_eq!(guest.flush(0), OK, "{kind} {mode}");
    assert_eq!((server.total("errors"), server.total("kept")), (0, 0));
    assert_eq!(server.ctl_ok(&["continue"]), "the disk was not stopped\n");
    server.ctl_ok(&["quiesce", "--", "true"]);
    drop(guest);
    let (status, log) = server.terminate();
    assert!(status.success(), "{log}");
    let bytes = fs::read(image).expect("the image");
    for n in 1..=4 {
        assert!(bytes[n * 4096 * 512..][..65536].iter().all(|byte| usize::from(*byte) == n + 1), "{kind} {mode}");
    }
}

#[test]
fn a_full_tmpfs_stops_the_disk_until_there_is_room() {
    on_a_full_filesystem("tmpfs", CacheMode::Writeback);
}

#[test]
fn a_full_ext4_stops_the_disk_until_there_is_room_in_every_mode() {
    for mode in CacheMode::ALL {
        on_a_full_filesystem("ext4", mode);
    }
}

/// Writes where there is no room; dd, and so the job, fails if the kernel saw one error.
const JOB: &str = r#"
ask full
tr '\0' w </dev/zero | dd of=/dev/vda bs=64k count=64 iflag=fullblock oflag=direct conv=notrunc,fsync 2>/tmp/error || { cat /tmp/error; exit 1; }
dmesg | grep -i 'i/o error' && exit 1
ask written
"#;

#[test]
fn a_real_guest_waits_for_room_whatever_becomes_of_its_server() {
    let Some(filesystem) = Mounted::new("tmpfs") else { return };
    let image: &Path = &filesystem.at.join("disk.img");
    fs::File::create(image).expect("an image").set_len(32 << 20).expect("sparse");
    let mode = CacheMode::Writeback;
    let server = Server::start(image, mode, &[]);
    let mut vm = qemu::linux(1, JOB).vhost_user_disk(&server.socket(), "").start();
    vm.until_asked("full");
    let ballast = filesystem.fill();
    vm.go();
    let stops = |server: &Server| {
        wait_until("the disk stops", || server.status()["stopped"].is_object());
        assert_eq!(server.total("errors"), 0, "{}", server.log());
        tell(&format!("{} kept", server.total("kept")));
    };
    stops(&server);
    let server = server.kill_and_start(image, mode, &[]);
    stops(&server);
    let server = server.restart(image, mode, &[]);
    stops(&server);
    fs::remove_file(ballast).expect("ours");
    server.ctl_ok(&["continue"]);
    vm.until_asked("written");
    vm.go();
    vm.finish();
    assert_eq!(server.total("errors"), 0);
    let (status, log) = server.terminate();
    assert!(status.success(), "{log}");
    let bytes = fs::read(image).expect("the image");
    assert!(bytes[..4 << 20].iter().all(|byte| *byte == b'w'), "what was acknowledged is there");
}

/// `put N`: 64 KiB of Ns at N times 128 KiB, in the background; then says whether the kernel saw an error.
const PUT: &str = r#"
put() {
    ( tr '\0' "$1" </dev/zero | dd of=/dev/vda bs=64k count=1 seek=$(($1 * 2)) iflag=fullblock oflag=direct \
        conv=notrunc 2>/dev/null; echo "@put $1 $?" ) &
}
"#;

/// A guest whose disk stops whenever the test wants it to, wherever it runs.
struct Stopping<'a> {
    filesystem: &'a Mounted,
    vm: Vm,
    server: Server,
}

impl Stopping<'_> {
    /// Write `n` finds no room and is kept.
    fn stop(&mut self, n: u8) -> PathBuf {
        let ballast = self.filesystem.fill();
        self.vm.sh(&format!("put {n}"));
        wait_until("the disk stops", || self.server.status()["stopped"].is_object());
        ballast
    }

    /// Write `n` is answered, with an error or without, and the disk is not stopped any more.
    fn answered(&mut self, n: u8, is_well: bool) {
        let said = self.vm.until_line("@put ").pop().expect("the line waited for");
        assert_eq!(said, format!("@put {n} {}", u8::from(!is_well)));
        assert_eq!(self.server.status()["stopped"], json!(null));
    }

    fn bytes_of(&self, n: u8) -> Vec<u8> {
        oracle::read_at(&self.filesystem.at.join("disk.img"), u64::from(n) * (128 << 10), 64 << 10)
    }
}

/// Whatever is done to it, neither QEMU nor its guest waits for the operator, who may come too late or never.
#[test]
fn a_guest_of_a_stopped_disk_is_paused_saved_moved_reset_and_ended() {
    let Some(filesystem) = Mounted::new("tmpfs") else { return };
    let image: &Path = &filesystem.at.join("disk.img");
    fs::File::create(image).expect("an image").set_len(32 << 20).expect("sparse");
    let served = || Server::start(image, CacheMode::Writeback, &["--locking", "in-use"]);
    let machine = |server: &Server| {
        qemu::linux_shell(1, PUT).vhost_user_disk(&server.socket(), "").args(["-action", "reboot=reset"])
    };
    let server = served();
    let vm = machine(&server).start_shell();
    let mut guest = Stopping { filesystem: &filesystem, vm, server };

    // Paused: the guest has the error when it goes on. What there is room for by then is written.
    let mut monitor = guest.vm.qmp();
    let ballast = guest.stop(1);
    monitor.execute("stop", json!({}));
    assert_eq!(guest.server.status()["stopped"], json!(null));
    monitor.execute("cont", json!({}));
    guest.answered(1, false);
    fs::remove_file(&ballast).expect("ours");
    let ballast = guest.stop(2);
    fs::remove_file(&ballast).expect("ours");
    monitor.execute("stop", json!({}));
    monitor.execute("cont", json!({}));
    guest.answered(2, true);
    assert_eq!(guest.bytes_of(2), [b'2'; 64 << 10]);

    // Saved, and restored with the next server.
    let ballast = guest.stop(3);
    let saved = tempfile::NamedTempFile::new().expect("room");
    monitor.execute("stop", json!({}));
    qemu::migrate(&mut monitor, 1 << 30, &format!("exec:cat >{}", saved.path().display()));
    drop(monitor);
    let Stopping { vm, server, .. } = guest;
    drop(vm);
    assert!(server.terminate().0.success());
    let server = served();
    let vm = machine(&server).args(["-incoming", &format!("exec:cat {}", saved.path().display())]).start();
    let mut guest = Stopping { filesystem: &filesystem, vm, server };
    let mut monitor = guest.vm.qmp();
    wait_until("the guest is restored", || monitor.execute("query-status", json!({}))["status"] == "paused");
    monitor.execute("cont", json!({}));
    guest.answered(3, false);
    fs::remove_file(&ballast).expect("ours");

    // Moved while it runs.
    let ballast = guest.stop(4);
    let next = served();
    let way = tempfile::tempdir().expect("room");
    let uri = format!("unix:{}", way.path().join("way").display());
    let vm = machine(&next).args(["-incoming", &uri]).start();
    wait_until("the other QEMU listens", || way.path().join("way").exists() && next.status()["connected"] == true);
    qemu::migrate(&mut monitor, 1 << 30, &uri);
    drop(monitor);
    assert_eq!(guest.server.status()["stopped"], json!(null));
    (guest.vm, guest.server) = (vm, next);
    guest.answered(4, false);
    fs::remove_file(&ballast).expect("ours");

    // Reset: the next kernel finds a disk that goes on.
    let mut monitor = guest.vm.qmp();
    let ballast = guest.stop(5);
    monitor.execute("system_reset", json!({}));
    guest.vm.until_line("@@ready");
    assert_eq!(guest.server.status()["stopped"], json!(null));
    fs::remove_file(&ballast).expect("ours");
    guest.vm.sh("put 6");
    guest.answered(6, true);
    assert_eq!(guest.bytes_of(6), [b'6'; 64 << 10]);

    // Ended: nothing is written after its end.
    let ballast = guest.stop(7);
    monitor.execute("quit", json!({}));
    assert!(guest.vm.wait().success());
    wait_until("QEMU has left", || guest.server.status()["connected"] == false);
    fs::remove_file(&ballast).expect("ours");
    assert_eq!(guest.server.ctl_ok(&["continue"]), "the disk was not stopped\n");
    assert_eq!(guest.bytes_of(7), [0; 64 << 10]);
    let (status, log) = guest.server.terminate();
    assert!(status.success(), "{log}");
    tell("a guest of a stopped disk paused twice, saved, moved, reset and ended: it had each answer");
}
