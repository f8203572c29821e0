//! Iterates over the descriptors of one chain (virtio 1.3, 2.7.5).

use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use super::guest_memory::GuestMemory;

/// The length of a descriptor in bytes.
const DESCRIPTOR: u32 = 16;

/// Yields the descriptors of a chain. One indirect table is followed. A chain that is broken or longer than its table ends
/// early; the caller sees it by the last descriptor, which then has VIRTQ_DESC_F_NEXT.
pub struct Chain<'a> {
    memory: &'a GuestMemory,
    table: Table<'a>,
    next: u16,
    /// How many descriptors may still follow.
    left: u32,
}

enum Table<'a> {
    /// The virtqueue's own table, two words a descriptor.
    Ring(&'a [AtomicU64]),
    Indirect {
        at: GuestAddress,
        size: u32,
    },
}

impl<'a> Chain<'a> {
    /// The chain that begins at `head` in the virtqueue's `table`, which has two words a descriptor.
    #[inline]
    pub(in crate::virtio) fn new(memory: &'a GuestMemory, table: &'a [AtomicU64], head: u16) -> Self {
        Chain { memory, table: Table::Ring(table), next: head, left: (table.len() / 2) as u32 }
    }

    #[inline]
    fn read(&self) -> Option<Descriptor> {
        let words = match self.table {
            Table::Ring(table) => {
                let at = 2 * usize::from(self.next);
                let [first, second] = table.get(at..at + 2)? else { return None };
                [first.load(Ordering::Relaxed), second.load(Ordering::Relaxed)].map(u64::from_le)
            }
            Table::Indirect { at, size } => {
                if u32::from(self.next) >= size {
                    return None;
                }
                let at = at.0.checked_add(u64::from(DESCRIPTOR * u32::from(self.next)))?;
                let both = u128::from_le_bytes(self.memory.read_sixteen(GuestAddress(at)).ok()?);
                [both as u64, (both >> 64) as u64]
            }
        };
        let [address, rest] = words;
        Some(Descriptor::new(address, rest as u32, (rest >> 32) as u16, (rest >> 48) as u16))
    }

    /// Continues in an indirect table (virtio 1.3, 2.7.5.3), whose length is a multiple of a descriptor's and which holds no
    /// further table. A table behind it in the chain is ignored, as QEMU does (virtqueue_split_pop).
    fn enter(&mut self, table: &Descriptor) -> Option<()> {
        let size = table.len() / DESCRIPTOR;
        let whole = table.len().is_multiple_of(DESCRIPTOR);
        let nested = matches!(self.table, Table::Indirect { .. });
        if nested || !whole || size == 0 || size > u32::from(u16::MAX) {
            return None;
        }
        self.table = Table::Indirect { at: table.addr(), size };
        (self.next, self.left) = (0, size);
        Some(())
    }

    fn step(&mut self) -> Option<Descriptor> {
        self.left = self.left.checked_sub(1)?;
        let descriptor = self.read()?;
        if descriptor.refers_to_indirect_table() {
            self.enter(&descriptor)?;
            return self.step();
        }
        if descriptor.has_next() {
            self.next = descriptor.next();
        } else {
            self.left = 0;
        }
        Some(descriptor)
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    #[inline]
    fn next(&mut self) -> Option<Descriptor> {
        let descriptor = self.step();
        if descriptor.is_none() {
            self.left = 0;
        }
        descriptor
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::virtio::virtqueue::guest_memory::AtomicSlice;
    use vm_memory::{Bytes, GuestMemoryMmap};

    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;
    const TABLE: u64 = 0x1000;
    const INNER: u64 = 0x8000;

    fn chain(descriptors: &[(u64, u64, u32, u16, u16)], head: u16) -> Vec<u32> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        for &(at, addr, len, flags, next) in descriptors {
            memory.write_obj(Descriptor::new(addr, len, flags, next), GuestAddress(at)).unwrap();
        }
        let mapped = GuestMemory::new(Arc::new(memory));
        let table: AtomicSlice<AtomicU64> = mapped.atomic_slice(TABLE, 2 * 8).unwrap();
        Chain::new(&mapped, &table, head).map(|descriptor| descriptor.len()).collect()
    }

    fn at(index: u64) -> u64 {
        TABLE + index * 16
    }

    #[test]
    fn chains_end_where_they_should() {
        assert_eq!(chain(&[(at(5), 0, 10, NEXT, 2), (at(2), 0, 20, NEXT, 7), (at(7), 0, 30, 0, 1)], 5), [10, 20, 30]);
        assert_eq!(chain(&[(at(5), 0, 10, NEXT, 8)], 5), [10], "outside the table");
        assert_eq!(chain(&[(at(5), 0, 10, NEXT, 5)], 5), [10; 8], "a loop");
        assert_eq!(chain(&[], 9), [0; 0]);
    }

    #[test]
    fn an_indirect_table_is_followed_once() {
        let inner = [(INNER, 0, 1, NEXT, 1), (INNER + 16, 0, 2, NEXT, 2), (INNER + 32, 0, 3, 0, 0)];
        let with = |len, flags, more: &[_]| {
            let mut all = inner.to_vec();
            all.push((at(3), INNER, len, INDIRECT | flags, 4));
            all.extend_from_slice(more);
            chain(&all, 3)
        };
        assert_eq!(with(48, 0, &[]), [1, 2, 3]);
        assert_eq!(with(32, 0, &[]), [1, 2], "its end");
        assert_eq!(with(47, 0, &[]), [0; 0], "half a descriptor");
        assert_eq!(with(0, 0, &[]), [0; 0], "empty");
        assert_eq!(with(48, NEXT, &[]), [1, 2, 3], "what is behind it does not count");
        assert_eq!(with(48, 0, &[(INNER + 16, INNER, 48, INDIRECT, 0)]), [1], "a table in a table");
        // After direct ones.
        let mut all = inner.to_vec();
        all.extend([(at(0), 0, 9, NEXT, 3), (at(3), INNER, 48, INDIRECT, 0)]);
        assert_eq!(chain(&all, 0), [9, 1, 2, 3]);
    }
}
