//! A running split virtqueue (virtio 1.3, 2.7): takes heads from the available ring and writes the used ring.
//!
//! The three parts of the virtqueue are located in guest memory once, when it starts, so a request costs only its loads and
//! stores. `virtio-queue`, the usual crate for this, locates them at every access, which cost more than everything else in
//! a small request. The tests compare this implementation with that crate.
//!
//! All fields are little endian: VIRTIO_F_VERSION_1 is always offered.

use std::fmt;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::chain::Chain;
use super::guest_memory::{AtomicSlice, GuestMemory};

/// The guest addresses of a virtqueue's three parts (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

impl RingAddresses {
    /// Whether each part is aligned as virtio 1.3, 2.7 requires.
    pub fn is_aligned(&self) -> bool {
        self.descriptors.is_multiple_of(16) && self.available.is_multiple_of(2) && self.used.is_multiple_of(4)
    }

    /// The used index: how many requests were completed, modulo 2^16. Returns `None` when it lies outside `memory`.
    pub fn used_index(&self, memory: &GuestMemoryMmap) -> Option<u16> {
        let at = GuestAddress(self.used.checked_add(2)?);
        memory.load(at, Ordering::Acquire).ok().map(u16::from_le)
    }
}

/// The length in bytes of the used ring of `size` descriptors: flags, index, the elements and `avail_event`.
fn used_bytes(size: u16) -> u64 {
    6 + 8 * u64::from(size)
}

/// The driver's available index is impossible: it is further ahead than the virtqueue has descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexTooFar;

impl fmt::Display for IndexTooFar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the available index is further ahead than the ring is long")
    }
}

/// One running virtqueue. Owned and used by its worker alone.
pub struct SplitRing {
    /// The descriptor table, two words a descriptor.
    table: AtomicSlice<AtomicU64>,
    /// The available ring: flags, index, the heads, and `used_event`.
    available: AtomicSlice<AtomicU16>,
    /// The beginning of the used ring: flags and index.
    used: AtomicSlice<AtomicU16>,
    /// The elements of the used ring, as head and length. Two words each, because the used ring is aligned to four bytes
    /// only.
    used_elements: AtomicSlice<AtomicU32>,
    /// `avail_event`, behind the elements of the used ring.
    available_event: AtomicSlice<AtomicU16>,
    size: u16,
    used_at: GuestAddress,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    event_idx: bool,
    /// The position of the next head to take.
    next_available: u16,
    /// The driver's available index when it was read last.
    seen_available: u16,
    /// The position of the next used element.
    next_used: u16,
    /// The value of `next_used` when [`SplitRing::wants_interrupt`] was last called.
    signalled_used: u16,
}

