//! The promises of the engine, each an oracle that the explorer asks after every step ([`super::model`]).

/// The promises. A path that breaks one ends there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Oracle {
    /// A request was done that is not in flight.
    DoneTwice,
    /// Every op has completed and every action was taken, but a request has no result.
    NeverDone,
    /// A change or a flush was admitted while writes were blocked or a request was retained.
    AdmittedWhileBlocked,
    /// A read was blocked, or any request while the gate was open.
    BlockedWithoutReason,
    /// A change was acknowledged under write-through and is not durable.
    ThroughNotDurable,
    /// A flush was acknowledged, and a write acknowledged before the flush was offered is not durable.
    FlushNotDurable,
    /// A request whose transfer failed, or whose sync failed, was acknowledged (or got the other's error).
    FailureAcknowledged,
    /// A request failed though neither its transfer nor a sync that covered it did.
    FailedWithoutReason,
    /// Quiesced(Ok) while a change was in flight.
    QuietInFlight,
    /// Quiesced(Ok) while an acknowledged write was not durable.
    QuietNotDurable,
    /// Quiesced, but not with the result of a sync that began within this quiesce after the last change was done.
    QuietUnsynced,
    /// Quiesced while no quiesce waits for its result.
    QuiescedTwice,
    /// Every op has completed and writes are still blocked, but no Quiesced came.
    QuiesceNeverEnds,
    /// Resumed while writes were blocked, or without an unblock.
    ResumedWithoutReason,
    /// Writes are unblocked and Resumed never came.
    ResumedLost,
    /// A sync was submitted while one was running.
    TwoSyncs,
    /// The durable flag on anything but a write, or where the back-end has no durable writes.
    DurableFlagMisused,
    /// A failure was retained that should go to the guest, was retained twice, or went to the guest although it should be
    /// retained.
    RetainedWrongly,
    /// Retained requests were retried, but not in the order in which they failed.
    RetriedOutOfOrder,
    /// `writes_in_flight` differs from the number of requests admitted and not done.
    Miscounted,
    /// `is_idle` while something is in flight, or not although nothing is.
    IdleWrong,
}
