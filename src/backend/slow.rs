//! A back-end in front of another that delays some writes, so that ops complete late and out of order, as on a slow or busy
//! medium. For tests: only then does it show whether a server that dies has kept its promises to the guest.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::layer::{Layer, LayerQueue};
use super::{Backend, IoQueue, Op, OpId, Wakeups};

/// Delays two of three writes: one by `delay`, the other by twice as much.
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
    /// Writes pushed so far.
    writes: u32,
    /// The delayed writes and when each is due, the earliest first.
    delayed: VecDeque<(Instant, Op, OpId)>,
}

impl SlowQueue {
    /// Passes on the writes that are due at `now`, or all if it is `None`, as far as the inner queue has room.
    fn pass_on(&mut self, now: Option<Instant>) {
        while let Some((due, op, id)) = self.delayed.pop_front() {
            let early = now.is_some_and(|now| due > now);
            match if early { Err(op) } else { self.inner.push(op, id) } {
                Ok(()) => {}
                Err(op) => return self.delayed.push_front((due, op, id)),
            }
        }
    }
}

impl LayerQueue for SlowQueue {
    fn inner(&mut self) -> &mut dyn IoQueue {
        &mut *self.inner
    }

    fn layer_push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        if matches!(op, Op::Write { .. }) {
            self.writes = self.writes.wrapping_add(1);
            if !self.writes.is_multiple_of(3) {
                let due = Instant::now() + self.delay * (self.writes % 3);
                let index = self.delayed.partition_point(|(other, ..)| *other <= due);
                self.delayed.insert(index, (due, op, id));
                return Ok(());
            }
        }
        self.inner.push(op, id)
    }

    fn layer_wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        let now = Instant::now();
        self.pass_on(Some(now));
        let due = self.delayed.front().map(|(due, ..)| due.saturating_duration_since(now));
        let wakeups = self.inner.wait(timeout.into_iter().chain(due).min())?;
        self.pass_on(Some(Instant::now()));
        Ok(wakeups)
    }
}

impl Drop for SlowQueue {
    fn drop(&mut self) {
        // Writes for which the inner queue has no room are dropped, with their buffers.
        self.pass_on(None);
    }
}

impl Layer for SlowBackend {
    fn image(&self) -> &dyn Backend {
        &*self.image
    }

    fn open_layer(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        let inner = self.image.open_queue(depth)?;
        Ok(Box::new(SlowQueue { inner, delay: self.delay, writes: 0, delayed: VecDeque::new() }))
    }

    fn layer_description(&self, image: String) -> String {
        format!("{image}, slow on purpose")
    }
}
