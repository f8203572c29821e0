//! Group commit: which sync covers which waiters.
//!
//! A sync covers what the back-end had finished when it received the sync (clause 4 of the back-end's contract). A waiter
//! therefore never joins a running sync: it waits for the next one, which starts when the running one is over and covers
//! every waiter of that moment. At most one sync runs at a time; a second one would make the device do twice what the next
//! one does once.

use super::RequestId;

/// What waits for a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Waiter {
    /// A flush, or a request whose data was transferred and must be durable before it completes.
    Request(RequestId),
    /// The quiesce of this epoch.
    Barrier(u64),
}

/// The waiters that the running sync covers, and those that wait for the next one. The two vectors swap roles and are
/// reused, so a steady state allocates nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct SyncLine {
    running: bool,
    covered: Vec<Waiter>,
    waiting: Vec<Waiter>,
}

impl SyncLine {
    /// Adds a waiter for the next sync that starts.
    #[inline]
    pub fn join(&mut self, waiter: Waiter) {
        self.waiting.push(waiter);
    }

    /// Starts a sync if there are waiters and none is running. Returns whether the caller must submit one now.
    #[inline]
    pub fn start(&mut self) -> bool {
        if self.running || self.waiting.is_empty() {
            return false;
        }
        debug_assert!(self.covered.is_empty(), "the last sync's waiters were not taken");
        std::mem::swap(&mut self.covered, &mut self.waiting);
        self.running = true;
        true
    }

    /// Ends the running sync and returns the waiters that it covered, in the order in which they joined. Returns `None`
    /// when no sync was running. The caller returns the vector through [`SyncLine::recycle`].
    pub fn finish(&mut self) -> Option<Vec<Waiter>> {
        if !self.running {
            return None;
        }
        self.running = false;
        Some(std::mem::take(&mut self.covered))
    }

    /// Takes back the vector of [`SyncLine::finish`], so that the next sync needs no new one.
    pub fn recycle(&mut self, mut covered: Vec<Waiter>) {
        covered.clear();
        self.covered = covered;
    }

    /// Whether no sync is running and nothing waits for one.
    #[inline]
    pub fn is_idle(&self) -> bool {
        !self.running && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sync_covers_all_present_waiters_and_no_later_one() {
        let mut line = SyncLine::default();
        assert!(!line.start(), "there is no waiter");
        line.join(Waiter::Request(1));
        line.join(Waiter::Request(2));
        assert!(line.start());
        line.join(Waiter::Request(3));
        line.join(Waiter::Barrier(7));
        assert!(!line.start(), "one at a time");

        let first = line.finish().unwrap();
        assert_eq!(first, [Waiter::Request(1), Waiter::Request(2)]);
        line.recycle(first);
        assert!(!line.is_idle(), "two wait");
        assert!(line.start());
        assert_eq!(line.finish().unwrap(), [Waiter::Request(3), Waiter::Barrier(7)]);
        assert!(line.is_idle());
        assert_eq!(line.finish(), None);
    }

    #[test]
    fn a_round_reuses_its_memory() {
        let mut line = SyncLine::default();
        let round = |line: &mut SyncLine| {
            (0..64).for_each(|id| line.join(Waiter::Request(id)));
            assert!(line.start());
            let covered = line.finish().unwrap();
            let address = covered.as_ptr();
            line.recycle(covered);
            address
        };
        let (first, second) = (round(&mut line), round(&mut line));
        for _ in 0..10 {
            let address = round(&mut line);
            assert!(address == first || address == second);
        }
    }
}
