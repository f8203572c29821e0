//! The contract of `src/backend/mod.rs`, clause by clause, against every back-end.

mod backend;

use std::path::Path;

use backend::{Driver, Loop, disk_dir, image, open, options, random_ops, skip};
use virtioblkd::backend::file::FileBackend;
use virtioblkd::backend::{Backend, Errno, Op};
use virtioblkd::engine::CacheMode;

#[test]
fn file_with_o_direct() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 8 << 20);
    random_ops(&open(&path, CacheMode::None), 1, 2000);
}

#[test]
fn file_over_the_cache() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 8 << 20);
    random_ops(&open(&path, CacheMode::Writeback), 2, 2000);
}

#[test]
fn file_on_tmpfs() {
    for mode in [CacheMode::Unsafe, CacheMode::Directsync] {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let path = image(dir.path(), "disk.img", 8 << 20);
        match FileBackend::open(&options(&path, mode)) {
            Ok(backend) => random_ops(&backend, 3, 2000),
            // Before Linux 6.6.
            Err(error) => drop(skip::<()>(&error.to_string())),
        }
    }
}

fn on_loop(sector: u32, logical: Option<u32>, mode: CacheMode, seed: u64) {
    let dir = disk_dir();
    let file = image(dir.path(), "disk.img", 8 << 20);
    let Some(device) = Loop::attach(&file, sector) else { return };
    let path: &Path = &device.0;
    let mut options = options(path, mode);
    options.logical_block_size = logical;
    let backend = FileBackend::open(&options).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(backend.geometry().logical_block, logical.unwrap_or(sector));
    random_ops(&backend, seed, 1500);
    drop(backend);
}

#[test]
fn device_with_512_byte_sectors() {
    on_loop(512, None, CacheMode::None, 4);
    on_loop(512, None, CacheMode::Writethrough, 5);
    on_loop(512, Some(4096), CacheMode::None, 6);
}

#[test]
fn device_with_4096_byte_sectors() {
    on_loop(4096, None, CacheMode::None, 7);
    on_loop(4096, None, CacheMode::Writeback, 8);
}

#[test]
fn device_with_4096_byte_sectors_served_as_512() {
    on_loop(4096, Some(512), CacheMode::None, 9);
    on_loop(4096, Some(512), CacheMode::Writeback, 10);
}

#[test]
fn what_is_beyond_a_cut_file_is_an_error_of_that_read() {
    for mode in [CacheMode::None, CacheMode::Writeback] {
        let dir = disk_dir();
        let path = image(dir.path(), "disk.img", 1 << 20);
        let backend = open(&path, mode);
        let mut driver = Driver::new(&backend, 4);
        driver.write(0, &[7; 8192]).expect("a write");
        std::fs::OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(4096)).expect("cut");
        assert_eq!(driver.read(0, 8192), Err(Errno(libc::EIO)));
        assert_eq!(driver.read(0, 4096), Ok(vec![7; 4096]));
        assert_eq!(driver.run(Op::Sync), Ok(()));
    }
}
