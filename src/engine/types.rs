//! The types that the engine shares with its callers.

/// An operating system error number. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

/// The kind of a request, as far as the policy distinguishes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN: never blocked at the gate, never followed by a sync.
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
    /// The name in events, status and log.
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

/// The caller's number for a request, for the worker its head. Unique among the requests that were admitted and are not done.
pub type RequestId = u16;

/// Identifies what the back-end was given; the caller returns it to [`complete`](super::Engine::complete).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Token {
    /// The data transfer of this request.
    Data(RequestId),
    /// A sync of the whole image. At most one is running at a time in one engine.
    Sync,
}

/// Whether a request was admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The request was admitted and is in flight until its `Done`.
    Admitted,
    /// Writes are blocked, or a failed transfer is [retained](Action::Retained). The caller leaves the request in the virtqueue,
    /// with all that stand behind it, and offers it again after `Resumed`.
    Blocked,
}

/// What the caller must do next, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Give the transfer or the sync to the back-end. `durable`: this write must be on stable storage when it completes;
    /// set only where the back-end writes durably by itself.
    Submit {
        /// What to submit.
        token: Token,
        /// The write must be durable when it completes. Never set for anything but `Data` of a `Write`.
        durable: bool,
    },
    /// Complete the request to the guest. `Err` is the error of exactly this request.
    Done {
        /// The request.
        id: RequestId,
        /// The result of the request.
        result: Result<(), Errno>,
    },
    /// The transfer of this request failed, and the request is retained: it stays in flight, and a `Submit` for it follows
    /// after [`retry`](super::Engine::retry).
    Retained {
        /// The request.
        id: RequestId,
        /// Why it failed.
        errno: Errno,
    },
    /// The quiesce that the first `block_writes` began is over: nothing that changes the disk is in flight and, if `Ok`,
    /// everything acknowledged so far is durable.
    Quiesced(Result<(), Errno>),
    /// The last holder left, or the retained requests are being retried: read the virtqueue again without waiting for a
    /// kick.
    Resumed,
}
