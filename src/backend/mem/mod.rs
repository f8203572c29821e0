//! A RAM disk with a volatile cache, for tests: [`MemBackend::crash`] loses written data unless a sync covered it. It
//! fails, delays and reorders ops on request, and counts them.

mod queue;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use super::eventfd_poll::Watches;
use super::{Backend, DurableWrite, Errno, Geometry, IoBuf, IoQueue};
use crate::base::prng::Prng;
use queue::MemQueue;

/// When and in which order ops are carried out and complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompletionOrder {
    /// All at once, in the order in which they were pushed.
    #[default]
    InOrder,
    /// A few at a time, in an order that the seed determines.
    Shuffled(u64),
    /// As many as [`MemBackend::release`] allowed, in the order in which they were pushed.
    OnRequest,
}

/// The properties of a RAM disk.
#[derive(Clone, Copy, Debug)]
pub struct MemOptions {
    /// Size in bytes, a multiple of `logical_block`.
    pub size: u64,
    /// Block size: 512 or 4096 bytes.
    pub logical_block: u32,
    /// When ops complete.
    pub order: CompletionOrder,
    /// How a single write becomes durable.
    pub durable_write: DurableWrite,
}

impl MemOptions {
    /// A disk of `size` bytes in 512-byte blocks that completes ops in order and has native durable writes.
    pub fn new(size: u64) -> Self {
        MemOptions { size, logical_block: 512, order: CompletionOrder::InOrder, durable_write: DurableWrite::Native }
    }
}

/// The kinds of ops, for faults and counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemOp {
    /// [`super::Op::Read`].
    Read,
    /// [`super::Op::Write`], durable or not.
    Write,
    /// [`super::Op::Sync`] and [`Backend::sync`].
    Sync,
    /// [`super::Op::Discard`].
    Discard,
    /// [`super::Op::WriteZeroes`].
    WriteZeroes,
}

/// A failure of a future op.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// The kind of op that fails.
    pub op: MemOp,
    /// Which op of this kind fails, counted from now; 1 is the next one.
    pub nth: u64,
    /// The error with which it fails.
    pub errno: Errno,
    /// For a read or write: how many bytes are transferred in spite of the failure.
    pub transferred: usize,
}

/// Which blocks a crash keeps of the writes that no sync covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashOutcome {
    /// No block.
    Nothing,
    /// Some blocks, which the seed determines.
    Some(u64),
}

/// The number of ops that were carried out, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes, durable ones included.
    pub writes: u64,
    /// Writes that asked to be durable.
    pub durable_writes: u64,
    /// Syncs.
    pub syncs: u64,
    /// Discards.
    pub discards: u64,
    /// Write-zeroes.
    pub write_zeroes: u64,
}

/// A RAM disk. Its methods may be called from any thread.
pub struct MemBackend {
    shared: Arc<Shared>,
}

struct Shared {
    /// The geometry at creation. [`Backend::geometry`] returns it with the current `size`.
    geometry: Geometry,
    size: AtomicU64,
    order: CompletionOrder,
    state: Mutex<State>,
}

struct State {
    volatile: Vec<u8>,
    durable: Vec<u8>,
    /// The blocks that differ from the durable image, with the value of `changes` at which they first did.
    dirty: BTreeMap<u64, u64>,
    /// The number of changes of the image.
    changes: u64,
    /// The number of crashes. An op that was pushed before the last one changes nothing.
    crashes: u64,
    sync_failed: Option<Errno>,
    faults: Vec<Fault>,
    counts: Counts,
    /// With [`CompletionOrder::OnRequest`]: how many ops may still complete.
    released: u64,
    /// Ops that were pushed and not carried out.
    waiting: usize,
    /// The eventfds of all queues.
    queue_eventfds: Vec<Weak<OwnedFd>>,
}

