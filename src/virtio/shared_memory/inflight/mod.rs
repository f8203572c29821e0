//! The in-flight region: which requests a server that died had taken and not completed (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
//! of vhost-user, the split-ring layout of QEMU's docs/interop/vhost-user.rst).
//!
//! The front-end keeps the memory for the next server. Each ring has a header, and an entry for each descriptor. A head is
//! marked when it is taken from the ring, and unmarked when it is completed. A server can be killed between the steps of a
//! completion. So the region also has the last head completed and a copy of the used index that counts it: where the guest's
//! used index is ahead of the copy, that head is completed. A killed process has made its stores in program order, so
//! Release is sufficient; the next process maps the memory after several system calls.
//!
//! The content may come from any process: every index is checked, and nothing outside the ring's part is accessed.
//!
//! The number of entries that a front-end asks for says little about its rings. QEMU asks for its `queue-size`, but QEMU
//! 10.0.13 of Debian 13 gives every virtio device rings of 1024 whatever that is (virtio_add_queue; 11.1 ends this). The
//! front-end sends back the number that it asked for, and not the one in the reply (vhost_user_get_inflight_fd). So the
//! entries asked for lie where every server expects them. Behind all of them lie further entries, up to the largest ring
//! that is allowed. Other servers do not see those, and this one recognises them by a magic number before them.

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

/// The length of the header of a ring: features (u64), version, number of entries, last head completed, copy of the used
/// index (u16 each). Then the offsets of these fields.
const HEADER: usize = 16;
const FEATURES: usize = 0;
const VERSION: usize = 8;
const ENTRIES: usize = 10;
const LAST_HEAD: usize = 12;
const USED_INDEX: usize = 14;
/// The length of the entry of a descriptor: in flight (u8), 5 unused bytes, the head completed before this one (u16), a
/// number that orders heads by when they were taken (u64). Then the offsets of the last two.
const ENTRY: usize = 16;
const PREVIOUS_HEAD: usize = 6;
const COUNTER: usize = 8;
/// The parts of rings begin at multiples of this. vhost-user leaves the number to the back-end.
const ALIGN: usize = 64;
/// The only version of the layout.
const VERSION_1: u16 = 1;
/// The magic number that [`Inflight::create`] puts behind the entries asked for (u64). Then comes the number of further
/// entries of each ring (u16, at [`MORE`]), and at [`ALIGN`] the further entries of each ring.
const MAGIC: u64 = u64::from_ne_bytes(*b"vblkmore");
const MORE: usize = 8;

/// The most descriptors that a ring can have (virtio 1.3, 2.7).
pub(in crate::virtio) const MAX_ENTRIES: u16 = 32768;

/// The length of a ring's part with this number of entries.
fn stride(entries: u16) -> usize {
    (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGN)
}

/// Where the parts of a region lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    rings: u16,
    /// How many entries each ring has where every server expects them.
    entries: u16,
    /// How many further entries each ring has behind all of those.
    more: u16,
}

impl Layout {
    /// The offset of the magic number, if there are further entries.
    fn magic_at(&self) -> usize {
        stride(self.entries) * usize::from(self.rings)
    }

    /// The offset of the further entries of a ring.
    fn more_at(&self, ring: usize) -> usize {
        self.magic_at() + ALIGN + ENTRY * usize::from(self.more) * ring
    }

    fn len(&self) -> usize {
        if self.more == 0 { self.magic_at() } else { self.more_at(usize::from(self.rings)) }
    }

