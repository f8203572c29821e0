//! A back-end whose reads of one place stay under way until they are let go.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use virtioblkd::backend::mem::{MemBackend, MemOptions};
use virtioblkd::backend::{Backend, Completion, Errno, Geometry, IoQueue, Op, OpId, Source, Wakeups};

/// The RAM disk, with [`Withheld`] in between.
pub struct Withholding {
    disk: MemBackend,
    withheld: Arc<Withheld>,
}

/// What both sides of it know.
pub struct Withheld {
    /// Byte offset of the reads that stay under way.
    at: u64,
    let_go: AtomicBool,
    waiting: AtomicUsize,
}

impl Withheld {
    /// How many wait now.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    /// They end the next time that the ring looks: with the next request.
    pub fn let_go(&self) {
        self.let_go.store(true, Ordering::Release);
    }
}

impl Withholding {
    /// `size` bytes of zeroes, of which reads at `at` wait.
    pub fn new(size: u64, at: u64) -> (Withholding, Arc<Withheld>) {
        let withheld = Arc::new(Withheld { at, let_go: AtomicBool::new(false), waiting: AtomicUsize::new(0) });
        (Withholding { disk: MemBackend::new(MemOptions::new(size)), withheld: withheld.clone() }, withheld)
    }
}

impl Backend for Withholding {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        let inner = self.disk.open_queue(depth)?;
        Ok(Box::new(Queue { inner, withheld: self.withheld.clone(), ids: Vec::new(), kept: Vec::new() }))
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.sync()
    }

    fn describe(&self) -> String {
        self.disk.describe()
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.disk.sync_failed()
    }
}

struct Queue {
    inner: Box<dyn IoQueue>,
    withheld: Arc<Withheld>,
    /// Of ops that will be kept.
    ids: Vec<OpId>,
    kept: Vec<Completion>,
}

impl IoQueue for Queue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        let keep = matches!(op, Op::Read { offset, .. } if offset == self.withheld.at)
            && !self.withheld.let_go.load(Ordering::Acquire);
        self.inner.push(op, id)?;
        if keep {
            self.ids.push(id);
        }
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        self.inner.submit()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let before = out.len();
        self.inner.reap(out);
        self.kept.extend(out.extract_if(before.., |done| self.ids.contains(&done.id)));
        if self.withheld.let_go.load(Ordering::Acquire) {
            self.ids.clear();
            out.append(&mut self.kept);
        }
        self.withheld.waiting.store(self.kept.len(), Ordering::Release);
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.inner.watch(source, fd)
    }

    fn has_completions(&mut self) -> bool {
        self.inner.has_completions()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        self.inner.wait(timeout)
    }
}
