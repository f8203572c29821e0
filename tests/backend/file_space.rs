//! Space of files and block devices: discards, zeroes, and filesystems that are full.

use std::fs;

use kit::backend::{Driver, Loop, disk_dir, image, open, opened, options};
use virtioblkd::backend::file::FileOptions;
use virtioblkd::backend::{Backend, Errno, Op};

use super::tmpfs::*;

#[test]
fn discard_and_zeroes_with_unmap_free_blocks() {
    for mode in [DIRECT, CACHED] {
        let dir = disk_dir();
        let path = image(dir.path(), "disk.img", 4 << 20);
        let backend = open(&path, mode);
        assert!(backend.geometry().discard.is_some() && backend.geometry().zeroes_may_unmap);
        let mut driver = Driver::new(&backend, 4);
        let fill = |driver: &mut Driver| {
            driver.write(0, &[0xaa; 4 << 20]).expect("a write");
            driver.run(Op::Sync).expect("a sync");
        };
        fill(&mut driver);
        let full = blocks(&path);
        driver.run(Op::Discard { offset: 1 << 20, len: 1 << 20 }).expect("a discard");
        assert!(blocks(&path) <= full - 2048, "{mode}: a discard freed nothing");
        fill(&mut driver);
        driver.run(Op::WriteZeroes { offset: 1 << 20, len: 1 << 20, unmap: true }).expect("zeroes");
        assert!(blocks(&path) <= full - 2048, "{mode}: zeroes with unmap freed nothing");
        assert_eq!(driver.read(1 << 20, 1 << 20), Ok(vec![0; 1 << 20]));
        fill(&mut driver);
        driver.run(Op::WriteZeroes { offset: 1 << 20, len: 1 << 20, unmap: false }).expect("zeroes");
        assert!(blocks(&path) >= full, "{mode}: zeroes without unmap freed blocks");
        // Through this descriptor and any other.
        assert_eq!(driver.read(1 << 20, 1 << 20), Ok(vec![0; 1 << 20]));
        assert!(fs::read(&path).expect("the image")[1 << 20..2 << 20].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn discard_ignored_keeps_every_block() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let keeping = FileOptions { discard_unmap: false, ..options(&path, DIRECT) };
    let backend = opened(&keeping);
    assert!(backend.geometry().discard.is_none() && !backend.geometry().zeroes_may_unmap);
    let mut driver = Driver::new(&backend, 4);
    driver.write(0, &[0xaa; 1 << 20]).expect("a write");
    driver.run(Op::Sync).expect("a sync");
    let full = blocks(&path);
    driver.run(Op::WriteZeroes { offset: 0, len: 1 << 20, unmap: true }).expect("zeroes");
    assert!(blocks(&path) >= full);
    assert_eq!(driver.read(0, 1 << 20), Ok(vec![0; 1 << 20]));
}

#[test]
fn discard_on_a_device_frees_blocks_behind_it() {
    let dir = disk_dir();
    let file = image(dir.path(), "disk.img", 4 << 20);
    let Some(device) = Loop::attach(&file, 512) else { return };
    let backend = open(&device.0, DIRECT);
    let mut driver = Driver::new(&backend, 4);
    driver.write(0, &[0xaa; 4 << 20]).expect("a write");
    driver.run(Op::Sync).expect("a sync");
    let full = blocks(&file);
    // Two at once: one helper thread does them in turn.
    let ids = [1u64, 2].map(|at| driver.push(Op::Discard { offset: at << 20, len: 1 << 20 }));
    assert_eq!(ids.map(|id| driver.finish(id).result), [Ok(()); 2]);
    assert!(blocks(&file) <= full - 4096, "a discard freed nothing");
    assert_eq!(driver.read(0, 1 << 20), Ok(vec![0xaa; 1 << 20]));
}

#[test]
fn zeroes_are_written_where_the_filesystem_cannot_zero() {
    // tmpfs has no ZERO_RANGE.
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let path = image(dir.path(), "disk.img", 8 << 20);
    let backend = open(&path, CACHED);
    let mut driver = Driver::new(&backend, 4);
    driver.write(0, &[0xaa; 8 << 20]).expect("a write");
    for _ in 0..2 {
        driver.run(Op::WriteZeroes { offset: 512, len: 5 << 20, unmap: false }).expect("zeroes");
        let seen = driver.read(0, 8 << 20).expect("a read");
        assert!(seen[512..512 + (5 << 20)].iter().all(|&byte| byte == 0));
        assert_eq!((seen[511], seen[512 + (5 << 20)]), (0xaa, 0xaa));
        assert_eq!(blocks(&path), 16384);
        driver.write(0, &[0xaa; 8 << 20]).expect("a write");
    }
}

#[test]
fn a_full_filesystem_fails_exactly_the_writes_that_find_no_room() {
    let dir = disk_dir();
    let Some(tmpfs) = Tmpfs::mount(&dir.path().join("mnt"), "size=1m") else { return };
    let path = image(&tmpfs.0, "disk.img", 2 << 20);
    let backend = open(&path, CACHED);
    let mut driver = Driver::new(&backend, 8);
    driver.write(0, &[1; 4096]).expect("room");
    assert_eq!(driver.write(4096, &[1; 2 << 20][..(2 << 20) - 4096]), Err(Errno(libc::ENOSPC)));
    assert_eq!(driver.write(0, &[2; 4096]), Ok(()), "what is allocated can be written");
    assert_eq!(driver.read(0, 4096), Ok(vec![2; 4096]));
    assert_eq!(driver.run(Op::Sync), Ok(()), "nothing that was acknowledged was lost");
    driver.run(Op::Discard { offset: 65536, len: (2 << 20) - 65536 }).expect("a discard");
    assert_eq!(driver.write(65536, &[1; 65536]), Ok(()), "there is room again");
}
