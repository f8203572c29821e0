//! A served file, for tests of requests and messages.

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use kit::front_end::*;
use kit::rig::Rig;
use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{DeviceOptions, Tuning};

pub(super) const OK: u8 = 0;

pub(super) const IOERR: u8 = 1;

pub(super) const UNSUPP: u8 = 2;

pub(super) const SIZE: u64 = 8 << 20;

pub(super) const SECTORS: u64 = SIZE / 512;

/// A served file; one front-end after another.
pub(super) struct FileRig {
    pub(super) rig: Rig,
    pub(super) image: PathBuf,
    pub(super) _dir: tempfile::TempDir,
}

impl Deref for FileRig {
    type Target = Rig;

    fn deref(&self) -> &Rig {
        &self.rig
    }
}

pub(super) fn rig(mode: CacheMode) -> FileRig {
    rig_with(mode, |_| ())
}

pub(super) fn rig_with(mode: CacheMode, change: impl FnOnce(&mut FileOptions)) -> FileRig {
    rig_tuned(mode, change, &Tuning::default())
}

pub(super) fn rig_tuned(mode: CacheMode, change: impl FnOnce(&mut FileOptions), tuning: &Tuning) -> FileRig {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let mut options =
        FileOptions { logical_block_size: Some(512), durable_writes: true, ..FileOptions::new(&image, mode.into()) };
    change(&mut options);
    let backend = Arc::new(FileBackend::open(&options).unwrap());
    let options = DeviceOptions { mode, num_queues: 8, queue_size: 256, serial: "rig-0123456789-too-long".into() };
    FileRig { rig: Rig::tuned(backend, &options, tuning), image, _dir: dir }
}

pub(super) fn connect(rig: &Rig, rings: usize) -> FrontEnd {
    FrontEnd::connect(&rig.path, rings, 256, ALL)
}

pub(super) fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect()
}
