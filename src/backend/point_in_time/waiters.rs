//! The ops that wait until a copy has saved the clusters that they change.
//!
//! A guest chooses how many there are and how long. Each op is listed under the last cluster that it waits for, and is
//! checked only when that cluster is saved. The copier saves a range in ascending order, so an op is checked once as a rule.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use super::bitmap::Bitmap;
use crate::backend::mailbox::Mailbox;

/// The name of a waiting op. No op of this or another copy has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct DelayTicket {
    copy: u64,
    serial: u64,
}

struct Waiter {
    /// The first cluster that the op changes.
    first: u64,
    mailbox: Arc<Mailbox<DelayTicket>>,
}

/// The waiting ops of one copy, of all queues.
pub(super) struct Waiters {
    copy: u64,
    last_serial: u64,
    /// By the last cluster that is not saved.
    waiters: BTreeMap<(u64, DelayTicket), Waiter>,
    /// That cluster of each waiter.
    clusters: HashMap<DelayTicket, u64>,
    /// How often a waiter was checked.
    #[cfg(test)]
    steps: u64,
}

impl Waiters {
    /// Creates an empty list for the copy of this number.
    pub(super) fn new(copy: u64) -> Self {
        Waiters {
            copy,
            last_serial: 0,
            waiters: BTreeMap::new(),
            clusters: HashMap::new(),
            #[cfg(test)]
            steps: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    /// Adds an op that changes these clusters, if one of them is not saved. Its ticket is posted to `mailbox` when all are.
    pub(super) fn add(
        &mut self,
        clusters: Range<u64>,
        saved: &Bitmap,
        mailbox: &Arc<Mailbox<DelayTicket>>,
    ) -> Option<DelayTicket> {
        let last = saved.last_clear(clusters.clone())?;
        self.last_serial += 1;
        let ticket = DelayTicket { copy: self.copy, serial: self.last_serial };
        self.put(last, ticket, Waiter { first: clusters.start, mailbox: Arc::clone(mailbox) });
        Some(ticket)
    }

    fn put(&mut self, last: u64, ticket: DelayTicket, waiter: Waiter) {
        self.waiters.insert((last, ticket), waiter);
        self.clusters.insert(ticket, last);
    }

    /// Removes the op of this ticket, if it still waits.
    pub(super) fn remove(&mut self, ticket: DelayTicket) {
        if let Some(last) = self.clusters.remove(&ticket) {
            self.waiters.remove(&(last, ticket));
        }
    }

    /// Posts the tickets of the ops that wait for nothing else, now that these clusters are saved.
    pub(super) fn release_saved(&mut self, clusters: Range<u64>, saved: &Bitmap) {
        let from = DelayTicket { copy: 0, serial: 0 };
        while let Some((&(last, ticket), _)) =
            self.waiters.range((clusters.start, from)..(clusters.end, from)).next_back()
        {
            let waiter = self.waiters.remove(&(last, ticket)).expect("found just now");
            #[cfg(test)]
            {
                self.steps += 1;
            }
            match saved.last_clear(waiter.first..last) {
                Some(before) => self.put(before, ticket, waiter),
                None => {
                    self.clusters.remove(&ticket);
                    waiter.mailbox.post(ticket);
                }
            }
        }
    }

    /// Posts all tickets, because the copy is over.
    pub(super) fn release_all(&mut self) {
        self.clusters.clear();
        for ((_, ticket), waiter) in std::mem::take(&mut self.waiters) {
            waiter.mailbox.post(ticket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_posted_when_the_last_of_its_clusters_is_saved() {
        let saved = Bitmap::new(100).unwrap();
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let mut waiters = Waiters::new(1);
        let save = |waiters: &mut Waiters, clusters: Range<u64>| {
            saved.set(clusters.clone());
            waiters.release_saved(clusters, &saved);
            mailbox.take()
        };
        let long = waiters.add(10..20, &saved, &mailbox).unwrap();
        let short = waiters.add(12..13, &saved, &mailbox).unwrap();
        let given_up = waiters.add(12..13, &saved, &mailbox).unwrap();
        waiters.remove(given_up);
        assert_eq!(save(&mut waiters, 15..30), []);
        assert_eq!(save(&mut waiters, 12..13), [short]);
        assert_eq!(save(&mut waiters, 11..15), []);
        assert_eq!(save(&mut waiters, 0..11), [long]);
        assert!(waiters.is_empty() && waiters.clusters.is_empty());
        assert_eq!(waiters.add(0..20, &saved, &mailbox), None, "all of it is saved");
        let rest = waiters.add(25..40, &saved, &mailbox).unwrap();
        waiters.release_all();
        assert_eq!(mailbox.take(), [rest]);
        assert!(waiters.is_empty());
    }

    /// Checking every waiter for every cluster would take the square of their number.
    #[test]
    fn a_cluster_saved_costs_only_the_waiters_for_it() {
        const MANY: u64 = 20_000;
        let saved = Bitmap::new(2 * MANY).unwrap();
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let mut waiters = Waiters::new(1);
        for number in 0..MANY {
            waiters.add(number..number + 1, &saved, &mailbox).unwrap();
            waiters.add(number..number + MANY, &saved, &mailbox).unwrap();
        }
        for cluster in 0..2 * MANY {
            saved.set(cluster..cluster + 1);
            waiters.release_saved(cluster..cluster + 1, &saved);
        }
        assert_eq!(mailbox.take().len() as u64, 2 * MANY);
        assert_eq!(waiters.steps, 2 * MANY);
    }
}
