use std::sync::Arc;

use super::*;
use crate::backend::{DurableWrite, RangeLimits};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::{Bytes, GuestMemoryMmap};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const HEADER_AT: u64 = 0x1_0000;
const DATA_AT: u64 = 0x2_0000;
const STATUS_AT: u64 = 0x3_0000;

fn memory() -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap())
}

fn mapped(memory: &Arc<GuestMemoryMmap>) -> GuestMemory {
    GuestMemory::new(memory.clone())
}

fn geometry() -> Geometry {
    let limits = Some(RangeLimits { max_bytes: 1 << 20, granularity: 4096 });
    Geometry {
        size: 1 << 20,
        logical_block: 512,
        physical_block: 4096,
        alignment_offset: 0,
        min_io: 0,
        opt_io: 0,
        read_only: false,
        discard: limits,
        write_zeroes: limits,
        zeroes_may_unmap: true,
        durable_write: DurableWrite::Emulate,
    }
}

fn put_header(memory: &Arc<GuestMemoryMmap>, kind: u32, sector: u64) {
    memory.write_obj(kind, GuestAddress(HEADER_AT)).unwrap();
    memory.write_obj(0u32, GuestAddress(HEADER_AT + 4)).unwrap();
    memory.write_obj(sector, GuestAddress(HEADER_AT + 8)).unwrap();
}