impl MemBackend {
    /// Creates a disk that holds zeroes, durably. Panics if the size is not a multiple of the block size.
    pub fn new(options: MemOptions) -> Self {
        let MemOptions { size, logical_block, order, durable_write } = options;
        assert!(size > 0 && size.is_multiple_of(u64::from(logical_block)), "the size must be whole blocks");
        let geometry = Geometry::without_medium(size, logical_block, durable_write);
        let state = State {
            volatile: vec![0; size as usize],
            durable: vec![0; size as usize],
            dirty: BTreeMap::new(),
            changes: 0,
            crashes: 0,
            sync_failed: None,
            faults: Vec::new(),
            counts: Counts::default(),
            released: 0,
            waiting: 0,
            queue_eventfds: Vec::new(),
        };
        MemBackend {
            shared: Arc::new(Shared { geometry, size: AtomicU64::new(size), order, state: Mutex::new(state) }),
        }
    }

    /// Simulates a power failure and returns the image that a restart finds, from which the disk continues. Ops that were
    /// pushed before and not carried out fail with EIO and change nothing.
    pub fn crash(&self, outcome: CrashOutcome) -> Vec<u8> {
        let mut state = self.shared.lock();
        let mut prng = Prng::new(if let CrashOutcome::Some(seed) = outcome { seed } else { 0 });
        for block in std::mem::take(&mut state.dirty).into_keys() {
            if outcome != CrashOutcome::Nothing && prng.below(2) == 0 {
                state.make_durable(self.shared.block_bytes(block));
            }
        }
        state.volatile = state.durable.clone();
        state.crashes += 1;
        state.volatile.clone()
    }

    /// Changes the size, to at most the one at creation.
    pub fn set_size(&self, bytes: u64) {
        assert!(bytes <= self.shared.geometry.size, "a RAM disk cannot exceed its size at creation");
        self.shared.size.store(bytes, Ordering::Relaxed);
    }

    /// Returns the image that a reader sees now.
    pub fn volatile_image(&self) -> Vec<u8> {
        self.shared.lock().volatile.clone()
    }

    /// Returns the image that a crash with [`CrashOutcome::Nothing`] would leave.
    pub fn durable_image(&self) -> Vec<u8> {
        self.shared.lock().durable.clone()
    }

    /// Plans a failure. A failed sync or durable write makes every later one fail (clause 5).
    pub fn fail(&self, fault: Fault) {
        self.shared.lock().faults.push(fault);
    }

