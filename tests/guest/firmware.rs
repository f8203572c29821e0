//! The smallest real guest: a boot sector that writes, reads back and compares through SeaBIOS on a disk that
//! virtioblkd serves. A fraction of a second a boot, so that every commit can afford it. SeaBIOS's driver knows no
//! FLUSH: it is also the driver that must be served write through (virtio 1.3, 5.2.6.2).

use std::path::{Path, PathBuf};

use kit::guest;
use kit::guest::oracle::{self, LoopDevice};
use kit::guest::qemu::{BOOT_SECTOR_DEVICES, Qemu, Verdict, Vm, boot_sector, boot_sector_in, install_boot_sector};
use kit::guest::{Server, mortal, scratch, server, sparse_image};
use virtioblkd::engine::cache::CacheMode;

/// What bootsector.S writes: sector N is full of 0xA0 + N.
const SECTORS: u8 = 8;

fn bootable_image(dir: &Path) -> PathBuf {
    let image = sparse_image(dir, 1 << 20);
    install_boot_sector(&image);
    // So that the boot sector itself is no dirty page when we look.
    std::fs::File::open(&image).and_then(|file| file.sync_all()).expect("the image can be synced");
    image
}

fn check_content(image: &Path) {
    for sector in 1..=SECTORS {
        let found = oracle::read_at(image, u64::from(sector) * 512, 512);
        assert_eq!(found, [0xa0 + sector; 512], "sector {sector}");
    }
}

#[test]
fn what_the_firmware_wrote_to_a_file_is_durable() {
    for mode in CacheMode::ALL {
        let dir = scratch();
        let image = bootable_image(dir.path());
        let server = Server::start(&image, mode, &[]);
        let (verdict, _guest) = boot_sector(&server.socket());
        assert_eq!(verdict, Verdict::Good, "{mode}");
        assert_eq!(server.total("writes"), u64::from(SECTORS), "{mode}");

        // The guest is still connected: nothing was synced because it left.
        if mode == CacheMode::Unsafe {
            assert_eq!(server.total("syncs"), 0, "{mode}");
        } else {
            let dirty = oracle::dirty_pages(&image).unwrap_or(0);
            assert_eq!(dirty, 0, "{mode}: pages of acknowledged writes that are not durable");
        }
        check_content(&image);
    }
}

#[test]
fn what_the_firmware_wrote_to_a_block_device_was_flushed_there() {
    let dir = scratch();
    let Some(disk) = LoopDevice::attach(&bootable_image(dir.path())) else { return };
    for mode in CacheMode::ALL {
        let before = disk.flushes();
        let server = Server::start(disk.path(), mode, &[]);
        let (verdict, _guest) = boot_sector(&server.socket());
        assert_eq!(verdict, Verdict::Good, "{mode}");
        let flushes = disk.flushes() - before;
        if mode == CacheMode::Unsafe {
            assert_eq!(flushes, 0, "{mode}");
        } else {
            // The firmware waits for each write, so no two share a flush.
            assert!(flushes >= SECTORS.into(), "{mode}: {SECTORS} durable writes and only {flushes} flushes");
        }
    }
}

#[test]
fn a_read_only_disk_refuses_the_firmwares_writes() {
    let dir = scratch();
    let image = bootable_image(dir.path());
    let before = oracle::digest(&image);
    let server = Server::start(&image, CacheMode::None, &["--read-only"]);
    let (verdict, _guest) = boot_sector(&server.socket());
    assert_eq!(verdict, Verdict::WriteFailed);
    assert_eq!(oracle::digest(&image), before);
}

#[test]
fn the_next_front_end_is_served_after_one_leaves() {
    let dir = scratch();
    let image = bootable_image(dir.path());
    let server = Server::start(&image, CacheMode::Writeback, &[]);
    for _ in 0..3 {
        let (verdict, guest) = boot_sector(&server.socket());
        assert_eq!(verdict, Verdict::Good);
        drop(guest);
    }
    let (status, log) = server.terminate();
    assert!(status.success(), "{status}\n{log}");
    check_content(&image);
}

/// The two mistakes that users make most, with a real QEMU: memory that is private, and memory without a back-end. The
/// guest cannot be served; the log and the status name the cause and the fix, and do not repeat themselves.
#[test]
fn guest_memory_that_is_not_shared_is_named_in_log_and_status() {
    let private = ["-object", "memory-backend-memfd,id=m,size=64M,share=off", "-machine", "q35,memory-backend=m"];
    for memory in [&private[..], &["-machine", "q35"]] {
        let dir = scratch();
        let server = Server::start(&bootable_image(dir.path()), CacheMode::None, &[]);
        let _guest = Qemu::bare("tcg", 64).args(memory).vhost_user_disk(&server.socket(), "").start();
        guest::wait_until("the cause is in the status", || server.ctl_ok(&["status"]).contains("share=on"));
        // Where it connects again and again, let it do so for a while.
        std::thread::sleep(std::time::Duration::from_secs(5));
        let (log, status) = (server.log(), server.status());
        let errors = status["last-errors"].to_string();
        for text in [&log, &errors] {
            for part in ["memory-backend-memfd", "share=on", "memory-backend=mem", "<access mode='shared'/>"] {
                assert!(text.contains(part), "{memory:?}: '{part}' is missing in {text}");
            }
        }
        assert_eq!(log.matches("share=on").count(), 1, "{memory:?}: it is logged once:\n{log}");
        for part in ["front-end connected", "front-end disconnected"] {
            assert!(log.matches(part).count() <= 3, "{memory:?}: '{part}' is repeated:\n{log}");
        }
    }
}

/// Somebody is connected to the disk's socket and says nothing; QEMU comes later and boots.
#[test]
fn a_silent_connection_does_not_keep_qemu_out() {
    let dir = scratch();
    let server = Server::start(&bootable_image(dir.path()), CacheMode::None, &[]);
    let silent = std::os::unix::net::UnixStream::connect(server.socket()).expect("it listens");
    guest::wait_until("the silent one is connected", || server.status()["connected"] == true);
    let (verdict, _guest) = boot_sector(&server.socket());
    assert_eq!(verdict, Verdict::Good);
    drop(silent);
}

#[test]
fn the_shipped_command_lines_boot() {
    let scripts = guest::root().join("qemu-configs/qemu");
    // So that the scripts find the server that was built.
    let bin = server::program("virtioblkd");
    let bin = bin.parent().expect("a directory").to_str().expect("a plain path");
    let path = format!("{bin}:{}", std::env::var("PATH").expect("a PATH"));
    for mode in CacheMode::ALL {
        let dir = scratch();
        let image = bootable_image(dir.path());
        let server = Server::start_as(|socket, control| {
            let mut command = mortal(scripts.join(format!("{mode}.sh")));
            command.arg(socket).arg(&image).arg(control).args(["--serial", "shipped"]).env("PATH", &path);
            command
        });
        assert_eq!(server.status()["cache-mode"], mode.name());
        let mut qemu = mortal(scripts.join("qemu.sh"));
        qemu.arg(server.socket()).args(["-nodefaults", "-display", "none"]).args(BOOT_SECTOR_DEVICES);
        qemu.env("MEMORY", "64M").env("ACCEL", "tcg");
        let (verdict, _guest) = boot_sector_in(Vm::start(qemu));
        assert_eq!(verdict, Verdict::Good, "{mode}");
    }
}
