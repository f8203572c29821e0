//! Locks on ranges of the image, for read-modify-write: media whose blocks are larger than the guest's.
//!
//! Between reading a block and writing it back nobody else may write to it, or that write is lost. Every write, zeroing
//! and discard takes its range: exclusively if it is a read-modify-write, together with others of its kind if not.
//! First come, first served, over all queues of the back-end.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::mailbox::{Mail, Mailbox};

/// The locks of one image.
#[derive(Default)]
pub(super) struct RangeLocks {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last_id: u64,
    /// Held and waiting, in the order of arrival.
    entries: VecDeque<Entry>,
}

struct Entry {
    id: u64,
    range: Range<u64>,
    exclusive: bool,
    granted: bool,
    mailbox: Arc<Mailbox>,
}

/// A range held or waited for, until dropped.
pub(super) struct Ticket {
    pub(super) id: u64,
    locks: Arc<RangeLocks>,
}

impl RangeLocks {
    /// Asks for a range of bytes. True: it is held. Otherwise `Mail::Granted` with the ticket's id comes to `mailbox`.
    pub(super) fn acquire(
        self: &Arc<Self>,
        range: Range<u64>,
        exclusive: bool,
        mailbox: &Arc<Mailbox>,
    ) -> (Ticket, bool) {
        let mut state = self.state.lock().expect("no panic while held");
        state.last_id += 1;
        let mut entry = Entry { id: state.last_id, range, exclusive, granted: false, mailbox: Arc::clone(mailbox) };
        entry.granted = !state.entries.iter().any(|earlier| earlier.excludes(&entry));
        let (id, granted) = (entry.id, entry.granted);
        state.entries.push_back(entry);
        (Ticket { id, locks: Arc::clone(self) }, granted)
    }

    fn release(&self, id: u64) {
        let mut state = self.state.lock().expect("no panic while held");
        state.entries.retain(|entry| entry.id != id);
        for index in 0..state.entries.len() {
            let entry = &state.entries[index];
            if !entry.granted && !state.entries.iter().take(index).any(|earlier| earlier.excludes(entry)) {
                let entry = &mut state.entries[index];
                entry.granted = true;
                entry.mailbox.post(Mail::Granted(entry.id));
            }
        }
    }
}

impl Entry {
    /// Whether `later` must wait for this one, held or itself waiting: nobody overtakes.
    fn excludes(&self, later: &Entry) -> bool {
        let overlap = self.range.start < later.range.end && later.range.start < self.range.end;
        overlap && (self.exclusive || later.exclusive)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.locks.release(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(mailbox: &Mailbox) -> Vec<u64> {
        let id = |mail| match mail {
            Mail::Granted(id) => id,
            _ => panic!("only locks are asked for here"),
        };
        mailbox.take().into_iter().map(id).collect()
    }

    #[test]
    fn first_come_first_served() {
        let locks = Arc::new(RangeLocks::default());
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let (plain, held) = locks.acquire(0..8192, false, &mailbox);
        assert!(held);
        let (other, held) = locks.acquire(4096..8192, false, &mailbox);
        assert!(held, "two plain writes need no order");
        let (first, held) = locks.acquire(4096..8192, true, &mailbox);
        assert!(!held);
        let (second, held) = locks.acquire(4096..12288, false, &mailbox);
        assert!(!held, "it would overtake the one that waits");
        let (_elsewhere, held) = locks.acquire(12288..16384, true, &mailbox);
        assert!(held);
        drop(plain);
        assert!(granted(&mailbox).is_empty());
        drop(other);
        assert_eq!(granted(&mailbox), [first.id]);
        drop(first);
        assert_eq!(granted(&mailbox), [second.id]);
    }

    #[test]
    fn one_that_gives_up_waiting_lets_the_next_pass() {
        let locks = Arc::new(RangeLocks::default());
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let (_held, _) = locks.acquire(0..4096, false, &mailbox);
        let (waiting, _) = locks.acquire(0..4096, true, &mailbox);
        let (behind, held) = locks.acquire(0..4096, false, &mailbox);
        assert!(!held);
        drop(waiting);
        assert_eq!(granted(&mailbox), [behind.id]);
    }
}
