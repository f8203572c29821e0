//! Locks on blocks of the image, for media whose blocks are larger than the guest's: read-modify-write.
//!
//! A write of a part of a block reads the block, changes it and writes it back. Any other write of that block meanwhile
//! would be lost. So each op that changes the image takes a ticket for its blocks and holds it until it is over:
//! - An op of whole blocks (an aligned write) enters the [`stripes`] of its regions, with one atomic addition for each.
//!   It takes the mutex only where a stripe is closed: a read-modify-write runs or waits nearby.
//! - A read-modify-write closes the stripes of its first and its last block, waits until the aligned writes that are
//!   inside have left, and waits for earlier [`claims`] of the same blocks. If it need not wait, the whole blocks
//!   between the two enter their stripes, as an aligned write does; otherwise they are claimed too.
//!
//! Where the guest's blocks are not smaller than the medium's there are no such locks at all.

mod claim_set;
mod claims;
#[cfg(all(test, feature = "model"))]
mod interleavings;
mod stripes;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::collections::hash_map::{Entry, HashMap};
use std::ops::Range;
use std::sync::Arc;

use super::mail::{Mail, Mailbox};
#[cfg(all(test, feature = "model"))]
use crate::base::sync::interleavings::{Mutant, planted};
use crate::base::sync::{Mutex, MutexGuard};
use claims::{Blocks, ClaimId, Claims};
use stripes::{Closures, StripeId, WritesInside};

/// Binary logarithm of the bytes of a region, unless a block is larger. Most writes touch one or two regions.
const REGION_BITS: u32 = 16;

/// Regions of the longest op that passes at the stripes: 4 MiB. For a longer one a claim costs less.
const MAX_REGIONS: u64 = 64;

/// The locks of one image, for all of its queues.
pub(super) struct RangeLocks {
    /// Binary logarithm of the bytes of a block of the medium.
    block_bits: u32,
    region_bits: u32,
    max_regions: u64,
    closures: Closures,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last_id: ClaimId,
    claims: Claims,
    /// Claims that are not granted yet.
    waiting: HashMap<ClaimId, WaitingClaim>,
    /// By stripe: the claims that wait until it is empty. Each of them keeps the stripe closed.
    draining: HashMap<StripeId, BTreeSet<ClaimId>>,
    /// What each queue has inside the stripes.
    queues: Vec<Arc<WritesInside>>,
}

struct WaitingClaim {
    /// Reasons to wait: earlier claims, and stripes that are not empty.
    reasons: usize,
    /// The mailbox of the queue that the op belongs to.
    mailbox: Arc<Mailbox>,
}

/// One queue's access to the locks.
pub(super) struct QueueLocks {
    locks: Arc<RangeLocks>,
    inside: Arc<WritesInside>,
    mailbox: Arc<Mailbox>,
}

/// Blocks that an op holds or waits for, until this is dropped.
pub(super) struct LockTicket {
    /// Regions whose stripes the op is inside.
    regions: Regions,
    claim: Option<Box<Claim>>,
    locks: Arc<QueueLocks>,
}

struct Claim {
    id: ClaimId,
    blocks: Blocks,
    /// The whole blocks are claimed, too. They are inside the stripes if not.
    has_whole: bool,
}

/// Neighbouring regions of the image.
#[derive(Clone, Copy)]
struct Regions {
    first: u64,
    count: u64,
}

impl Regions {
    const NONE: Regions = Regions { first: 0, count: 0 };

    #[inline]
    fn stripes(self) -> impl Iterator<Item = StripeId> {
        (self.first..self.first + self.count).map(StripeId::of_region)
    }
}

impl QueueLocks {
    /// Creates a queue's access. `mailbox` receives [`Mail::Granted`] for tickets that wait.
    pub(super) fn new(locks: Arc<RangeLocks>, mailbox: Arc<Mailbox>) -> Arc<Self> {
        let inside = Arc::new(WritesInside::new());
        locks.state().queues.push(Arc::clone(&inside));
        Arc::new(QueueLocks { locks, inside, mailbox })
    }

