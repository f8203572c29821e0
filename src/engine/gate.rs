//! The write gate: who may change the disk, and how many are at it. One a ring, used by the ring's thread alone, so
//! there are no atomics.

/// Counts the holders that keep the gate closed and the requests that passed it and are not done.
///
/// Invariant: while `blockers > 0`, `in_flight` never grows. So a gate that is drained stays drained until the last
/// [`WriteGate::unblock`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct WriteGate {
    blockers: u32,
    in_flight: u32,
}

impl WriteGate {
    /// Asks to pass. `false`: closed; the request stays where it is.
    #[inline]
    pub fn enter(&mut self) -> bool {
        if self.blockers > 0 {
            return false;
        }
        self.in_flight += 1;
        true
    }

    /// A request that passed is done, its durability included.
    #[inline]
    pub fn leave(&mut self) {
        debug_assert!(self.in_flight > 0, "a request left the gate that never entered it");
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Closes the gate once more. Returns whether it was open.
    pub fn block(&mut self) -> bool {
        self.blockers += 1;
        self.blockers == 1
    }

    /// Undoes one `block`. Returns whether the gate is open now because of it; without a `block` to undo, false.
    pub fn unblock(&mut self) -> bool {
        debug_assert!(self.blockers > 0, "unblock without block");
        let was_blocked = self.blockers > 0;
        self.blockers = self.blockers.saturating_sub(1);
        was_blocked && self.blockers == 0
    }

    /// Somebody keeps it closed.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.blockers > 0
    }

    /// Closed, and everything that passed before is done.
    #[inline]
    pub fn is_drained(&self) -> bool {
        self.blockers > 0 && self.in_flight == 0
    }

    /// Requests that passed and are not done.
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
