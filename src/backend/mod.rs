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
//! 6. [`IoQueue::wait`] returns when [`IoQueue::reap`] would return something or a watched descriptor became
//!    readable; the next wait sees an event that came before it. [`IoQueue::has_news`] becomes true when a submitted op
//!    has completed.
//! 7. A full queue returns the op; it takes ops again once something was reaped.

pub mod blocking;
pub mod bounce_pool;
pub mod buffer;
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
use std::sync::Arc;
use std::time::Duration;

use crate::disk::{ImageSnapshots, ImageStatus};
pub use crate::engine::Errno;
pub use blocking::{BlockingCall, Caller};
pub use buffer::IoBuf;
pub use image_format::ImageEnds;
pub use notices::{Notices, QuiesceAsk};
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

/// An open image, which the workers, the vhost-user thread and `main` share.
pub trait Backend: Send + Sync {
    /// Returns the image's geometry. Only the size may change while the image is open; [`Notices::resized`] reports
    /// that.
    fn geometry(&self) -> Geometry;

    /// Opens a queue for one virtqueue. The worker that will use it calls this. `depth` is the most ops that the caller
    /// wants in flight.
    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>>;

    /// Makes everything written so far durable. Blocks. The vhost-user thread calls it (GET_VRING_BASE, disconnect),
    /// `main` at the end, and a quiesce that finds no running ring; a worker never does.
    fn sync(&self) -> io::Result<()>;

    /// Describes in one line what is open and how, for logs and status.
    fn describe(&self) -> String;

    /// Returns the absolute path of the file or block device, if there is one: for status, and for snapshots by other
    /// tools.
    fn path(&self) -> Option<&std::path::Path> {
        None
    }

    /// Returns the next range at or after `offset` that may hold data, as (start, end), or `None` if only zeroes
    /// follow. By default the whole image may hold data. May block on metadata; a worker never calls it.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let size = self.geometry().size;
        Ok((offset < size).then_some((offset, size)))
    }

    /// Returns the image's first and last bytes, which show whether it has another format than raw; empty where it has none.
    /// Reads a few KiB, and may block for as long as the image's storage hangs; a thread of its own calls it.
    fn ends(&self) -> io::Result<ImageEnds> {
        Ok(ImageEnds::default())
    }

    /// Returns how the storage below reads the buffer of a write. Called once, when the disk is put together.
    fn buffer_use(&self) -> BufferUse {
        BufferUse::ReadsOnce("nothing is below that would read a write's buffer twice".into())
    }

    /// Returns the error of the first sync that failed, if that makes all later ones fail (clause 5).
    fn sync_failed(&self) -> Option<Errno>;

    /// Starts to report events to `notices`. Called once, when the disk is put together, before the first queue is
    /// opened. The back-end drops `notices` in [`Backend::stop_notices`].
    fn start_notices(&self, notices: Arc<dyn Notices>) {
        drop(notices);
    }

    /// Stops the notices, because the daemon ends. No notice comes after this returns, and every quiesce has its reply.
    /// May block for a moment; `main` calls it.
    fn stop_notices(&self) {}

    /// Prepares the image for a guest, because the first ring starts. A back-end whose image several hosts can open
    /// excludes the others here. After an error the ring does not run. May be called again before
    /// [`Backend::deactivate`], where a hold or a copy used the image meanwhile. The vhost-user thread calls it; may
    /// block.
    fn activate(&self) -> io::Result<()> {
        Ok(())
    }

    /// Does what [`Backend::activate`] does, for a hold while no ring runs, where only that excludes others from
    /// changing the image. `Ok(false)` means that there was nothing to do and [`Backend::deactivate`] does not follow.
    /// An error means that another client has the image. A thread of the hold calls it; may block.
    fn activate_for_hold(&self) -> io::Result<bool> {
        Ok(false)
    }

    /// Whether others, who cannot change the image now, can after [`Backend::deactivate`]. Any thread.
    fn gives_way(&self) -> bool {
        false
    }

    /// Lets others have the image: the last ring has stopped, everything acknowledged was synced as the cache mode
    /// promises, and there is no hold. The vhost-user thread or that of a hold or a copy calls it, after
    /// [`Backend::activate`] and not during it; may block.
    fn deactivate(&self) {}

    /// Returns a name of the image by which two processes can tell whether they have the same one open, by whatever
    /// path. `None` means that no other process can have it. For upgrades in place; any thread.
    fn identity(&self) -> Option<String> {
        None
    }

    /// Waits until [`Backend::deactivate`] will be quick, because another process is about to take over the image while
    /// the guest still runs. Blocks for seconds at most; the thread that hands over calls it.
    fn wait_until_releasable(&self) {}

    /// Releases what excludes others even without a guest, because another process takes over the image. A successful
    /// sync and [`Backend::deactivate`] come before it. If the other process fails, [`Backend::take_over`] comes next,
    /// before any I/O of the guest. The thread that hands over calls it.
    fn hand_over(&self) {}

    /// Takes what the previous process released by [`Backend::hand_over`], for an image that was opened to be taken
    /// over; or takes it back. Fails when another process was faster. The thread that hands over or takes over calls
    /// it.
    fn take_over(&self) -> io::Result<()> {
        Ok(())
    }

    /// Takes over the present size of the image, which an operator has changed. With `grow_to` it first grows the image
    /// to so many bytes, where the back-end can. It takes a size smaller than before only with `shrink`. Returns the
    /// size, which [`Backend::geometry`] has from then on. An error says what failed, why, and how to fix it. A thread
    /// for `resize` on the control socket calls it; may block.
    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
        let _ = (grow_to, shrink);
        Err(io::Error::other(format!(
            "{}: it cannot be resized from here; if its store can do it (rbd resize), use that: the guest gets the new size",
            self.describe()
        )))
    }

    /// Returns what the status says of the image, besides its geometry. The control thread calls it; does not block on
    /// I/O.
    fn image_status(&self) -> ImageStatus {
        ImageStatus::default()
    }

    /// Returns the access to snapshots by the image's own store, where that has them. The control thread calls it.
    fn snapshots(&self) -> Option<Arc<dyn ImageSnapshots>> {
        None
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

    /// Whether `reap` would return something. For a busy-polling caller, which watches the guest's ring itself; a kick
    /// therefore does not count. Makes a system call only when there is something to do. May miss a watched descriptor.
    fn has_news(&mut self) -> bool;

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