    /// The layout of `region`, which has so many bytes and of which the front-end says that it has `entries` for each of
    /// `rings`.
    fn of(region: &SharedRegion, bytes: usize, rings: u16, entries: u16) -> Self {
        let plain = Layout { rings, entries, more: 0 };
        let half = |at: usize| region.atomic::<AtomicU16>(at).map_or(0, |cell| cell.load(Ordering::Relaxed));
        let magic = region.atomic::<AtomicU64>(plain.magic_at()).map_or(0, |cell| cell.load(Ordering::Relaxed));
        let extended = Layout { more: half(plain.magic_at() + MORE), ..plain };
        let total = usize::from(entries) + usize::from(extended.more);
        if magic == MAGIC && extended.len() <= bytes && total <= usize::from(MAX_ENTRIES) {
            return extended;
        }
        // Another server may have created the region for larger rings than the front-end asked for. Its headers say so
        // (desc_num).
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

/// The mapped in-flight region of one device. The handler owns it.
pub(in crate::virtio) struct Inflight {
    region: Arc<SharedRegion>,
    /// What the front-end says: the number of rings, and of entries of each.
    shape: (u16, u16),
    layout: Layout,
    /// It was logged that a ring does not fit.
    warned: AtomicBool,
}

impl Inflight {
    /// Creates a region for so many rings of `entries` descriptors, and of up to `largest` (GET_INFLIGHT_FD). It is sealed, so
    /// that no process can truncate it.
    pub(in crate::virtio) fn create(rings: u16, entries: u16, largest: u16) -> io::Result<(VhostUserInflight, File)> {
        let layout = Layout { rings, entries, more: largest.saturating_sub(entries) };
        let file: File = memfd_create("in-flight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into();
        file.set_len(layout.len() as u64)?;
        if layout.more > 0 {
            file.write_all_at(&MAGIC.to_ne_bytes(), layout.magic_at() as u64)?;
            file.write_all_at(&layout.more.to_ne_bytes(), (layout.magic_at() + MORE) as u64)?;
        }
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((VhostUserInflight::new(layout.len() as u64, 0, rings, entries), file))
    }

    /// Maps the region of SET_INFLIGHT_FD, for the session of `socket`: what an earlier server left, or a new region.
    pub(in crate::virtio) fn map(message: &VhostUserInflight, file: File, socket: &Arc<SessionSocket>) -> Result<Self> {
        let (rings, entries) = (message.num_queues, message.queue_size);
        let needed = (stride(entries) * usize::from(rings)) as u64;
        if message.mmap_size < needed {
            let has = message.mmap_size;
            log_limited!(
                FRONT_END_LOG,
                Error,
                "the front-end's in-flight region has {has} bytes; {rings} queues of {entries} need {needed}"
            );
            return Err(Error::InvalidParam);
        }
        let region =
            Arc::new(SharedRegion::map("in-flight region", file, message.mmap_offset, message.mmap_size, socket)?);
        let bytes = usize::try_from(message.mmap_size).map_err(|_| Error::InvalidParam)?;
        let layout = Layout::of(&region, bytes, rings, entries);
        Ok(Inflight { region, shape: (rings, entries), layout, warned: AtomicBool::new(false) })
    }

    /// What the front-end says: for how many rings the region is, and of how many descriptors.
    pub(in crate::virtio) fn shape(&self) -> (u16, u16) {
        self.shape
    }

    /// The mapped region.
    pub(in crate::virtio) fn region(&self) -> &SharedRegion {
        &self.region
    }

    /// The part of a ring of `size` descriptors; `used`: its used index. `None`: the region has no part for the ring, or too
    /// small a one, which is logged once. The ring is then served all the same, but not tracked. If only some of its heads
    /// were tracked, the next server would take the others for completed, and the guest would wait for them for ever. Marks
    /// from before are removed.
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
                "queue {index} has {size} descriptors, and the front-end's in-flight region is for {rings} queues of {}: its \
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
            InflightFault::OtherRun => "the in-flight region is not of this queue's last run",
            InflightFault::HeadOutside => "the in-flight region names a head outside the queue",
        })
    }
}

/// The part of one running ring. The ring's worker owns it.
pub(in crate::virtio) struct Tracker {
    region: Arc<SharedRegion>,
    at: usize,
    /// How many entries the ring's own part has.
    entries: u16,
    /// The offset of the further entries: those of the heads from `entries` on.
    more_at: usize,
    /// How many entries there are in all.
    all: u16,
    /// The number that the next head taken gets.
    counter: u64,
}

impl Tracker {
    fn atomic<A: AtomicInteger>(&self, offset: usize) -> &A {
        self.region.atomic(self.at + offset).expect("the region was checked to hold every ring's part")
    }

    /// A field of a head's entry. The worker takes only heads below the ring's size, and so does `recover`.
    fn entry<A: AtomicInteger>(&self, head: u16, field: usize) -> &A {
        assert!(head < self.all, "heads were checked before");
        let at = if head < self.entries {
            self.at + HEADER + ENTRY * usize::from(head)
        } else {
            self.more_at + ENTRY * usize::from(head - self.entries)
        };
        self.region.atomic(at + field).expect("the region was checked to hold every ring's part")
    }

    fn half(&self, field: usize) -> &AtomicU16 {
        self.atomic(field)
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        self.entry(head, 0)
    }