    /// Locks the blocks of an op that writes these bytes. Returns whether the ticket is granted; if not, [`Mail::Granted`]
    /// with [`LockTicket::claim`] is posted to the mailbox when it is.
    #[inline]
    pub(super) fn lock_written(self: &Arc<Self>, bytes: Range<u64>) -> (LockTicket, bool) {
        self.lock(Blocks::written(bytes, self.locks.block_bits))
    }

    /// Locks the whole blocks inside these bytes, for an op that changes no others. Returns as
    /// [`QueueLocks::lock_written`] does.
    pub(super) fn lock_inside(self: &Arc<Self>, bytes: Range<u64>) -> (LockTicket, bool) {
        self.lock(Blocks::inside(bytes, self.locks.block_bits))
    }

    #[inline]
    fn lock(self: &Arc<Self>, blocks: Blocks) -> (LockTicket, bool) {
        if let Some(regions) = self.enter(&blocks) {
            return (LockTicket { regions, claim: None, locks: Arc::clone(self) }, true);
        }
        self.claim(blocks)
    }

    /// Enters the stripes of an op of whole blocks, without the mutex. Returns `None` when the op must make a claim.
    #[inline]
    fn enter(&self, blocks: &Blocks) -> Option<Regions> {
        if blocks.has_partial() {
            return None;
        }
        let regions = self.locks.regions_of(&blocks.whole)?;
        for (before, stripe) in regions.stripes().enumerate() {
            if !self.inside.enter(stripe, &self.locks.closures) {
                self.leave(Regions { count: before as u64 + 1, ..regions });
                return None;
            }
        }
        Some(regions)
    }

    /// Leaves stripes that were entered.
    #[inline]
    fn leave(&self, regions: Regions) {
        for stripe in regions.stripes() {
            if self.inside.leave(stripe, &self.locks.closures) {
                self.locks.stripe_drained(stripe);
            }
        }
    }

    /// Claims blocks, after all earlier claims of them. Returns whether the claim is granted.
    fn claim(self: &Arc<Self>, blocks: Blocks) -> (LockTicket, bool) {
        let locks = &*self.locks;
        let mut state = locks.state();
        state.last_id += 1;
        let id = state.last_id;
        let mut reasons = state.claims.insert_parts(id, &blocks);
        for stripe in locks.closed_stripes(&blocks) {
            locks.closures.close(stripe);
            if state.has_writes(stripe) && state.draining.entry(stripe).or_default().insert(id) {
                reasons += 1;
            }
        }
        let entered = if reasons == 0 { self.enter_whole(&blocks) } else { None };
        if entered.is_none() {
            reasons += state.claims.insert_whole(id, &blocks);
        }
        if reasons > 0 {
            state.waiting.insert(id, WaitingClaim { reasons, mailbox: Arc::clone(&self.mailbox) });
        }
        drop(state);
        let claim = Claim { id, blocks, has_whole: entered.is_none() };
        let regions = entered.unwrap_or(Regions::NONE);
        (LockTicket { regions, claim: Some(Box::new(claim)), locks: Arc::clone(self) }, reasons == 0)
    }

    /// Enters the stripes of the whole blocks of a claim whose partial blocks are granted. The caller holds the mutex, so no
    /// stripe is closed meanwhile. Returns `None` when another claim keeps one of them closed.
    fn enter_whole(&self, blocks: &Blocks) -> Option<Regions> {
        let regions = self.locks.regions_of(&blocks.whole)?;
        let is_open = |stripe| {
            let own = self.locks.closed_stripes(blocks).filter(|&closed| closed == stripe).count();
            self.locks.closures.count(stripe) == own as u32
        };
        if !regions.stripes().all(is_open) {
            return None;
        }
        #[cfg(all(test, feature = "model"))]
        if planted(Mutant::EntersUnseen) {
            return Some(Regions::NONE);
        }
        for stripe in regions.stripes() {
            self.inside.enter(stripe, &self.locks.closures);
        }
        Some(regions)
    }
}

impl Drop for QueueLocks {
    fn drop(&mut self) {
        self.locks.state().queues.retain(|inside| !Arc::ptr_eq(inside, &self.inside));
    }
}

impl LockTicket {
    /// The claim of a ticket that may have to wait.
    pub(super) fn claim(&self) -> Option<ClaimId> {
        self.claim.as_ref().map(|claim| claim.id)
    }
}

