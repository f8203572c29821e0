//! What a server that dies leaves to the next one: which requests it had taken and not answered (vhost-user's
//! VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, the split-ring layout of QEMU's docs/interop/vhost-user.rst).
//!
//! The front-end keeps the memory. Each ring has a header and an entry a descriptor. A head is marked when it is taken
//! from the ring, and the mark goes when it is answered. A server can be killed between the steps of an answer, so the
//! last head answered and the used index that counts it are kept too: where the guest's used ring has moved on and the
//! copy has not, that head is answered. A process that is killed has made its stores in program order, so Release is all
//! that is needed; the next one maps the memory after a few system calls.
//!
//! Whoever wrote it may have been anybody: every index is checked, and nothing outside the ring's part is touched.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Error, Result};
use vm_memory::AtomicInteger;

use super::shared::Shared;
use super::vanished::Wire;

/// Header of a ring: features (u64), version, entries, last head answered, copy of the used index (u16 each).
const HEADER: usize = 16;
const FEATURES: usize = 0;
const VERSION: usize = 8;
const ENTRIES: usize = 10;
const LAST: usize = 12;
const USED: usize = 14;
/// Entry of a descriptor: in flight (u8), then 5 bytes, the head answered before (u16), when it was taken (u64).
const ENTRY: usize = 16;
const NEXT: usize = 6;
const COUNTER: usize = 8;
/// Rings begin at multiples of this; how is the back-end's affair.
const ALIGN: usize = 64;
/// The only version there is.
const VERSION_1: u16 = 1;

/// The in-flight region of one device, mapped. Owned by the handler.
pub(super) struct Inflight {
    region: Arc<Shared>,
    rings: u16,
    entries: u16,
}

fn stride(entries: u16) -> usize {
    (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGN)
}

impl Inflight {
    /// GET_INFLIGHT_FD: fresh memory for so many rings of so many descriptors, sealed so that nobody can cut it.
    pub(super) fn create(rings: u16, entries: u16) -> io::Result<(VhostUserInflight, File)> {
        let len = (stride(entries) * usize::from(rings)) as u64;
        let file: File = memfd_create("in-flight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into();
        file.set_len(len)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((VhostUserInflight::new(len, 0, rings, entries), file))
    }

    /// SET_INFLIGHT_FD on the connection of `wire`: what an earlier server left, or fresh memory.
    pub(super) fn map(told: &VhostUserInflight, file: File, wire: &Arc<Wire>) -> Result<Self> {
        let (rings, entries) = (told.num_queues, told.queue_size);
        let needed = (stride(entries) * usize::from(rings)) as u64;
        if told.mmap_size < needed {
            let has = told.mmap_size;
            log::error!("the front-end's in-flight region has {has} bytes; {rings} rings of {entries} need {needed}");
            return Err(Error::InvalidParam);
        }
        let region = Arc::new(Shared::map("in-flight region", file, told.mmap_offset, told.mmap_size, wire)?);
        Ok(Inflight { region, rings, entries })
    }

    /// How many rings it is for, and of how many descriptors.
    pub(super) fn shape(&self) -> (u16, u16) {
        (self.rings, self.entries)
    }

    /// The memory.
    pub(super) fn shared(&self) -> &Shared {
        &self.region
    }

    /// The part of one ring, if there is one.
    pub(super) fn ring(&self, index: u32) -> Option<Tracker> {
        (index < u32::from(self.rings)).then(|| Tracker {
            region: self.region.clone(),
            at: stride(self.entries) * index as usize,
            entries: self.entries,
            counter: 0,
        })
    }
}

/// The part of one running ring. Owned by its worker.
pub(super) struct Tracker {
    region: Arc<Shared>,
    at: usize,
    entries: u16,
    /// Of the next head taken.
    counter: u64,
}

impl Tracker {
    fn cell<A: AtomicInteger>(&self, offset: usize) -> &A {
        self.region.cell(self.at + offset).expect("the region was checked to hold every ring's part")
    }

    /// A field of a head's entry. The worker takes no head that is not below the ring's size, nor does `recover`.
    fn entry<A: AtomicInteger>(&self, head: u16, field: usize) -> &A {
        assert!(head < self.entries, "heads were checked before");
        self.cell(HEADER + ENTRY * usize::from(head) + field)
    }

