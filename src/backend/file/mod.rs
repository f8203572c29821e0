//! Raw image files and host block devices: one io_uring a ring, and plain calls for what needs no waiting.

mod bounce;
mod change_counter;
mod device_stack;
mod geometry;
mod helper_thread;
mod image_ends;
mod immediate;
mod lock;
mod mailbox;
mod open;
mod queue;
mod range_locks;
mod range_op;
mod resize;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{Advice, OFlags};

pub use lock::check_unused;
pub use open::OpenError;

use super::bounce_pool::BouncePool;
use super::sticky_error::StickyError;
use super::uring::Submission;
use super::{Backend, BufferUse, DurableWrite, Errno, Geometry, ImageEnds, IoQueue};
use crate::engine::CachePolicy;
use change_counter::ChangeCounter;
use geometry::{Alignment, Storage};
use queue::FileQueue;
use range_locks::RangeLocks;
use range_op::Unsupported;

/// Whether QEMU's image locks are used (`--locking`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Where the filesystem has them; a warning where not.
    #[default]
    Auto,
    /// The same, but only while a guest's rings run: two servers can have the image open, and a live migration hands it
    /// from one to the other. A guest that is paused holds no lock.
    InUse,
    /// No: the user answers for it.
    Off,
}

/// What to open and how.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// The image: a regular file or a block device.
    pub path: PathBuf,
    /// The cache mode's meaning; decides about O_DIRECT.
    pub policy: CachePolicy,
    /// Refuse writes; the image need not be writable.
    pub read_only: bool,
    /// The sector size that the guest sees, 512 or 4096 bytes; None: the sector of the disk below, in every mode.
    pub logical_block_size: Option<u32>,
    /// Pass discards on, and let write-zeroes deallocate.
    pub discard_unmap: bool,
    /// The user said that the image is raw (`--format raw`), whatever it looks like.
    pub is_raw: bool,
    /// QEMU's image locks.
    pub locking: Locking,
    /// Another process has the image, and gives its locks up later: then [`Backend::take_over`] takes them.
    pub lock_later: bool,
    /// Make single writes durable with RWF_DSYNC ([`DurableWrite::Native`]) instead of a sync after them. See
    /// [`FileOptions::new`] for which is better where.
    pub durable_writes: bool,
    /// Where transfers that must be copied get their memory.
    pub memory: Arc<BouncePool>,
    /// Where sysfs is mounted: `/sys`, but for tests.
    pub sysfs: PathBuf,
}

