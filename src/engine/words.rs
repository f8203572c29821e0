//! The words that the engine and its callers share. Everyone uses them as `crate::engine::...`.

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

impl Kind {
    /// As events and the log call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush => "flush",
            Kind::Discard => "discard",
            Kind::WriteZeroes => "write-zeroes",
        }
    }
}

/// The caller's name for a request: its slot. Unique among the requests taken and not yet done.
pub type Slot = u16;

/// What was handed to the back-end and comes back in [`complete`](super::Engine::complete).
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
    /// Writes are blocked, or a failed transfer is [kept](Action::Keep): leave the request in the ring (and what stands
    /// behind it) and offer it again after `Resumed`.
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
    /// This request's transfer failed and is kept: it stays in flight, and a `Submit` for it follows after
    /// [`retry`](super::Engine::retry).
    Keep {
        /// The request.
        slot: Slot,
        /// Why it failed.
        errno: Errno,
    },
    /// The quiesce begun by the first `block_writes` is settled: nothing that changes the disk is in flight and, if
    /// `Ok`, everything acknowledged so far is durable.
    Quiesced(Result<(), Errno>),
    /// The last holder left, or what was kept is tried again: read the ring again, without waiting for a kick.
    Resumed,
}