    fn half(&self, field: usize) -> &AtomicU16 {
        self.cell(field)
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        self.entry(head, 0)
    }

    /// The heads that were taken and not answered, in the order in which they were taken; fresh memory has none. `used`:
    /// the used index in the guest's memory; `outstanding`: requests that the driver waits for, by its two indices; `size`:
    /// descriptors of the ring. Errors: what is wrong with the memory.
    ///
    /// A front-end gives a driver that was reset fresh memory. One that does not would have the next driver's memory
    /// written by what the earlier one asked for: a driver is owed no more than it waits for.
    pub(super) fn recover(
        &mut self,
        used: u16,
        outstanding: u16,
        size: u16,
    ) -> std::result::Result<Vec<u16>, &'static str> {
        if size > self.entries {
            return Err("the in-flight region is for smaller rings");
        }
        if self.half(VERSION).load(Ordering::Acquire) == 0 {
            self.begin(used);
            return Ok(Vec::new());
        }
        if self.half(VERSION).load(Ordering::Relaxed) != VERSION_1
            || self.half(ENTRIES).load(Ordering::Relaxed) != self.entries
            || self.cell::<AtomicU64>(FEATURES).load(Ordering::Relaxed) != 0
        {
            return Err("the in-flight region is of an unknown kind");
        }
        if outstanding == 0 || (0..self.entries).all(|head| self.mark(head).load(Ordering::Relaxed) == 0) {
            self.begin(used);
            return Ok(Vec::new());
        }
        self.finish_last_answers(used, size)?;
        let in_flight = |head: &u16| self.mark(*head).load(Ordering::Relaxed) == 1;
        let mut heads: Vec<(u64, u16)> = (0..size)
            .filter(in_flight)
            .map(|head| (self.entry::<AtomicU64>(head, COUNTER).load(Ordering::Relaxed), head))
            .collect();
        if heads.len() > usize::from(outstanding) {
            return Err("the in-flight region has more requests than the driver waits for");
        }
        heads.sort_unstable();
        // Counted anew from 0, so that they never run out. Each gets no more than it had (they differ, and are sorted),
        // so the order stands wherever this is cut off.
        for (counter, &(_, head)) in heads.iter().enumerate() {
            self.entry::<AtomicU64>(head, COUNTER).store(counter as u64, Ordering::Release);
        }
        self.counter = heads.len() as u64;
        Ok(heads.into_iter().map(|(_, head)| head).collect())
    }

    /// Fresh memory.
    fn begin(&mut self, used: u16) {
        for head in 0..self.entries {
            self.mark(head).store(0, Ordering::Relaxed);
        }
        self.half(ENTRIES).store(self.entries, Ordering::Relaxed);
        self.half(LAST).store(0, Ordering::Relaxed);
        self.half(USED).store(used, Ordering::Relaxed);
        self.half(VERSION).store(VERSION_1, Ordering::Release);
    }

