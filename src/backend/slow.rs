//! A back-end in front of another that keeps some writes back for a while, so that ops complete late and out of order,
//! as on a slow or busy medium. For tests: what a server owes its guest when it dies shows only then.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::layer::Layer;
use super::{Backend, BlockingCall, Caller, Completion, IoQueue, Op, OpId, Source, Wakeups};

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

    fn has_news(&mut self) -> bool {
        self.inner.has_news()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let now = Instant::now();
        self.pass_on(Some(now));
        let due = self.late.front().map(|(due, ..)| due.saturating_duration_since(now));
        let wakeups = self.inner.wait(timeout.into_iter().chain(due).min())?;
        self.pass_on(Some(Instant::now()));
        Ok(wakeups)
    }

    fn caller(&mut self) -> Option<Box<dyn Caller>> {
        self.inner.caller()
    }

    fn next_call(&mut self) -> Option<BlockingCall> {
        self.inner.next_call()
    }

    fn call_made(&mut self, call: BlockingCall) {
        self.inner.call_made(call);
    }

    fn change_thread(&mut self) -> io::Result<()> {
        self.inner.change_thread()
    }
}

impl Drop for SlowQueue {
    fn drop(&mut self) {
        // What does not fit any more fails: its buffer is ours to free.
        self.pass_on(None);
    }
}

impl Layer for SlowBackend {
    fn image(&self) -> &dyn Backend {
        &*self.image
    }

    fn open_layer(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        let inner = self.image.open_queue(depth)?;
        Ok(Box::new(SlowQueue { inner, delay: self.delay, writes: 0, late: VecDeque::new() }))
    }

    fn layer_description(&self, image: String) -> String {
        format!("{image}, slow on purpose")
    }
}
