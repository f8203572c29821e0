//! An open image: what all of its queues share.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::fs::OFlags;

use super::change_counter::{ChangeCounter, ChangeStamp};
use super::claim::ImageLocks;
use super::geometry::{Alignment, MediumLimits, Storage};
use super::inline::InlinePolicy;
use super::open::OpenImage;
use super::range_locks::RangeLocks;
use super::range_op::UnsupportedOps;
use super::{FileOptions, device_stack};
use crate::backend::bounce_pool::BouncePool;
use crate::backend::sticky_error::StickyError;
use crate::backend::uring::Submission;
use crate::backend::{BufferUse, DurableWrite, Errno, Geometry};

/// An open image.
pub(super) struct FileImage {
    pub(super) file: OpenFile,
    pub(super) limits: IoLimits,
    /// The geometry when the image was opened; the current size is in `size`.
    pub(super) geometry: Geometry,
    /// The current size in bytes.
    pub(super) size: AtomicU64,
    pub(super) buffer_use: BufferUse,
    pub(super) bounce_pool: Arc<BouncePool>,
    pub(super) sync_error: StickyError,
    pub(super) changes: ChangeCounter,
    /// What a queue's own thread may do.
    pub(super) inline_policy: InlinePolicy,
    /// Which thread begins the file ops of a queue's io_uring.
    pub(super) submission: Submission,
    pub(super) unsupported: UnsupportedOps,
    /// The locks for read-modify-write, where the guest's blocks are smaller than those that can be written.
    pub(super) range_locks: Option<Arc<RangeLocks>>,
    pub(super) image_locks: ImageLocks,
}

/// The file or block device as it was opened.
pub(super) struct OpenFile {
    /// The description that holds the image locks. Queues open their own.
    pub(super) fd: OwnedFd,
    /// The path as the user wrote it, for messages.
    pub(super) name: String,
    /// Absolute path.
    pub(super) path: PathBuf,
    pub(super) flags: OFlags,
    pub(super) is_device: bool,
}

/// What transfers and ranges must keep to.
pub(super) struct IoLimits {
    /// Opened with O_DIRECT.
    pub(super) direct: bool,
    /// What O_DIRECT requires; 1 without O_DIRECT.
    pub(super) align: Alignment,
    /// Bytes of the units in which the kernel discards and zeroes ranges.
    pub(super) range_unit: u32,
    pub(super) may_unmap: bool,
}

impl FileImage {
    /// Puts together what `open` found, and what `options` want of it.
    pub(super) fn new(opened: OpenImage, options: &FileOptions) -> Self {
        let medium = opened.medium;
        let direct = options.policy.opens_direct();
        let align = if direct { medium.alignment } else { Alignment { memory: 1, offset: 1 } };
        let geometry = geometry(options, &medium, opened.logical_block);
        let buffer_use = if direct {
            device_stack::buffer_use(opened.fd.as_fd(), opened.is_device, &options.sysfs)
        } else {
            BufferUse::Copies("the host's page cache gets a copy of each write".into())
        };
        FileImage {
            file: OpenFile {
                fd: opened.fd,
                name: options.path.display().to_string(),
                path: std::path::absolute(&options.path).unwrap_or_else(|_| options.path.clone()),
                flags: opened.flags,
                is_device: opened.is_device,
            },
            limits: IoLimits {
                direct,
                align,
                range_unit: medium.range_unit,
                may_unmap: options.discard_unmap && medium.zeroes_may_unmap,
            },
            size: AtomicU64::new(geometry.size),
            geometry,
            buffer_use,
            bounce_pool: options.memory.clone(),
            sync_error: StickyError::default(),
            changes: ChangeCounter::default(),
            inline_policy: match (direct, medium.storage) {
                (true, _) => InlinePolicy::Device,
                (false, Storage::Local) => InlinePolicy::Cache,
                (false, Storage::Remote) => InlinePolicy::RemoteCache,
                (false, Storage::Memory) => InlinePolicy::Memory,
            },
            submission: match medium.storage {
                Storage::Memory | Storage::Local => Submission::Inline,
                Storage::Remote => Submission::Worker,
            },
            unsupported: UnsupportedOps::default(),
            range_locks: (opened.logical_block < align.offset).then(|| RangeLocks::new(align.offset)),
            image_locks: ImageLocks::new(options),
        }
    }

    /// Records the result of the sync that began with `stamp`, and returns the result to report.
    pub(super) fn end_sync(&self, stamp: ChangeStamp, result: Result<(), Errno>) -> Result<(), Errno> {
        if result.is_ok() {
            self.changes.sync_succeeded(stamp);
        }
        self.record_durability(result)
    }

    /// Records whether data became durable, and returns the result to report; see [`StickyError::record`].
    pub(super) fn record_durability(&self, result: Result<(), Errno>) -> Result<(), Errno> {
        self.sync_error.record(result, &self.file.name)
    }
}

/// The geometry that the guest sees of this medium.
fn geometry(options: &FileOptions, medium: &MediumLimits, logical_block: u32) -> Geometry {
    let writable = !options.read_only;
    Geometry {
        size: medium.size,
        logical_block,
        physical_block: medium.physical_block.max(logical_block),
        alignment_offset: medium.alignment_offset,
        min_io: medium.min_io.max(logical_block),
        opt_io: medium.opt_io,
        read_only: options.read_only,
        discard: medium.discard.filter(|_| writable && options.discard_unmap),
        write_zeroes: Some(medium.write_zeroes).filter(|_| writable),
        zeroes_may_unmap: writable && options.discard_unmap && medium.zeroes_may_unmap,
        durable_write: if options.durable_writes { DurableWrite::Native } else { DurableWrite::Emulate },
    }
}
