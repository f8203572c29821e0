//! Turns a descriptor chain into a checked [`Request`], or into the status that refuses it. Everything here comes from a
//! guest that may be hostile: every index, sum and cast is checked, and nothing panics.

use std::fmt;

use vm_memory::GuestAddress;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;

use crate::backend::Geometry;
use crate::virtio::blk::features::{SECTOR, sectors};
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
mod tests;
