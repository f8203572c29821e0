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
//!
//! The number of entries that a front-end asks for says little about its rings. QEMU asks for its `queue-size`, and the
//! 10.0.13 of Debian 13 gives every virtio device rings of 1024 whatever that says (virtio_add_queue; 11.1 ends this).
//! The front-end sends back the number that it asked for, not the one in our reply (vhost_user_get_inflight_fd). So the
//! entries asked for lie where every server looks for them, and behind all of them lie the rest, up to the largest ring
//! that we allow: another server does not see those, and we recognise them by the mark before them.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Error, Result};
use vm_memory::AtomicInteger;

use super::region::SharedRegion;
use super::sigbus::SessionSocket;
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};

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
/// What [`Inflight::create`] puts behind the entries asked for: the mark (u64), how many more each ring has (u16), the
/// rest up to [`ALIGN`] unused. Then those of each ring.
const MARK: u64 = u64::from_ne_bytes(*b"vblkmore");
const MORE: usize = 8;

/// The most descriptors that a ring can have (virtio 1.3, 2.7).
pub(in crate::virtio) const MAX_ENTRIES: u16 = 32768;

fn stride(entries: u16) -> usize {
    (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGN)
}

/// Where the parts of a region lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    rings: u16,
    /// Entries of each ring where every server looks for them.
    entries: u16,
    /// Entries of each ring behind all of those.
    more: u16,
}

impl Layout {
    /// Where the mark is, if there are more entries.
    fn mark_at(&self) -> usize {
        stride(self.entries) * usize::from(self.rings)
    }

    fn more_at(&self, ring: usize) -> usize {
        self.mark_at() + ALIGN + ENTRY * usize::from(self.more) * ring
    }

    fn len(&self) -> usize {
        if self.more == 0 { self.mark_at() } else { self.more_at(usize::from(self.rings)) }
    }

    /// Finds out what `region`, of which the front-end says this, is.
    fn of(region: &SharedRegion, bytes: usize, rings: u16, entries: u16) -> Self {
        let plain = Layout { rings, entries, more: 0 };
        let half = |at: usize| region.cell::<AtomicU16>(at).map_or(0, |cell| cell.load(Ordering::Relaxed));
        let mark = region.cell::<AtomicU64>(plain.mark_at()).map_or(0, |cell| cell.load(Ordering::Relaxed));
        let extended = Layout { more: half(plain.mark_at() + MORE), ..plain };
        let total = usize::from(entries) + usize::from(extended.more);
        if mark == MARK && extended.len() <= bytes && total <= usize::from(MAX_ENTRIES) {
            return extended;
        }
        // Another server may have made it for larger rings than it was asked for: its headers say so (desc_num).
        let larger = Layout { entries: half(ENTRIES), ..plain };
        let agrees = |ring| [0, larger.entries].contains(&half(stride(larger.entries) * ring + ENTRIES));
        if (entries..=MAX_ENTRIES).contains(&larger.entries)
            && larger.len() <= bytes
            && (1..usize::from(rings)).all(agrees)
        {
            return larger;
        }
        plain
    }
}

/// The in-flight region of one device, mapped. Owned by the handler.
pub(in crate::virtio) struct Inflight {
    region: Arc<SharedRegion>,
    /// What the front-end said of it: rings, and entries of each.
    told: (u16, u16),
    layout: Layout,
    /// A ring that does not fit was logged.
    warned: AtomicBool,
}

