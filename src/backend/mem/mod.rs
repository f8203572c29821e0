//! A RAM disk with a volatile cache: what is written is lost in [`MemBackend::crash`] unless a sync covered it. For
//! tests: it fails, delays and reorders on request, and counts.

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

/// When ops are carried out and complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompletionOrder {
    /// At once, one after the other.
    #[default]
    InOrder,
    /// Some at a time, in an order that follows from the seed.
    Shuffled(u64),
    /// Only as many as [`MemBackend::release`] allowed, in order.
    OnRequest,
}

/// What to make.
#[derive(Clone, Copy, Debug)]
pub struct MemOptions {
    /// Bytes, a multiple of `logical_block`.
    pub size: u64,
    /// 512 or 4096 bytes.
    pub logical_block: u32,
    /// When ops complete.
    pub order: CompletionOrder,
    /// How a single write becomes durable.
    pub durable_write: DurableWrite,
}

impl MemOptions {
    /// `size` bytes in 512-byte blocks, in order, with native durable writes.
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

/// One failure to come.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Of which ops.
    pub op: MemOp,
    /// The how manieth from now: 1 is the next.
    pub nth: u64,
    /// What it fails with.
    pub errno: Errno,
    /// For a read or write: the bytes that are transferred all the same.
    pub transferred: usize,
}

/// What a crash leaves of the writes that no sync covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashOutcome {
    /// Nothing.
    Nothing,
    /// Some blocks, chosen by the seed.
    Some(u64),
}

/// Ops carried out, by kind.
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

/// The RAM disk. All methods may be called from any thread.
pub struct MemBackend {
    shared: Arc<Shared>,
}

struct Shared {
    /// As it was made; what is told has `size`.
    geometry: Geometry,
    size: AtomicU64,
    order: CompletionOrder,
    state: Mutex<State>,
}

struct State {
    volatile: Vec<u8>,
    durable: Vec<u8>,
    /// Blocks that differ from the durable image, and when they first did.
    dirty: BTreeMap<u64, u64>,
    /// Counts changes to the image.
    now: u64,
    /// Counts crashes: an op of an earlier life changes nothing.
    life: u64,
    sync_failed: Option<Errno>,
    faults: Vec<Fault>,
    counts: Counts,
    /// [`CompletionOrder::OnRequest`]: ops that may still complete.
    released: u64,
    waiting: usize,
    sleepers: Vec<Weak<OwnedFd>>,
}

impl MemBackend {
    /// A disk full of zeroes, durable ones. Panics if the size is not whole blocks.
    pub fn new(options: MemOptions) -> Self {
        let MemOptions { size, logical_block, order, durable_write } = options;
        assert!(size > 0 && size.is_multiple_of(u64::from(logical_block)), "the size must be whole blocks");
        let geometry = Geometry::without_medium(size, logical_block, durable_write);
        let state = State {
            volatile: vec![0; size as usize],
            durable: vec![0; size as usize],
            dirty: BTreeMap::new(),
            now: 0,
            life: 0,
            sync_failed: None,
            faults: Vec::new(),
            counts: Counts::default(),
            released: 0,
            waiting: 0,
            sleepers: Vec::new(),
        };
        MemBackend {
            shared: Arc::new(Shared { geometry, size: AtomicU64::new(size), order, state: Mutex::new(state) }),
        }
    }

    /// The power goes: returns what a restart finds. The disk goes on from there; ops pushed before and not yet carried
    /// out fail with EIO and change nothing.
    pub fn crash(&self, keep: CrashOutcome) -> Vec<u8> {
        let mut state = self.shared.lock();
        let mut chance = Prng::new(if let CrashOutcome::Some(seed) = keep { seed } else { 0 });
        for block in std::mem::take(&mut state.dirty).into_keys() {
            if keep != CrashOutcome::Nothing && chance.below(2) == 0 {
                state.make_durable(self.shared.place(block));
            }
        }
        state.volatile = state.durable.clone();
        state.life += 1;
        state.volatile.clone()
    }

    /// Tells of another size from now on, at most the one that it was made with.
    pub fn set_size(&self, bytes: u64) {
        assert!(bytes <= self.shared.geometry.size, "there is no more memory");
        self.shared.size.store(bytes, Ordering::Relaxed);
    }

    /// What a reader sees now.
    pub fn volatile_image(&self) -> Vec<u8> {
        self.shared.lock().volatile.clone()
    }

    /// What a crash would leave at least.
    pub fn durable_image(&self) -> Vec<u8> {
        self.shared.lock().durable.clone()
    }

