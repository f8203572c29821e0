//! Media that fail: an error is never forgotten.

use std::fs;
use std::path::Path;

use kit::backend::{Driver, Loop, disk_dir, image, open};
use virtioblkd::backend::{Backend, DurableWrite, IoBuf, Op};
use virtioblkd::engine::CacheMode;

use super::tmpfs::*;

/// A block device over a sparse file on a filesystem that is full: reads work, writeback fails with EIO.
fn failing_device(dir: &Path) -> Option<(Tmpfs, Loop)> {
    let tmpfs = Tmpfs::mount(&dir.join("mnt"), "size=1m")?;
    let device = Loop::attach(&image(&tmpfs.0, "disk.img", 4 << 20), 512)?;
    fs::write(tmpfs.0.join("ballast"), vec![1; 2 << 20]).expect_err("a full filesystem");
    Some((tmpfs, device))
}

/// There is room again, at once: a file that is removed may still be open in a process that another test starts.
fn make_room(tmpfs: &Tmpfs) {
    fs::File::create(tmpfs.0.join("ballast")).expect("ours");
}

#[test]
fn a_failed_writeback_is_never_forgotten() {
    let dir = disk_dir();
    let Some((tmpfs, device)) = failing_device(dir.path()) else { return };
    let backend = open(&device.0, CACHED);
    let mut queues = [0; 3].map(|_| Driver::new(&backend, 4));
    assert_eq!(queues[0].run(Op::Sync), Ok(()));
    assert_eq!(queues[0].write(0, &[1; 65536]), Ok(()), "the cache takes it");
    let first = queues[1].run(Op::Sync).expect_err("writeback cannot succeed");
    // Now it could: the kernel would say so, and the data is gone.
    make_room(&tmpfs);
    let plain = fs::OpenOptions::new().write(true).open(&device.0).expect("the device");
    plain.sync_data().expect("whoever comes later sees no error");
    for queue in &mut queues {
        assert_eq!(queue.run(Op::Sync).map_err(|_| ()), Err(()));
        assert_eq!(queue.run(Op::Sync), Err(first));
    }
    let buf = IoBuf::owned(4096, 4096, 0);
    assert_eq!(queues[2].run(Op::Write { offset: 0, buf, durable: true }), Err(first));
    assert!(backend.sync().is_err());
    assert_eq!(backend.sync_failed(), Some(first));
    assert_eq!(Driver::new(&backend, 1).run(Op::Sync), Err(first), "a queue that comes later");
    drop((queues, backend, plain, device, tmpfs));
}

#[test]
fn a_failed_durable_write_is_never_forgotten_over_the_cache() {
    for (mode, latched) in [(CacheMode::Writethrough, true), (CacheMode::Directsync, false)] {
        let dir = disk_dir();
        let Some((tmpfs, device)) = failing_device(dir.path()) else { return };
        let backend = open(&device.0, mode);
        assert_eq!(backend.geometry().durable_write, DurableWrite::Native);
        let mut driver = Driver::new(&backend, 4);
        let durable = || Op::Write { offset: 0, buf: IoBuf::owned(65536, 4096, 0), durable: true };
        assert!(driver.run(durable()).is_err(), "{mode}");
        make_room(&tmpfs);
        // Past the cache the write failed and nothing else: it may be tried again.
        assert_eq!(driver.run(durable()).is_err(), latched, "{mode}");
        assert_eq!(driver.run(Op::Sync).is_err(), latched, "{mode}");
        drop((driver, backend, device, tmpfs));
    }
}
