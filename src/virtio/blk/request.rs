//! Turns a descriptor chain into a checked [`Request`], or into the status that refuses it. Everything here comes from a
//! guest that may be hostile: every index, sum and cast is checked, and nothing panics.

use std::fmt;

use vm_memory::GuestAddress;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;

use super::features::{SECTOR, sectors};
use crate::backend::Geometry;
use crate::virtio::virtqueue::guest_memory::{GuestMemory, Segment};

/// The status byte of a request (virtio 1.3, 5.2.6).
pub type Status = u8;
/// VIRTIO_BLK_S_OK.
pub const OK: Status = VIRTIO_BLK_S_OK as u8;
/// VIRTIO_BLK_S_IOERR.
pub const IOERR: Status = VIRTIO_BLK_S_IOERR as u8;
/// VIRTIO_BLK_S_UNSUPP.
pub const UNSUPP: Status = VIRTIO_BLK_S_UNSUPP as u8;

/// The length in bytes of `struct virtio_blk_req` before the data.
const HEADER: usize = 16;
/// The length in bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE: usize = 16;
/// The bit that old drivers set in a type for a barrier (virtio 0.9.5, VIRTIO_BLK_T_BARRIER). Barriers are not offered,
/// and QEMU ignores the bit (virtio_blk_handle_request).
const BARRIER: u32 = 1 << 31;
/// The type by which old drivers flush (virtio 0.9.5, VIRTIO_BLK_T_FLUSH_OUT). A driver to which it is refused takes the
/// disk for one without a cache, and never flushes again.
const FLUSH_OUT: u32 = VIRTIO_BLK_T_FLUSH | VIRTIO_BLK_T_OUT;
/// GET_ID with the bit of the direction, which QEMU accepts too.
const GET_ID_OUT: u32 = VIRTIO_BLK_T_GET_ID | VIRTIO_BLK_T_OUT;
/// How many bytes of the serial GET_ID returns at most.
pub const ID_BYTES: usize = 20;
/// A request with more data segments than Linux takes in one vectored call (IOV_MAX) is refused.
const MAX_SEGMENTS: usize = 1024;

/// What the guest requests, checked against the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlkCommand {
    /// Read `len` bytes at byte `offset` into the data segments.
    Read {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write the data segments at byte `offset`.
    Write {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Make acknowledged writes durable.
    Flush,
    /// Return the serial.
    GetId,
    /// Discard a range: its content is no longer needed.
    Discard {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Fill a range with zeroes.
    WriteZeroes {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP was set: the range may be deallocated.
        unmap: bool,
    },
}

/// A chain that can be completed: what to do (or the status that refuses it), and where the status byte goes. The data
/// segments stay in the [`Parser`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The chain's head, which identifies the request in its virtqueue.
    pub head: u16,
    /// The guest address of the status byte.
    pub status_at: GuestAddress,
    /// How many bytes the device may write before the status byte.
    pub writable: u32,
    /// What to do. `Err`: complete the request with this status.
    pub command: Result<BlkCommand, Status>,
}

/// A chain without a place for the status byte, or with broken descriptors. It can only be returned without a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The chain's head.
    pub head: u16,
    /// What is wrong with it.
    pub fault: ChainFault,
}

/// Why a chain cannot carry a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainFault {
    /// Its descriptors have more than 4 GiB together.
    TooLong,
    /// A readable descriptor follows a writable one.
    ReadableBehindWritable,
    /// It has a bad address, a loop, or a bad indirect table.
    Broken,
    /// No byte of it is writable.
    NoStatusByte,
    /// Its readable bytes are fewer than a header, or lie outside the guest's memory.
    NoHeader,
}

impl fmt::Display for ChainFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ChainFault::TooLong => "a chain longer than 4 GiB",
            ChainFault::ReadableBehindWritable => "a readable descriptor behind a writable one",
            ChainFault::Broken => "broken descriptor chain",
            ChainFault::NoStatusByte => "no writable byte for the status",
            ChainFault::NoHeader => "no complete request header",
        })
    }
}

/// How many segments a parser has room for between requests.
const SPARE_SEGMENTS: usize = 2 * MAX_SEGMENTS;

