//! A back-end that completes every op at once and stores nothing, for benchmarks of everything in front of a back-end. A
//! read leaves the buffer as it is.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::eventfd_poll::{Watches, deadline};
use super::{Backend, Completion, DurableWrite, Errno, Geometry, ImageUpgrade, IoQueue, Op, OpId, Source, Wakeups};

/// A disk that stores nothing.
pub struct NullBackend {
    geometry: Geometry,
}

impl NullBackend {
    /// Creates a disk of `size` bytes, rounded down to whole blocks of `logical_block` bytes.
    pub fn new(size: u64, logical_block: u32) -> Self {
        let size = size / u64::from(logical_block) * u64::from(logical_block);
        NullBackend { geometry: Geometry::without_medium(size, logical_block, DurableWrite::Native) }
    }
}

impl Backend for NullBackend {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        queue(depth, Ok(()))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn describe(&self) -> String {
        "null: stores nothing".into()
    }

    fn sync_failed(&self) -> Option<Errno> {
        None
    }

    fn for_upgrade(&self) -> &dyn ImageUpgrade {
        self
    }
}

impl ImageUpgrade for NullBackend {
    fn identity(&self) -> Option<String> {
        Some("nothing".into())
    }
}

/// Opens a queue on which every op fails with `errno`. A virtqueue gets it when its real queue cannot be opened, so that
/// the guest sees I/O errors instead of a disk that never responds.
pub fn failing_queue(depth: usize, errno: Errno) -> io::Result<Box<dyn IoQueue>> {
    queue(depth, Err(errno))
}

fn queue(depth: usize, result: Result<(), Errno>) -> io::Result<Box<dyn IoQueue>> {
    Ok(Box::new(NullQueue { watches: Watches::new()?, result, done: Vec::with_capacity(depth), depth }))
}

struct NullQueue {
    watches: Watches,
    /// The result of every op.
    result: Result<(), Errno>,
    done: Vec<Completion>,
    depth: usize,
}

impl IoQueue for NullQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        if self.done.len() >= self.depth {
            return Err(op);
        }
        let buf = match op {
            Op::Read { buf, .. } | Op::Write { buf, .. } => Some(buf),
            Op::Sync | Op::Discard { .. } | Op::WriteZeroes { .. } => None,
        };
        self.done.push(Completion { id, result: self.result, buf });
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.done);
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watches.watch(source, fd)
    }

    fn has_completions(&mut self) -> bool {
        !self.done.is_empty()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let deadline = if self.done.is_empty() { deadline(timeout) } else { Some(Instant::now()) };
        loop {
            let wakeups = self.watches.sleep(deadline)?;
            if wakeups != Wakeups::default() || deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Ok(wakeups);
            }
        }
    }
}
