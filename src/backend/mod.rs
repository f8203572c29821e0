//! The storage behind the device. A [`Backend`] opens one [`IoQueue`] for each virtqueue. It knows nothing of virtio.
//!
//! # The contract
//! `tests/backend/contract.rs` runs these clauses against every back-end:
//! 1. Each pushed op completes exactly once, in any order.
//! 2. `Ok` means every byte: the back-end continues a short transfer, or fails the op.
//! 3. An op owns its buffer until its completion returns it. Dropping a queue waits for what is in flight; if it cannot
//!    wait, it leaks the buffers rather than free them.
//! 4. A `Sync` covers every write reaped before the sync was pushed, on any queue of the same back-end.
//! 5. A sync (or a durable write) that failed over the page cache makes every later one fail, on every queue.
//! 6. [`IoQueue::wait`] returns when [`IoQueue::reap`] would return something or a watched descriptor became readable;
//!    the next wait sees an event that came before it. [`IoQueue::has_completions`] becomes true when a submitted op
//!    has completed.
//! 7. A full queue returns the op; it takes ops again once something was reaped.
//!
//! # The files
//!
//! | file | what |
//! |---|---|
//! | `capabilities`, `notices` | what some images can do besides; what an image reports without being asked |
//! | `file/`, `rbd/` | raw files and block devices; Ceph RBD |
//! | `mem/`, `null`, `slow` | for tests and benchmarks |
//! | `layer`, `point_in_time/`, `stable/` | back-ends in front of another: copies of an instant, stable writes |
//! | `uring/`, `preadv`, `blocking` | one io_uring (UNSAFE); a plain call (UNSAFE); calls that may never return |
//! | `eventfd_poll`, `mailbox` | how a queue without io_uring sleeps; messages to a queue |
//! | `buffer`, `bounce_pool` | the memory of a transfer (UNSAFE); memory for transfers that are copied |
//! | `sticky_error` | after a failed sync every later one fails |
//! | `image_format` | recognizes images of other formats |

pub mod blocking;
pub mod bounce_pool;
pub mod buffer;
pub mod capabilities;
mod eventfd_poll;
pub mod file;
pub(crate) mod image_format;
pub mod layer;
mod mailbox;
pub mod mem;
pub mod notices;
pub mod null;
pub mod point_in_time;
mod preadv;
pub mod rbd;
pub mod slow;
pub mod stable;
mod sticky_error;
mod uring;

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

pub use crate::engine::Errno;
pub use blocking::{BlockingCall, Caller};
pub use buffer::IoBuf;
pub use capabilities::{ImageClaim, ImageInfo, ImageStore, ImageUpgrade};
pub use image_format::ImageEnds;
pub use notices::{Notices, QuiesceRequest};
pub use stable::BufferUse;

/// The caller's number for an op, which its completion carries: any number below 2^63. The highest bit is for a layer
/// in front of a back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpId(pub u64);

/// One operation on the image. Offsets and lengths are in bytes. The device has checked that they are inside the image
/// and multiples of the logical block size.
#[derive(Debug)]
pub enum Op {
    /// Reads into `buf` from `offset`.
    Read {
        /// Byte offset in the image.
        offset: u64,
        /// The memory for the data.
        buf: IoBuf,
    },
    /// Writes `buf` at `offset`.
    Write {
        /// Byte offset in the image.
        offset: u64,
        /// The data.
        buf: IoBuf,
        /// The data is durable when the op completes. Set only where [`Geometry::durable_write`] is
        /// [`DurableWrite::Native`].
        durable: bool,
    },
    /// Makes every op reaped so far durable.
    Sync,
    /// Discards the content of a range, which may read as anything afterwards.
    Discard {
        /// Byte offset in the image.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// Byte offset in the image.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The range may be deallocated (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP); otherwise its space stays allocated.
        unmap: bool,
    },
}

/// The completion of an op.
#[derive(Debug)]
pub struct Completion {
    /// The number of the op.
    pub id: OpId,
    /// `Ok` means that all of the op was carried out.
    pub result: Result<(), Errno>,
    /// The op's buffer, for reuse.
    pub buf: Option<IoBuf>,
}

/// How the back-end makes a single write durable, in nbdkit's words for FUA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DurableWrite {
    /// By a flag of the write.
    Native,
    /// Only by a sync after it.
    Emulate,
}

/// Limits of discard and write-zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// The longest range of one op, in bytes.
    pub max_bytes: u64,
    /// Only ranges aligned to this many bytes free space.
    pub granularity: u32,
}

/// The image as the guest sees it. All sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the image, a multiple of `logical_block`.
    pub size: u64,
    /// The smallest addressable unit: 512 or 4096.
    pub logical_block: u32,
    /// The smallest unit that the medium writes without read-modify-write.
    pub physical_block: u32,
    /// The offset of the first physical block.
    pub alignment_offset: u32,
    /// The smallest preferred I/O; 0 if unknown.
    pub min_io: u32,
    /// The preferred I/O; 0 if unknown.
    pub opt_io: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// The limits of discards; `None` if they are not offered.
    pub discard: Option<RangeLimits>,
    /// The limits of write-zeroes; `None` if they are not offered.
    pub write_zeroes: Option<RangeLimits>,
    /// A write-zeroes with `unmap` deallocates.
    pub zeroes_may_unmap: bool,
    /// How a single write becomes durable.
    pub durable_write: DurableWrite,
}

