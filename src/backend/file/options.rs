//! What to open and how: the options of a [`FileBackend`](super::FileBackend).

use std::path::PathBuf;
use std::sync::Arc;

use crate::backend::bounce_pool::BouncePool;
use crate::engine::CachePolicy;

/// How QEMU's image locks are used (`--locking`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Locks where the filesystem supports it, and warns where not.
    #[default]
    Auto,
    /// Like `Auto`, but only while a guest's virtqueues run. Two servers can then have the image open, and a live migration
    /// hands it from one to the other. A paused guest holds no lock.
    InUse,
    /// Takes no locks: the user excludes other writers.
    Off,
}

/// What to open and how.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// The image: a regular file or a block device.
    pub path: PathBuf,
    /// What the cache mode means; it decides about O_DIRECT.
    pub policy: CachePolicy,
    /// Refuses writes; the image need not be writable.
    pub read_only: bool,
    /// The sector size that the guest sees, 512 or 4096 bytes. `None`: that of the disk below, in every mode.
    pub logical_block_size: Option<u32>,
    /// Passes discards on, and lets write-zeroes deallocate.
    pub discard_unmap: bool,
    /// The user said that the image is raw (`--format raw`), whatever it looks like.
    pub is_raw: bool,
    /// How QEMU's image locks are used.
    pub locking: Locking,
    /// Another process has the image and will release its locks later. [`crate::backend::ImageUpgrade::take_over`]
    /// then takes them.
    pub lock_later: bool,
    /// Makes single writes durable with RWF_DSYNC ([`crate::backend::DurableWrite::Native`]) instead of a
    /// sync after them.
    /// [`FileOptions::new`] says which is better where.
    pub durable_writes: bool,
    /// The memory for transfers that must be copied.
    pub memory: Arc<BouncePool>,
    /// Where sysfs is mounted: `/sys`, except in tests.
    pub sysfs: PathBuf,
}

impl FileOptions {
    /// The defaults: writable, blocks as O_DIRECT needs them, discards passed on, locks taken.
    ///
    /// Durable writes use RWF_DSYNC with O_DIRECT, and a sync shared by many writes over the page cache. Measured by
    /// `benches/durable_write.rs` (ext4, virtio disk without FUA, 4 KiB random, depths 1, 16, 64), the shared sync
    /// relative to RWF_DSYNC: O_DIRECT 0.92, 1.11, 0.90; page cache 0.96, 3.21, 4.31. With O_DIRECT they are equal
    /// here, and RWF_DSYNC needs one step instead of two and uses the FUA of devices that have it. Over the page cache
    /// RWF_DSYNC writes to one file take turns. There a failed RWF_DSYNC is also as final as a failed sync, even if
    /// only this write found no space.
    pub fn new(path: impl Into<PathBuf>, policy: CachePolicy) -> Self {
        FileOptions {
            path: path.into(),
            policy,
            read_only: false,
            logical_block_size: None,
            discard_unmap: true,
            is_raw: false,
            locking: Locking::Auto,
            lock_later: false,
            durable_writes: policy.opens_direct(),
            memory: BouncePool::new(BouncePool::DEFAULT_BYTES),
            sysfs: "/sys".into(),
        }
    }
}
