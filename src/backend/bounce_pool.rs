//! Memory for transfers that are copied: aligned, reused and bounded.
//!
//! Every queue has a `Pool` of its own, which may always hold one largest piece, so that whoever is the only one to
//! want memory gets it; what a queue needs beyond that comes from the image's [`BouncePool`]. `Pool::take` never waits: a
//! queue that gets nothing has pieces at work itself, and asks again when one of them comes back. Whoever has a piece
//! waits for the medium only, never for a second piece. So there is no deadlock, and no queue need wake another.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use super::IoBuf;
use super::buffer::Memory;

/// Bytes of the largest piece. Longer transfers go in several.
pub const MAX_PIECE: usize = 1 << 20;

/// Bytes of the smallest piece.
const MIN_PIECE: usize = 4096;

/// Pieces are aligned to their size or to this, whichever is less.
const MAX_ALIGNMENT: usize = 64 << 10;

/// Sizes of pieces: powers of two.
const SIZES: usize = (MAX_PIECE / MIN_PIECE).ilog2() as usize + 1;

/// The memory that all queues of an image share, beyond the [`MAX_PIECE`] bytes that each of them has.
pub struct BouncePool {
    shared: Arc<Budget>,
    shelves: Mutex<FreeLists>,
    gauge: Arc<Usage>,
}

impl std::fmt::Debug for BouncePool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BouncePool({} bytes)", self.limit())
    }
}

impl BouncePool {
    /// Bytes that suit most: 64 large writes at once.
    pub const DEFAULT_BYTES: usize = 64 << 20;

    /// At most `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        let gauge = Arc::new(Usage::default());
        let shared = Budget::new(limit, &gauge);
        Arc::new(BouncePool { shared, shelves: Mutex::default(), gauge })
    }

    /// Bytes allocated now and at most so far, in use or kept for reuse, with those of the queues.
    pub fn allocated(&self) -> (usize, usize) {
        (self.gauge.now.load(Relaxed), self.gauge.most.load(Relaxed))
    }

    /// Bytes that the queues share.
    pub fn limit(&self) -> usize {
        self.shared.limit
    }
}

/// Bytes allocated in all.
#[derive(Default)]
struct Usage {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// What memory is charged to.
struct Budget {
    limit: usize,
    used: AtomicUsize,
    gauge: Arc<Usage>,
}

impl Budget {
    fn new(limit: usize, gauge: &Arc<Usage>) -> Arc<Self> {
        Arc::new(Budget { limit, used: AtomicUsize::new(0), gauge: gauge.clone() })
    }

    /// Allocates if that stays within the limit. Tells whose it is by the account.
    fn piece(self: &Arc<Self>, size: usize) -> Option<BounceBuffer> {
        let more = |used: usize| used.checked_add(size).filter(|&used| used <= self.limit);
        self.used.fetch_update(Relaxed, Relaxed, more).ok()?;
        let now = self.gauge.now.fetch_add(size, Relaxed) + size;
        self.gauge.most.fetch_max(now, Relaxed);
        Some(BounceBuffer { memory: Memory::new(size, size.min(MAX_ALIGNMENT)), account: self.clone() })
    }
}

/// Memory for a transfer. Goes back with [`Pool::give`]; dropped, it is freed.
pub(super) struct BounceBuffer {
    memory: Memory,
    account: Arc<Budget>,
}

impl BounceBuffer {
    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.memory.len()
    }

    /// The first `len` bytes as a buffer. `scratch` is an old iovec list to reuse.
    pub(super) fn lend(&self, len: usize, scratch: Vec<libc::iovec>) -> IoBuf {
        self.memory.lend(len, scratch)
    }
}

impl Drop for BounceBuffer {
    fn drop(&mut self) {
        self.account.used.fetch_sub(self.len(), Relaxed);
        self.account.gauge.now.fetch_sub(self.len(), Relaxed);
    }
}

/// Pieces kept for reuse, by size.
#[derive(Default)]
struct FreeLists {
    pieces: [Vec<BounceBuffer>; SIZES],
    /// All of them.
    bytes: usize,
}

impl FreeLists {
    /// A piece of this size: one kept, or a new one, for which others may have to go.
    fn take(&mut self, account: &Arc<Budget>, class: usize) -> Option<BounceBuffer> {
        let size = MIN_PIECE << class;
        if let Some(piece) = self.pieces[class].pop() {
            self.bytes -= size;
            return Some(piece);
        }
        if account.used.load(Relaxed) - self.bytes + size > account.limit {
            return None;
        }
        loop {
            if let Some(piece) = account.piece(size) {
                return Some(piece);
            }
            // The largest first: few of them make room for anything.
            let freed = self.pieces.iter_mut().rev().find_map(Vec::pop)?;
            self.bytes -= freed.len();
        }
    }

    fn put(&mut self, piece: BounceBuffer) {
        self.bytes += piece.len();
        self.pieces[class_of(piece.len())].push(piece);
    }
}

