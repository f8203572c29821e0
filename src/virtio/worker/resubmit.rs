//! Resubmits what an earlier server took from the virtqueue and did not complete, before anything new and in its order.
//! Doing a request twice is harmless: the guest has seen no completion, so it may not have relied on either outcome.

use std::collections::HashSet;

use super::Worker;
use crate::base::rate_limit::FRONT_END_LOG;
use crate::engine::Admission;
use crate::virtio::rings::StopMode;

impl Worker {
    /// Finds out which requests an earlier server left. The front-end knows only how many were completed (QEMU takes the
    /// used index for the ring's base after a lost connection). What was taken is those, and the requests in flight.
    ///
    /// `left`: heads that this process's own worker before this one left ([`Worker::take_unfinished`]). They are marked in
    /// the in-flight region too, unless the front-end has no such region, or has sent another one since.
    pub(super) fn recover(&mut self, left: Vec<u16>) {
        let Some(inflight) = &mut self.setup.inflight else {
            self.requests.resubmit = left.into();
            return;
        };
        let (available, used) = self.ring.indices();
        match inflight.recover(used, available.wrapping_sub(used), self.ring.size()) {
            Ok(mut heads) => {
                let index = self.setup.index;
                let marked: HashSet<u16> = heads.iter().copied().collect();
                heads.extend(left.iter().filter(|&head| !marked.contains(head)));
                if heads.is_empty() {
                    return;
                }
                // While requests are retained, a front-end can have its rings restarted as often as it likes.
                let level = if left.is_empty() { log::Level::Info } else { log::Level::Debug };
                let found = heads.len();
                FRONT_END_LOG.log(
                    level,
                    format_args!("queue {index}: {found} requests that were not completed are resubmitted"),
                );
                // The sum is at most the ring's size, which has 16 bits.
                self.ring.set_next_available(used.wrapping_add(heads.len() as u16));
                self.requests.resubmit = heads.into();
            }
            Err(why) => self.break_ring(why),
        }
    }

    /// Resubmits until everything is resubmitted, a write is blocked (`requests.blocked`) or the parser has walked more
    /// descriptors than `walk_limit` (`turn.poll_again`).
    pub(super) fn resubmit(&mut self, walk_limit: u64) {
        while let Some(&head) = self.requests.resubmit.front()
            && !self.broken
        {
            if self.parser.walked() > walk_limit {
                self.turn.poll_again = true;
                return;
            }
            if self.take(head) == Admission::Blocked {
                self.block();
                return;
            }
            self.requests.resubmit.pop_front();
        }
    }

    /// Admits everything that was popped and waits, before the gate closes: only this worker can be relied on to complete it.
    pub(super) fn admit_taken(&mut self) {
        self.clock.forget();
        while !self.broken
            && let Some(head) = self.requests.resubmit.pop_front()
        {
            if let Some(request) = self.parse(head) {
                let admission = self.carry_out_taken(&request);
                debug_assert_eq!(admission, Admission::Admitted, "the gate is open");
            }
        }
        self.admit_aside();
    }

    /// Whether the virtqueue may stop though requests still wait to be resubmitted, because a hold blocks them. If it
    /// restarts here, the next worker gets them. If it does not, the next server finds them in the in-flight region. When
    /// the guest moves to another host (the dirty log is on) that region stays behind, so the stop waits until the
    /// operator's hold ends.
    pub(super) fn may_leave_resubmissions(&self, mode: StopMode) -> bool {
        let region_is_kept = self.setup.inflight.is_some() && self.setup.log.is_none();
        self.requests.resubmit.is_empty() || mode == StopMode::Restartable || region_is_kept || self.broken
    }
}
