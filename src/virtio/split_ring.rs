//! A split virtqueue that runs (virtio 1.3, 2.7): what the driver made available, and what we used.
//!
//! Its three parts are found in the guest's memory once, when it starts, so what a request costs here is its loads and
//! stores. `virtio-queue`, the crate that one would take for this, finds them at every access, which was more than
//! everything else that a small request takes; it is what the tests compare this with.
//!
//! All fields are little endian: VIRTIO_F_VERSION_1 is always offered.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::chain::Chain;
use super::mapped::{Cells, Mapped};

/// Where the driver put a ring's parts, in its own addresses (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

impl Place {
    /// Whether each part begins where it may (virtio 1.3, 2.7: table of alignments).
    pub fn is_aligned(&self) -> bool {
        self.descriptors.is_multiple_of(16) && self.available.is_multiple_of(2) && self.used.is_multiple_of(4)
    }

    /// The index in the used ring: how many answers the driver has been given, modulo 2^16. `None`: it lies outside the
    /// memory.
    pub fn used_index(&self, memory: &GuestMemoryMmap) -> Option<u16> {
        let at = GuestAddress(self.used.checked_add(2)?);
        memory.load(at, Ordering::Acquire).ok().map(u16::from_le)
    }
}

/// Bytes of the used ring of so many descriptors: flags, index, the answers and the event.
fn used_bytes(size: u16) -> u64 {
    6 + 8 * u64::from(size)
}

/// The driver's available index makes no sense.
pub const TOO_FAR: &str = "the available index is further ahead than the ring is long";

/// One running ring. Its worker's.
pub struct SplitRing {
    /// Two words a descriptor.
    table: Cells<AtomicU64>,
    /// Flags, index, a head each, and the event.
    available: Cells<AtomicU16>,
    /// Flags and index.
    used: Cells<AtomicU16>,
    /// Head and length of each answer: the used ring need not be aligned to more than their halves.
    answers: Cells<AtomicU32>,
    available_event: Cells<AtomicU16>,
    size: u16,
    used_at: GuestAddress,
    /// VIRTIO_F_EVENT_IDX is negotiated.
    event_idx: bool,
    /// The next head to take, and the available index that was seen last.
    next_available: u16,
    seen: u16,
    /// The next answer, and which was the next when the driver's wish for interrupts was looked at last.
    next_used: u16,
    told: u16,
}

impl SplitRing {
    /// The ring of `size` descriptors (a power of two) at `place`, to go on at these indices. `None`: one of its parts is
    /// not all in one region of the guest's memory, or not aligned. Drivers' rings always are: QEMU refuses others, too
    /// (vhost_memory_map). Called when a ring starts.
    pub fn open(
        memory: &Mapped,
        place: &Place,
        size: u16,
        event_idx: bool,
        (next_available, next_used): (u16, u16),
    ) -> Option<Self> {
        assert!(size.is_power_of_two(), "checked when it was told (SET_VRING_NUM)");
        let entries = usize::from(size);
        let behind_answers = place.used.checked_add(used_bytes(size) - 2)?;
        Some(SplitRing {
            table: memory.cells(place.descriptors, 2 * entries)?,
            available: memory.cells(place.available, 3 + entries)?,
            used: memory.cells(place.used, 2)?,
            answers: memory.cells(place.used.checked_add(4)?, 2 * entries)?,
            available_event: memory.cells(behind_answers, 1)?,
            size,
            used_at: GuestAddress(place.used),
            event_idx,
            next_available,
            seen: next_available,
            next_used,
            told: next_used,
        })
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The part of the guest's memory that this writes to: where it is, and its bytes.
    pub fn used_part(&self) -> (GuestAddress, u64) {
        (self.used_at, used_bytes(self.size))
    }

    /// Where the next head is taken, modulo 2^16.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Takes up there.
    pub fn set_next_available(&mut self, index: u16) {
        (self.next_available, self.seen) = (index, index);
    }

    /// Where the next answer goes, modulo 2^16.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// The driver's available index, and what it was given for used ones.
    pub fn indices(&self) -> (u16, u16) {
        (self.available_index(), u16::from_le(self.used[1].load(Ordering::Acquire)))
    }

    #[inline]
    fn available_index(&self) -> u16 {
        u16::from_le(self.available[1].load(Ordering::Acquire))
    }

    /// Whether the driver made more available than was taken. Looks at memory only.
    #[inline]
    pub fn has_more(&self) -> bool {
        self.available_index() != self.next_available
    }

    /// The next head, if there is one. It may be any number. Errors: [`TOO_FAR`].
    #[inline]
    pub fn take(&mut self) -> Result<Option<u16>, &'static str> {
        if self.seen == self.next_available {
            let index = self.available_index();
            if index.wrapping_sub(self.next_available) > self.size {
                return Err(TOO_FAR);
            }
            self.seen = index;
            if index == self.next_available {
                return Ok(None);
            }
        }
        let head = self.available[2 + self.slot(self.next_available)].load(Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(u16::from_le(head)))
    }

    /// The head taken last is still to be taken.
    pub fn put_back(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// The descriptors of the chain that begins at `head`.
    #[inline]
    pub fn chain<'a>(&'a self, memory: &'a Mapped, head: u16) -> Chain<'a> {
        Chain::new(memory, &self.table, head)
    }

    /// Puts a chain into the used ring; `written`: bytes that we wrote to it. The driver may look at once. `head` is below
    /// [`SplitRing::size`].
    #[inline]
    pub fn answer(&mut self, head: u16, written: u32) {
        let at = 2 * self.slot(self.next_used);
        self.answers[at].store(u32::from(head).to_le(), Ordering::Relaxed);
        self.answers[at + 1].store(written.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
        self.used[1].store(self.next_used.to_le(), Ordering::Release);
    }

    /// Whether the driver is to be interrupted for what was answered since this was asked last (virtio 1.3, 2.7.7.2 and
    /// 2.7.10).
    pub fn wants_interrupt(&mut self) -> bool {
        let told = std::mem::replace(&mut self.told, self.next_used);
        // The used index is visible before the wish is read; the driver does it the other way round.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags = u16::from_le(self.available[0].load(Ordering::Relaxed));
            return u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let event = u16::from_le(self.available[2 + usize::from(self.size)].load(Ordering::Relaxed));
        // vring_need_event of linux/virtio_ring.h: the answer with the event's number is among these.
        self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(told)
    }

    /// The driver need not kick: we look by ourselves. With VIRTIO_F_EVENT_IDX it kicks once at most until it is asked again.
    #[inline]
    pub fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.used[0].store((VRING_USED_F_NO_NOTIFY as u16).to_le(), Ordering::Relaxed);
        }
    }

    /// From here on the driver kicks for what it makes available. Whether it made something available before, for which it
    /// may not have.
    #[inline]
    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.available_event[0].store(self.next_available.to_le(), Ordering::Relaxed);
        } else {
            self.used[0].store(0, Ordering::Relaxed);
        }
        // The wish is visible before the index is read; the driver does it the other way round.
        fence(Ordering::SeqCst);
        self.has_more()
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }
}

#[cfg(test)]
mod tests;