impl Drop for LockTicket {
    #[inline]
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take() {
            self.locks.locks.release(&claim);
        }
        self.locks.leave(self.regions);
    }
}

impl RangeLocks {
    /// Creates the locks for a medium whose blocks have this many bytes, a power of two.
    pub(super) fn new(block: u32) -> Arc<Self> {
        let block_bits = block.ilog2();
        Arc::new(RangeLocks {
            block_bits,
            region_bits: REGION_BITS.max(block_bits),
            max_regions: MAX_REGIONS,
            closures: Closures::new(),
            state: Mutex::new(State::default()),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn region_of(&self, block: u64) -> u64 {
        block >> (self.region_bits - self.block_bits)
    }

    /// Returns the regions of these blocks; `None` when there are too many.
    #[inline]
    fn regions_of(&self, blocks: &Range<u64>) -> Option<Regions> {
        if blocks.is_empty() {
            return Some(Regions::NONE);
        }
        let first = self.region_of(blocks.start);
        let count = self.region_of(blocks.end - 1) - first + 1;
        (count <= self.max_regions).then_some(Regions { first, count })
    }

    /// The last write of a queue has left a closed stripe.
    #[cold]
    fn stripe_drained(&self, stripe: StripeId) {
        #[cfg(all(test, feature = "model"))]
        if planted(Mutant::LeavesSilently) {
            return;
        }
        let mut state = self.state();
        // A write of another queue is inside, or one that entered after the stripe was opened and closed again. When that
        // leaves, its thread comes here in turn.
        if state.has_writes(stripe) {
            return;
        }
        let waiting = state.draining.remove(&stripe).unwrap_or_default();
        let granted = state.take_reasons(waiting);
        drop(state);
        post(granted);
    }

    /// Ends a claim, granted or not.
    fn release(&self, claim: &Claim) {
        let Claim { id, ref blocks, has_whole } = *claim;
        let mut state = self.state();
        let gave_up = state.waiting.remove(&id).is_some();
        let mut freed = Vec::new();
        state.claims.remove_parts(id, blocks, &mut freed);
        if has_whole {
            state.claims.remove_whole(id, blocks, &mut freed);
        }
        for stripe in self.closed_stripes(blocks) {
            self.closures.open(stripe);
            if gave_up {
                state.stop_draining(stripe, id);
            }
        }
        let granted = state.take_reasons(freed);
        drop(state);
        post(granted);
    }

    /// The stripes that a claim keeps closed. An op of whole blocks excludes no aligned write.
    fn closed_stripes(&self, blocks: &Blocks) -> impl Iterator<Item = StripeId> {
        blocks.partial().map(|block| StripeId::of_region(self.region_of(block)))
    }
}

impl State {
    /// Whether a write of any queue is inside a stripe.
    fn has_writes(&self, stripe: StripeId) -> bool {
        self.queues.iter().any(|inside| inside.has_writes(stripe))
    }

    /// A claim gave up waiting for a stripe.
    fn stop_draining(&mut self, stripe: StripeId, id: ClaimId) {
        if let Some(waiting) = self.draining.get_mut(&stripe) {
            waiting.remove(&id);
            if waiting.is_empty() {
                self.draining.remove(&stripe);
            }
        }
    }

    /// Takes one reason to wait from each of these claims. Returns those that have none any more.
    fn take_reasons(&mut self, freed: impl IntoIterator<Item = ClaimId>) -> Vec<(ClaimId, Arc<Mailbox>)> {
        let mut granted = Vec::new();
        for id in freed {
            let Entry::Occupied(mut waiting) = self.waiting.entry(id) else { continue };
            waiting.get_mut().reasons -= 1;
            if waiting.get().reasons == 0 {
                granted.push((id, waiting.remove().mailbox));
            }
        }
        granted
    }
}

/// Posts the grants, without the mutex. A queue ignores the grant of an op that it has dropped.
fn post(granted: Vec<(ClaimId, Arc<Mailbox>)>) {
    for (id, mailbox) in granted {
        mailbox.post(Mail::Granted(id));
    }
}
