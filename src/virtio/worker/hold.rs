//! One virtqueue's part in an operator's hold: the gate closes, the engine drains and syncs, and the result goes to
//! [`Rings`](crate::virtio::rings::Rings) with the time that each step took.

use std::time::Instant;

use super::Worker;
#[cfg(all(test, feature = "model"))]
use crate::base::sync::interleavings::{Mutant, planted};
use crate::engine::Errno;
use crate::virtio::rings::RingHoldStats;

/// The times of an operator's hold.
pub(super) struct HoldTimer {
    epoch: u64,
    closed: Instant,
    /// How many writes were in flight when the gate closed.
    drained: u64,
    drained_at: Option<Instant>,
}

/// How many acknowledged bytes may not be durable yet.
#[derive(Default)]
pub(super) struct UnsyncedBytes {
    total: u64,
    /// How many of them the running sync covers.
    syncing: u64,
}

impl UnsyncedBytes {
    /// Counts `bytes` that were written and acknowledged.
    #[inline]
    pub(super) fn written(&mut self, bytes: u64) {
        self.total += bytes;
    }

    /// A sync starts, which covers all bytes so far.
    pub(super) fn sync_started(&mut self) {
        self.syncing = self.total;
    }

    /// The sync that started last has succeeded.
    pub(super) fn sync_succeeded(&mut self) {
        self.total -= self.syncing;
    }
}

impl Worker {
    /// Carries out [`super::WorkerCommand::CloseGate`].
    pub(super) fn close_gate(&mut self, epoch: u64) {
        if !self.engine.is_gate_closed() {
            self.admit_taken();
        }
        let drained = u64::from(self.engine.writes_in_flight());
        self.hold = Some(HoldTimer { epoch, closed: Instant::now(), drained, drained_at: None });
        #[cfg(all(test, feature = "model"))]
        if planted(Mutant::GateStaysOpen) {
            return self.hold_settled(Ok(()));
        }
        self.engine.block_writes();
    }

    /// Carries out [`super::WorkerCommand::OpenGate`].
    pub(super) fn open_gate(&mut self) {
        self.engine.unblock_writes();
        self.hold = None;
    }

    /// Notes when the last write before a hold completed.
    pub(super) fn note_drained(&mut self) {
        if let Some(hold) = &mut self.hold
            && hold.drained_at.is_none()
            && self.engine.writes_in_flight() == 0
        {
            hold.drained_at = Some(Instant::now());
        }
    }

    /// Reports that the engine is quiet, or that the sync of the quiesce failed.
    pub(super) fn hold_settled(&mut self, result: Result<(), Errno>) {
        self.note_drained();
        let Some(hold) = &self.hold else { return };
        let drained_at = hold.drained_at.unwrap_or(hold.closed);
        let stats = RingHoldStats {
            drained: hold.drained,
            drain: drained_at - hold.closed,
            sync: drained_at.elapsed(),
            bytes: self.unsynced.syncing,
            result,
        };
        self.setup.rings.ring_settled(self.setup.index, hold.epoch, stats);
    }
}
