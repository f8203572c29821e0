//! A ring that stands still since a transfer failed ([`crate::engine::on_error`]): what is kept, who is told, and what
//! becomes of it when the ring stops.
//!
//! What is kept stays marked as in flight. A ring that only changes (memory, features, a log) does it again when it runs
//! again, and so does the next server, which the front-end hands the marks to. A ring that is disabled or handed back
//! (GET_VRING_BASE) is another matter: it may go on elsewhere, where nobody knows of the marks, and the guest would wait
//! for ever. So what is kept is then tried once more, and its outcome is the guest's.

use crate::virtio::rings::StopMode;
use std::time::Instant;

use super::super::rings::RetainedRequests;
use super::Worker;
use crate::backend::{Errno, IoBuf, Op};
#[cfg(all(test, feature = "model"))]
use crate::base::sync::interleavings::{Mutant, planted};
use crate::base::sync::mpsc::Sender;
use crate::disk::{Event, FailedRequest};
use crate::engine::Kind;

/// A ring that is to come to rest, and is not to be handed back.
pub(super) enum Rest {
    /// Something is in flight; who waits.
    Coming(Sender<()>),
    /// Nothing is.
    Reached,
}

impl Worker {
    /// [`super::Command::Rest`].
    pub(super) fn rest(&mut self, told: Sender<()>) {
        self.stopping = Some(StopMode::Restartable);
        self.resting = Some(Rest::Coming(told));
    }

    /// [`super::Command::GoOn`].
    pub(super) fn go_on(&mut self, told: &Sender<()>) {
        let resting = self.resting.take();
        #[cfg(all(test, feature = "model"))]
        let resting = resting.filter(|rest| matches!(rest, Rest::Reached) || !planted(Mutant::RestsTooLate));
        if resting.is_some() {
            self.stopping = None;
        }
        // Whoever asked may not wait.
        let _ = told.send(());
    }

    /// The ring may stop. Whether it only rests: then whoever waits for that is told, once.
    pub(super) fn only_rests(&mut self) -> bool {
        match self.resting.replace(Rest::Reached) {
            Some(Rest::Coming(told)) => {
                // It may have lost patience.
                let _ = told.send(());
                #[cfg(all(test, feature = "model"))]
                if planted(Mutant::RestsInName) {
                    self.stopping = None;
                }
                true
            }
            Some(Rest::Reached) => true,
            None => {
                self.resting = None;
                false
            }
        }
    }

    /// [`super::Command::StopMode`].
    pub(super) fn stop(&mut self, how: StopMode) {
        self.resting = None;
        self.stopping = Some(how);
        if how == StopMode::Final {
            self.stop_keeping();
        }
    }

    /// Whether the ring may stop as it was told to.
    pub(super) fn may_stop(&self) -> bool {
        let Some(how) = self.stopping else { return false };
        let is_done = match how {
            StopMode::Restartable => self.engine.rests(),
            StopMode::Final => self.engine.is_idle(),
        };
        is_done && self.backlog.is_empty() && self.may_leave_replay(how)
    }

    /// Whether the engine keeps a request of which the transfer failed so. Not once making data durable has failed: no
    /// operator can mend that, and the guest must hear of it.
    pub(super) fn may_keep(&mut self, errno: Errno) -> bool {
        if self.engine.keeps(errno) && self.setup.rings.backend().sync_failed().is_some() {
            self.stop_keeping();
        }
        self.engine.keeps(errno)
    }

    /// A transfer failed and is to be kept: its op goes back into its slot.
    pub(super) fn take_back(&mut self, head: u16, buf: Option<IoBuf>) {
        let slot = self.slots[usize::from(head)].as_mut().expect("in its slot until it is done");
        let (offset, len, unmap) = (slot.offset, slot.len, slot.unmap);
        slot.op = match (slot.kind, buf) {
            (Kind::Read, Some(buf)) => Some(Op::Read { offset, buf }),
            (Kind::Write, Some(buf)) => Some(Op::Write { offset, buf, durable: false }),
            (Kind::Discard, _) => Some(Op::Discard { offset, len }),
            (Kind::WriteZeroes, _) => Some(Op::WriteZeroes { offset, len, unmap }),
            (kind, _) => unreachable!("a {}, or the back-end did not hand its buffer back", kind.name()),
        };
    }

    /// The engine keeps a request.
    pub(super) fn keep(&mut self, head: u16, errno: Errno) {
        // Another ring's sync failed for good meanwhile ([`Worker::may_keep`]): it is about to be tried for the last time.
        if !self.engine.kept().contains(&head) {
            return;
        }
        let slot = self.slots[usize::from(head)].as_mut().expect("in its slot until it is done");
        slot.kept = true;
        let failed = FailedRequest {
            operation: slot.kind.name(),
            ring: self.setup.index,
            offset: slot.offset,
            len: slot.len,
            errno,
        };
        let is_news = match &self.stopped_by {
            None => true,
            // From here on no quiesce can succeed.
            Some(first) => !first.is_change() && failed.is_change(),
        };
        if is_news {
            self.stopped_by = Some(failed.clone());
        }
        self.show_kept();
        if is_news {
            self.setup.rings.report(Event::IoStopped(failed));
        }
    }

    /// [`super::Command::Retry`]: tries again what is kept.
    pub(super) fn retry(&mut self) {
        let now = Instant::now();
        for &head in self.engine.kept() {
            if let Some(slot) = &mut self.slots[usize::from(head)] {
                slot.since = now;
            }
        }
        self.engine.retry();
        self.no_longer_stopped();
    }

    /// Syncs fail for good, or the ring stops for good: whatever fails is the guest's to hear of.
    pub(super) fn stop_keeping(&mut self) {
        self.engine.stop_keeping();
        self.no_longer_stopped();
    }

    /// The ring has stopped: what it kept, and what an earlier one did and it did not come to, for the next one.
    pub(super) fn leave_kept(&mut self) -> Vec<u16> {
        let mut left = self.engine.kept().to_vec();
        left.extend(&self.replay);
        if self.broken || self.stopping == Some(StopMode::Final) {
            // What an operator's hold kept from being done again is still marked.
            left.clear();
        }
        if self.stopped_by.take().is_some() {
            let ring = self.setup.index;
            log::debug!("ring {ring}: {} requests are left to be done again", left.len());
            self.setup.rings.ring_keeps(ring, None);
            self.setup.rings.report(Event::IoContinued { ring });
        }
        left
    }

    /// For the status, and for quiesces, which cannot succeed.
    fn show_kept(&self) {
        let requests = self.engine.kept().len() as u64;
        let kept = self.stopped_by.clone().map(|first| RetainedRequests { first, requests });
        self.setup.rings.ring_keeps(self.setup.index, kept);
    }

    fn no_longer_stopped(&mut self) {
        if self.stopped_by.take().is_some() {
            self.show_kept();
            self.setup.rings.report(Event::IoContinued { ring: self.setup.index });
        }
    }
}