fn put_range(memory: &Arc<GuestMemoryMmap>, sector: u64, count: u32, flags: u32) {
    memory.write_obj(sector, GuestAddress(DATA_AT)).unwrap();
    memory.write_obj(count, GuestAddress(DATA_AT + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(DATA_AT + 12)).unwrap();
}

/// Parses a chain of descriptors, given as address, length, and flags without NEXT.
fn parse_with(
    memory: &Arc<GuestMemoryMmap>,
    geometry: &Geometry,
    parts: &[(u64, u32, u16)],
) -> Result<(Request, Vec<Segment>), Malformed> {
    let mock = MockSplitQueue::new(&**memory, 16);
    let last = parts.len() - 1;
    let chain: Vec<RawDescriptor> = parts
        .iter()
        .enumerate()
        .map(|(at, &(address, len, flags))| {
            let next = if at < last { NEXT } else { 0 };
            RawDescriptor::from(Descriptor::new(address, len, flags | next, at as u16 + 1))
        })
        .collect();
    mock.add_desc_chains(&chain, 0).unwrap();
    let mut queue: Queue = mock.create_queue().unwrap();
    let chain = queue.iter(&**memory).unwrap().next().unwrap();
    let mut parser = Parser::default();
    let request = parser.parse(&mapped(memory), chain.head_index(), chain, geometry)?;
    let data = request.command.map(|command| parser.data(&command).to_vec()).unwrap_or_default();
    Ok((request, data))
}

fn parse(memory: &Arc<GuestMemoryMmap>, parts: &[(u64, u32, u16)]) -> Result<(Request, Vec<Segment>), Malformed> {
    parse_with(memory, &geometry(), parts)
}

#[test]
fn a_read_and_a_write_have_their_offset_and_their_data() {
    let memory = memory();
    put_header(&memory, VIRTIO_BLK_T_IN, 8);
    let parts = [(HEADER_AT, 16, 0), (DATA_AT, 1024, WRITE), (STATUS_AT, 1, WRITE)];
    let (request, data) = parse(&memory, &parts).unwrap();
    assert_eq!(request.command, Ok(BlkCommand::Read { offset: 4096, len: 1024 }));
    assert_eq!((request.status_at, request.writable), (GuestAddress(STATUS_AT), 1024));
    assert_eq!(data, [(GuestAddress(DATA_AT), 1024)]);
    put_header(&memory, VIRTIO_BLK_T_OUT, 8);
    let (request, data) = parse(&memory, &[(HEADER_AT, 16, 0), (DATA_AT, 512, 0), (STATUS_AT, 1, WRITE)]).unwrap();
    assert_eq!(request.command, Ok(BlkCommand::Write { offset: 4096, len: 512 }));
    assert_eq!(data, [(GuestAddress(DATA_AT), 512)]);
}

#[test]
fn header_and_status_may_share_descriptors_with_data() {
    let memory = memory();
    put_header(&memory, VIRTIO_BLK_T_OUT, 0);
    // The header in three pieces, the last of them also carrying data; then an empty descriptor and more data.
    let parts = [
        (HEADER_AT, 1, 0),
        (HEADER_AT + 1, 7, 0),
        (HEADER_AT + 8, 8 + 100, 0),
        (DATA_AT, 0, 0),
        (DATA_AT, 412, 0),
        (STATUS_AT, 1, WRITE),
    ];
    let (request, data) = parse(&memory, &parts).unwrap();
    assert_eq!(request.command, Ok(BlkCommand::Write { offset: 0, len: 512 }));
    let carried: u32 = data.iter().map(|&(_, len)| len).sum();
    assert_eq!((data[0], carried), ((GuestAddress(HEADER_AT + 16), 100), 512));
    // Data and status in one descriptor.
    put_header(&memory, VIRTIO_BLK_T_IN, 0);
    let (request, data) = parse(&memory, &[(HEADER_AT, 16, 0), (DATA_AT, 513, WRITE)]).unwrap();
    assert_eq!(request.status_at, GuestAddress(DATA_AT + 512));
    assert_eq!(data, [(GuestAddress(DATA_AT), 512)]);
}

#[test]
fn a_chain_that_cannot_be_completed_is_malformed() {
    let memory = memory();
    put_header(&memory, VIRTIO_BLK_T_IN, 0);
    let cases: &[&[(u64, u32, u16)]] = &[
        &[(HEADER_AT, 16, 0)],
        &[(HEADER_AT, 16, 0), (STATUS_AT, 0, WRITE)],
        &[(HEADER_AT, 15, 0), (STATUS_AT, 1, WRITE)],
        &[(0xffff_ffff_0000, 16, 0), (STATUS_AT, 1, WRITE)],
        &[(u64::MAX - 3, 16, 0), (STATUS_AT, 1, WRITE)],
        &[(STATUS_AT, 1, WRITE), (HEADER_AT, 16, 0)],
        &[(HEADER_AT, 7, INDIRECT)],
        &[(HEADER_AT, 16, 0), (DATA_AT, u32::MAX, WRITE), (STATUS_AT, 1, WRITE)],
    ];
    for parts in cases {
        assert!(parse(&memory, parts).is_err(), "{parts:x?}");
    }
}

#[test]
fn a_chain_with_a_loop_is_malformed() {
    let memory = memory();
    put_header(&memory, VIRTIO_BLK_T_IN, 0);
    let mock = MockSplitQueue::new(&*memory, 16);
    let header = RawDescriptor::from(Descriptor::new(HEADER_AT, 16, NEXT, 1));
    let around = RawDescriptor::from(Descriptor::new(DATA_AT, 512, NEXT | WRITE, 1));
    mock.add_desc_chains(&[header, around], 0).unwrap();
    // add_desc_chains ends the chain. Make its last descriptor point to itself.
    mock.desc_table().store(1, around).unwrap();
    let mut queue: Queue = mock.create_queue().unwrap();
    let chain = queue.iter(&*memory).unwrap().next().unwrap();
    let error = Parser::default().parse(&mapped(&memory), chain.head_index(), chain, &geometry()).unwrap_err();
    assert_eq!(error.fault, ChainFault::Broken);
}

#[test]
fn the_lists_of_a_chain_of_65535_descriptors_are_freed() {
    let memory = memory();
    put_header(&memory, VIRTIO_BLK_T_IN, 0);
    let chain = |len: u16, flags: u16| {
        (0..len).map(move |at| match at {
            0 => Descriptor::new(HEADER_AT, 16, NEXT, 1),
            _ if at + 1 < len => Descriptor::new(DATA_AT, 512, NEXT | flags, at + 1),
            _ => Descriptor::new(STATUS_AT, 1, WRITE, 0),
        })
    };
    let mut parser = Parser::default();
    for flags in [0, WRITE] {
        let request = parser.parse(&mapped(&memory), 0, chain(u16::MAX, flags), &geometry()).unwrap();
        let wanted = if flags == WRITE { Err(IOERR) } else { Ok(BlkCommand::Read { offset: 0, len: 0 }) };
        assert_eq!((request.status_at, request.command), (GuestAddress(STATUS_AT), wanted));
    }
    assert_eq!(parser.walked(), 2 * 65_535);
    let request = parser.parse(&mapped(&memory), 0, chain(3, WRITE), &geometry()).unwrap();
    assert_eq!(request.command, Ok(BlkCommand::Read { offset: 0, len: 512 }));
    let spare = parser.readable.capacity() + parser.writable.capacity();
    assert!(spare <= 2 * SPARE_SEGMENTS, "there is room for {spare} segments");
}

#[test]
fn a_request_outside_the_image_is_refused() {
    let memory = memory();
    let last = geometry().size / SECTOR - 1;
    for (kind, flag) in [(VIRTIO_BLK_T_IN, WRITE), (VIRTIO_BLK_T_OUT, 0)] {
        for (sector, len, inside) in [
            (last, 512, true),
            (last, 1024, false),
            (last + 1, 512, false),
            (last + 1, 0, true),
            (last + 2, 0, false),
            (u64::MAX, 512, false),
            (u64::MAX / 512, 512, false),
            (0, 511, false),
            (0, 513, false),
        ] {
            put_header(&memory, kind, sector);
            let parts = [(HEADER_AT, 16, 0), (DATA_AT, len, flag), (STATUS_AT, 1, WRITE)];
            let (request, _) = parse(&memory, &parts).unwrap();
            assert_eq!(request.command.is_ok(), inside, "{kind} {sector} {len}: {:?}", request.command);
            assert!(inside || request.command == Err(IOERR));
        }
    }
}

#[test]
fn a_request_that_is_not_aligned_to_the_logical_block_is_refused() {
    let memory = memory();
    let geometry = Geometry { logical_block: 4096, ..geometry() };
    for (sector, len, fine) in [(8, 4096, true), (1, 4096, false), (8, 512, false)] {
        put_header(&memory, VIRTIO_BLK_T_IN, sector);
        let parts = [(HEADER_AT, 16, 0), (DATA_AT, len, WRITE), (STATUS_AT, 1, WRITE)];
        let (request, _) = parse_with(&memory, &geometry, &parts).unwrap();
        assert_eq!(request.command.is_ok(), fine);
    }
}

#[test]
fn a_discard_and_a_write_zeroes_are_checked_against_their_limits() {
    let memory = memory();
    let parts = [(HEADER_AT, 16, 0), (DATA_AT, 16, 0), (STATUS_AT, 1, WRITE)];
    let ask = |kind, sector, count, flags, geometry: &Geometry| {
        put_header(&memory, kind, 0);
        put_range(&memory, sector, count, flags);
        parse_with(&memory, geometry, &parts).unwrap().0.command
    };
    let (discard, zeroes, plain) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES, geometry());
    assert_eq!(ask(discard, 8, 8, 0, &plain), Ok(BlkCommand::Discard { offset: 4096, len: 4096 }));
    assert_eq!(ask(discard, 8, 8, 1, &plain), Err(UNSUPP), "unmap belongs to write-zeroes");
    assert_eq!(ask(zeroes, 8, 8, 1, &plain), Ok(BlkCommand::WriteZeroes { offset: 4096, len: 4096, unmap: true }));
    assert_eq!(ask(zeroes, 8, 8, 2, &plain), Err(UNSUPP), "reserved flag");
    assert_eq!(ask(zeroes, 2047, 2, 0, &plain), Err(IOERR), "past the end");
    assert_eq!(ask(zeroes, u64::MAX, u32::MAX, 0, &plain), Err(IOERR));
    let allocated = Geometry { zeroes_may_unmap: false, ..plain };
    assert_eq!(ask(zeroes, 0, 8, 1, &allocated), Ok(BlkCommand::WriteZeroes { offset: 0, len: 4096, unmap: false }));
    let short = RangeLimits { max_bytes: 512, granularity: 512 };
    assert_eq!(ask(discard, 0, 2, 0, &Geometry { discard: Some(short), ..plain }), Err(IOERR), "over the limit");
    assert_eq!(ask(discard, 0, 8, 0, &Geometry { discard: None, ..plain }), Err(UNSUPP));
    assert_eq!(ask(zeroes, 0, 8, 0, &Geometry { read_only: true, ..plain }), Err(UNSUPP));
    // Two ranges were not offered; half a range is an error.
    put_header(&memory, discard, 0);
    for (len, status) in [(32, UNSUPP), (8, IOERR), (0, IOERR)] {
        let parts = [(HEADER_AT, 16, 0), (DATA_AT, len, 0), (STATUS_AT, 1, WRITE)];
        assert_eq!(parse(&memory, &parts).unwrap().0.command, Err(status));
    }
}

