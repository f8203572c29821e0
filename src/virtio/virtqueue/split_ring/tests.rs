//! Compares [`SplitRing`] with `virtio-queue`, on two copies of the same memory: whatever a driver does, both take the same
//! heads and chains, complete and notify alike, and leave the same bytes.

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryBackend;

use super::*;
use crate::base::prng::Prng;

const SIZE: u16 = 8;
const BYTES: usize = 0x1000;
/// The parts lie close together, and the used ring's address is not a multiple of 8.
const ADDRESSES: RingAddresses = RingAddresses { descriptors: 0x100, available: 0x182, used: 0x1a4 };

fn memory() -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), BYTES)]).unwrap())
}

fn open(
    memory: &Arc<GuestMemoryMmap>,
    addresses: &RingAddresses,
    event_idx: bool,
    indices: (u16, u16),
) -> Option<(GuestMemory, SplitRing)> {
    let mapped = GuestMemory::new(memory.clone());
    let ring = SplitRing::open(&mapped, addresses, SIZE, event_idx, indices)?;
    Some((mapped, ring))
}

fn virtio_queue(event_idx: bool, (next_available, next_used): (u16, u16)) -> Queue {
    let mut queue = Queue::new(256).unwrap();
    queue.set_size(SIZE);
    queue.set_desc_table_address(Some(ADDRESSES.descriptors as u32), Some(0));
    queue.set_avail_ring_address(Some(ADDRESSES.available as u32), Some(0));
    queue.set_used_ring_address(Some(ADDRESSES.used as u32), Some(0));
    queue.set_ready(true);
    queue.set_event_idx(event_idx);
    queue.set_next_avail(next_available);
    queue.set_next_used(next_used);
    queue
}

