//! Locks on ranges of the image, for read-modify-write: media whose blocks are larger than the guest's.
//!
//! Between reading a block and writing it back nobody else may write to it, or that write is lost. Every write, zeroing
//! and discard takes its range: exclusively if it is a read-modify-write, together with others of its kind if not.
//! First come, first served, over all queues of the back-end.

//! A guest chooses how many there are, so each step costs the logarithm of that: every entry that waits knows one earlier
//! entry that excludes it, and is looked at again when that one is gone.

use std::collections::{BTreeMap, HashMap};
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
    /// Held and waiting, by the order of arrival.
    entries: HashMap<u64, Entry>,
    exclusive: Index,
    shared: Index,
}

/// Entries by length and then by (start, id): those of one length and start overlap the same ranges.
#[derive(Default)]
struct Index(BTreeMap<u64, BTreeMap<(u64, u64), ()>>);

struct Entry {
    range: Range<u64>,
    exclusive: bool,
    /// Later entries that wait for this one, among others.
    waiters: Vec<u64>,
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
        let id = state.last_id;
        state.index(exclusive).insert(&range, id);
        state.entries.insert(id, Entry { range, exclusive, waiters: Vec::new(), mailbox: Arc::clone(mailbox) });
        let granted = !state.waits(id);
        (Ticket { id, locks: Arc::clone(self) }, granted)
    }

    fn release(&self, id: u64) {
        let mut state = self.state.lock().expect("no panic while held");
        let Some(Entry { range, exclusive, waiters, .. }) = state.entries.remove(&id) else { return };
        state.index(exclusive).remove(&range, id);
        for waiter in waiters {
            // Not there: it gave up waiting.
            if state.entries.contains_key(&waiter) && !state.waits(waiter) {
                state.entries[&waiter].mailbox.post(Mail::Granted(waiter));
            }
        }
    }
}

impl State {
    fn index(&mut self, exclusive: bool) -> &mut Index {
        if exclusive { &mut self.exclusive } else { &mut self.shared }
    }

    /// Whether an entry must wait for an earlier one, held or itself waiting: nobody overtakes. Then it is one of its
    /// waiters.
    fn waits(&mut self, id: u64) -> bool {
        let entry = &self.entries[&id];
        let mut earlier = self.exclusive.before(&entry.range, id);
        if earlier.is_none() && entry.exclusive {
            earlier = self.shared.before(&entry.range, id);
        }
        if let Some(earlier) = earlier {
            self.entries.get_mut(&earlier).expect("it is indexed").waiters.push(id);
        }
        earlier.is_some()
    }
}

impl Index {
    fn insert(&mut self, range: &Range<u64>, id: u64) {
        self.0.entry(range.end - range.start).or_default().insert((range.start, id), ());
    }

    fn remove(&mut self, range: &Range<u64>, id: u64) {
        let len = range.end - range.start;
        if let Some(of_length) = self.0.get_mut(&len) {
            of_length.remove(&(range.start, id));
            if of_length.is_empty() {
                self.0.remove(&len);
            }
        }
    }

    /// An entry that came before `id` and overlaps `range`, if there is one.
    fn before(&self, range: &Range<u64>, id: u64) -> Option<u64> {
        self.0.iter().find_map(|(len, of_length)| {
            let mut until = range.end;
            // From one start to the next below, as far as the length reaches.
            while let Some((&(start, _), ())) = of_length.range(..(until, 0)).next_back() {
                if start + len <= range.start {
                    return None;
                }
                // The newest of them, so that those for one block wait in a row.
                if let Some((&(_, earlier), ())) = of_length.range((start, 0)..(start, id)).next_back() {
                    return Some(earlier);
                }
                until = start;
            }
            None
        })
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

    /// Beside the plain way: all entries in the order of arrival, each compared with all before it.
    #[test]
    fn ranges_are_granted_as_by_comparing_all() {
        struct Plain {
            ticket: Ticket,
            range: Range<u64>,
            exclusive: bool,
            granted: bool,
        }
        fn excluded(entries: &[Plain], at: usize) -> bool {
            let later = &entries[at];
            entries[..at].iter().any(|earlier| {
                earlier.range.start < later.range.end
                    && later.range.start < earlier.range.end
                    && (earlier.exclusive || later.exclusive)
            })
        }
        let mut random = 7u64;
        let mut below = |limit: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % limit
        };
        let locks = Arc::new(RangeLocks::default());
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let mut entries: Vec<Plain> = Vec::new();
        for step in 0..20_000 {
            if below(100) < if step / 1000 % 2 == 0 { 60 } else { 40 } || entries.is_empty() {
                let start = below(40);
                let range = start..start + 1 + below(4) * below(4);
                let exclusive = below(2) == 0;
                let (ticket, granted) = locks.acquire(range.clone(), exclusive, &mailbox);
                entries.push(Plain { ticket, range, exclusive, granted });
                assert_eq!(granted, !excluded(&entries, entries.len() - 1), "step {step}");
            } else {
                // Held or waiting.
                drop(entries.remove(below(entries.len() as u64) as usize));
                let mut told = granted(&mailbox);
                told.sort();
                let mut wanted = Vec::new();
                for at in 0..entries.len() {
                    if !entries[at].granted && !excluded(&entries, at) {
                        entries[at].granted = true;
                        wanted.push(entries[at].ticket.id);
                    }
                }
                assert_eq!(told, wanted, "step {step}");
            }
        }
        drop(entries);
        assert!(locks.state.lock().unwrap().entries.is_empty());
        assert!(locks.state.lock().unwrap().exclusive.0.is_empty() && locks.state.lock().unwrap().shared.0.is_empty());
    }

    /// As many as a guest can have in flight, on one block and on as many: by comparing all it takes minutes.
    #[test]
    fn many_ranges_at_once_are_no_burden() {
        const MANY: u64 = 30_000;
        for blocks in [1, MANY] {
            let locks = Arc::new(RangeLocks::default());
            let mailbox = Arc::new(Mailbox::new().unwrap());
            let start = std::time::Instant::now();
            let tickets: Vec<_> = (0..MANY)
                .map(|number| locks.acquire(number % blocks * 4096..(number % blocks + 1) * 4096, true, &mailbox).0)
                .collect();
            drop(tickets);
            assert!(start.elapsed() < std::time::Duration::from_secs(20), "{blocks} blocks: {:?}", start.elapsed());
        }
    }
}