/// Parses chains. It reuses its lists for the next request, so that parsing allocates nothing. It frees the lists of a chain
/// that no driver would make, because each ring of a hostile guest could have sent one.
#[derive(Default)]
pub struct Parser {
    /// How many descriptors were read so far.
    walked: u64,
    readable: Vec<Segment>,
    /// How many readable segments are used up, because the header was in them.
    used_up: usize,
    writable: Vec<Segment>,
}

impl Parser {
    /// The data segments of the request that was parsed last: where the data of a read goes, or that of a write comes from.
    pub fn data(&self, command: &BlkCommand) -> &[Segment] {
        match command {
            BlkCommand::Write { .. } => self.readable(),
            _ => &self.writable,
        }
    }

    fn readable(&self) -> &[Segment] {
        &self.readable[self.used_up..]
    }

    /// How many descriptors were read so far. A guest chooses how many a request has, up to 98,302 (all but one of the
    /// largest ring, and an indirect table of 65,535). A worker limits by this number what it does between two checks of its
    /// commands.
    pub fn walked(&self) -> u64 {
        self.walked
    }

    /// Parses one chain. Called by the virtqueue's worker.
    pub fn parse(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        descriptors: impl Iterator<Item = Descriptor>,
        geometry: &Geometry,
    ) -> Result<Request, Malformed> {
        self.collect(descriptors).map_err(|fault| Malformed { head, fault })?;
        let status_at =
            take_last_byte(&mut self.writable).ok_or(Malformed { head, fault: ChainFault::NoStatusByte })?;
        let writable = total(&self.writable);
        let header = self.take_sixteen(memory).ok_or(Malformed { head, fault: ChainFault::NoHeader })?;
        let command = self.decode(memory, &header, geometry);
        Ok(Request { head, status_at, writable, command })
    }

    /// Collects the readable and the writable segments (virtio 1.3, 2.7.4.2: readable ones come first; 2.7.5.2: no more than
    /// 4 GiB in all).
    fn collect(&mut self, descriptors: impl Iterator<Item = Descriptor>) -> Result<(), ChainFault> {
        for list in [&mut self.readable, &mut self.writable] {
            list.clear();
            list.shrink_to(SPARE_SEGMENTS);
        }
        self.used_up = 0;
        let mut more = true;
        let mut bytes = 0u32;
        for descriptor in descriptors {
            self.walked += 1;
            bytes = bytes.checked_add(descriptor.len()).ok_or(ChainFault::TooLong)?;
            more = descriptor.has_next();
            let segment = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                self.writable.push(segment);
            } else if self.writable.is_empty() {
                self.readable.push(segment);
            } else {
                return Err(ChainFault::ReadableBehindWritable);
            }
        }
        // The iterator ends early at a bad address, a loop or a bad indirect table.
        if more { Err(ChainFault::Broken) } else { Ok(()) }
    }

    /// Cuts sixteen bytes off the front of the readable segments and returns them. `None`: there are fewer, or some lie
    /// outside the guest's memory.
    fn take_sixteen(&mut self, memory: &GuestMemory) -> Option<[u8; 16]> {
        let &(address, len) = self.readable().first()?;
        if len != 16 {
            return self.take_sixteen_in_pieces(memory);
        }
        self.used_up += 1;
        memory.read_sixteen(address).ok()
    }

    /// Does the same as [`Parser::take_sixteen`] where the sixteen bytes are no segment of their own.
    #[cold]
    fn take_sixteen_in_pieces(&mut self, memory: &GuestMemory) -> Option<[u8; 16]> {
        let mut bytes = [0; 16];
        let mut done = 0;
        while done < bytes.len() {
            let (address, len) = self.readable.get_mut(self.used_up)?;
            let part = (*len as usize).min(bytes.len() - done);
            memory.read(*address, &mut bytes[done..done + part]).ok()?;
            done += part;
            if part == *len as usize {
                self.used_up += 1;
            } else {
                *address = GuestAddress(address.0.checked_add(part as u64)?);
                *len -= part as u32;
            }
        }
        Some(bytes)
    }

    fn decode(
        &mut self,
        memory: &GuestMemory,
        header: &[u8; HEADER],
        geometry: &Geometry,
    ) -> Result<BlkCommand, Status> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) & !BARRIER {
            VIRTIO_BLK_T_IN => {
                let (offset, len) = data_range(sector, &self.writable, geometry)?;
                Ok(BlkCommand::Read { offset, len })
            }
            VIRTIO_BLK_T_OUT if geometry.read_only => Err(IOERR),
            VIRTIO_BLK_T_OUT => {
                let (offset, len) = data_range(sector, self.readable(), geometry)?;
                Ok(BlkCommand::Write { offset, len })
            }
            VIRTIO_BLK_T_FLUSH | FLUSH_OUT => Ok(BlkCommand::Flush),
            VIRTIO_BLK_T_GET_ID | GET_ID_OUT => Ok(BlkCommand::GetId),
            VIRTIO_BLK_T_DISCARD => self.decode_discard(memory, geometry),
            VIRTIO_BLK_T_WRITE_ZEROES => self.decode_write_zeroes(memory, geometry),
            _ => Err(UNSUPP),
        }
    }

    fn decode_discard(&mut self, memory: &GuestMemory, geometry: &Geometry) -> Result<BlkCommand, Status> {
        let limits = geometry.discard.filter(|_| !geometry.read_only).ok_or(UNSUPP)?;
        let (offset, len, unmap) = self.range(memory, geometry, limits.max_bytes)?;
        // virtio 1.3, 5.2.6.2: the unmap flag belongs to write-zeroes only.
        if unmap { Err(UNSUPP) } else { Ok(BlkCommand::Discard { offset, len }) }
    }

    fn decode_write_zeroes(&mut self, memory: &GuestMemory, geometry: &Geometry) -> Result<BlkCommand, Status> {
        let limits = geometry.write_zeroes.filter(|_| !geometry.read_only).ok_or(UNSUPP)?;
        let (offset, len, unmap) = self.range(memory, geometry, limits.max_bytes)?;
        Ok(BlkCommand::WriteZeroes { offset, len, unmap: unmap && geometry.zeroes_may_unmap })
    }

    /// The range of a discard or write-zeroes: byte offset, length in bytes, unmap flag. Several ranges in one request were
    /// not offered (max_discard_seg is 1).
    fn range(&mut self, memory: &GuestMemory, geometry: &Geometry, max_bytes: u64) -> Result<(u64, u64, bool), Status> {
        match total(self.readable()) as usize {
            RANGE => {}
            len if len > 0 && len.is_multiple_of(RANGE) => return Err(UNSUPP),
            _ => return Err(IOERR),
        }
        let range: [u8; RANGE] = self.take_sixteen(memory).ok_or(IOERR)?;
        let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = range;
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !1 != 0 {
            return Err(UNSUPP);
        }
        if count > sectors(max_bytes) {
            return Err(IOERR);
        }
        let len = u64::from(count) * SECTOR;
        let offset = inside(u64::from_le_bytes(sector), len, geometry)?;
        Ok((offset, len, flags & 1 != 0))
    }
}

