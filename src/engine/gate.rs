//! The write gate: admits requests that change the disk and counts those in flight. Each virtqueue has one, which only its
//! thread uses, so there are no atomics.

/// Counts the holders that keep the gate closed, and the requests that passed it and are not done.
///
/// Invariant: while `blockers > 0`, `in_flight` never grows. A drained gate therefore stays drained until the last
/// [`WriteGate::unblock`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct WriteGate {
    blockers: u32,
    in_flight: u32,
}

impl WriteGate {
    /// Admits one request. Returns `false` when the gate is closed; the request then stays in the virtqueue.
    #[inline]
    pub fn enter(&mut self) -> bool {
        if self.blockers > 0 {
            return false;
        }
        self.in_flight += 1;
        true
    }

    /// Counts one admitted request as done, its durability included.
    #[inline]
    pub fn leave(&mut self) {
        debug_assert!(self.in_flight > 0, "a request left the gate that never entered it");
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Closes the gate for one more holder. Returns whether it was open.
    pub fn block(&mut self) -> bool {
        self.blockers += 1;
        self.blockers == 1
    }

    /// Undoes one `block`. Returns whether this opened the gate; `false` without a `block` to undo.
    pub fn unblock(&mut self) -> bool {
        debug_assert!(self.blockers > 0, "unblock without block");
        let was_blocked = self.blockers > 0;
        self.blockers = self.blockers.saturating_sub(1);
        was_blocked && self.blockers == 0
    }

    /// Whether at least one holder keeps the gate closed.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.blockers > 0
    }

    /// Whether the gate is closed and every request that passed it before is done.
    #[inline]
    pub fn is_drained(&self) -> bool {
        self.blockers > 0 && self.in_flight == 0
    }

    /// The number of requests that passed the gate and are not done.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_unblock_opens() {
        let mut gate = WriteGate::default();
        assert!(gate.enter());
        assert!(gate.block());
        assert!(!gate.block());
        assert!(!gate.enter());
        assert!(!gate.is_drained(), "one is still in flight");
        gate.leave();
        assert!(gate.is_drained());
        assert!(!gate.unblock());
        assert!(gate.is_drained() && !gate.enter());
        assert!(gate.unblock());
        assert!(!gate.is_drained() && gate.enter());
        assert_eq!(gate.in_flight(), 1);
    }
}