#[test]
fn flush_and_get_id_are_parsed_and_unknown_types_are_unsupported() {
    let memory = memory();
    let parts = [(HEADER_AT, 16, 0), (DATA_AT, 20, WRITE), (STATUS_AT, 1, WRITE)];
    for (kind, command) in [
        (VIRTIO_BLK_T_FLUSH, Ok(BlkCommand::Flush)),
        (VIRTIO_BLK_T_GET_ID, Ok(BlkCommand::GetId)),
        (5, Ok(BlkCommand::Flush)),
        (9, Ok(BlkCommand::GetId)),
        // SCSI commands, and types of zoned disks and of secure erase.
        (2, Err(UNSUPP)),
        (3, Err(UNSUPP)),
        (10, Err(UNSUPP)),
        (14, Err(UNSUPP)),
        (i32::MAX as u32, Err(UNSUPP)),
    ] {
        for barrier in [0, BARRIER] {
            put_header(&memory, kind | barrier, 0);
            assert_eq!(parse(&memory, &parts).unwrap().0.command, command, "{kind}");
        }
    }
    put_header(&memory, VIRTIO_BLK_T_GET_ID, 0);
    let short = [(HEADER_AT, 16, 0), (DATA_AT, 19, WRITE), (STATUS_AT, 1, WRITE)];
    assert_eq!(parse(&memory, &short).unwrap().0.command, Ok(BlkCommand::GetId));
    put_header(&memory, VIRTIO_BLK_T_OUT, 0);
    let write = [(HEADER_AT, 16, 0), (DATA_AT, 512, 0), (STATUS_AT, 1, WRITE)];
    let read_only = Geometry { read_only: true, ..geometry() };
    assert_eq!(parse_with(&memory, &read_only, &write).unwrap().0.command, Err(IOERR));
}
