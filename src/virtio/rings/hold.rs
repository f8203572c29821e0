//! The rings' part in an operator's hold. Every worker blocks writes, drains and syncs. Where no ring runs, a thread of its
//! own syncs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Rings, State, WorkerCommand, errno_of};
use crate::backend::Errno;
use crate::base::rate_limit::{COMMAND_LOG, log_limited};
#[cfg(all(test, feature = "model"))]
use crate::base::sync::interleavings::{Mutant, planted};
use crate::base::sync::thread;
use crate::disk::{Event, HoldFigures};

/// What one ring did for a hold.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct RingHoldStats {
    /// How many writes were in flight when the gate closed.
    pub drained: u64,
    /// How long they took to complete.
    pub drain: Duration,
    /// How long the sync took after that.
    pub sync: Duration,
    /// How many bytes the sync covered.
    pub bytes: u64,
    /// The result of the sync.
    pub result: Result<(), Errno>,
}

/// An operator's hold, from its start to its end.
pub(super) struct Hold {
    pub(super) epoch: u64,
    /// The rings whose workers have not settled the hold.
    pub(super) waiting: BTreeSet<u32>,
    /// A ring stopped without a sync after its last write, or no ring ran: sync once more at the end.
    pub(super) needs_sync: bool,
    pub(super) figures: HoldFigures,
    pub(super) error: Option<Errno>,
}

impl Rings {
    /// Carries out [`crate::disk::Disk::close_gate`].
    pub(super) fn begin_hold(self: &Arc<Self>, epoch: u64) {
        let mut state = self.lock();
        let waiting: BTreeSet<u32> = state.running.keys().copied().collect();
        let needs_sync = waiting.is_empty();
        for mailbox in state.running.values() {
            mailbox.send(WorkerCommand::CloseGate(epoch));
        }
        state.hold = Some(Hold { epoch, waiting, needs_sync, figures: HoldFigures::default(), error: None });
        self.settle_if_complete(&mut state);
    }

    /// Carries out [`crate::disk::Disk::open_gate`].
    pub(super) fn end_hold(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.hold.take().is_none() {
            return;
        }
        for mailbox in state.running.values() {
            mailbox.send(WorkerCommand::OpenGate);
        }
        // The rings may have stopped meanwhile, which left the image to the hold.
        let hold_has_image = state.running.is_empty() && state.syncing.is_none();
        drop(state);
        #[cfg(all(test, feature = "model"))]
        if planted(Mutant::NeverReleasesImage) {
            return;
        }
        if hold_has_image {
            let rings = self.clone();
            // Not in this thread: releasing an image may take a while.
            let thread = thread::Builder::new().name("hold-end".into()).spawn(move || rings.release_for_hold());
            if let Err(error) = thread {
                log_limited!(
                    COMMAND_LOG,
                    Warn,
                    "no thread to give the image back in ({error}): done by the control thread"
                );
                self.release_for_hold();
            }
        }
    }

    /// Takes a worker's result of [`WorkerCommand::CloseGate`]. A sync that failed was reported when it completed.
    pub(in super::super) fn ring_settled(self: &Arc<Self>, index: u32, epoch: u64, ring: RingHoldStats) {
        let mut state = self.lock();
        let Some(hold) = state.hold.as_mut().filter(|hold| hold.epoch == epoch) else { return };
        if !hold.waiting.remove(&index) {
            return;
        }
        let figures = &mut hold.figures;
        figures.rings += 1;
        figures.drained += ring.drained;
        figures.drain = figures.drain.max(ring.drain);
        figures.sync = figures.sync.max(ring.sync);
        figures.bytes_synced += ring.bytes;
        hold.error = hold.error.or(ring.result.err());
        self.settle_if_complete(&mut state);
    }

    pub(super) fn settle_if_complete(self: &Arc<Self>, state: &mut State) {
        let Some(hold) = &state.hold else { return };
        if !hold.waiting.is_empty() {
            return;
        }
        if hold.needs_sync && hold.error.is_none() {
            let epoch = hold.epoch;
            // One such thread at a time, because threads must not pile up on storage that hangs. The thread checks for a
            // newer hold when it ends.
            if state.syncing.is_none() {
                match self.spawn_sync() {
                    Ok(()) => state.syncing = Some(epoch),
                    Err(error) => {
                        log_limited!(COMMAND_LOG, Error, "cannot start a thread to sync for a quiesce: {error}");
                        self.events.send(Event::HoldSettled { epoch, result: Err(errno_of(&error)) });
                    }
                }
            }
            return;
        }
        let result = match hold.error {
            Some(errno) => Err(errno),
            None => Ok(hold.figures),
        };
        self.events.send(Event::HoldSettled { epoch: hold.epoch, result });
    }

    /// Syncs in a thread of its own, for a hold that no running ring can sync for.
    fn spawn_sync(self: &Arc<Self>) -> std::io::Result<()> {
        let rings = self.clone();
        let work = move || {
            rings.sync_for_holds();
            // The hold may have ended before the image was claimed.
            rings.release_for_hold();
        };
        thread::Builder::new().name("hold-sync".into()).spawn(work).map(drop)
    }

    fn sync_for_holds(self: &Arc<Self>) {
        loop {
            let start = Instant::now();
            let claimed = self.image_users.claim_for_hold(&*self.backend);
            let result = match &claimed {
                Ok(()) => self.sync(),
                Err(_) => Ok(()),
            };
            let took = start.elapsed();
            let mut state = self.lock();
            let synced = state.syncing.take();
            let Some(hold) = &mut state.hold else { return };
            if !hold.needs_sync || !hold.waiting.is_empty() {
                return;
            }
            if synced == Some(hold.epoch) {
                if let Err(why) = claimed {
                    log_limited!(COMMAND_LOG, Error, "the disk cannot be held still: {why}");
                    self.events.send(Event::HoldRefused { epoch: hold.epoch });
                    return;
                }
                hold.needs_sync = false;
                hold.figures.sync = hold.figures.sync.max(took);
                hold.error = result.err().map(|error| errno_of(&error));
                self.settle_if_complete(&mut state);
                return;
            }
            state.syncing = Some(hold.epoch);
        }
    }

    fn release_for_hold(&self) {
        self.image_users.release_hold(&*self.backend, || self.lock().hold.is_some());
    }
}