/// The byte offset and the length in bytes of a read or write.
fn data_range(sector: u64, segments: &[Segment], geometry: &Geometry) -> Result<(u64, u32), Status> {
    if segments.len() > MAX_SEGMENTS {
        return Err(IOERR);
    }
    let len = total(segments);
    Ok((inside(sector, u64::from(len), geometry)?, len))
}

/// The byte offset of `len` bytes at `sector` if they lie inside the image on logical block boundaries.
fn inside(sector: u64, len: u64, geometry: &Geometry) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(IOERR)?;
    let end = offset.checked_add(len).ok_or(IOERR)?;
    // The block is a power of two. A division would take longer than everything else here.
    let within_block = u64::from(geometry.logical_block) - 1;
    if end > geometry.size || (offset | len) & within_block != 0 {
        return Err(IOERR);
    }
    Ok(offset)
}

/// The length in bytes of segments of one chain. The sum fits, because the chain has no more than 4 GiB.
fn total(segments: &[Segment]) -> u32 {
    segments.iter().map(|&(_, len)| len).sum()
}

/// Cuts the last byte off the writable segments and returns its address: the status byte (virtio 1.3, 2.7.4: no framing may
/// be assumed).
fn take_last_byte(segments: &mut Vec<Segment>) -> Option<GuestAddress> {
    loop {
        let (address, len) = segments.pop()?;
        if len == 0 {
            continue;
        }
        if len > 1 {
            segments.push((address, len - 1));
        }
        return address.0.checked_add(u64::from(len) - 1).map(GuestAddress);
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(
            ask(zeroes, 0, 8, 1, &allocated),
            Ok(BlkCommand::WriteZeroes { offset: 0, len: 4096, unmap: false })
        );
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
}
