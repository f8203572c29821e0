//! Faults that can be planted into the engine, each at the line that decides. The hooks exist in test builds only; the
//! explorer must find every fault but the legal one.

use std::cell::Cell;

use super::model::Oracle;

/// A planted fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The gate lets everybody through while blocked.
    GateStaysOpen,
    /// A write under write-through is answered before its sync.
    EarlyAck,
    /// A waiter joins the sync that is running.
    JoinsRunningSync,
    /// A second sync starts while one runs.
    SecondSync,
    /// A quiesce is answered as soon as it is drained.
    NoSyncAtQuiesce,
    /// The same, in `unsafe` only.
    NoSyncAtQuiesceInUnsafe,
    /// The last unblock says nothing.
    ResumedLost,
    /// One unblock opens the gate for all holders.
    FirstUnblockOpens,
    /// Requests that a failed sync covered are acknowledged.
    SyncErrorAcked,
    /// A quiesce whose sync failed is a success.
    QuiesceErrorLost,
    /// A transfer's error is dropped.
    DataErrorAcked,
    /// The gate is left when the data arrived.
    LeavesBeforeDurable,
    /// The gate is left when the data is submitted.
    LeavesBeforeData,
    /// The sync of an abandoned quiesce answers the next one.
    StaleEpoch,
    /// An answer not yet taken outlives its quiesce.
    StaleAnswer,
    /// A `Resumed` not yet taken outlives the next block.
    StaleResumed,
    /// Discard and write-zeroes are answered when transferred, under write-through too.
    RangesNotSynced,
    /// Discard and write-zeroes get the durable flag instead of a sync.
    RangesFlagged,
    /// The durable flag is set whatever the back-end has.
    FlagWithoutNative,
    /// A driver without FLUSH is served write back.
    NoFlushIsWriteBack,
    /// A flush is answered at once under write back.
    FlushIgnored,
    /// Every answer comes twice.
    DoubleAnswer,
    /// A sync forgets the last one that it covered.
    LostWaiter,
    /// A sync settles those that wait for the next one, too.
    SettlesBystanders,
    /// A quiesce joins the sync line before it is drained.
    BarrierBeforeDrained,
    /// A sync that runs does not count as work.
    IdleWhileSyncing,
    /// A quiesce that finds nothing in flight waits for ever.
    LostDrain,
    /// A nested block begins the quiesce anew.
    NestedQuiesce,
    /// Reads pass the gate too.
    ReadsGated,
    /// A change is taken while another one is kept.
    TakenWhileStopped,
    /// A kept change has left the gate.
    KeptLeavesGate,
    /// What is kept is tried again, the last first.
    RetryReversed,
    /// One of those kept is not tried again.
    RetryForgets,
    /// A durable write is tried again without its flag.
    RetryNotDurable,
    /// Where failures are kept, a failed sync is tried again.
    SyncRetried,
    /// What failed is answered although failures are kept.
    KeptAnswered,
    /// LEGAL: a flush is answered at once under write-through, where all that is acknowledged is durable.
    FlushNoopUnderThrough,
}

impl Mutant {
    /// Every fault and an oracle that must find it.
    pub const FAULTS: [(Mutant, Oracle); 32] = [
        (Mutant::GateStaysOpen, Oracle::AdmittedWhileBlocked),
        (Mutant::EarlyAck, Oracle::ThroughNotDurable),
        (Mutant::JoinsRunningSync, Oracle::FlushNotDurable),
        (Mutant::SecondSync, Oracle::TwoSyncs),
        (Mutant::NoSyncAtQuiesce, Oracle::QuietNotDurable),
        (Mutant::NoSyncAtQuiesceInUnsafe, Oracle::QuietNotDurable),
        (Mutant::ResumedLost, Oracle::ResumedLost),
        (Mutant::FirstUnblockOpens, Oracle::AdmittedWhileBlocked),
        (Mutant::SyncErrorAcked, Oracle::FailureAcknowledged),
        (Mutant::QuiesceErrorLost, Oracle::QuietNotDurable),
        (Mutant::DataErrorAcked, Oracle::FailureAcknowledged),
        (Mutant::LeavesBeforeDurable, Oracle::Miscounted),
        (Mutant::LeavesBeforeData, Oracle::QuietInFlight),
        (Mutant::StaleEpoch, Oracle::QuietNotDurable),
        (Mutant::StaleAnswer, Oracle::QuietInFlight),
        (Mutant::StaleResumed, Oracle::ResumedWithoutReason),
        (Mutant::RangesNotSynced, Oracle::ThroughNotDurable),
        (Mutant::RangesFlagged, Oracle::DurableFlagMisused),
        (Mutant::FlagWithoutNative, Oracle::DurableFlagMisused),
        (Mutant::NoFlushIsWriteBack, Oracle::ThroughNotDurable),
        (Mutant::FlushIgnored, Oracle::FlushNotDurable),
        (Mutant::DoubleAnswer, Oracle::AnsweredTwice),
        (Mutant::LostWaiter, Oracle::Unanswered),
        (Mutant::SettlesBystanders, Oracle::FailedWithoutReason),
        (Mutant::SettlesBystanders, Oracle::FlushNotDurable),
        (Mutant::BarrierBeforeDrained, Oracle::QuietUnsynced),
        (Mutant::BarrierBeforeDrained, Oracle::QuietInFlight),
        (Mutant::IdleWhileSyncing, Oracle::IdleWrong),
        (Mutant::QuiesceErrorLost, Oracle::QuietUnsynced),
        (Mutant::LostDrain, Oracle::QuiesceUnanswered),
        (Mutant::NestedQuiesce, Oracle::QuiescedTwice),
        (Mutant::ReadsGated, Oracle::HeldWithoutReason),
    ];

    /// Those of which nothing is seen unless failures are kept.
    pub const KEEPING_FAULTS: [(Mutant, Oracle); 8] = [
        (Mutant::TakenWhileStopped, Oracle::AdmittedWhileBlocked),
        (Mutant::KeptLeavesGate, Oracle::QuietInFlight),
        (Mutant::KeptLeavesGate, Oracle::Miscounted),
        (Mutant::RetryReversed, Oracle::RetriedOutOfOrder),
        (Mutant::RetryForgets, Oracle::Unanswered),
        (Mutant::RetryNotDurable, Oracle::ThroughNotDurable),
        (Mutant::SyncRetried, Oracle::FailureAcknowledged),
        (Mutant::KeptAnswered, Oracle::KeptWrong),
    ];
}

thread_local! {
    static PLANTED: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// Whether this fault is planted in this thread.
pub fn planted(mutant: Mutant) -> bool {
    PLANTED.get() == Some(mutant)
}

/// Runs `work` with the fault planted.
pub fn with<T>(mutant: Mutant, work: impl FnOnce() -> T) -> T {
    PLANTED.set(Some(mutant));
    let result = work();
    PLANTED.set(None);
    result
}
