//! What an earlier server took from the ring and did not answer is done again, before anything new and in its order.
//! Doing it twice is harmless: the guest has seen no answer, so it may not have built on either outcome.

use super::{Admission, Worker};
use crate::base::rate_limit::FRONT_END_LOG;
use crate::virtio::rings::StopMode;

impl Worker {
    /// Looks what an earlier server left. The front-end knows only how many were answered (QEMU takes the used index
    /// for the ring's base after a lost connection); what was taken is that and what was not answered.
    ///
    /// `left`: heads that our own worker before this one kept ([`super::stop`]). They are marked, too, unless the
    /// front-end keeps no such memory, or another one by now.
    pub(super) fn recover(&mut self, left: Vec<u16>) {
        let Some(inflight) = &mut self.setup.inflight else {
            self.replay = left.into();
            return;
        };
        let (available, used) = self.ring.indices();
        match inflight.recover(used, available.wrapping_sub(used), self.ring.size()) {
            Ok(mut heads) => {
                let (index, found) = (self.setup.index, heads.len());
                heads.extend(left.iter().filter(|&head| !heads[..found].contains(head)).collect::<Vec<_>>());
                if heads.is_empty() {
                    return;
                }
                // A front-end can have its rings restarted as often as it likes while something is kept.
                let level = if left.is_empty() { log::Level::Info } else { log::Level::Debug };
                let found = heads.len();
                FRONT_END_LOG
                    .log(level, format_args!("ring {index}: {found} requests that were not answered are done again"));
                // At most the ring's size, which is 16 bits.
                self.ring.set_next_available(used.wrapping_add(heads.len() as u16));
                self.replay = heads.into();
            }
            Err(why) => self.break_ring(why),
        }
    }

    /// Takes what is to be done again, until a write is held (`self.held` says so) or `until` descriptors were walked
    /// (`self.more` does).
    pub(super) fn take_replay(&mut self, until: u64) {
        while let Some(&head) = self.replay.front()
            && !self.broken
        {
            if self.parser.walked() > until {
                self.more = true;
                return;
            }
            if self.take(head) == Admission::Held {
                self.held = true;
                return;
            }
            self.replay.pop_front();
        }
    }

    /// Whether the ring may stop though something is held that is to be done again. Where it goes on here it is handed
    /// over, and where it may not the memory that told of it tells the next start. Where the guest moves to another host
    /// that memory stays behind, so there the stop waits for the operator's hold to end.
    pub(super) fn may_leave_replay(&self, stop: StopMode) -> bool {
        let is_told = self.setup.inflight.is_some() && self.setup.log.is_none();
        self.replay.is_empty() || stop == StopMode::Restartable || is_told || self.broken
    }
}