fn bytes(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// A driver's random steps, carried out on both implementations.
struct Comparison {
    prng: Prng,
    /// The memory of [`SplitRing`], and of `virtio-queue`.
    memories: [Arc<GuestMemoryMmap>; 2],
    mapped: GuestMemory,
    ring: SplitRing,
    queue: Queue,
    event_idx: bool,
    made_available: u16,
    taken: Vec<u16>,
}

impl Comparison {
    fn new(seed: u64) -> Comparison {
        let mut prng = Prng::new(seed);
        let event_idx = prng.below(2) == 0;
        // Often close to where 16 bits wrap.
        let indices = ((0u16.wrapping_sub(prng.below(8) as u16)), 0u16.wrapping_sub(prng.below(8) as u16));
        let memories = [memory(), memory()];
        let (mapped, ring) = open(&memories[0], &ADDRESSES, event_idx, indices).unwrap();
        let comparison = Comparison {
            prng,
            memories,
            mapped,
            ring,
            queue: virtio_queue(event_idx, indices),
            event_idx,
            made_available: indices.0,
            taken: vec![],
        };
        comparison.put(ADDRESSES.available + 2, indices.0);
        comparison.put(ADDRESSES.used + 2, indices.1);
        comparison
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memories.iter().for_each(|memory| memory.write_obj(value, GuestAddress(at)).unwrap());
    }

    /// Writes descriptors of any kind, some of them indirect into the same table.
    fn write_descriptors(&mut self) {
        for word in 0..u64::from(SIZE) {
            let at = ADDRESSES.descriptors + 16 * word;
            let [len, flags, next] = [64, 8, u64::from(SIZE) + 1].map(|bound| self.prng.below(bound));
            let address = if flags & 4 != 0 { ADDRESSES.descriptors + 16 * self.prng.below(4) } else { len };
            let len = if flags & 4 != 0 { 16 * self.prng.below(5) } else { len };
            self.put(at, address);
            self.put(at + 8, len | flags << 32 | next << 48);
        }
    }

    fn make_available(&mut self) {
        let head = self.prng.below(u64::from(SIZE) + 1) as u16;
        self.put(ADDRESSES.available + 4 + 2 * u64::from(self.made_available % SIZE), head);
        self.made_available = self.made_available.wrapping_add(1);
        self.put(ADDRESSES.available + 2, self.made_available);
    }

    fn take(&mut self) {
        let memory = self.memories[1].clone();
        let wanted = self.queue.iter(&*memory).map(|mut chains| chains.next());
        match (self.ring.take(), wanted) {
            (Ok(None), Ok(None)) => {}
            (Ok(Some(head)), Ok(Some(chain))) => {
                assert_eq!(head, chain.head_index());
                let part = |descriptor: virtio_queue::desc::split::Descriptor| {
                    (descriptor.addr(), descriptor.len(), descriptor.flags(), descriptor.next())
                };
                let ours: Vec<_> = self.ring.chain(&self.mapped, head).map(part).collect();
                assert_eq!(ours, chain.map(part).collect::<Vec<_>>());
                if self.prng.below(8) == 0 {
                    self.ring.put_back();
                    self.queue.go_to_previous_position();
                } else if head < SIZE {
                    self.taken.push(head);
                }
            }
            (ours, theirs) => {
                panic!("{ours:?}, and {}", theirs.map_or_else(|error| error.to_string(), |_| "more".into()))
            }
        }
    }

    fn complete(&mut self) {
        if let Some(head) = self.taken.pop() {
            let written = self.prng.below(1 << 32) as u32;
            self.ring.complete(head, written);
            self.queue.add_used(&*self.memories[1], head, written).unwrap();
        }
    }

    fn wants_interrupt(&mut self) {
        // Close to the present used index.
        let used_event = self.ring.next_used().wrapping_sub(self.prng.below(6) as u16);
        self.put(ADDRESSES.available + 4 + 2 * u64::from(SIZE), used_event);
        let suppressed = self.prng.below(2) as u16;
        self.put(ADDRESSES.available, suppressed);
        let theirs = self.queue.needs_notification(&*self.memories[1]).unwrap();
        // virtio-queue leaves the flag to its user.
        let wanted = theirs && (self.event_idx || suppressed == 0);
        assert_eq!(self.ring.wants_interrupt(), wanted);
    }

    fn switch_kicks(&mut self) {
        let memory = &*self.memories[1];
        if self.prng.below(2) == 0 {
            self.ring.disable_kicks();
            self.queue.disable_notification(memory).unwrap();
        } else {
            assert_eq!(self.ring.enable_kicks(), self.queue.enable_notification(memory).unwrap());
        }
    }

    fn step(&mut self) {
        match self.prng.below(8) {
            0 => self.write_descriptors(),
            1 | 2 if self.made_available.wrapping_sub(self.ring.next_available()) < SIZE => self.make_available(),
            1..=4 => self.take(),
            5 => self.complete(),
            6 => self.wants_interrupt(),
            _ => self.switch_kicks(),
        }
        assert_eq!(self.ring.next_available(), self.queue.next_avail());
        assert_eq!(self.ring.next_used(), self.queue.next_used());
        assert_eq!(bytes(&self.memories[0]), bytes(&self.memories[1]));
    }
}

#[test]
fn a_split_ring_does_what_virtio_queue_does() {
    let mut with_event_idx = 0;
    for seed in 1..=60 {
        let mut comparison = Comparison::new(seed);
        with_event_idx += u32::from(comparison.event_idx);
        (0..400).for_each(|_| comparison.step());
    }
    assert!((15..=45).contains(&with_event_idx), "{with_event_idx} of 60 comparisons");
}

#[test]
fn an_index_that_is_too_far_ahead_breaks_the_ring() {
    for (index, broken) in [(SIZE, false), (SIZE + 1, true), (u16::MAX, true)] {
        let memory = memory();
        let (_mapped, mut ring) = open(&memory, &ADDRESSES, false, (0, 0)).unwrap();
        memory.write_obj(index, GuestAddress(ADDRESSES.available + 2)).unwrap();
        assert_eq!(ring.take(), if broken { Err(IndexTooFar) } else { Ok(Some(0)) });
    }
}

/// The driver makes heads available between two reads of its index: they are seen once the earlier ones are taken.
#[test]
fn heads_made_available_between_two_takes_are_not_missed() {
    let memory = memory();
    let (_mapped, mut ring) = open(&memory, &ADDRESSES, false, (0, 0)).unwrap();
    let make_available = |upto: u16| memory.write_obj(upto, GuestAddress(ADDRESSES.available + 2)).unwrap();
    make_available(1);
    assert_eq!((ring.has_more(), ring.take()), (true, Ok(Some(0))));
    make_available(3);
    assert!(ring.enable_kicks());
    assert_eq!([ring.take(), ring.take(), ring.take()], [Ok(Some(0)), Ok(Some(0)), Ok(None)]);
    assert!(!ring.has_more() && !ring.enable_kicks());
    assert_eq!(ring.indices(), (3, 0));
}

#[test]
fn ring_addresses_outside_memory_or_unaligned_are_refused() {
    let memory = memory();
    let end = BYTES as u64;
    let fits = |addresses: RingAddresses| addresses.is_aligned() && open(&memory, &addresses, true, (0, 0)).is_some();
    assert!(fits(ADDRESSES));
    let size = u64::from(SIZE);
    // Each part may end where the memory does, and not a byte later.
    assert!(fits(RingAddresses { descriptors: end - 16 * size, ..ADDRESSES }));
    assert!(fits(RingAddresses { available: end - 6 - 2 * size, ..ADDRESSES }));
    assert!(!fits(RingAddresses { descriptors: end - 16 * size + 16, ..ADDRESSES }));
    assert!(!fits(RingAddresses { available: end - 4 - 2 * size, ..ADDRESSES }));
    assert!(!fits(RingAddresses { used: end - 4 - 8 * size, ..ADDRESSES }));
    for far in [end, 1 << 40, !15] {
        assert!(!fits(RingAddresses { descriptors: far, ..ADDRESSES }));
        assert!(!fits(RingAddresses { available: far, ..ADDRESSES }));
        assert!(!fits(RingAddresses { used: far, ..ADDRESSES }));
    }
    for (addresses, part) in [
        (RingAddresses { descriptors: 0x108, ..ADDRESSES }, "descriptors"),
        (RingAddresses { available: 0x183, ..ADDRESSES }, "available"),
        (RingAddresses { used: 0x1a2, ..ADDRESSES }, "used"),
    ] {
        assert!(!addresses.is_aligned(), "{part}");
    }
    assert_eq!(ADDRESSES.used_index(&memory), Some(0));
    assert_eq!(RingAddresses { used: end, ..ADDRESSES }.used_index(&memory), None);
    assert_eq!(memory.num_regions(), 1);
}

/// Addresses that the guest aligned are not aligned in this process where a region begins at an odd address.
#[test]
fn a_region_at_an_odd_address_is_refused() {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(1), BYTES)]).unwrap());
    assert!(open(&memory, &ADDRESSES, true, (0, 0)).is_none());
}