impl Geometry {
    /// Returns the geometry of a writable disk of `size` bytes (whole blocks) without a medium, for `mem` and `null`:
    /// every operation is offered and no size is preferred.
    fn without_medium(size: u64, block: u32, durable_write: DurableWrite) -> Self {
        let range = Some(RangeLimits { max_bytes: 1 << 30, granularity: block });
        Geometry {
            size,
            logical_block: block,
            physical_block: block,
            alignment_offset: 0,
            min_io: 0,
            opt_io: 0,
            read_only: false,
            discard: range,
            write_zeroes: range,
            zeroes_may_unmap: true,
            durable_write,
        }
    }
}

/// An event that wakes a worker, besides completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The guest's kick eventfd.
    Kick,
    /// The worker's mailbox eventfd.
    Wake,
    /// The mailbox of a layer in front of this back-end: a point-in-time copy has released delayed writes.
    Copy,
}

/// The sources that fired since the last [`IoQueue::wait`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wakeups {
    /// [`Source::Kick`] fired.
    pub kick: bool,
    /// [`Source::Wake`] fired.
    pub wake: bool,
    /// [`Source::Copy`] fired.
    pub copy: bool,
}

/// An opened image. The virtqueues' threads, the vhost-user thread, the control thread and main share it.
///
/// Five methods make a back-end. An image that can do more overrides one of the last four, each of which returns one
/// capability ([`capabilities`]).
pub trait Backend: Send + Sync {
    /// The image's shape. Only the size may change while the image is open; [`Notices::resized`] reports it.
    fn geometry(&self) -> Geometry;

    /// Opens a queue for one virtqueue. Called in the virtqueue's own thread, which alone uses the queue. `depth`: the most ops
    /// that the caller wants in flight.
    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>>;

    /// Makes everything written so far durable; blocks. Called by the vhost-user thread (GET_VRING_BASE, disconnect),
    /// by main at the end, and by a quiesce that finds no running virtqueue; never by a virtqueue's thread.
    fn sync(&self) -> io::Result<()>;

    /// The error number of the first sync that failed for good (clause 5), if any.
    fn sync_failed(&self) -> Option<Errno>;

    /// One line for logs and status: what is open and how.
    fn describe(&self) -> String;

    /// The next range at or after `offset` that may hold data, as (start, end). `None`: there are only zeroes from here
    /// on. By default everything may hold data. An image that was truncated behind [`Backend::geometry`]'s back is an error
    /// where only that part is left. May block on metadata; never called by a virtqueue's thread.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let size = self.geometry().size;
        Ok((offset < size).then_some((offset, size)))
    }

    /// Reads the image's present size, because another program may have changed it. With `grow_to`, first grows the
    /// image to so many bytes, if the back-end can. A size that is smaller than before is accepted only with `shrink`.
    /// Returns the size, which [`Backend::geometry`] has from now on. An error says what failed, why and how to fix it.
    /// Called by a thread of its own for `resize` on the control socket; may block.
    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
        let _ = (grow_to, shrink);
        Err(io::Error::other(format!(
            "{}: it cannot be resized from here; if its store can do it (rbd resize), use that: the guest gets the new size",
            self.describe()
        )))
    }

    /// What else is known of the image.
    fn info(&self) -> &dyn ImageInfo {
        &capabilities::NONE
    }

    /// Claims and releases an image that other processes or hosts can open.
    fn claim(&self) -> &dyn ImageClaim {
        &capabilities::NONE
    }

    /// Hands the image over in an upgrade in place.
    fn for_upgrade(&self) -> &dyn ImageUpgrade {
        &capabilities::NONE
    }

    /// The image's own store, if it has one that reports changes and takes snapshots.
    fn store(&self) -> &dyn ImageStore {
        &capabilities::NONE
    }
}

/// The back-end's queue for one virtqueue. Only the thread that opened it may use it, or the one that called
/// [`IoQueue::change_thread`] last.
pub trait IoQueue: Send {
    /// Takes an op, or returns it when the queue is full (clause 7). The op may start only at `submit` or `wait`.
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op>;

    /// Starts the pushed ops, without waiting.
    fn submit(&mut self) -> io::Result<()>;

    /// Appends the completions. Never blocks.
    fn reap(&mut self, out: &mut Vec<Completion>);

    /// Watches an eventfd. Called once for each source, before the first `wait`. The descriptor stays open until the
    /// queue is dropped. The queue may consume the eventfd's count; the caller never reads it.
    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Whether `reap` would return something. For a busy-polling caller, which watches the guest's virtqueue itself; a kick
    /// therefore does not count. Makes a system call only when there is something to do. May miss a watched descriptor.
    fn has_completions(&mut self) -> bool;

    /// Submits, then sleeps until there is something to reap, a source fired (clause 6), or the timeout passed.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups>;

    /// Returns what makes the calls of [`IoQueue::next_call`], which the owner of the queue then has to make after each
    /// round of pushes. An owner that does not ask leaves the calls to the queue, which makes them in `push`. `None`:
    /// there are no such calls. The owner asks again after [`IoQueue::change_thread`].
    fn caller(&mut self) -> Option<Box<dyn Caller>> {
        None
    }

    /// Returns the next call that may block. The owner makes it without borrowing the queue, and then calls
    /// [`IoQueue::call_made`].
    fn next_call(&mut self) -> Option<BlockingCall> {
        None
    }

    /// Takes back a call that was made. Its op is then complete, or the queue continues it.
    fn call_made(&mut self, call: BlockingCall) {
        drop(call);
    }

    /// Makes the calling thread the queue's, while the old one is in a call that does not return. Ops that the old
    /// thread had given to the kernel may need that thread, and then complete after its call. Fails when no descriptor
    /// is left; the queue is then unchanged.
    fn change_thread(&mut self) -> io::Result<()> {
        Ok(())
    }
}
