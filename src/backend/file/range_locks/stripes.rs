//! Lock stripes: how an aligned write passes without a mutex, yet never during a read-modify-write of its blocks.
//!
//! The image is divided into regions, and each region belongs to one of [`STRIPES`] stripes, by a hash. An aligned
//! write *enters* the stripes of its regions and *leaves* them when the storage has completed it. A read-modify-write
//! *closes* the stripes of the blocks that it reads, and waits until no write of any queue is inside.
//!
//! Each queue counts its own writes in words of its own ([`WritesInside`]), which its thread alone changes as a rule. The
//! [`Closures`] of the image are changed by read-modify-writes only. So an aligned write costs an addition to a cache line
//! of its queue and a load of a line that seldom changes, and the same when it leaves.
//!
//! # Why no write is lost
//! All operations on these words are `SeqCst`: they have one order, in which each thread's own keep theirs. The mutex is
//! that of [`super::RangeLocks`].
//! 1. An aligned write W adds itself, then loads the closures. A read-modify-write R adds its closure, then loads what is
//!    inside. So W sees the closure, or R sees W, or both.
//! 2. W sees no closure: it continues. R sees W, or R's closure came after W had left. R waits while a write is
//!    inside, so R reads its block after W's completion.
//! 3. W sees a closure: it leaves, and queues at the mutex, where claims of the same blocks are granted in the order of
//!    their arrival (`claims.rs`).
//! 4. No wake-up is lost. R loads what is inside, and notes that it waits, while it holds the mutex. A write that R saw
//!    leaves later. If that write is the last of its queue, it then loads the closures, finds R's, takes the mutex and
//!    checks whether any queue is still inside. Of several writes that leave, the last one finds nothing inside. A write
//!    that only came to see the closure leaves in the same way.
//! 5. A stripe opens after the read-modify-write has completed, so what enters later overwrites what that wrote.
//!
//! Two regions may share a stripe. Then a read-modify-write waits for a write that it need not wait for. That costs time
//! only: a write that is inside waits for the storage, never for a lock.

#[cfg(not(all(test, feature = "model")))]
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

#[cfg(all(test, feature = "model"))]
use shuttle::sync::atomic::AtomicU32;

#[cfg(all(test, feature = "model"))]
use crate::base::sync::interleavings::{Mutant, planted};

/// The number of stripes of an image: many more than the regions that are written at one time. Each queue has a word for
/// each of them, 16 KiB in all.
const STRIPES: usize = 1 << STRIPE_BITS;
const STRIPE_BITS: u32 = if cfg!(all(test, feature = "model")) { 4 } else { 12 };

/// The number of a stripe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StripeId(usize);

impl StripeId {
    /// The stripe of a region. Those of neighbours are far apart, so that no few regions fill a stripe.
    #[inline]
    pub(super) fn of_region(region: u64) -> Self {
        StripeId((region.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - STRIPE_BITS)) as usize)
    }
}

fn zeroes() -> Box<[AtomicU32]> {
    (0..STRIPES).map(|_| AtomicU32::new(0)).collect()
}

/// For each stripe of an image: how many read-modify-writes keep it closed. Changed only while the mutex is held.
pub(super) struct Closures(Box<[AtomicU32]>);

impl Closures {
    pub(super) fn new() -> Self {
        Closures(zeroes())
    }

    /// Closes a stripe, or adds a closure to one that is closed.
    pub(super) fn close(&self, stripe: StripeId) {
        self.0[stripe.0].fetch_add(1, SeqCst);
    }

    /// Takes one closure back.
    pub(super) fn open(&self, stripe: StripeId) {
        self.0[stripe.0].fetch_sub(1, SeqCst);
    }

    /// How many read-modify-writes keep it closed.
    #[inline]
    pub(super) fn count(&self, stripe: StripeId) -> u32 {
        self.0[stripe.0].load(SeqCst)
    }

    #[cfg(test)]
    pub(super) fn are_idle(&self) -> bool {
        self.0.iter().all(|word| word.load(SeqCst) == 0)
    }
}

/// For each stripe: how many of one queue's writes are inside. A guest has at most 4,096 in a queue, of 64 regions each.
pub(super) struct WritesInside(Box<[AtomicU32]>);

impl WritesInside {
    pub(super) fn new() -> Self {
        WritesInside(zeroes())
    }

    /// A write of this queue enters. Returns `false` when the stripe is closed; the write must then leave. Never waits.
    #[inline]
    pub(super) fn enter(&self, stripe: StripeId, closures: &Closures) -> bool {
        #[cfg(all(test, feature = "model"))]
        if planted(Mutant::EntersUnchecked) {
            let is_open = closures.count(stripe) == 0;
            self.0[stripe.0].fetch_add(1, SeqCst);
            return is_open;
        }
        self.0[stripe.0].fetch_add(1, SeqCst);
        closures.count(stripe) == 0
    }

    /// A write of this queue leaves. Returns whether it was the last one inside and a read-modify-write may wait for that.
    #[inline]
    pub(super) fn leave(&self, stripe: StripeId, closures: &Closures) -> bool {
        self.0[stripe.0].fetch_sub(1, SeqCst) == 1 && closures.count(stripe) != 0
    }

    /// Whether a write of this queue is inside.
    pub(super) fn has_writes(&self, stripe: StripeId) -> bool {
        self.0[stripe.0].load(SeqCst) != 0
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.0.iter().all(|word| word.load(SeqCst) == 0)
    }
}
