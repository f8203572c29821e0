//! What stands behind the device: [`Backend`] opens one [`IoQueue`] a ring. Knows no virtio.
//!
//! # The contract
//! `tests/backend/contract.rs` runs these clauses against every back-end:
//! 1. Each pushed token comes back exactly once, in any order.
//! 2. `Ok` means every byte: a short transfer is finished or failed inside.
//! 3. An op owns its buffer until its completion hands it back; dropping a queue waits for what is in flight, and if
//!    it cannot wait it leaks rather than frees.
//! 4. A `Sync` covers every write reaped before the sync was pushed, on any queue of the same back-end.
//! 5. A sync (or a durable write) that failed over the page cache makes every later one fail, on every queue.
//! 6. [`IoQueue::wait`] returns when [`IoQueue::reap`] would return something or a watched descriptor became
//!    readable; an event that comes while nobody waits is seen by the next wait. [`IoQueue::has_news`] becomes true when
//!    something submitted has finished.
//! 7. A full queue hands the op back; it takes ops again once something was reaped.

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

/// The caller's name for an op, returned with its completion: any number below 2^63. The highest bit is left to a back-end
/// in front of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpId(pub u64);

/// One operation on the image. Offsets and lengths are bytes, inside the image and multiples of the logical block
/// size: the device model checked that.
#[derive(Debug)]
pub enum Op {
    /// Fill `buf` from `offset`.
    Read {
        /// Byte offset in the image.
        offset: u64,
        /// Where the bytes go.
        buf: IoBuf,
    },
    /// Store `buf` at `offset`.
    Write {
        /// Byte offset in the image.
        offset: u64,
        /// The bytes.
        buf: IoBuf,
        /// On stable storage when it completes. Only pushed where [`Geometry::durable_write`] is
        /// [`DurableWrite::Native`].
        durable: bool,
    },
    /// Everything reaped so far becomes durable.
    Sync,
    /// The range's content is no longer needed. Afterwards it reads as anything.
    Discard {
        /// Byte offset in the image.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// Byte offset in the image.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The range may be deallocated (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP). Without it, space stays allocated.
        unmap: bool,
    },
}

/// What became of an op.
#[derive(Debug)]
pub struct Completion {
    /// The op.
    pub id: OpId,
    /// `Ok`: all of it happened.
    pub result: Result<(), Errno>,
    /// The op's buffer, for reuse.
    pub buf: Option<IoBuf>,
}

/// How the back-end makes a single write durable (nbdkit's words for FUA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DurableWrite {
    /// By a flag on the write.
    Native,
    /// Only by a sync after it.
    Emulate,
}

/// Limits of discard and write-zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// Longest range in one op, in bytes.
    pub max_bytes: u64,
    /// Ranges aligned to this free space; in bytes.
    pub granularity: u32,
}

/// The image as the guest will see it. Bytes throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the image, a multiple of `logical_block`.
    pub size: u64,
    /// Smallest addressable unit: 512 or 4096.
    pub logical_block: u32,
    /// Smallest unit that the medium writes without read-modify-write.
    pub physical_block: u32,
    /// Offset of the first physical block.
    pub alignment_offset: u32,
    /// Preferred smallest I/O; 0: unknown.
    pub min_io: u32,
    /// Preferred I/O; 0: unknown.
    pub opt_io: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// None: discard is not offered.
    pub discard: Option<RangeLimits>,
    /// None: write-zeroes is not offered.
    pub write_zeroes: Option<RangeLimits>,
    /// Write-zeroes with `unmap` really deallocates.
    pub zeroes_may_unmap: bool,
    /// How one write becomes durable.
    pub durable_write: DurableWrite,
}

impl Geometry {
    /// A writable disk of `size` bytes, whole blocks, that has no medium behind it: everything is possible, nothing is
    /// preferred. For `mem` and `null`.
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

/// What wakes a worker besides completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The guest's kick eventfd.
    Kick,
    /// The worker's mailbox eventfd.
    Wake,
    /// The mailbox of a back-end that wraps this one: a point-in-time copy has let delayed writes go.
    Copy,
}

