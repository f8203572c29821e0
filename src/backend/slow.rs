//! A back-end in front of another that keeps some writes back for a while, so that ops complete late and out of order,
//! as on a slow or busy medium. For tests: what a server owes its guest when it dies shows only then.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Backend, Completion, Errno, Geometry, IoQueue, Notices, Op, OpId, Source, Wakeups};
use crate::disk::{ImageSnapshots, ImageStatus};

/// Two of three writes come late: one by `delay`, one by twice as much.
pub struct SlowBackend {
    image: Arc<dyn Backend>,
    delay: Duration,
}

impl SlowBackend {
    /// Wraps `image`.
    pub fn new(image: Arc<dyn Backend>, delay: Duration) -> Self {
        SlowBackend { image, delay }
    }
}

struct SlowQueue {
    inner: Box<dyn IoQueue>,
    delay: Duration,
    writes: u32,
    /// When each is due, soonest first.
    late: VecDeque<(Instant, Op, OpId)>,
}

impl SlowQueue {
    /// Passes on what is due, as far as there is room.
    fn pass_on(&mut self, now: Option<Instant>) {
        while let Some((due, op, id)) = self.late.pop_front() {
            let early = now.is_some_and(|now| due > now);
            match if early { Err(op) } else { self.inner.push(op, id) } {
                Ok(()) => {}
                Err(op) => return self.late.push_front((due, op, id)),
            }
        }
    }
}

impl IoQueue for SlowQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        if matches!(op, Op::Write { .. }) {
            self.writes = self.writes.wrapping_add(1);
            if !self.writes.is_multiple_of(3) {
                let due = Instant::now() + self.delay * (self.writes % 3);
                let place = self.late.partition_point(|(other, ..)| *other <= due);
                self.late.insert(place, (due, op, id));
                return Ok(());
            }
        }
        self.inner.push(op, id)
    }

    fn submit(&mut self) -> io::Result<()> {
        self.inner.submit()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.inner.reap(out);
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.inner.watch(source, fd)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let now = Instant::now();
        self.pass_on(Some(now));
        let due = self.late.front().map(|(due, ..)| due.saturating_duration_since(now));
        let wakeups = self.inner.wait(timeout.into_iter().chain(due).min())?;
        self.pass_on(Some(Instant::now()));
        Ok(wakeups)
    }
}

impl Drop for SlowQueue {
    fn drop(&mut self) {
        // What does not fit any more fails: its buffer is ours to free.
        self.pass_on(None);
    }
}

impl Backend for SlowBackend {
    fn geometry(&self) -> Geometry {
        self.image.geometry()
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        let inner = self.image.open_queue(depth)?;
        Ok(Box::new(SlowQueue { inner, delay: self.delay, writes: 0, late: VecDeque::new() }))
    }

    fn sync(&self) -> io::Result<()> {
        self.image.sync()
    }

    fn describe(&self) -> String {
        format!("{}, slow on purpose", self.image.describe())
    }

    fn path(&self) -> Option<&Path> {
        self.image.path()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.image.next_data(offset)
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.image.sync_failed()
    }

    fn start_notices(&self, notices: Arc<dyn Notices>) {
        self.image.start_notices(notices);
    }

    fn stop_notices(&self) {
        self.image.stop_notices();
    }

    fn activate(&self) -> io::Result<()> {
        self.image.activate()
    }

    fn deactivate(&self) {
        self.image.deactivate();
    }

    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
        self.image.resize(grow_to, shrink)
    }

    fn image_status(&self) -> ImageStatus {
        self.image.image_status()
    }

    fn snapshots(&self) -> Option<Arc<dyn ImageSnapshots>> {
        self.image.snapshots()
    }
}