impl Inflight {
    /// GET_INFLIGHT_FD: fresh memory for so many rings of so many descriptors, and of up to `largest`, sealed so that no
    /// other process can cut it.
    pub(in crate::virtio) fn create(rings: u16, entries: u16, largest: u16) -> io::Result<(VhostUserInflight, File)> {
        let layout = Layout { rings, entries, more: largest.saturating_sub(entries) };
        let file: File = memfd_create("in-flight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into();
        file.set_len(layout.len() as u64)?;
        if layout.more > 0 {
            file.write_all_at(&MARK.to_ne_bytes(), layout.mark_at() as u64)?;
            file.write_all_at(&layout.more.to_ne_bytes(), (layout.mark_at() + MORE) as u64)?;
        }
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((VhostUserInflight::new(layout.len() as u64, 0, rings, entries), file))
    }

    /// SET_INFLIGHT_FD on the connection of `wire`: what an earlier server left, or fresh memory.
    pub(in crate::virtio) fn map(told: &VhostUserInflight, file: File, wire: &Arc<SessionSocket>) -> Result<Self> {
        let (rings, entries) = (told.num_queues, told.queue_size);
        let needed = (stride(entries) * usize::from(rings)) as u64;
        if told.mmap_size < needed {
            let has = told.mmap_size;
            log_limited!(
                FRONT_END_LOG,
                Error,
                "the front-end's in-flight region has {has} bytes; {rings} rings of {entries} need {needed}"
            );
            return Err(Error::InvalidParam);
        }
        let region = Arc::new(SharedRegion::map("in-flight region", file, told.mmap_offset, told.mmap_size, wire)?);
        let bytes = usize::try_from(told.mmap_size).map_err(|_| Error::InvalidParam)?;
        let layout = Layout::of(&region, bytes, rings, entries);
        Ok(Inflight { region, told: (rings, entries), layout, warned: AtomicBool::new(false) })
    }

    /// What the front-end said of it: for how many rings it is, and of how many descriptors.
    pub(in crate::virtio) fn shape(&self) -> (u16, u16) {
        self.told
    }

    /// The memory.
    pub(in crate::virtio) fn shared(&self) -> &SharedRegion {
        &self.region
    }

    /// The part of a ring of `size` descriptors; `used`: its used index. `None`: there is none, or too small a one, which
    /// is logged once. Then the ring is served all the same, and not tracked: with some of its heads tracked the next
    /// server would take the others for answered, and the guest would wait for them for ever. Those tracked earlier are
    /// forgotten.
    pub(in crate::virtio) fn ring(&self, index: u32, size: u16, used: u16) -> Option<Tracker> {
        let Layout { rings, entries, more } = self.layout;
        let mut tracker = (index < u32::from(rings)).then(|| Tracker {
            region: self.region.clone(),
            at: stride(entries) * index as usize,
            entries,
            more_at: self.layout.more_at(index as usize),
            all: entries + more,
            counter: 0,
        });
        if let Some(found) = tracker.take_if(|tracker| tracker.all < size) {
            found.begin(used);
        }
        if tracker.is_none() && !self.warned.swap(true, Ordering::Relaxed) {
            log_limited!(
                FRONT_END_LOG,
                Warn,
                "ring {index} has {size} descriptors, and the front-end's in-flight region is for {rings} rings of {}: its \
                 requests in flight are not tracked, so a guest may hang if virtioblkd is killed. Another server made the \
                 region; reset the guest, and virtioblkd makes a large enough one",
                entries + more
            );
        }
        tracker
    }
}

/// What is wrong with an in-flight region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::virtio) enum InflightFault {
    /// Its version, its number of entries or its features are not what this server writes.
    UnknownLayout,
    /// It marks more requests than the driver waits for.
    TooManyRequests,
    /// Its copy of the used index is too far behind the virtqueue's.
    OtherRun,
    /// It names a head outside the virtqueue.
    HeadOutside,
}

impl fmt::Display for InflightFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InflightFault::UnknownLayout => "the in-flight region is of an unknown kind",
            InflightFault::TooManyRequests => "the in-flight region has more requests than the driver waits for",
            InflightFault::OtherRun => "the in-flight region is not of this ring's last run",
            InflightFault::HeadOutside => "the in-flight region names a head outside the ring",
        })
    }
}

/// The part of one running ring. Owned by its worker.
pub(in crate::virtio) struct Tracker {
    region: Arc<SharedRegion>,
    at: usize,
    /// Entries in the ring's own part.
    entries: u16,
    /// Where the entries of the heads from `entries` on are,
    more_at: usize,
    /// and how many there are with them.
    all: u16,
    /// Of the next head taken.
    counter: u64,
}

impl Tracker {
    fn cell<A: AtomicInteger>(&self, offset: usize) -> &A {
        self.region.cell(self.at + offset).expect("the region was checked to hold every ring's part")
    }

