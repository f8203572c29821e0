//! PURE. Which request runs, when it is acknowledged, and when the disk is quiet. Standard library only: no I/O, no
//! memory of the guest, no file descriptor, no thread, no clock.
//!
//! One [`Engine`] serves one ring, in that ring's thread.

pub mod cache;

pub use cache::{CacheMode, CachePolicy};

/// An operating system error number. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

/// What a request does, as far as policy is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN: never held, never synced.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes,
}

/// The caller's name for a request: its slot. Unique among the requests taken and not yet done.
pub type Slot = u16;

/// What was handed to the back-end and comes back in [`Engine::complete`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Token {
    /// The data transfer of the request in this slot.
    Data(Slot),
    /// A sync of the whole image. At most one is running at a time in one engine.
    Sync,
}

/// Whether a request was admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// The request is the engine's until its `Done`.
    Taken,
    /// Writes are blocked: leave the request in the ring (and what stands behind it) and offer it again after
    /// `Resumed`.
    Held,
}

/// What the caller must do next, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Hand the transfer (or the sync) to the back-end. `durable`: this write must be on stable storage when it
    /// completes (only ever set where the back-end has durable writes natively).
    Submit {
        /// What to submit.
        token: Token,
        /// Only for `Data` of a `Write`.
        durable: bool,
    },
    /// Answer the guest. `Err` is the error of exactly this request.
    Done {
        /// The request.
        slot: Slot,
        /// Its outcome.
        result: Result<(), Errno>,
    },
    /// The quiesce begun by the first `block_writes` is settled: nothing that changes the disk is in flight and, if
    /// `Ok`, everything acknowledged so far is durable.
    Quiesced(Result<(), Errno>),
    /// The last holder left: read the ring again, without waiting for a kick.
    Resumed,
}

/// Admission, acknowledgement and quiet for one ring. SKELETON: the engine's author replaces this.
pub struct Engine;

impl Engine {
    /// `durable_writes`: the back-end has durable writes natively ([`Action::Submit`]'s flag). A write through the
    /// policy is then one durable write; otherwise data, then a sync shared by many.
    pub fn new(policy: CachePolicy, durable_writes: bool) -> Self {
        let _ = (policy, durable_writes);
        todo!()
    }

    /// Whether the driver negotiated VIRTIO_BLK_F_FLUSH. Called before the first `offer`.
    pub fn set_driver_can_flush(&mut self, can: bool) {
        let _ = can;
        todo!()
    }

    /// Offers the request at the head of the ring.
    pub fn offer(&mut self, slot: Slot, kind: Kind) -> Offer {
        let _ = (slot, kind);
        todo!()
    }

    /// Something submitted came back. Every submitted token, exactly once.
    pub fn complete(&mut self, token: Token, result: Result<(), Errno>) {
        let _ = (token, result);
        todo!()
    }

    /// Closes the gate (nests). The first call begins a quiesce, answered by one `Quiesced`; a nested one changes
    /// nothing but the count.
    pub fn block_writes(&mut self) {
        todo!()
    }

    /// Undoes one `block_writes`; the last one yields `Resumed` and abandons a quiesce that is still under way.
    pub fn unblock_writes(&mut self) {
        todo!()
    }

    /// Requests that change the disk and are not done yet: what a quiesce would drain.
    pub fn writes_in_flight(&self) -> u32 {
        todo!()
    }

    /// Nothing taken is undone and no sync is running: the ring may stop.
    pub fn is_idle(&self) -> bool {
        todo!()
    }

    /// The next thing to do; call until `None` after every `offer` batch and every `complete` batch.
    pub fn next_action(&mut self) -> Option<Action> {
        todo!()
    }
}