    /// Plans a failure. A failed sync, or durable write, makes every later one fail (clause 5).
    pub fn fail(&self, fault: Fault) {
        self.shared.lock().faults.push(fault);
    }

    /// Ops carried out so far.
    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }

    /// Ops pushed, on all queues, and not yet carried out.
    pub fn waiting(&self) -> usize {
        self.shared.lock().waiting
    }

    /// Lets `count` more ops complete ([`CompletionOrder::OnRequest`]).
    pub fn release(&self, count: u64) {
        let mut state = self.shared.lock();
        state.released += count;
        for sleeper in state.sleepers.iter().filter_map(Weak::upgrade) {
            // Full means readable, which is all that is wanted.
            let _ = rustix::io::write(&*sleeper, &1u64.to_ne_bytes());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn place(&self, block: u64) -> std::ops::Range<usize> {
        let len = self.geometry.logical_block as usize;
        block as usize * len..(block as usize + 1) * len
    }

    fn blocks(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let block = u64::from(self.geometry.logical_block);
        offset / block..(offset + len).div_ceil(block)
    }
}

impl State {
    fn make_durable(&mut self, place: std::ops::Range<usize>) {
        self.durable[place.clone()].copy_from_slice(&self.volatile[place]);
    }

    /// The fault that hits this op, if one does.
    fn fault(&mut self, op: MemOp) -> Option<Fault> {
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

    fn changed(&mut self, shared: &Shared, offset: u64, len: u64) {
        self.now += 1;
        for block in shared.blocks(offset, len) {
            self.dirty.entry(block).or_insert(self.now);
        }
    }

    /// Makes durable what had been changed when the sync was pushed, and as little else as possible.
    fn sync(&mut self, shared: &Shared, pushed: u64) -> Result<(), Errno> {
        self.counts.syncs += 1;
        if let Some(fault) = self.fault(MemOp::Sync) {
            self.sync_failed.get_or_insert(fault.errno);
        }
        self.sync_failed.map_or(Ok(()), Err)?;
        let covered: Vec<u64> = self.dirty.iter().filter(|&(_, &since)| since <= pushed).map(|(&b, _)| b).collect();
        for block in covered {
            self.dirty.remove(&block);
            self.make_durable(shared.place(block));
        }
        Ok(())
    }

    fn write(&mut self, shared: &Shared, offset: u64, buf: &IoBuf, durable: bool) -> Result<(), Errno> {
        self.counts.writes += 1;
        self.counts.durable_writes += u64::from(durable);
        let fault = self.fault(MemOp::Write);
        let len = fault.map_or(buf.len(), |fault| fault.transferred.min(buf.len()));
        let start = offset as usize;
        buf.copy_to(0, &mut self.volatile[start..start + len]);
        self.changed(shared, offset, len as u64);
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
                self.make_durable(shared.place(block));
            }
        }
        Ok(())
    }

    fn read(&mut self, offset: u64, buf: &IoBuf) -> Result<(), Errno> {
        self.counts.reads += 1;
        let fault = self.fault(MemOp::Read);
        let len = fault.map_or(buf.len(), |fault| fault.transferred.min(buf.len()));
        buf.copy_from(0, &self.volatile[offset as usize..offset as usize + len]);
        fault.map_or(Ok(()), |fault| Err(fault.errno))
    }

    /// Zeroes a range, or fills it with what nobody may rely on.
    fn fill(&mut self, shared: &Shared, op: MemOp, offset: u64, len: u64) -> Result<(), Errno> {
        let byte = if op == MemOp::Discard { 0xdb } else { 0 };
        *(if op == MemOp::Discard { &mut self.counts.discards } else { &mut self.counts.write_zeroes }) += 1;
        if let Some(fault) = self.fault(op) {
            return Err(fault.errno);
        }
        self.volatile[offset as usize..(offset + len) as usize].fill(byte);
        self.changed(shared, offset, len);
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
        state.sleepers.retain(|sleeper| sleeper.strong_count() > 0);
        state.sleepers.push(watches.own());
        drop(state);
        let seed = if let CompletionOrder::Shuffled(seed) = self.shared.order { seed } else { 0 };
        let shared = Arc::clone(&self.shared);
        let chance = Prng::new(seed);
        Ok(Box::new(MemQueue::new(shared, watches, chance, depth)))
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.shared.lock();
        let now = state.now;
        state.sync(&self.shared, now).map_err(|errno| io::Error::from_raw_os_error(errno.0))
    }

    fn describe(&self) -> String {
        format!("RAM disk of {} bytes", self.shared.geometry.size)
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.shared.lock().sync_failed
    }
}
