//! Raw image files and host block devices: an io_uring for each virtqueue, and plain calls for what need not wait.

mod bounce;
mod change_counter;
mod device_stack;
mod geometry;
mod helper_thread;
mod image_ends;
mod inline;
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
use super::{
    Backend, BufferUse, DurableWrite, Errno, Geometry, ImageClaim, ImageEnds, ImageInfo, ImageUpgrade, IoQueue,
};
use crate::engine::CachePolicy;
use change_counter::ChangeCounter;
use geometry::{Alignment, Storage};
use queue::FileQueue;
use range_locks::RangeLocks;
use range_op::UnsupportedOps;

/// How QEMU's image locks are used (`--locking`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Locks where the file system supports it, and warns where not.
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
    /// Another process has the image and will release its locks later. [`ImageUpgrade::take_over`] then takes them.
    pub lock_later: bool,
    /// Makes single writes durable with RWF_DSYNC ([`DurableWrite::Native`]) instead of a sync after them.
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

/// An open image.
pub struct FileBackend {
    shared: Arc<Shared>,
}

/// What all queues of an image share.
struct Shared {
    /// The description that holds the image locks. Queues open their own.
    fd: OwnedFd,
    name: String,
    /// Absolute path.
    path: PathBuf,
    flags: OFlags,
    is_device: bool,
    /// Opened with O_DIRECT.
    direct: bool,
    /// What O_DIRECT requires; 1 without O_DIRECT.
    align: Alignment,
    /// Bytes of the units in which the kernel discards and zeroes ranges.
    range_unit: u32,
    may_unmap: bool,
    /// The geometry when the image was opened; the current size is in `size`.
    geometry: Geometry,
    /// The current size in bytes.
    size: AtomicU64,
    buffer_use: BufferUse,
    memory: Arc<BouncePool>,
    sync_error: StickyError,
    changes: ChangeCounter,
    /// What a queue's own thread may do.
    inline_policy: inline::InlinePolicy,
    /// Which thread begins the file ops of a queue's io_uring.
    submission: Submission,
    unsupported: UnsupportedOps,
    /// The locks for read-modify-write, where the guest's blocks are smaller than those that can be written.
    range_locks: Option<Arc<RangeLocks>>,
    locking: Locking,
    /// The locks of [`Locking::Auto`] are released for another process, or that process still has them.
    locks_released: AtomicBool,
}

impl FileBackend {
    /// Opens and checks an image, and takes its locks. `main` calls it before it binds the socket. An error says what
    /// failed, why, and how to fix it.
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
            device_stack::buffer_use(opened.fd.as_fd(), opened.is_device, &options.sysfs)
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
            sync_error: StickyError::default(),
            changes: ChangeCounter::default(),
            inline_policy: match (direct, medium.storage) {
                (true, _) => inline::InlinePolicy::Device,
                (false, Storage::Local) => inline::InlinePolicy::Cache,
                (false, Storage::Remote) => inline::InlinePolicy::RemoteCache,
                (false, Storage::Memory) => inline::InlinePolicy::Memory,
            },
            submission: match medium.storage {
                Storage::Memory | Storage::Local => Submission::Inline,
                Storage::Remote => Submission::Worker,
            },
            unsupported: UnsupportedOps::default(),
            range_locks: (opened.logical_block < align.offset).then(|| RangeLocks::new(align.offset)),
            locking: options.locking,
            locks_released: AtomicBool::new(options.lock_later),
        };
        Ok(FileBackend { shared: Arc::new(shared) })
    }
}

/// Checks that the kernel provides an io_uring to this process, with its present rights; the error says why not. `main`
/// calls it once more after it has dropped rights.
pub(crate) fn probe_io_uring() -> io::Result<()> {
    super::uring::probe()
}

