//! The descriptors of a chain whose head is known but is no longer in the available ring: one that an earlier server
//! took. `virtio-queue` makes chains of the available ring only.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// Yields the chain's descriptors as `virtio_queue::DescriptorChain` does: an indirect table is followed once, and a
/// chain that is broken or longer than its table ends without a word.
pub(super) struct Chain<'a> {
    memory: &'a GuestMemoryMmap,
    table: u64,
    /// Descriptors of the table.
    size: u32,
    next: u16,
    /// Descriptors that may still come.
    left: u32,
    indirect: bool,
}

impl<'a> Chain<'a> {
    /// The chain that begins at `head` in a table of `size` descriptors at `table`. The ring's worker.
    pub(super) fn new(memory: &'a GuestMemoryMmap, table: u64, size: u16, head: u16) -> Self {
        Chain { memory, table, size: size.into(), next: head, left: size.into(), indirect: false }
    }

    fn read(&self) -> Option<Descriptor> {
        if u32::from(self.next) >= self.size {
            return None;
        }
        let at = self.table.checked_add(DESCRIPTOR * u64::from(self.next))?;
        self.memory.read_obj(GuestAddress(at)).ok()
    }

    /// Goes on in an indirect table (virtio 1.3, 2.7.5.3): its length is whole descriptors, and it has no table inside.
    fn enter(&mut self, table: &Descriptor) -> Option<()> {
        let size = table.len() / DESCRIPTOR as u32;
        let whole = table.len().is_multiple_of(DESCRIPTOR as u32);
        if self.indirect || table.has_next() || !whole || size == 0 || size > u32::from(u16::MAX) {
            return None;
        }
        (self.table, self.size, self.left) = (table.addr().0, size, size);
        (self.next, self.indirect) = (0, true);
        Some(())
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        loop {
            if self.left == 0 {
                return None;
            }
            self.left -= 1;
            let descriptor = self.read();
            let Some(descriptor) = descriptor else {
                self.left = 0;
                return None;
            };
            if descriptor.refers_to_indirect_table() {
                if self.enter(&descriptor).is_none() {
                    self.left = 0;
                    return None;
                }
                continue;
            }
            if descriptor.has_next() {
                self.next = descriptor.next();
            } else {
                self.left = 0;
            }
            return Some(descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;
    const TABLE: u64 = 0x1000;
    const INNER: u64 = 0x8000;

    fn chain(descriptors: &[(u64, u64, u32, u16, u16)], head: u16) -> Vec<u32> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        for &(at, addr, len, flags, next) in descriptors {
            memory.write_obj(Descriptor::new(addr, len, flags, next), GuestAddress(at)).unwrap();
        }
        Chain::new(&memory, TABLE, 8, head).map(|descriptor| descriptor.len()).collect()
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
        assert_eq!(with(48, NEXT, &[]), [0; 0], "more behind it");
        assert_eq!(with(48, 0, &[(INNER + 16, INNER, 48, INDIRECT, 0)]), [1], "a table in a table");
        // After direct ones.
        let mut all = inner.to_vec();
        all.extend([(at(0), 0, 9, NEXT, 3), (at(3), INNER, 48, INDIRECT, 0)]);
        assert_eq!(chain(&all, 0), [9, 1, 2, 3]);
    }
}