    /// Returns the heads that were taken and not completed, in the order in which they were taken; a new region has none.
    /// `used`: the used index in the guest's memory; `outstanding`: how many requests the driver waits for, by its two
    /// indices; `size`: the number of descriptors of the ring, which fits ([`Inflight::ring`]).
    ///
    /// After a reset of the driver, a front-end sends a new region. If one does not, requests of the earlier driver could
    /// write the next driver's memory. So no more requests are recovered than the driver waits for.
    pub(in crate::virtio) fn recover(
        &mut self,
        used: u16,
        outstanding: u16,
        size: u16,
    ) -> std::result::Result<Vec<u16>, InflightFault> {
        // When the driver waits for nothing, the content and its version do not matter.
        if self.half(VERSION).load(Ordering::Acquire) == 0 || outstanding == 0 {
            self.begin(used);
            return Ok(Vec::new());
        }
        if self.half(VERSION).load(Ordering::Relaxed) != VERSION_1
            || self.half(ENTRIES).load(Ordering::Relaxed) != self.entries
            || self.atomic::<AtomicU64>(FEATURES).load(Ordering::Relaxed) != 0
        {
            return Err(InflightFault::UnknownLayout);
        }
        if (0..self.all).all(|head| self.mark(head).load(Ordering::Relaxed) == 0) {
            self.begin(used);
            return Ok(Vec::new());
        }
        self.unmark_completed(used, size)?;
        let in_flight = |head: &u16| self.mark(*head).load(Ordering::Relaxed) == 1;
        let mut heads: Vec<(u64, u16)> = (0..size)
            .filter(in_flight)
            .map(|head| (self.entry::<AtomicU64>(head, COUNTER).load(Ordering::Relaxed), head))
            .collect();
        if heads.len() > usize::from(outstanding) {
            return Err(InflightFault::TooManyRequests);
        }
        heads.sort_unstable();
        // Number them from 0 again, so that numbers never run out. The old numbers differ and are sorted, so no head gets a
        // larger number than it had: the order is right wherever the process is killed.
        for (counter, &(_, head)) in heads.iter().enumerate() {
            self.entry::<AtomicU64>(head, COUNTER).store(counter as u64, Ordering::Release);
        }
        self.counter = heads.len() as u64;
        Ok(heads.into_iter().map(|(_, head)| head).collect())
    }

    /// Initializes the part of the ring, without marks.
    fn begin(&self, used: u16) {
        self.atomic::<AtomicU64>(FEATURES).store(0, Ordering::Relaxed);
        for head in 0..self.all {
            self.mark(head).store(0, Ordering::Relaxed);
        }
        self.half(ENTRIES).store(self.entries, Ordering::Relaxed);
        self.half(LAST_HEAD).store(0, Ordering::Relaxed);
        self.half(USED_INDEX).store(used, Ordering::Relaxed);
        self.half(VERSION).store(VERSION_1, Ordering::Release);
    }

    /// Unmarks the heads that are in the guest's used ring, and that the earlier server was killed before it could unmark.
    fn unmark_completed(&self, used: u16, size: u16) -> std::result::Result<(), InflightFault> {
        let completed = used.wrapping_sub(self.half(USED_INDEX).load(Ordering::Relaxed));
        if completed > size {
            return Err(InflightFault::OtherRun);
        }
        let mut head = self.half(LAST_HEAD).load(Ordering::Relaxed);
        for _ in 0..completed {
            if head >= size {
                return Err(InflightFault::HeadOutside);
            }
            self.mark(head).store(0, Ordering::Release);
            head = self.entry::<AtomicU16>(head, PREVIOUS_HEAD).load(Ordering::Relaxed);
        }
        self.half(USED_INDEX).store(used, Ordering::Release);
        Ok(())
    }

    /// Marks a head that was taken from the ring. Nothing was done for its request yet.
    #[inline]
    pub(in crate::virtio) fn taken(&mut self, head: u16) {
        self.entry::<AtomicU64>(head, COUNTER).store(self.counter, Ordering::Relaxed);
        self.counter += 1;
        self.mark(head).store(1, Ordering::Release);
    }

    /// Records that a head, marked or not, is about to be put into the used ring.
    #[inline]
    pub(in crate::virtio) fn completing(&mut self, head: u16) {
        let last = self.half(LAST_HEAD).load(Ordering::Relaxed);
        self.entry::<AtomicU16>(head, PREVIOUS_HEAD).store(last, Ordering::Relaxed);
        self.half(LAST_HEAD).store(head, Ordering::Release);
    }

    /// Unmarks a head that was put into the used ring. `used`: the used index that counts it.
    #[inline]
    pub(in crate::virtio) fn completed(&mut self, head: u16, used: u16) {
        self.mark(head).store(0, Ordering::Release);
        self.half(USED_INDEX).store(used, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