/// Creates the io_urings of so many queues, for all images of this process; none is created after that. Returns for how
/// many queues there was memory; fails if for none. `main` calls it before the filter of system calls forbids it, and
/// before it changes its user: an io_uring that root created does not count as memory locked by a user.
pub(crate) fn prepare_io_urings(queues: u16) -> io::Result<u16> {
    super::uring::prepare(queues)
}

impl Backend for FileBackend {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.shared.size.load(Ordering::Relaxed), ..self.shared.geometry }
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        // An open file description of its own: the kernel reports a writeback error once to each description. If queues
        // shared one, the first sync would get the error, and another that runs at the same time would succeed.
        let file = geometry::reopen(self.shared.fd.as_fd(), self.shared.flags)?;
        Ok(Box::new(FileQueue::open(Arc::clone(&self.shared), file, depth)?))
    }

    fn sync(&self) -> io::Result<()> {
        let result = match self.shared.changes.begin_sync() {
            None => Ok(()),
            Some(stamp) => loop {
                match rustix::fs::fdatasync(&self.shared.fd) {
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => break Err(Errno(error.raw_os_error())),
                    Ok(()) => {
                        self.shared.changes.sync_succeeded(stamp);
                        break Ok(());
                    }
                }
            },
        };
        self.shared.sync_error.record(result, &self.shared.name).map_err(|errno| io::Error::from_raw_os_error(errno.0))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        use rustix::fs::{SeekFrom, seek};
        use rustix::io::Errno;
        let size = self.geometry().size;
        if offset >= size {
            return Ok(None);
        }
        // This moves the position of our own description, which nothing else uses.
        match seek(&self.shared.fd, SeekFrom::Data(offset)) {
            Ok(start) if start >= size => Ok(None),
            Ok(start) => Ok(Some((start, seek(&self.shared.fd, SeekFrom::Hole(start))?.min(size)))),
            Err(Errno::NXIO) => Ok(None),
            // Devices, and file systems that cannot report holes.
            Err(Errno::INVAL | Errno::NOTSUP) => Ok(Some((offset, size))),
            Err(error) => Err(error.into()),
        }
    }

    fn describe(&self) -> String {
        let shared = &self.shared;
        let what = if shared.is_device { "block device" } else { "raw file" };
        let how = if shared.direct { "O_DIRECT" } else { "the host's cache" };
        let access = if shared.geometry.read_only { ", read-only" } else { "" };
        let modify = if shared.range_locks.is_some() {
            format!(", read-modify-write of {}-byte blocks", shared.align.offset)
        } else {
            String::new()
        };
        format!("{what} {} over {how}{access}{modify}", shared.name)
    }

    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
        resize::resize(&self.shared, grow_to, shrink)
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.shared.sync_error.get()
    }

    fn info(&self) -> &dyn ImageInfo {
        self
    }

    fn for_upgrade(&self) -> &dyn ImageUpgrade {
        self
    }

    fn claim(&self) -> &dyn ImageClaim {
        self
    }
}

impl ImageInfo for FileBackend {
    fn buffer_use(&self) -> BufferUse {
        self.shared.buffer_use.clone()
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.shared.path)
    }

    fn ends(&self) -> io::Result<ImageEnds> {
        image_ends::read(self.shared.fd.as_fd(), self.geometry().size, self.shared.align)
    }
}

impl ImageUpgrade for FileBackend {
    fn identity(&self) -> Option<String> {
        // By its numbers, because a device or a file may have many paths.
        let found = rustix::fs::fstat(&self.shared.fd).ok()?;
        Some(match self.shared.is_device {
            true => format!("device {}", found.st_rdev),
            false => format!("file {}:{}", found.st_dev, found.st_ino),
        })
    }

    fn hand_over(&self) {
        if self.shared.locking == Locking::Auto {
            self.shared.locks_released.store(true, Ordering::Release);
            lock::unlock_image(self.shared.fd.as_fd());
        }
    }

