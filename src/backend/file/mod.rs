//! Raw image files and host block devices: an io_uring for each virtqueue, and plain calls for what need not wait.
//!
//! | file | what |
//! |---|---|
//! | `options`, `open` | what to open and how; every check before a guest waits |
//! | `geometry`, `device_stack` | the limits of the medium; whether it reads a write's buffer twice |
//! | `image` | an open image, which all of its queues share |
//! | `qemu_locks`, `claim` | QEMU's image locks, and when they are taken and released |
//! | `resize`, `image_ends` | a new size; the bytes that show the image's format |
//! | `queue` | the queue of one virtqueue: how an op begins, continues and completes |
//! | `inline` | reads and writes that are tried without the io_uring |
//! | `bounce`, `range_op` | transfers through memory of our own; discard and write-zeroes |
//! | `range_locks` | read-modify-write, where the medium's blocks are larger than the guest's |
//! | `helper_threads`, `mail` | threads for what io_uring cannot do, and their messages to a queue |
//! | `change_counter` | whether a sync has anything to do |

mod bounce;
mod change_counter;
mod claim;
mod device_stack;
mod geometry;
mod helper_threads;
mod image;
mod image_ends;
mod inline;
mod mail;
mod open;
mod options;
mod qemu_locks;
mod queue;
mod range_locks;
mod range_op;
mod resize;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use open::OpenError;
pub use options::{FileOptions, Locking};
pub use qemu_locks::check_unused;

use super::{Backend, BufferUse, Errno, Geometry, ImageClaim, ImageEnds, ImageInfo, ImageUpgrade, IoQueue};
use image::{FileImage, OpenFile};
use queue::FileQueue;

/// An open image.
pub struct FileBackend {
    image: Arc<FileImage>,
}

impl FileBackend {
    /// Opens and checks an image, and takes its locks. `main` calls it before it binds the socket. An error says what
    /// failed, why, and how to fix it.
    pub fn open(options: &FileOptions) -> Result<FileBackend, OpenError> {
        let opened = open::open(options)?;
        Ok(FileBackend { image: Arc::new(FileImage::new(opened, options)) })
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

fn fdatasync(file: &OpenFile) -> Result<(), Errno> {
    loop {
        match rustix::fs::fdatasync(&file.fd) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map_err(|error| Errno(error.raw_os_error())),
        }
    }
}

impl Backend for FileBackend {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.image.size.load(Ordering::Relaxed), ..self.image.geometry }
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        // An open file description of its own: the kernel reports a writeback error once to each description. If queues
        // image one, the first sync would get the error, and another that runs at the same time would succeed.
        let file = geometry::reopen(self.image.file.fd.as_fd(), self.image.file.flags)?;
        Ok(Box::new(FileQueue::open(Arc::clone(&self.image), file, depth)?))
    }

    fn sync(&self) -> io::Result<()> {
        let image = &self.image;
        let result = match image.changes.begin_sync() {
            None => image.record_durability(Ok(())),
            Some(stamp) => image.end_sync(stamp, fdatasync(&image.file)),
        };
        result.map_err(|errno| io::Error::from_raw_os_error(errno.0))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        use rustix::fs::{SeekFrom, seek};
        use rustix::io::Errno;
        let size = self.geometry().size;
        if offset >= size {
            return Ok(None);
        }
        // This moves the position of our own description, which nothing else uses.
        match seek(&self.image.file.fd, SeekFrom::Data(offset)) {
            Ok(start) if start >= size => Ok(None),
            Ok(start) => Ok(Some((start, seek(&self.image.file.fd, SeekFrom::Hole(start))?.min(size)))),
            // What was cut off the file is no hole.
            Err(Errno::NXIO) => resize::check_not_truncated(&self.image, size).map(|()| None),
            // Devices, and filesystems that cannot report holes.
            Err(Errno::INVAL | Errno::NOTSUP) => Ok(Some((offset, size))),
            Err(error) => Err(error.into()),
        }
    }

    fn describe(&self) -> String {
        let image = &self.image;
        let what = if image.file.is_device { "block device" } else { "raw file" };
        let how = if image.limits.direct { "O_DIRECT" } else { "page cache" };
        let access = if image.geometry.read_only { ", read-only" } else { "" };
        let modify = if image.range_locks.is_some() {
            format!(", read-modify-write of {}-byte blocks", image.limits.align.offset)
        } else {
            String::new()
        };
        format!("{what} {} ({how}){access}{modify}", image.file.name)
    }

    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
        resize::resize(&self.image, grow_to, shrink)
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.image.sync_error.get()
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
        self.image.buffer_use.clone()
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.image.file.path)
    }

    fn ends(&self) -> io::Result<ImageEnds> {
        image_ends::read(self.image.file.fd.as_fd(), self.geometry().size, self.image.limits.align)
    }
}
