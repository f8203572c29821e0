//! Memory for transfers that are copied: aligned, reused and bounded.
//!
//! Each queue has a `QueuePool` of its own, which may always hold one buffer of the largest size, so that a queue's
//! only request for memory always succeeds. What a queue needs beyond that comes from the image's [`BouncePool`].
//!
//! `QueuePool::take` never waits. A queue that gets nothing has buffers in use itself, and asks again when one of
//! them comes back. An op that has a buffer waits for the storage only, never for a second buffer. So there is no
//! deadlock, and no queue has to wake another.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use super::IoBuf;
use super::buffer::Memory;

/// Bytes of the largest buffer. Longer transfers are made in several parts.
pub const MAX_BUFFER: usize = 1 << 20;

/// Bytes of the smallest buffer.
const MIN_BUFFER: usize = 4096;

/// A buffer is aligned to its size or to this, whichever is less.
const MAX_ALIGNMENT: usize = 64 << 10;

/// Number of buffer sizes, which are the powers of two.
const SIZES: usize = (MAX_BUFFER / MIN_BUFFER).ilog2() as usize + 1;

/// The memory that all queues of an image share, beyond the [`MAX_BUFFER`] bytes that each of them has.
pub struct BouncePool {
    budget: Arc<Budget>,
    free: Mutex<FreeLists>,
    usage: Arc<Usage>,
}

impl std::fmt::Debug for BouncePool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BouncePool({} bytes)", self.limit())
    }
}

impl BouncePool {
    /// The default limit in bytes: enough for 64 large writes at once.
    pub const DEFAULT_BYTES: usize = 64 << 20;

    /// Creates a pool of at most `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        let usage = Arc::new(Usage::default());
        let budget = Budget::new(limit, &usage);
        Arc::new(BouncePool { budget, free: Mutex::default(), usage })
    }

    /// Returns the bytes allocated now, and the most so far. Buffers kept for reuse and those of the queues count.
    pub fn allocated(&self) -> (usize, usize) {
        (self.usage.now.load(Relaxed), self.usage.max.load(Relaxed))
    }

    /// Returns how many bytes the queues share.
    pub fn limit(&self) -> usize {
        self.budget.limit
    }
}

/// Bytes allocated for an image, under every budget.
#[derive(Default)]
struct Usage {
    now: AtomicUsize,
    max: AtomicUsize,
}

/// A limit, and the bytes that are charged to it.
struct Budget {
    limit: usize,
    used: AtomicUsize,
    usage: Arc<Usage>,
}

impl Budget {
    fn new(limit: usize, usage: &Arc<Usage>) -> Arc<Self> {
        Arc::new(Budget { limit, used: AtomicUsize::new(0), usage: usage.clone() })
    }

    /// Allocates a buffer, if the budget has room for it.
    fn allocate(self: &Arc<Self>, size: usize) -> Option<BounceBuffer> {
        let more = |used: usize| used.checked_add(size).filter(|&used| used <= self.limit);
        self.used.fetch_update(Relaxed, Relaxed, more).ok()?;
        let now = self.usage.now.fetch_add(size, Relaxed) + size;
        self.usage.max.fetch_max(now, Relaxed);
        Some(BounceBuffer { memory: Memory::new(size, size.min(MAX_ALIGNMENT)), budget: self.clone() })
    }
}

/// Memory for one transfer. [`QueuePool::put_back`] keeps it for reuse; dropping it frees it.
pub(super) struct BounceBuffer {
    memory: Memory,
    budget: Arc<Budget>,
}

impl BounceBuffer {
    /// Returns the size in bytes.
    pub(super) fn len(&self) -> usize {
        self.memory.len()
    }

    /// Returns the first `len` bytes as a transfer's buffer. `scratch` is an old iovec list to reuse.
    pub(super) fn lend(&self, len: usize, scratch: Vec<libc::iovec>) -> IoBuf {
        self.memory.lend(len, scratch)
    }
}

impl Drop for BounceBuffer {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.len(), Relaxed);
        self.budget.usage.now.fetch_sub(self.len(), Relaxed);
    }
}

/// Buffers kept for reuse, by size.
#[derive(Default)]
struct FreeLists {
    lists: [Vec<BounceBuffer>; SIZES],
    /// Bytes of all of them.
    bytes: usize,
}

impl FreeLists {
    /// Takes a buffer of this size class: a kept one, or a new one, for which kept ones of other sizes may be freed.
    fn take(&mut self, budget: &Arc<Budget>, class: usize) -> Option<BounceBuffer> {
        let size = MIN_BUFFER << class;
        if let Some(buffer) = self.lists[class].pop() {
            self.bytes -= size;
            return Some(buffer);
        }
        if budget.used.load(Relaxed) - self.bytes + size > budget.limit {
            return None;
        }
        loop {
            if let Some(buffer) = budget.allocate(size) {
                return Some(buffer);
            }
            // The largest first: few of them make room for anything.
            let freed = self.lists.iter_mut().rev().find_map(Vec::pop)?;
            self.bytes -= freed.len();
        }
    }

    fn put(&mut self, buffer: BounceBuffer) {
        self.bytes += buffer.len();
        self.lists[class_of(buffer.len())].push(buffer);
    }
}

