//! When writes are copied: as the option, the mode and the medium say.

use std::path::Path;
use std::sync::Arc;

use kit::backend;
use kit::backend::{disk_dir, image, options, stable};
use virtioblkd::backend::file::FileOptions;
use virtioblkd::backend::stable::StableWrites;
use virtioblkd::backend::{BufferUse, ImageInfo};
use virtioblkd::engine::CacheMode;

use super::mirror::*;

/// A sysfs in which the disk below `file` asks for stable buffers.
fn sysfs_that_asks(dir: &Path, file: &Path) {
    use std::os::unix::fs::MetadataExt;
    let device = file.metadata().unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::create_dir_all(dir.join("devices/sdx/queue")).unwrap();
    std::fs::write(dir.join("devices/sdx/queue/stable_writes"), "1\n").unwrap();
    std::fs::create_dir_all(dir.join("dev/block")).unwrap();
    std::os::unix::fs::symlink(dir.join("devices/sdx"), dir.join(format!("dev/block/{major}:{minor}"))).unwrap();
}

#[test]
fn the_medium_decides_and_the_status_says_why() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    sysfs_that_asks(dir.path(), &path);
    let empty = tempfile::tempdir().unwrap();
    let sees = |sysfs: &Path, mode: CacheMode, read_only: bool, how: StableWrites| {
        let file = FileOptions { sysfs: sysfs.into(), read_only, ..options(&path, mode) };
        let file = backend::opened(&file);
        let status = seen(&stable(Arc::new(file), how, 0));
        assert_eq!(status.asked, how.name());
        (status.in_effect, status.why)
    };
    use StableWrites::{Auto, Copy, Detect, Off};
    for (sysfs, mode, read_only, how, effect, why) in [
        (dir.path(), CacheMode::None, false, Auto, "copy", "sdx needs unchanged buffers"),
        (dir.path(), CacheMode::Directsync, false, Auto, "copy", "sdx needs unchanged buffers"),
        (dir.path(), CacheMode::None, false, Off, "off", "although the host device sdx needs unchanged buffers"),
        (dir.path(), CacheMode::None, false, Detect, "detect", "sdx needs unchanged buffers"),
        (dir.path(), CacheMode::None, true, Copy, "off", "read-only"),
        (empty.path(), CacheMode::None, false, Auto, "off", "no block device"),
        (empty.path(), CacheMode::None, false, Copy, "copy", "no block device"),
        // The page cache has a copy: nothing is copied twice.
        (dir.path(), CacheMode::Writeback, false, Auto, "off", "page cache"),
        (dir.path(), CacheMode::Writethrough, false, Copy, "off", "not copied a second time: the host's page cache"),
        (dir.path(), CacheMode::Unsafe, false, Copy, "off", "page cache"),
        (dir.path(), CacheMode::Writeback, false, Detect, "detect", "page cache"),
    ] {
        let (effective, told) = sees(sysfs, mode, read_only, how);
        assert_eq!(effective, effect, "{how} in {mode}: {told}");
        assert!(told.contains(why), "{how} in {mode}: {told}");
    }
}

/// The real sysfs: a loop device copies into the page cache, or, told to pass O_DIRECT on, is as its file.
#[test]
fn the_buffer_use_of_a_loop_device_is_that_of_its_file() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 8 << 20);
    let Some(device) = backend::Loop::attach(&path, 512) else { return };
    let below_the_file = backend::opened(&options(&path, CacheMode::None)).buffer_use();
    let used = || backend::opened(&options(&device.0, CacheMode::None)).buffer_use();
    let BufferUse::Copies(why) = used() else { panic!("{:?}", used()) };
    assert!(why.contains("loop") && why.contains("page cache"), "{why}");
    match std::process::Command::new("losetup").arg("--direct-io=on").arg(&device.0).status() {
        Ok(status) if status.success() => assert_eq!(used(), below_the_file),
        other => drop(backend::skip::<()>(&format!("no loop device with O_DIRECT: {other:?}"))),
    }
}