/// The size of a piece for `len` bytes, or of the largest there is.
fn class_of(len: usize) -> usize {
    (len.clamp(MIN_PIECE, MAX_PIECE).next_power_of_two() / MIN_PIECE).ilog2() as usize
}

/// One queue's way to memory; used by its thread alone.
pub(super) struct Pool {
    depot: Arc<BouncePool>,
    own: Arc<Budget>,
    shelves: FreeLists,
    /// Bytes of its smallest piece.
    least: usize,
}

impl Pool {
    /// Pieces are aligned to `align` bytes (a power of two, [`MAX_ALIGNMENT`] at most), and to a page.
    pub(super) fn new(depot: Arc<BouncePool>, align: usize) -> Self {
        let own = Budget::new(MAX_PIECE, &depot.gauge);
        Pool { depot, own, shelves: FreeLists::default(), least: align }
    }

    /// A piece of `wanted` bytes or more, or one of [`MAX_PIECE`] bytes. None: only when this pool has lent out others;
    /// ask again when one was given back.
    pub(super) fn take(&mut self, wanted: usize) -> Option<BounceBuffer> {
        let class = class_of(wanted.max(self.least));
        self.shelves.take(&self.own, class).or_else(|| {
            let mut shelves = self.depot.shelves.lock().expect("no panic while held");
            shelves.take(&self.depot.shared, class)
        })
    }

    /// Takes a piece back for reuse, unless somebody still has a buffer of it.
    pub(super) fn give(&mut self, piece: BounceBuffer) {
        if !piece.memory.is_free() {
            return;
        }
        if Arc::ptr_eq(&piece.account, &self.own) {
            self.shelves.put(piece);
        } else {
            self.depot.shelves.lock().expect("no panic while held").put(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_two_between_a_page_and_the_largest() {
        let depot = BouncePool::new(0);
        let mut pool = Pool::new(depot, 1);
        for (wanted, len) in [(1, 4096), (4096, 4096), (4097, 8192), (MAX_PIECE - 1, MAX_PIECE), (1 << 30, MAX_PIECE)] {
            let piece = pool.take(wanted).expect("the only one");
            assert_eq!(piece.len(), len);
            assert!(piece.lend(512, Vec::new()).is_aligned(4096, 512));
            pool.give(piece);
        }
    }

    #[test]
    fn the_bound_holds_and_whoever_has_nothing_gets_something() {
        let depot = BouncePool::new(2 * MAX_PIECE);
        let mut pools: Vec<Pool> = (0..3).map(|_| Pool::new(depot.clone(), 512)).collect();
        let mut lent = Vec::new();
        for _ in 0..3 {
            lent.push(pools[0].take(MAX_PIECE).expect("its own, and two of the depot"));
        }
        assert!(pools[0].take(1).is_none());
        for pool in &mut pools[1..] {
            let own = pool.take(MAX_PIECE).expect("its own");
            assert!(pool.take(4096).is_none());
            pool.give(own);
        }
        assert_eq!(depot.allocated(), (5 * MAX_PIECE, 5 * MAX_PIECE));
        let shared = lent.pop().expect("three were taken");
        pools[0].give(shared);
        assert!(
            pools[1].take(MAX_PIECE).is_some() && pools[1].take(MAX_PIECE).is_some(),
            "what one gives another gets"
        );
        drop((pools, lent));
        assert_eq!(depot.allocated().0, MAX_PIECE, "one is kept in the depot, and one was dropped");
    }

    #[test]
    fn pieces_kept_for_reuse_make_room_for_other_sizes() {
        let depot = BouncePool::new(0);
        let mut pool = Pool::new(depot.clone(), 512);
        let small: Vec<BounceBuffer> = (0..256).map(|_| pool.take(4096).expect("within a largest piece")).collect();
        assert!(pool.take(4096).is_none());
        small.into_iter().for_each(|piece| pool.give(piece));
        let large = pool.take(MAX_PIECE).expect("all the small ones are free");
        assert_eq!(depot.allocated(), (MAX_PIECE, MAX_PIECE));
        pool.give(large);
        let small: Vec<BounceBuffer> = (0..256).map_while(|_| pool.take(4096)).collect();
        assert_eq!(small.len(), 256, "the large one made room again");
        drop(small);
        assert_eq!(depot.allocated(), (0, MAX_PIECE));
    }

    #[test]
    fn memory_that_somebody_still_has_is_not_lent_again() {
        let mut pool = Pool::new(BouncePool::new(0), 512);
        let piece = pool.take(MAX_PIECE).expect("memory");
        let kept = piece.lend(512, Vec::new());
        pool.give(piece);
        kept.copy_from(0, &[7; 512]);
        let other = pool.take(MAX_PIECE).expect("another");
        let mut seen = [1; 512];
        other.lend(512, Vec::new()).copy_to(0, &mut seen);
        assert_eq!(seen, [0; 512]);
    }
}
