//! The model of the locks: in every order of the threads no write is lost, and every claim is granted.

use std::ops::Range;
use std::sync::Arc;

use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use shuttle::thread;

use super::super::mail::{Mail, Mailbox};
use super::{LockTicket, QueueLocks, RangeLocks};
use crate::base::sync::interleavings::{Mutant, holds};

const BLOCK: u64 = 4096;
const SECTOR: u64 = BLOCK / 2;

/// Three blocks, of two of the guest's sectors each. They lie in one region.
#[derive(Default)]
struct Medium {
    sectors: [AtomicU64; 6],
    /// A write of a block was lost. A thread that panics could not give its tickets back.
    has_lost: AtomicBool,
}

/// A thread's queue.
struct Queue {
    locks: Arc<QueueLocks>,
    mailbox: Arc<Mailbox>,
    medium: Arc<Medium>,
}

impl Queue {
    fn new(locks: &Arc<RangeLocks>, medium: &Arc<Medium>) -> Self {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        Queue { locks: QueueLocks::new(Arc::clone(locks), Arc::clone(&mailbox)), mailbox, medium: Arc::clone(medium) }
    }

    fn wait(&self, (ticket, granted): (LockTicket, bool)) -> LockTicket {
        let mut granted = granted;
        while !granted {
            let mail = self.mailbox.take();
            granted = mail.iter().any(|mail| matches!(mail, Mail::Granted(id) if ticket.claim() == Some(*id)));
            thread::yield_now();
        }
        ticket
    }

    /// Writes sectors as the storage does it: the sectors of whole blocks are overwritten, a block of which only one sector
    /// is written is read first.
    fn write(&self, sectors: Range<u64>, value: u64) {
        let ticket = self.wait(self.locks.lock_written(sectors.start * SECTOR..sectors.end * SECTOR));
        for block in sectors.start / 2..sectors.end.div_ceil(2) {
            let of_block = [block * 2, block * 2 + 1];
            if of_block.iter().all(|sector| sectors.contains(sector)) {
                of_block.iter().for_each(|&sector| self.medium.sectors[sector as usize].store(value, SeqCst));
            } else {
                self.read_modify_write(of_block, &sectors, value);
            }
        }
        drop(ticket);
    }

    fn read_modify_write(&self, of_block: [u64; 2], sectors: &Range<u64>, value: u64) {
        let before = of_block.map(|sector| self.medium.sectors[sector as usize].load(SeqCst));
        for (sector, before) in of_block.into_iter().zip(before) {
            let after = if sectors.contains(&sector) { value } else { before };
            if self.medium.sectors[sector as usize].swap(after, SeqCst) != before {
                self.medium.has_lost.store(true, SeqCst);
            }
        }
    }
}

/// Runs the threads, each with a queue of its own.
fn run(threads: &[fn(&Queue)]) {
    let locks = RangeLocks::new(BLOCK as u32);
    let medium = Arc::new(Medium::default());
    let start = |work: &fn(&Queue)| {
        let (queue, work) = (Queue::new(&locks, &medium), *work);
        thread::spawn(move || work(&queue))
    };
    let started: Vec<_> = threads.iter().map(start).collect();
    started.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(!medium.has_lost.load(SeqCst), "a write of a block was lost");
    assert!(locks.is_idle());
}

#[test]
fn a_read_modify_write_loses_no_aligned_write() {
    let model = || {
        run(&[
            |queue| {
                queue.write(0..2, 1);
                queue.write(0..2, 2);
            },
            |queue| queue.write(0..2, 3),
            |queue| queue.write(0..1, 4),
            |queue| queue.write(1..2, 5),
        ]);
    };
    holds(model, &[Mutant::EntersUnchecked, Mutant::LeavesSilently]);
}

#[test]
fn a_read_modify_write_loses_no_middle_of_a_long_write() {
    let model = || {
        run(&[
            |queue| queue.write(1..5, 1),
            |queue| queue.write(2..3, 2),
            |queue| queue.write(0..4, 3),
            |queue| {
                queue.write(3..6, 4);
                queue.write(3..4, 5);
            },
        ]);
    };
    holds(model, &[Mutant::EntersUnseen, Mutant::LeavesSilently]);
}