    /// A field of a head's entry. The worker takes no head that is not below the ring's size, nor does `recover`.
    fn entry<A: AtomicInteger>(&self, head: u16, field: usize) -> &A {
        assert!(head < self.all, "heads were checked before");
        let at = if head < self.entries {
            self.at + HEADER + ENTRY * usize::from(head)
        } else {
            self.more_at + ENTRY * usize::from(head - self.entries)
        };
        self.region.cell(at + field).expect("the region was checked to hold every ring's part")
    }

    fn half(&self, field: usize) -> &AtomicU16 {
        self.cell(field)
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        self.entry(head, 0)
    }

    /// The heads that were taken and not answered, in the order in which they were taken; fresh memory has none. `used`:
    /// the used index in the guest's memory; `outstanding`: requests that the driver waits for, by its two indices; `size`:
    /// descriptors of the ring, which fits ([`Inflight::ring`]). Errors: what is wrong with the memory.
    ///
    /// A front-end gives a driver that was reset fresh memory. One that does not would have the next driver's memory
    /// written by what the earlier one asked for: a driver is owed no more than it waits for.
    pub(in crate::virtio) fn recover(
        &mut self,
        used: u16,
        outstanding: u16,
        size: u16,
    ) -> std::result::Result<Vec<u16>, InflightFault> {
        // Where the driver waits for nothing, it does not matter what is in it, or of which kind it is.
        if self.half(VERSION).load(Ordering::Acquire) == 0 || outstanding == 0 {
            self.begin(used);
            return Ok(Vec::new());
        }
        if self.half(VERSION).load(Ordering::Relaxed) != VERSION_1
            || self.half(ENTRIES).load(Ordering::Relaxed) != self.entries
            || self.cell::<AtomicU64>(FEATURES).load(Ordering::Relaxed) != 0
        {
            return Err(InflightFault::UnknownLayout);
        }
        if (0..self.all).all(|head| self.mark(head).load(Ordering::Relaxed) == 0) {
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
            return Err(InflightFault::TooManyRequests);
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
    fn begin(&self, used: u16) {
        self.cell::<AtomicU64>(FEATURES).store(0, Ordering::Relaxed);
        for head in 0..self.all {
            self.mark(head).store(0, Ordering::Relaxed);
        }
        self.half(ENTRIES).store(self.entries, Ordering::Relaxed);
        self.half(LAST).store(0, Ordering::Relaxed);
        self.half(USED).store(used, Ordering::Relaxed);
        self.half(VERSION).store(VERSION_1, Ordering::Release);
    }

    /// Takes the marks from heads that are in the guest's used ring, and that the earlier server had no time to unmark.
    fn finish_last_answers(&self, used: u16, size: u16) -> std::result::Result<(), InflightFault> {
        let answered = used.wrapping_sub(self.half(USED).load(Ordering::Relaxed));
        if answered > size {
            return Err(InflightFault::OtherRun);
        }
        let mut head = self.half(LAST).load(Ordering::Relaxed);
        for _ in 0..answered {
            if head >= size {
                return Err(InflightFault::HeadOutside);
            }
            self.mark(head).store(0, Ordering::Release);
            head = self.entry::<AtomicU16>(head, NEXT).load(Ordering::Relaxed);
        }
        self.half(USED).store(used, Ordering::Release);
        Ok(())
    }

    /// A head was taken from the ring, and nothing was done for it yet.
    #[inline]
    pub(in crate::virtio) fn taken(&mut self, head: u16) {
        self.entry::<AtomicU64>(head, COUNTER).store(self.counter, Ordering::Relaxed);
        self.counter += 1;
        self.mark(head).store(1, Ordering::Release);
    }

    /// A head is about to be put into the used ring, whether it was marked or not.
    #[inline]
    pub(in crate::virtio) fn answering(&mut self, head: u16) {
        let last = self.half(LAST).load(Ordering::Relaxed);
        self.entry::<AtomicU16>(head, NEXT).store(last, Ordering::Relaxed);
        self.half(LAST).store(head, Ordering::Release);
    }

    /// It is there, and the used index is this now.
    #[inline]
    pub(in crate::virtio) fn answered(&mut self, head: u16, used: u16) {
        self.mark(head).store(0, Ordering::Release);
        self.half(USED).store(used, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