/// Which sources fired since the last [`IoQueue::wait`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wakeups {
    /// [`Source::Kick`] fired.
    pub kick: bool,
    /// [`Source::Wake`] fired.
    pub wake: bool,
    /// [`Source::Copy`] fired.
    pub copy: bool,
}

/// An opened image. Shared by the rings' threads, the vhost-user thread and main.
pub trait Backend: Send + Sync {
    /// The image's shape. Only the size may change while it is open, and [`Notices::resized`] says so.
    fn geometry(&self) -> Geometry;

    /// A queue for one ring, called in the ring's own thread, which alone uses it. `depth`: how many ops the caller
    /// wants in flight at most.
    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>>;

    /// Makes everything written so far durable; blocks. Called by the vhost-user thread (GET_VRING_BASE,
    /// disconnect), by main at the end, and by a quiesce that finds no running ring; never by a ring's thread.
    fn sync(&self) -> io::Result<()>;

    /// One line for logs and status: what is open and how.
    fn describe(&self) -> String;

    /// The file or block device, absolute, if there is one. For status, and for snapshots taken outside.
    fn path(&self) -> Option<&std::path::Path> {
        None
    }

    /// The next range at or after `offset` that may hold data, as (start, end); `None`: only zeroes from here on. By
    /// default everything may. May block on metadata; not called by a ring's thread.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let size = self.geometry().size;
        Ok((offset < size).then_some((offset, size)))
    }

    /// The image's first and last bytes, which show whether it has another format than raw; empty where it has none. Reads
    /// a few KiB, and may block for as long as the image's storage hangs; a thread of its own.
    fn ends(&self) -> io::Result<ImageEnds> {
        Ok(ImageEnds::default())
    }

    /// How what is below reads the buffer of a write. Called once, by whoever puts the parts together.
    fn buffer_use(&self) -> BufferUse {
        BufferUse::ReadsOnce("nothing is below that would read a write's buffer twice".into())
    }

    /// The error number of the first sync that failed for good (clause 5), if any.
    fn sync_failed(&self) -> Option<Errno>;

    /// Tells `notices` what happens from now on. Called once, by whoever puts the parts together, before the first
    /// queue is opened; the back-end lets go of `notices` in [`Backend::stop_notices`].
    fn start_notices(&self, notices: Arc<dyn Notices>) {
        drop(notices);
    }

    /// The daemon ends: no notice comes after this returns, and no quiesce is left unanswered. May block for a moment;
    /// main.
    fn stop_notices(&self) {}

    /// A guest is about to use the image: the first ring starts. A back-end that excludes others from an image that
    /// several hosts can open does so here; an error keeps the ring from running. Comes again before
    /// [`Backend::deactivate`] where a hold or a copy had kept the image meanwhile. Called by the vhost-user thread; may
    /// block.
    fn activate(&self) -> io::Result<()> {
        Ok(())
    }

    /// An operator holds the disk still while no ring runs: what [`Backend::activate`] does, where only that keeps others
    /// from changing the image meanwhile. `Ok(false)`: nothing was to be done, and [`Backend::deactivate`] does not
    /// follow. An error: the image is somebody else's. Called by a thread of the hold's; may block.
    fn activate_for_hold(&self) -> io::Result<bool> {
        Ok(false)
    }

    /// Whether [`Backend::deactivate`] lets others change the image, who could not before. Any thread.
    fn gives_way(&self) -> bool {
        false
    }

    /// The last ring has stopped, everything it acknowledged was synced as its mode promises, and no hold is on: others
    /// may have the image. Called by the vhost-user thread or one of a hold's or a copy's, after [`Backend::activate`] and
    /// not during it; may block.
    fn deactivate(&self) {}

    /// Names the image so that two processes can tell whether they have the same one open, by whatever path. `None`: no
    /// other process can have it. For upgrades in place; any thread.
    fn identity(&self) -> Option<String> {
        None
    }

    /// Another process is about to go on with the image, and the guest still runs: returns when [`Backend::deactivate`]
    /// will be quick. Blocks for seconds at most; the thread that hands over.
    fn wait_until_releasable(&self) {}

    /// Another process goes on with the image: gives up what keeps others away even without a guest
    /// ([`Backend::deactivate`] comes before it, and a good sync). Not the guest's I/O but only [`Backend::take_over`] comes
    /// next, if the other gives up. The thread that hands over.
    fn hand_over(&self) {}

    /// Takes what the process before us gave up by [`Backend::hand_over`], for an image that was opened to be taken over;
    /// or takes it back. Errors: somebody else was faster. The thread that hands over or takes over.
    fn take_over(&self) -> io::Result<()> {
        Ok(())
    }

    /// Takes the image's size as it is now, because somebody changed it; with `grow_to`, makes it so many bytes first,
    /// where the back-end can. One that is smaller than before is taken only with `shrink`. Returns the size, which
    /// [`Backend::geometry`] has from now on. Errors name the thing, the cause and the mend. Called by a thread of its
    /// own for `resize` on the control socket; may block.
    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
        let _ = (grow_to, shrink);
        Err(io::Error::other(format!(
            "{}: it cannot be resized from here; where its store can do it (rbd resize), use that, and the guest is told",
            self.describe()
        )))
    }

    /// What the status says of the image besides its shape. Called by the control thread; does not block on I/O.
    fn image_status(&self) -> ImageStatus {
        ImageStatus::default()
    }

    /// Snapshots that the image's own store makes, where it can. Called by the control thread.
    fn snapshots(&self) -> Option<Arc<dyn ImageSnapshots>> {
        None
    }
}