impl FileOptions {
    /// The defaults: writable, blocks as O_DIRECT needs them, discards passed on, locks taken.
    ///
    /// Single durable writes past the page cache, a sync shared by many over it. Measured by `benches/durable_write.rs`
    /// (ext4, virtio disk without FUA, 4 KiB random, depths 1, 16, 64), shared sync relative to RWF_DSYNC: O_DIRECT
    /// 0.92, 1.11, 0.90; page cache 0.96, 3.21, 4.31. Past the cache they are equal here, and RWF_DSYNC needs one step
    /// instead of two and uses the FUA of devices that have it. Over the cache its writes to one file take turns.
    /// And there a failed RWF_DSYNC is as final as a failed sync, even where only this write found no room.
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

/// An open image.
pub struct FileBackend {
    shared: Arc<Shared>,
}

/// What all queues of an image have in common.
struct Shared {
    /// Holds the image locks. Queues open their own descriptions.
    fd: OwnedFd,
    name: String,
    /// Absolute.
    path: PathBuf,
    flags: OFlags,
    is_device: bool,
    /// Opened with O_DIRECT.
    direct: bool,
    /// Of O_DIRECT; 1 without.
    align: Alignment,
    /// Bytes of the units in which the kernel discards and zeroes.
    range_unit: u32,
    may_unmap: bool,
    /// As it was opened; the size is in `size`.
    geometry: Geometry,
    /// Bytes.
    size: AtomicU64,
    buffer_use: BufferUse,
    memory: Arc<BouncePool>,
    latch: StickyError,
    unsynced: ChangeCounter,
    /// What may be done in a queue's own thread.
    medium: immediate::InlinePolicy,
    /// Who begins what a queue's ring is given.
    submission: Submission,
    unable: Unsupported,
    /// Where the guest's blocks are smaller than those that can be written: what read-modify-write needs.
    ranges: Option<Arc<RangeLocks>>,
    locking: Locking,
    /// The locks of [`Locking::Auto`] are another process's to take, or still its own.
    lent: AtomicBool,
}

impl FileBackend {
    /// Opens and checks an image, and takes its locks. Errors name the thing, the cause and the mend. Called by main
    /// before the socket is bound.
    pub fn open(options: &FileOptions) -> Result<FileBackend, OpenError> {
        let opened = open::open(options)?;
        let medium = opened.medium;
        let direct = options.policy.opens_direct();
        let align = if direct { medium.alignment } else { Alignment { memory: 1, offset: 1 } };
        let writable = !options.read_only;
        let may_unmap = options.discard_unmap && medium.zeroes_may_unmap;
        let geometry = Geometry {
            size: medium.size,
            logical_block: opened.logical_block,
            physical_block: medium.physical_block.max(opened.logical_block),
            alignment_offset: medium.alignment_offset,
            min_io: medium.min_io.max(opened.logical_block),
            opt_io: medium.opt_io,
            read_only: options.read_only,
            discard: medium.discard.filter(|_| writable && options.discard_unmap),
            write_zeroes: Some(medium.write_zeroes).filter(|_| writable),
            zeroes_may_unmap: writable && may_unmap,
            durable_write: if options.durable_writes { DurableWrite::Native } else { DurableWrite::Emulate },
        };
        let buffer_use = if direct {
            device_stack::of(opened.fd.as_fd(), opened.is_device, &options.sysfs)
        } else {
            BufferUse::Copies("the host's page cache gets a copy of each write".into())
        };
        let shared = Shared {
            fd: opened.fd,
            name: options.path.display().to_string(),
            path: std::path::absolute(&options.path).unwrap_or_else(|_| options.path.clone()),
            flags: opened.flags,
            is_device: opened.is_device,
            direct,
            align,
            range_unit: medium.range_unit,
            may_unmap,
            size: AtomicU64::new(geometry.size),
            geometry,
            buffer_use,
            memory: options.memory.clone(),
            latch: StickyError::default(),
            unsynced: ChangeCounter::default(),
            medium: match (direct, medium.storage) {
                (true, _) => immediate::InlinePolicy::Device,
                (false, Storage::Local) => immediate::InlinePolicy::Cache,
                (false, Storage::ForeignSnapshot) => immediate::InlinePolicy::CacheElsewhere,
                (false, Storage::Memory) => immediate::InlinePolicy::Memory,
            },
            submission: match medium.storage {
                Storage::Memory | Storage::Local => Submission::Inline,
                Storage::ForeignSnapshot => Submission::Worker,
            },
            unable: Unsupported::default(),
            ranges: (opened.logical_block < align.offset).then(|| RangeLocks::new(align.offset)),
            locking: options.locking,
            lent: AtomicBool::new(options.lock_later),
        };
        Ok(FileBackend { shared: Arc::new(shared) })
    }
}

/// Whether the kernel gives this process an io_uring, with the rights that it has now; the error says why not. Called by
/// main once more after rights were given up.
pub(crate) fn probe_io_uring() -> io::Result<()> {
    super::uring::probe()
}

/// Makes the io_urings of so many queues, of all images of this process; no other is made from now on. Returns for how many
/// there was memory. Called by main before the filter of system calls forbids it, and before it is another user: an
/// io_uring that root made does not count as memory that a user locks. Errors: there is none at all.
pub(crate) fn prepare_io_urings(queues: u16) -> io::Result<u16> {
    super::uring::prepare(queues)
}

impl Backend for FileBackend {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.shared.size.load(Ordering::Relaxed), ..self.shared.geometry }
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        // Its own open file description: the kernel reports a writeback error to each of them once. If queues shared
        // one, the first sync would take the error and another, running at the same time, would succeed.
        let file = geometry::reopen(self.shared.fd.as_fd(), self.shared.flags)?;
        Ok(Box::new(FileQueue::open(Arc::clone(&self.shared), file, depth)?))
    }

    fn sync(&self) -> io::Result<()> {
        let result = match self.shared.unsynced.begin() {
            None => Ok(()),
            Some(upto) => loop {
                match rustix::fs::fdatasync(&self.shared.fd) {
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => break Err(Errno(error.raw_os_error())),
                    Ok(()) => {
                        self.shared.unsynced.synced(upto);
                        break Ok(());
                    }
                }
            },
        };
        self.shared.latch.judge(result, &self.shared.name).map_err(|errno| io::Error::from_raw_os_error(errno.0))
    }

    fn buffer_use(&self) -> BufferUse {
        self.shared.buffer_use.clone()
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.shared.path)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        use rustix::fs::{SeekFrom, seek};
        use rustix::io::Errno;
        let size = self.geometry().size;
        if offset >= size {
            return Ok(None);
        }
        // Moves the position of our own description, which nothing else uses.
        match seek(&self.shared.fd, SeekFrom::Data(offset)) {
            Ok(start) if start >= size => Ok(None),
            Ok(start) => Ok(Some((start, seek(&self.shared.fd, SeekFrom::Hole(start))?.min(size)))),
            Err(Errno::NXIO) => Ok(None),
            // Devices, and filesystems that do not know.
            Err(Errno::INVAL | Errno::NOTSUP) => Ok(Some((offset, size))),
            Err(error) => Err(error.into()),
        }
    }

    fn ends(&self) -> io::Result<ImageEnds> {
        image_ends::read(self.shared.fd.as_fd(), self.geometry().size, self.shared.align)
    }

    fn describe(&self) -> String {
        let shared = &self.shared;
        let what = if shared.is_device { "block device" } else { "raw file" };
        let how = if shared.direct { "O_DIRECT" } else { "the host's cache" };
        let access = if shared.geometry.read_only { ", read-only" } else { "" };
        let modify = if shared.ranges.is_some() {
            format!(", read-modify-write of {}-byte blocks", shared.align.offset)
        } else {
            String::new()
        };
        format!("{what} {} over {how}{access}{modify}", shared.name)
    }

    fn identity(&self) -> Option<String> {
        // By its own numbers: a device may be named by many paths, a file as well.
        let found = rustix::fs::fstat(&self.shared.fd).ok()?;
        Some(match self.shared.is_device {
            true => format!("device {}", found.st_rdev),
            false => format!("file {}:{}", found.st_dev, found.st_ino),
        })
    }

    fn hand_over(&self) {
        if self.shared.locking == Locking::Auto {
            self.shared.lent.store(true, Ordering::Release);
            lock::unlock_image(self.shared.fd.as_fd());
        }
    }

    fn take_over(&self) -> io::Result<()> {
        let shared = &self.shared;
        if shared.locking == Locking::Auto && shared.lent.load(Ordering::Acquire) {
            open::lock(&shared.path, shared.fd.as_fd(), shared.geometry.read_only)
                .map_err(|error| io::Error::other(error.to_string()))?;
            shared.lent.store(false, Ordering::Release);
        }
        Ok(())
    }

    fn activate(&self) -> io::Result<()> {
        // Where it could not be taken back at once it is tried again before a guest's rings run.
        self.take_over()?;
        let shared = &self.shared;
        if shared.locking == Locking::InUse {
            open::lock(&shared.path, shared.fd.as_fd(), shared.geometry.read_only)
                .map_err(|error| io::Error::other(error.to_string()))?;
            // Another host may have written it since: what is cached here and clean is read again.
            if let Err(error) = rustix::fs::fadvise(&shared.fd, 0, None, Advice::DontNeed) {
                log::debug!("{}: what is cached of it stays: {error}", shared.name);
            }
        }
        resize::notice_growth(shared);
        Ok(())
    }

    fn activate_for_hold(&self) -> io::Result<bool> {
        match self.shared.locking {
            Locking::InUse => self.activate().map(|()| true),
            // Where a process that was to go on with it did not, and the image could not be had back at once.
            Locking::Auto => self.take_over().map(|()| false),
            Locking::Off => Ok(false),
        }
    }

    fn gives_way(&self) -> bool {
        self.shared.locking == Locking::InUse
    }

    fn deactivate(&self) {
        if self.shared.locking == Locking::InUse {
            lock::unlock_image(self.shared.fd.as_fd());
        }
    }

    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
        resize::resize(&self.shared, grow_to, shrink)
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.shared.latch.get()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::{IoBuf, Op, OpId, preadv};
    use crate::engine::CacheMode;

    fn image(policy: CacheMode) -> (tempfile::NamedTempFile, Result<FileBackend, OpenError>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let backend = FileBackend::open(&FileOptions::new(file.path(), policy.into()));
        (file, backend)
    }

    /// What a push left ready, without any help of the kernel's.
    fn at_once(queue: &mut dyn IoQueue, op: Op) -> Option<Result<(), Errno>> {
        let mut out = Vec::new();
        queue.push(op, OpId(1)).unwrap();
        queue.reap(&mut out);
        out.pop().map(|completion| completion.result)
    }

    fn write() -> Op {
        Op::Write { offset: 4096, buf: IoBuf::owned(4096, 4096, 0), durable: false }
    }

    #[test]
    fn what_is_in_the_cache_takes_no_ring() {
        let (file, backend) = image(CacheMode::Writeback);
        let mut queue = backend.unwrap().open_queue(4).unwrap();
        assert_eq!(at_once(&mut *queue, write()), Some(Ok(())));
        let part = IoBuf::owned(4096, 4096, 0);
        let asked =
            preadv::transfer(file.as_file().as_fd(), false, &part, 0..512, 4096, libc::RWF_NOWAIT, &mut Vec::new());
        if asked == Err(Errno(libc::EOPNOTSUPP)) {
            return eprintln!("SKIPPED: reads of {} do not know RWF_NOWAIT", file.path().display());
        }
        assert_eq!(at_once(&mut *queue, Op::Read { offset: 4096, buf: part }), Some(Ok(())));
        let long = IoBuf::owned(1 << 20, 4096, 0);
        assert_eq!(at_once(&mut *queue, Op::Read { offset: 0, buf: long }), None, "long copies hold up the others");
    }

    #[test]
    fn a_sync_after_a_sync_asks_nobody() {
        let (_file, backend) = image(CacheMode::Writeback);
        let backend = backend.unwrap();
        let is_clean = || backend.shared.unsynced.begin().is_none();
        let mut queue = backend.open_queue(4).unwrap();
        assert!(!is_clean(), "a predecessor's writes may be in the cache");
        backend.sync().unwrap();
        assert!(is_clean());
        assert_eq!(at_once(&mut *queue, Op::Sync), Some(Ok(())));
        at_once(&mut *queue, write());
        assert!(!is_clean());
        backend.shared.latch.fail(Errno(libc::EIO), "test");
        backend.sync().unwrap_err();
        assert_eq!(at_once(&mut *queue, Op::Sync), Some(Err(Errno(libc::EIO))), "a failure is for good");
    }

    /// A filesystem that asks for more than it told must not fail a guest's request.
    #[test]
    fn what_the_kernel_refuses_is_bounced_after_all() {
        let (_file, backend) = image(CacheMode::None);
        let mut backend = match backend {
            Ok(backend) => backend,
            Err(error) => return eprintln!("SKIPPED: {error}"),
        };
        Arc::get_mut(&mut backend.shared).unwrap().align.memory = 1;
        let mut queue = backend.open_queue(2).unwrap();
        let mut run = |op| {
            let mut out = Vec::new();
            queue.push(op, OpId(1)).unwrap();
            while out.is_empty() {
                queue.wait(Some(Duration::from_secs(60))).unwrap();
                queue.reap(&mut out);
            }
            out.remove(0)
        };
        let skewed = IoBuf::owned(8192, 4096, 1);
        skewed.copy_from(0, &[5; 8192]);
        assert_eq!(run(Op::Write { offset: 4096, buf: skewed, durable: true }).result, Ok(()));
        let read = run(Op::Read { offset: 4096, buf: IoBuf::owned(8192, 4096, 3) });
        assert_eq!(read.result, Ok(()));
        let mut seen = [0; 8192];
        read.buf.unwrap().copy_to(0, &mut seen);
        assert_eq!(seen, [5; 8192]);
    }
}