/// The size class of a buffer for `len` bytes; the largest class where `len` is more than that.
fn class_of(len: usize) -> usize {
    (len.clamp(MIN_BUFFER, MAX_BUFFER).next_power_of_two() / MIN_BUFFER).ilog2() as usize
}

/// The memory of one queue, which its thread alone uses.
pub(super) struct QueuePool {
    common: Arc<BouncePool>,
    budget: Arc<Budget>,
    free: FreeLists,
    /// Bytes of the smallest buffer.
    min_bytes: usize,
}

impl QueuePool {
    /// Creates a pool whose buffers are aligned to `align` bytes (a power of two, [`MAX_ALIGNMENT`] at most) and to a
    /// page.
    pub(super) fn new(common: Arc<BouncePool>, align: usize) -> Self {
        let budget = Budget::new(MAX_BUFFER, &common.usage);
        QueuePool { common, budget, free: FreeLists::default(), min_bytes: align }
    }

    /// Takes a buffer of `wanted` bytes or more, or one of [`MAX_BUFFER`] bytes. Returns `None` only when buffers of
    /// this pool are in use; the caller asks again when one of them was put back.
    pub(super) fn take(&mut self, wanted: usize) -> Option<BounceBuffer> {
        let class = class_of(wanted.max(self.min_bytes));
        self.free.take(&self.budget, class).or_else(|| {
            let mut free = self.common.free.lock().expect("no panic while held");
            free.take(&self.common.budget, class)
        })
    }

    /// Puts a buffer back for reuse, unless a transfer still has memory of it.
    pub(super) fn put_back(&mut self, buffer: BounceBuffer) {
        if !buffer.memory.is_free() {
            return;
        }
        if Arc::ptr_eq(&buffer.budget, &self.budget) {
            self.free.put(buffer);
        } else {
            self.common.free.lock().expect("no panic while held").put(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_sizes_are_powers_of_two_from_a_page_to_the_largest() {
        let common = BouncePool::new(0);
        let mut pool = QueuePool::new(common, 1);
        for (wanted, len) in
            [(1, 4096), (4096, 4096), (4097, 8192), (MAX_BUFFER - 1, MAX_BUFFER), (1 << 30, MAX_BUFFER)]
        {
            let buffer = pool.take(wanted).expect("the only one");
            assert_eq!(buffer.len(), len);
            assert!(buffer.lend(512, Vec::new()).is_aligned(4096, 512));
            pool.put_back(buffer);
        }
    }

    #[test]
    fn a_pool_that_has_nothing_gets_a_buffer_and_the_limit_holds() {
        let common = BouncePool::new(2 * MAX_BUFFER);
        let mut pools: Vec<QueuePool> = (0..3).map(|_| QueuePool::new(common.clone(), 512)).collect();
        let mut taken = Vec::new();
        for _ in 0..3 {
            taken.push(pools[0].take(MAX_BUFFER).expect("its own, and two shared ones"));
        }
        assert!(pools[0].take(1).is_none());
        for pool in &mut pools[1..] {
            let own = pool.take(MAX_BUFFER).expect("its own");
            assert!(pool.take(4096).is_none());
            pool.put_back(own);
        }
        assert_eq!(common.allocated(), (5 * MAX_BUFFER, 5 * MAX_BUFFER));
        let shared = taken.pop().expect("three were taken");
        pools[0].put_back(shared);
        assert!(
            pools[1].take(MAX_BUFFER).is_some() && pools[1].take(MAX_BUFFER).is_some(),
            "a queue gets what another put back"
        );
        drop((pools, taken));
        assert_eq!(common.allocated().0, MAX_BUFFER, "one is kept for reuse, and one was dropped");
    }

    #[test]
    fn buffers_kept_for_reuse_make_room_for_other_sizes() {
        let common = BouncePool::new(0);
        let mut pool = QueuePool::new(common.clone(), 512);
        let small: Vec<BounceBuffer> = (0..256).map(|_| pool.take(4096).expect("within a largest buffer")).collect();
        assert!(pool.take(4096).is_none());
        small.into_iter().for_each(|buffer| pool.put_back(buffer));
        let large = pool.take(MAX_BUFFER).expect("all the small ones are free");
        assert_eq!(common.allocated(), (MAX_BUFFER, MAX_BUFFER));
        pool.put_back(large);
        let small: Vec<BounceBuffer> = (0..256).map_while(|_| pool.take(4096)).collect();
        assert_eq!(small.len(), 256, "the large one made room again");
        drop(small);
        assert_eq!(common.allocated(), (0, MAX_BUFFER));
    }

    #[test]
    fn memory_still_in_use_is_not_lent_again() {
        let mut pool = QueuePool::new(BouncePool::new(0), 512);
        let buffer = pool.take(MAX_BUFFER).expect("memory");
        let kept = buffer.lend(512, Vec::new());
        pool.put_back(buffer);
        kept.copy_from(0, &[7; 512]);
        let other = pool.take(MAX_BUFFER).expect("another");
        let mut seen = [1; 512];
        other.lend(512, Vec::new()).copy_to(0, &mut seen);
        assert_eq!(seen, [0; 512]);
    }
}