    fn take_over(&self) -> io::Result<()> {
        let shared = &self.shared;
        if shared.locking == Locking::Auto && shared.locks_released.load(Ordering::Acquire) {
            open::lock(&shared.path, shared.fd.as_fd(), shared.geometry.read_only)
                .map_err(|error| io::Error::other(error.to_string()))?;
            shared.locks_released.store(false, Ordering::Release);
        }
        Ok(())
    }
}

impl ImageClaim for FileBackend {
    fn activate(&self) -> io::Result<()> {
        // If the locks could not be taken back after a failed hand-over, this retries before a guest's virtqueues run.
        self.take_over()?;
        let shared = &self.shared;
        if shared.locking == Locking::InUse {
            open::lock(&shared.path, shared.fd.as_fd(), shared.geometry.read_only)
                .map_err(|error| io::Error::other(error.to_string()))?;
            // Another host may have written the image since, so clean cached data must be read again.
            if let Err(error) = rustix::fs::fadvise(&shared.fd, 0, None, Advice::DontNeed) {
                log::debug!("{}: cannot drop its cached data: {error}", shared.name);
            }
        }
        resize::notice_growth(shared);
        Ok(())
    }

    fn activate_for_hold(&self) -> io::Result<bool> {
        match self.shared.locking {
            Locking::InUse => self.activate().map(|()| true),
            // If another process was to take over and did not, and the locks could not be taken back at once.
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

    /// Returns the result if the op completed inline, in `push`.
    fn inline_result(queue: &mut dyn IoQueue, op: Op) -> Option<Result<(), Errno>> {
        let mut out = Vec::new();
        queue.push(op, OpId(1)).unwrap();
        queue.reap(&mut out);
        out.pop().map(|completion| completion.result)
    }

    fn write() -> Op {
        Op::Write { offset: 4096, buf: IoBuf::owned(4096, 4096, 0), durable: false }
    }

    #[test]
    fn cached_data_is_transferred_inline() {
        let (file, backend) = image(CacheMode::Writeback);
        let mut queue = backend.unwrap().open_queue(4).unwrap();
        assert_eq!(inline_result(&mut *queue, write()), Some(Ok(())));
        let part = IoBuf::owned(4096, 4096, 0);
        let asked =
            preadv::transfer(file.as_file().as_fd(), false, &part, 0..512, 4096, libc::RWF_NOWAIT, &mut Vec::new());
        if asked == Err(Errno(libc::EOPNOTSUPP)) {
            return eprintln!("SKIPPED: reads of {} do not know RWF_NOWAIT", file.path().display());
        }
        assert_eq!(inline_result(&mut *queue, Op::Read { offset: 4096, buf: part }), Some(Ok(())));
        let long = IoBuf::owned(1 << 20, 4096, 0);
        assert_eq!(
            inline_result(&mut *queue, Op::Read { offset: 0, buf: long }),
            None,
            "a long copy would delay the others"
        );
    }

    #[test]
    fn a_sync_after_a_sync_makes_no_system_call() {
        let (_file, backend) = image(CacheMode::Writeback);
        let backend = backend.unwrap();
        let is_clean = || backend.shared.changes.begin_sync().is_none();
        let mut queue = backend.open_queue(4).unwrap();
        assert!(!is_clean(), "an earlier process may have written");
        backend.sync().unwrap();
        assert!(is_clean());
        assert_eq!(inline_result(&mut *queue, Op::Sync), Some(Ok(())));
        inline_result(&mut *queue, write());
        assert!(!is_clean());
        backend.shared.sync_error.fail(Errno(libc::EIO), "test");
        backend.sync().unwrap_err();
        assert_eq!(inline_result(&mut *queue, Op::Sync), Some(Err(Errno(libc::EIO))), "a failure is final");
    }

    /// A guest's request must not fail because a file system requires more alignment than it reported.
    #[test]
    fn a_transfer_that_the_kernel_refuses_is_bounced() {
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