impl SplitRing {
    /// Locates the virtqueue of `size` descriptors (a power of two) at `addresses`; it continues at the given indices. Returns
    /// `None` when one of its parts is not aligned or does not lie in one region of guest memory. The virtqueues of real
    /// drivers always do; QEMU refuses others, too (vhost_memory_map). Called when the virtqueue starts.
    pub fn open(
        memory: &GuestMemory,
        addresses: &RingAddresses,
        size: u16,
        event_idx: bool,
        (next_available, next_used): (u16, u16),
    ) -> Option<Self> {
        assert!(size.is_power_of_two(), "SET_VRING_NUM checked it");
        let entries = usize::from(size);
        let available_event_at = addresses.used.checked_add(used_bytes(size) - 2)?;
        Some(SplitRing {
            table: memory.atomic_slice(addresses.descriptors, 2 * entries)?,
            available: memory.atomic_slice(addresses.available, 3 + entries)?,
            used: memory.atomic_slice(addresses.used, 2)?,
            used_elements: memory.atomic_slice(addresses.used.checked_add(4)?, 2 * entries)?,
            available_event: memory.atomic_slice(available_event_at, 1)?,
            size,
            used_at: GuestAddress(addresses.used),
            event_idx,
            next_available,
            seen_available: next_available,
            next_used,
            signalled_used: next_used,
        })
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The guest memory that this virtqueue writes to (the used ring): its address and its length in bytes. For the dirty
    /// log.
    pub fn used_part(&self) -> (GuestAddress, u64) {
        (self.used_at, used_bytes(self.size))
    }

    /// The position in the available ring of the next head to take, modulo 2^16.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Sets the position in the available ring of the next head to take.
    pub fn set_next_available(&mut self, index: u16) {
        (self.next_available, self.seen_available) = (index, index);
    }

    /// The position in the used ring of the next completion, modulo 2^16.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// The available index of the driver, and the used index that it was given.
    pub fn indices(&self) -> (u16, u16) {
        (self.available_index(), u16::from_le(self.used[1].load(Ordering::Acquire)))
    }

    #[inline]
    fn available_index(&self) -> u16 {
        u16::from_le(self.available[1].load(Ordering::Acquire))
    }

    /// Whether the driver has made available more heads than were taken. Reads memory only.
    #[inline]
    pub fn has_more(&self) -> bool {
        self.available_index() != self.next_available
    }

    /// Takes the next head, or returns `None` when there is none. The guest chose the number, so it may be any.
    #[inline]
    pub fn take(&mut self) -> Result<Option<u16>, IndexTooFar> {
        if self.seen_available == self.next_available {
            let index = self.available_index();
            if index.wrapping_sub(self.next_available) > self.size {
                return Err(IndexTooFar);
            }
            self.seen_available = index;
            if index == self.next_available {
                return Ok(None);
            }
        }
        let head = self.available[2 + self.slot(self.next_available)].load(Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(u16::from_le(head)))
    }

    /// Undoes the last [`SplitRing::take`].
    pub fn put_back(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// The descriptors of the chain that begins at `head`.
    #[inline]
    pub fn chain<'a>(&'a self, memory: &'a GuestMemory, head: u16) -> Chain<'a> {
        Chain::new(memory, &self.table, head)
    }

    /// Puts the chain of `head`, which is below [`SplitRing::size`], into the used ring. `written`: the number of bytes that
    /// the device wrote to the chain. The driver can see the element at once.
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) {
        let at = 2 * self.slot(self.next_used);
        self.used_elements[at].store(u32::from(head).to_le(), Ordering::Relaxed);
        self.used_elements[at + 1].store(written.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
        self.used[1].store(self.next_used.to_le(), Ordering::Release);
    }

    /// Whether the driver wants an interrupt for the chains that were completed since the last call (virtio 1.3, 2.7.7.2 and
    /// 2.7.10).
    pub fn wants_interrupt(&mut self) -> bool {
        let signalled_used = std::mem::replace(&mut self.signalled_used, self.next_used);
        // The used index must be visible before the driver's setting is read; the driver does it the other way round.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags = u16::from_le(self.available[0].load(Ordering::Relaxed));
            return u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let event = u16::from_le(self.available[2 + usize::from(self.size)].load(Ordering::Relaxed));
        // As vring_need_event of linux/virtio_ring.h: the element with the event's number is among these.
        self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(signalled_used)
    }

    /// Asks the driver not to kick, because the worker polls. With VIRTIO_F_EVENT_IDX the driver kicks at most once until
    /// [`SplitRing::enable_kicks`].
    #[inline]
    pub fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.used[0].store((VRING_USED_F_NO_NOTIFY as u16).to_le(), Ordering::Relaxed);
        }
    }

    /// Asks the driver to kick for every head that it makes available from now on. Returns whether it made heads available
    /// before, for which it may not have kicked.
    #[inline]
    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.available_event[0].store(self.next_available.to_le(), Ordering::Relaxed);
        } else {
            self.used[0].store(0, Ordering::Relaxed);
        }
        // The setting must be visible before the index is read; the driver does it the other way round.
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