    /// Returns the number of ops carried out so far.
    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }

    /// Returns the number of ops, on all queues, that were pushed and not carried out.
    pub fn waiting(&self) -> usize {
        self.shared.lock().waiting
    }

    /// Lets `count` more ops complete ([`CompletionOrder::OnRequest`]).
    pub fn release(&self, count: u64) {
        let mut state = self.shared.lock();
        state.released += count;
        for eventfd in state.queue_eventfds.iter().filter_map(Weak::upgrade) {
            // An error does not matter: a counter that is full is readable, too.
            let _ = rustix::io::write(&*eventfd, &1u64.to_ne_bytes());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    /// The bytes of a block.
    fn block_bytes(&self, block: u64) -> std::ops::Range<usize> {
        let len = self.geometry.logical_block as usize;
        block as usize * len..(block as usize + 1) * len
    }

    /// The blocks that a range of bytes touches.
    fn blocks(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let block = u64::from(self.geometry.logical_block);
        offset / block..(offset + len).div_ceil(block)
    }
}

impl State {
    fn make_durable(&mut self, bytes: std::ops::Range<usize>) {
        self.durable[bytes.clone()].copy_from_slice(&self.volatile[bytes]);
    }

    /// Counts an op of this kind and takes the fault that was planned for it, if any.
    fn take_fault(&mut self, op: MemOp) -> Option<Fault> {
        let mut hit = None;
        self.faults.retain_mut(|fault| {
            if fault.op != op {
                return true;
            }
            fault.nth = fault.nth.saturating_sub(1);
            if fault.nth == 0 && hit.is_none() {
                hit = Some(*fault);
                return false;
            }
            true
        });
        hit
    }

    /// Records a change of the image.
    fn mark_dirty(&mut self, shared: &Shared, offset: u64, len: u64) {
        self.changes += 1;
        for block in shared.blocks(offset, len) {
            self.dirty.entry(block).or_insert(self.changes);
        }
    }

    /// Makes the blocks durable that had changed when the sync was pushed, at `pushed` changes, and as little else as
    /// possible.
    fn sync(&mut self, shared: &Shared, pushed: u64) -> Result<(), Errno> {
        self.counts.syncs += 1;
        if let Some(fault) = self.take_fault(MemOp::Sync) {
            self.sync_failed.get_or_insert(fault.errno);
        }
        self.sync_failed.map_or(Ok(()), Err)?;
        let covered: Vec<u64> = self.dirty.iter().filter(|&(_, &since)| since <= pushed).map(|(&b, _)| b).collect();
        for block in covered {
            self.dirty.remove(&block);
            self.make_durable(shared.block_bytes(block));
        }
        Ok(())
    }

    fn write(&mut self, shared: &Shared, offset: u64, buf: &IoBuf, durable: bool) -> Result<(), Errno> {
        self.counts.writes += 1;
        self.counts.durable_writes += u64::from(durable);
        let fault = self.take_fault(MemOp::Write);
        let len = fault.map_or(buf.len(), |fault| fault.transferred.min(buf.len()));
        let start = offset as usize;
        buf.copy_to(0, &mut self.volatile[start..start + len]);
        self.mark_dirty(shared, offset, len as u64);
        if let Some(fault) = fault {
            if durable {
                self.sync_failed.get_or_insert(fault.errno);
            }
            return Err(fault.errno);
        }
        if durable {
            self.sync_failed.map_or(Ok(()), Err)?;
            for block in shared.blocks(offset, len as u64) {
                self.dirty.remove(&block);
                self.make_durable(shared.block_bytes(block));
            }
        }
        Ok(())
    }

    fn read(&mut self, offset: u64, buf: &IoBuf) -> Result<(), Errno> {
        self.counts.reads += 1;
        let fault = self.take_fault(MemOp::Read);
        let len = fault.map_or(buf.len(), |fault| fault.transferred.min(buf.len()));
        buf.copy_from(0, &self.volatile[offset as usize..offset as usize + len]);
        fault.map_or(Ok(()), |fault| Err(fault.errno))
    }

    /// Fills a range with zeroes; for a discard, with bytes on which no reader may rely.
    fn fill(&mut self, shared: &Shared, op: MemOp, offset: u64, len: u64) -> Result<(), Errno> {
        let byte = if op == MemOp::Discard { 0xdb } else { 0 };
        *(if op == MemOp::Discard { &mut self.counts.discards } else { &mut self.counts.write_zeroes }) += 1;
        if let Some(fault) = self.take_fault(op) {
            return Err(fault.errno);
        }
        self.volatile[offset as usize..(offset + len) as usize].fill(byte);
        self.mark_dirty(shared, offset, len);
        Ok(())
    }
}

impl Backend for MemBackend {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.shared.size.load(Ordering::Relaxed), ..self.shared.geometry }
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        let watches = Watches::new()?;
        let mut state = self.shared.lock();
        state.queue_eventfds.retain(|eventfd| eventfd.strong_count() > 0);
        state.queue_eventfds.push(watches.own());
        drop(state);
        let seed = if let CompletionOrder::Shuffled(seed) = self.shared.order { seed } else { 0 };
        let shared = Arc::clone(&self.shared);
        let prng = Prng::new(seed);
        Ok(Box::new(MemQueue::new(shared, watches, prng, depth)))
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.shared.lock();
        let changes = state.changes;
        state.sync(&self.shared, changes).map_err(|errno| io::Error::from_raw_os_error(errno.0))
    }

    fn describe(&self) -> String {
        format!("RAM disk of {} bytes", self.shared.geometry.size)
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.shared.lock().sync_failed
    }
}
