//! Fuzzes a guest's memory, including its virtqueue and descriptors: all of it is random.

use std::sync::Arc;

use virtioblkd::backend::{DurableWrite, Geometry, RangeLimits};
use virtioblkd::internal::blk::request::{BlkCommand, Parser};
use virtioblkd::internal::virtqueue::guest_memory::GuestMemory;
use virtioblkd::internal::virtqueue::split_ring::{RingAddresses, SplitRing};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The regions of the guest's memory: two adjacent ones, and a hole after them.
const REGION: u64 = 0x4000;
const SIZE: u64 = 1 << 20;

fn geometry(choice: u8) -> Geometry {
    let limits = Some(RangeLimits { max_bytes: SIZE / 2, granularity: 4096 });
    Geometry {
        size: SIZE,
        logical_block: if choice & 1 == 0 { 512 } else { 4096 },
        physical_block: 4096,
        alignment_offset: 0,
        min_io: 4096,
        opt_io: 0,
        read_only: choice & 2 != 0,
        discard: limits.filter(|_| choice & 4 == 0),
        write_zeroes: limits.filter(|_| choice & 8 == 0),
        zeroes_may_unmap: choice & 16 == 0,
        durable_write: DurableWrite::Emulate,
    }
}

/// Runs one input. The first byte chooses a geometry, and the second the size of the virtqueue. The rest is memory from
/// address 0: descriptors at 0, the available ring at 0x100, the used ring at 0x200. Returns the number of valid requests.
pub fn run(data: &[u8]) -> u64 {
    let [choice, size, bytes @ ..] = data else { return 0 };
    let geometry = geometry(*choice);
    let size = 1u16 << (size % 5);
    let regions = [(GuestAddress(0), REGION as usize), (GuestAddress(REGION), REGION as usize)];
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&regions).expect("memory"));
    let bytes = &bytes[..bytes.len().min(2 * REGION as usize)];
    memory.write_slice(bytes, GuestAddress(0)).expect("inside");
    let mapped = GuestMemory::new(memory.clone());
    let place = RingAddresses { descriptors: 0, available: 0x100, used: 0x200 };
    let mut ring = SplitRing::open(&mapped, &place, size, choice & 32 != 0, (0, 0)).expect("inside one region");
    let mut parser = Parser::default();
    let mut understood = 0;
    // An available index that is too far ahead is an error. With an index of 0 the ring is empty.
    while let Ok(Some(head)) = ring.take() {
        let request = parser.parse(&mapped, head, ring.chain(&mapped, head), &geometry);
        if head < size {
            // This overwrites the guest's memory, perhaps chains that are still to be popped.
            ring.complete(head, 1);
        }
        let Ok(request) = request else { continue };
        let Ok(command) = request.command else { continue };
        understood += 1;
        let segments = parser.data(&command);
        let total: u64 = segments.iter().map(|&(_, len)| u64::from(len)).sum();
        match command {
            BlkCommand::Read { offset, len } | BlkCommand::Write { offset, len } => {
                inside(offset, u64::from(len), &geometry);
                assert_eq!(total, u64::from(len));
                assert!(segments.len() <= 1024);
            }
            BlkCommand::Discard { offset, len } | BlkCommand::WriteZeroes { offset, len, .. } => {
                inside(offset, len, &geometry);
                assert!(len <= SIZE / 2);
            }
            BlkCommand::GetId | BlkCommand::Flush => {}
        }
        if matches!(command, BlkCommand::Write { .. } | BlkCommand::Discard { .. } | BlkCommand::WriteZeroes { .. }) {
            assert!(!geometry.read_only);
        }
        // Every byte of the buffer is in the guest's memory; otherwise the request has no buffer.
        if let Ok(buffer) = mapped.buffer(segments, None) {
            assert_eq!(buffer.len() as u64, total);
            assert!(segments.iter().all(|&(at, len)| len == 0 || memory.check_range(at, len as usize)));
        }
    }
    ring.wants_interrupt();
    ring.enable_kicks();
    understood
}

fn inside(offset: u64, len: u64, geometry: &Geometry) {
    let block = u64::from(geometry.logical_block);
    assert!(offset.checked_add(len).is_some_and(|end| end <= geometry.size), "{offset} {len}");
    assert!(offset.is_multiple_of(block) && len.is_multiple_of(block), "{offset} {len}");
}
