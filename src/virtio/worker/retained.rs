//! Failed requests that are retained instead of completed ([`crate::engine::on_error`]): how they are reported
//! and retried, and what becomes of them when the virtqueue stops.
//!
//! A retained request stays marked as in flight. When the virtqueue only changes (memory, features, a dirty log), its next
//! worker does the request again. So does the next server, which gets the marks from the front-end. A virtqueue that is
//! disabled or handed back (GET_VRING_BASE) is another matter: it may continue elsewhere, where the marks are not known, and
//! the guest would wait for ever. So what is retained is then retried once more, and the guest gets the result.

use super::Worker;
use super::lifecycle::Lifecycle;
use crate::disk::{Event, FailedRequest};
use crate::engine::Errno;
use crate::virtio::rings::{RetainedRequests, StopMode};

impl Worker {
    /// Whether the engine retains a request whose transfer failed with `errno`. It retains nothing once making data
    /// durable has failed: no operator can fix that, and the guest must get the error.
    pub(super) fn retains(&mut self, errno: Errno) -> bool {
        if self.engine.retains(errno) && self.setup.rings.backend().sync_failed().is_some() {
            self.stop_retaining();
        }
        self.engine.retains(errno)
    }

    /// Reports a request that the engine retains.
    pub(super) fn retain(&mut self, head: u16, errno: Errno) {
        // Another ring's sync has failed for good meanwhile ([`Worker::retains`]), so the request is being retried for the
        // last time.
        if !self.engine.retained().contains(&head) {
            return;
        }
        let request = self.requests.get_mut(head);
        request.retained = true;
        let failed = FailedRequest {
            kind: request.kind,
            ring: self.setup.index,
            offset: request.offset,
            len: request.len,
            errno,
        };
        let is_first_of_its_kind = match &self.requests.stopped_by {
            None => true,
            // No quiesce can succeed while a change is retained.
            Some(first) => !first.is_change() && failed.is_change(),
        };
        if is_first_of_its_kind {
            self.requests.stopped_by = Some(failed.clone());
        }
        self.publish_retained();
        if is_first_of_its_kind {
            self.setup.rings.report(Event::IoStopped(failed));
        }
    }

    /// Carries out [`super::WorkerCommand::Retry`]: retries what is retained.
    pub(super) fn retry(&mut self) {
        self.clock.forget();
        let now = self.clock.now();
        for &head in self.engine.retained() {
            if let Some(Some(request)) = self.requests.pending.get_mut(usize::from(head)) {
                request.since = now;
            }
        }
        self.engine.retry();
        self.report_continued();
    }

    /// Retries what is retained once more, and gives the guest every error from now on: syncs fail for good, or the
    /// virtqueue stops for good.
    pub(super) fn stop_retaining(&mut self) {
        self.engine.stop_retaining();
        self.report_continued();
    }

    /// Takes the heads that this worker leaves to the next one, when the virtqueue has stopped: those retained, and those
    /// that an earlier worker left and this one did not resubmit.
    pub(super) fn take_unfinished(&mut self) -> Vec<u16> {
        let mut left = self.engine.retained().to_vec();
        left.extend(&self.requests.resubmit);
        self.leave_limit();
        if self.broken || matches!(self.lifecycle, Lifecycle::Stopping(StopMode::Final)) {
            // What an operator's hold kept from being resubmitted is still marked in the in-flight region.
            left.clear();
        }
        if self.requests.stopped_by.take().is_some() {
            let ring = self.setup.index;
            log::debug!("queue {ring}: {} requests are left to be resubmitted", left.len());
            self.setup.rings.set_retained(ring, None);
            self.setup.rings.report(Event::IoContinued { ring });
        }
        left
    }

    /// Publishes what is retained, for the status, and for quiesces, which cannot succeed meanwhile.
    fn publish_retained(&self) {
        let requests = self.engine.retained().len() as u64;
        let retained = self.requests.stopped_by.clone().map(|first| RetainedRequests { first, requests });
        self.setup.rings.set_retained(self.setup.index, retained);
    }

    fn report_continued(&mut self) {
        if self.requests.stopped_by.take().is_some() {
            self.publish_retained();
            self.setup.rings.report(Event::IoContinued { ring: self.setup.index });
        }
    }
}