    /// Takes the marks from heads that are in the guest's used ring, and that the earlier server had no time to unmark.
    fn finish_last_answers(&self, used: u16, size: u16) -> std::result::Result<(), &'static str> {
        let answered = used.wrapping_sub(self.half(USED).load(Ordering::Relaxed));
        if answered > size {
            return Err("the in-flight region is not of this ring's last run");
        }
        let mut head = self.half(LAST).load(Ordering::Relaxed);
        for _ in 0..answered {
            if head >= size {
                return Err("the in-flight region names a head outside the ring");
            }
            self.mark(head).store(0, Ordering::Release);
            head = self.entry::<AtomicU16>(head, NEXT).load(Ordering::Relaxed);
        }
        self.half(USED).store(used, Ordering::Release);
        Ok(())
    }

    /// A head was taken from the ring, and nothing was done for it yet.
    #[inline]
    pub(super) fn taken(&mut self, head: u16) {
        self.entry::<AtomicU64>(head, COUNTER).store(self.counter, Ordering::Relaxed);
        self.counter += 1;
        self.mark(head).store(1, Ordering::Release);
    }

    /// A head is about to be put into the used ring, whether it was marked or not.
    #[inline]
    pub(super) fn answering(&mut self, head: u16) {
        let last = self.half(LAST).load(Ordering::Relaxed);
        self.entry::<AtomicU16>(head, NEXT).store(last, Ordering::Relaxed);
        self.half(LAST).store(head, Ordering::Release);
    }

    /// It is there, and the used index is this now.
    #[inline]
    pub(super) fn answered(&mut self, head: u16, used: u16) {
        self.mark(head).store(0, Ordering::Release);
        self.half(USED).store(used, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;

    fn fresh() -> (VhostUserInflight, File) {
        Inflight::create(3, SIZE).unwrap()
    }

    fn map(told: &VhostUserInflight, file: &File) -> Result<Inflight> {
        Inflight::map(told, file.try_clone().unwrap(), &Wire::pair().0)
    }

    fn ring((told, file): &(VhostUserInflight, File)) -> Tracker {
        map(told, file).unwrap().ring(1).unwrap()
    }

    #[test]
    fn what_was_taken_and_not_answered_is_found_in_order() {
        let memory = fresh();
        let mut first = ring(&memory);
        assert_eq!(first.recover(65_534, SIZE, SIZE), Ok(vec![]));
        for head in [5, 2, 7, 0] {
            first.taken(head);
        }
        first.answering(2);
        first.answered(2, 65_535);
        assert_eq!(ring(&memory).recover(65_535, SIZE, SIZE), Ok(vec![5, 7, 0]));
        // The next server takes one more and dies too.
        let mut second = ring(&memory);
        assert_eq!(second.recover(65_535, SIZE, SIZE), Ok(vec![5, 7, 0]));
        second.taken(2);
        assert_eq!(ring(&memory).recover(65_535, SIZE, SIZE), Ok(vec![5, 7, 0, 2]));
    }

    #[test]
    fn a_server_may_die_between_any_two_steps_of_an_answer() {
        for steps in 0..=2 {
            let memory = fresh();
            let mut dying = ring(&memory);
            assert_eq!(dying.recover(65_535, SIZE, SIZE), Ok(vec![]));
            dying.taken(3);
            dying.taken(4);
            dying.answering(4);
            // add_used comes here: from step 1 on, the guest's used index counts the head.
            if steps == 2 {
                dying.answered(4, 0);
            }
            let (used, left) = if steps == 0 { (65_535, vec![3, 4]) } else { (0, vec![3]) };
            assert_eq!(ring(&memory).recover(used, SIZE, SIZE), Ok(left), "{steps} steps");
        }
    }

    /// A head is answered twice in its life, and the second life is in flight when the server dies answering another.
    #[test]
    fn a_head_that_was_never_marked_is_told_from_the_last_one() {
        let memory = fresh();
        let mut dying = ring(&memory);
        assert_eq!(dying.recover(0, SIZE, SIZE), Ok(vec![]));
        dying.taken(1);
        dying.answering(1);
        dying.answered(1, 1);
        dying.taken(1);
        dying.answering(6);
        assert_eq!(ring(&memory).recover(2, SIZE, SIZE), Ok(vec![1]));
    }

    /// The driver was reset and the memory was not: nothing of what the earlier driver asked for.
    #[test]
    fn a_driver_is_owed_no_more_than_it_waits_for() {
        let used_by_the_first = 5;
        let memory = fresh();
        let mut first = ring(&memory);
        assert_eq!(first.recover(used_by_the_first, 0, SIZE), Ok(vec![]));
        first.taken(2);
        first.taken(3);
        assert!(ring(&memory).recover(used_by_the_first, 1, SIZE).is_err(), "one of them is not its own");
        assert!(ring(&memory).recover(0, 2, SIZE).is_err(), "its used ring was begun anew");
        assert_eq!(ring(&memory).recover(used_by_the_first, 2, SIZE), Ok(vec![2, 3]));
        assert_eq!(ring(&memory).recover(0, 0, SIZE), Ok(vec![]));
        // And they are forgotten.
        assert_eq!(ring(&memory).recover(0, 2, SIZE), Ok(vec![]));
    }

    /// Where nothing is marked, nothing is owed, whatever became of the ring.
    #[test]
    fn memory_without_marks_fits_every_ring() {
        let memory = fresh();
        let mut first = ring(&memory);
        assert_eq!(first.recover(0, 0, SIZE), Ok(vec![]));
        first.taken(2);
        first.answering(2);
        first.answered(2, 1);
        assert_eq!(ring(&memory).recover(700, 3, SIZE), Ok(vec![]));
    }

    #[test]
    fn each_ring_has_its_own_part() {
        let memory = fresh();
        let region = map(&memory.0, &memory.1).unwrap();
        let mut rings: Vec<Tracker> = (0..3).map(|index| region.ring(index).unwrap()).collect();
        for (head, ring) in rings.iter_mut().enumerate() {
            assert_eq!(ring.recover(0, SIZE, SIZE), Ok(vec![]));
            ring.taken(head as u16);
        }
        for (head, ring) in rings.iter_mut().enumerate() {
            assert_eq!(ring.recover(0, SIZE, SIZE), Ok(vec![head as u16]));
        }
        assert!(region.ring(3).is_none());
    }

    #[test]
    fn memory_that_is_too_small_is_refused() {
        let (told, file) = fresh();
        let refused = |told: VhostUserInflight, file: &File| assert!(map(&told, file).is_err());
        refused(VhostUserInflight { num_queues: 4, ..told }, &file);
        refused(VhostUserInflight { queue_size: 512, ..told }, &file);
        refused(VhostUserInflight { mmap_size: told.mmap_size + 1, ..told }, &file);
        refused(VhostUserInflight { mmap_offset: 4096, ..told }, &file);
        refused(VhostUserInflight { mmap_offset: u64::MAX, ..told }, &file);
        // Half a huge page. That there are none on this machine is no matter: nothing is touched.
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let huge: File = memfd_create("huge", flags).unwrap().into();
        huge.set_len(4 << 20).unwrap();
        refused(VhostUserInflight { mmap_size: 1 << 20, ..told }, &huge);
        assert!(map(&VhostUserInflight { mmap_size: 2 << 20, ..told }, &huge).is_ok());
    }

    /// Whatever is in the memory: no panic, and only heads of the ring, each once.
    #[test]
    fn garbage_is_survived() {
        use std::os::unix::fs::FileExt;
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut chance = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let (mut good, mut bad) = (0, 0);
        for _ in 0..20_000 {
            let memory = fresh();
            let mut bytes: Vec<u8> = (0..stride(SIZE) * 3).map(|_| chance() as u8).collect();
            if chance() % 8 > 0 {
                // Nearly right.
                let at = stride(SIZE);
                bytes[at..at + 12].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, SIZE as u8, 0]);
                bytes[at + LAST + 1] = 0;
                bytes[at + LAST] %= 10;
                bytes[at + USED + 1] = 0;
                bytes[at + USED] %= 10;
                for head in 0..usize::from(SIZE) {
                    let entry = at + HEADER + ENTRY * head;
                    bytes[entry] %= 3;
                    bytes[entry + NEXT] %= 9;
                    bytes[entry + NEXT + 1] = 0;
                }
            }
            memory.1.write_all_at(&bytes, 0).unwrap();
            let mut ring = ring(&memory);
            match ring.recover((chance() % 12) as u16, SIZE, if chance() % 2 == 0 { SIZE } else { SIZE / 2 }) {
                Ok(mut heads) => {
                    good += 1;
                    let found = heads.len();
                    heads.sort_unstable();
                    heads.dedup();
                    assert!(heads.len() == found && heads.iter().all(|&head| head < SIZE));
                    (0..SIZE).for_each(|head| ring.taken(head));
                    (0..SIZE).for_each(|head| ring.answering(head));
                    (0..SIZE).for_each(|head| ring.answered(head, head));
                }
                Err(why) => bad += usize::from(!why.is_empty()),
            }
            let mut after = vec![0; bytes.len()];
            memory.1.read_exact_at(&mut after, 0).unwrap();
            assert!(after[..stride(SIZE)] == bytes[..stride(SIZE)], "another ring's part was touched");
            assert!(after[2 * stride(SIZE)..] == bytes[2 * stride(SIZE)..], "another ring's part was touched");
        }
        assert!(good > 1000 && bad > 1000, "{good} good, {bad} bad: the garbage is too good or too bad");
    }
}