/// One ring's way into the back-end. Everything happens in the thread that opened it, or in the one that called
/// [`IoQueue::change_thread`] last.
pub trait IoQueue: Send {
    /// Takes an op, or hands it back when full (clause 7). Nothing need happen before `submit` or `wait`.
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op>;

    /// Starts what was pushed, without waiting.
    fn submit(&mut self) -> io::Result<()>;

    /// Appends what has finished. Never blocks.
    fn reap(&mut self, out: &mut Vec<Completion>);

    /// Watches an eventfd; called once a source, before the first `wait`. The descriptor stays open until the queue
    /// is dropped. The queue may consume the eventfd's count; the caller never reads it.
    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Whether there is something to reap, for who looks again and again instead of sleeping, at the guest's ring too: so
    /// kicks are no news. A system call only where there is something to do. May overlook a descriptor that is watched.
    fn has_news(&mut self) -> bool;

    /// Submits, then sleeps until there is something to reap or a source fired (clause 6), or the timeout passed.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups>;

    /// Takes it on the caller to make the calls of [`IoQueue::next_call`] after each round of pushes, with what is returned;
    /// without, a queue makes them itself as it is pushed to. `None`: there are no such calls. Again after
    /// [`IoQueue::change_thread`].
    fn caller(&mut self) -> Option<Box<dyn Caller>> {
        None
    }

    /// The next call that may block, to be made with nothing of the queue borrowed; then [`IoQueue::call_made`].
    fn next_call(&mut self) -> Option<BlockingCall> {
        None
    }

    /// A call was made. Its op may be reaped, or goes on.
    fn call_made(&mut self, call: BlockingCall) {
        drop(call);
    }

    /// This thread goes on with the queue, while the one before is in a call and does not return. What the ring had given
    /// to the kernel before that call may need the thread, and then completes after it. Errors: no descriptor left; then
    /// the queue is as it was.
    fn change_thread(&mut self) -> io::Result<()> {
        Ok(())
    }
}
