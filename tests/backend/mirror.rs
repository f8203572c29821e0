//! An image that reads a buffer twice, as a mirror does, and memory that another thread writes to all the time.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use virtioblkd::backend::bounce_pool::BouncePool;
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::backend::point_in_time::PointInTime;
use virtioblkd::backend::stable::{StableBackend, StableWrites};
use virtioblkd::backend::{
    Backend, BufferUse, Completion, Errno, Geometry, ImageInfo, IoBuf, IoQueue, Op, OpId, Source, Wakeups,
};
use virtioblkd::disk::{Events, StableWritesStatus};
use vm_memory::MmapRegion;

pub(super) const MIB: usize = 1 << 20;

/// A mirror: the first half reads a write's buffer when it gets it, the second when it carries it out.
pub(super) struct Mirror {
    pub(super) first: Arc<Mutex<Vec<u8>>>,
    pub(super) second: MemBackend,
}

impl Mirror {
    pub(super) fn new(size: usize, order: CompletionOrder) -> Arc<Self> {
        let second = MemBackend::new(MemOptions { order, ..MemOptions::new(size as u64) });
        Arc::new(Mirror { first: Arc::new(Mutex::new(vec![0; size])), second })
    }

    /// Blocks of `len` bytes that the halves hold differently.
    pub(super) fn differences(&self, len: usize) -> usize {
        let (first, second) = (self.first.lock().unwrap(), self.second.volatile_image());
        first.chunks(len).zip(second.chunks(len)).filter(|(one, other)| one != other).count()
    }
}

impl Backend for Mirror {
    fn geometry(&self) -> Geometry {
        self.second.geometry()
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        Ok(Box::new(MirrorQueue { first: self.first.clone(), second: self.second.open_queue(depth)? }))
    }

    fn sync(&self) -> io::Result<()> {
        self.second.sync()
    }

    fn describe(&self) -> String {
        "a mirror".into()
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.second.sync_failed()
    }

    fn info(&self) -> &dyn ImageInfo {
        self
    }
}

impl ImageInfo for Mirror {
    fn buffer_use(&self) -> BufferUse {
        BufferUse::ReadsTwice("each half of the mirror reads the buffer".into())
    }
}

pub(super) struct MirrorQueue {
    pub(super) first: Arc<Mutex<Vec<u8>>>,
    pub(super) second: Box<dyn IoQueue>,
}

impl IoQueue for MirrorQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        if let Op::Write { offset, buf, .. } = &op {
            let at = *offset as usize;
            buf.copy_to(0, &mut self.first.lock().unwrap()[at..at + buf.len()]);
        }
        self.second.push(op, id)
    }

    fn submit(&mut self) -> io::Result<()> {
        self.second.submit()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.second.reap(out);
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.second.watch(source, fd)
    }

    fn has_completions(&mut self) -> bool {
        self.second.has_completions()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        self.second.wait(timeout)
    }
}

/// `image` as the daemon stacks it: copies of an instant in front, stable writes behind.
pub(super) fn stacked(
    image: Arc<dyn Backend>,
    how: StableWrites,
    depot: &Arc<BouncePool>,
) -> (Arc<PointInTime>, Arc<Events>) {
    let events = Arc::new(Events::new().unwrap());
    let stable = StableBackend::new(image, how, depot.clone(), events.clone());
    (Arc::new(PointInTime::new(Arc::new(stable), events.clone())), events)
}

pub(super) fn seen(disk: &dyn Backend) -> StableWritesStatus {
    disk.info().image_status().stable_writes.expect("the layer is there")
}

pub(super) const WRITE: usize = 4096;

/// Memory that a queue's ops use and another thread writes to.
pub(super) struct Scribbled {
    pub(super) region: Arc<MmapRegion>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) scribbler: Option<thread::JoinHandle<()>>,
}

impl Scribbled {
    pub(super) fn new(len: usize) -> Self {
        let region: Arc<MmapRegion> = Arc::new(MmapRegion::new(len).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, stopped) = (region.clone(), stop.clone());
        let scribbler = thread::spawn(move || {
            let mut value = 0u64;
            while !stopped.load(Relaxed) {
                value += 1;
                for at in (0..len).step_by(1024) {
                    // SAFETY: inside the region, which this thread keeps mapped, and aligned; no reference to it exists.
                    unsafe { (*theirs.as_ptr().add(at).cast::<AtomicU64>()).store(value, Relaxed) };
                }
            }
        });
        Scribbled { region, stop, scribbler: Some(scribbler) }
    }

    pub(super) fn buf(&self, at: usize, len: usize) -> IoBuf {
        assert!(at + len <= self.region.size());
        // SAFETY: inside the region, which the buffer keeps mapped; nobody makes a reference to it.
        unsafe {
            let base = self.region.as_ptr().add(at).cast();
            IoBuf::from_iovecs(vec![libc::iovec { iov_base: base, iov_len: len }], self.region.clone())
        }
    }
}

impl Drop for Scribbled {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        self.scribbler.take().unwrap().join().unwrap();
    }
}

/// Writes that the halves of the mirror hold differently.
pub(super) fn torn(mirror: &Mirror, places: &[(usize, usize)]) -> usize {
    let (first, second) = (mirror.first.lock().unwrap(), mirror.second.volatile_image());
    places.iter().filter(|&&(at, len)| first[at..at + len] != second[at..at + len]).count()
}
