//! The front-end's memory table: guest-physical regions, and the front-end's own addresses for them.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vhost::vhost_user::{Error, Result};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::region::whole_pages;
use super::sigbus::{GuardedMapping, SessionSocket};
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};

/// Memory regions that a front-end may add (QEMU asks; its own limit is 512).
pub const MAX_REGIONS: u64 = 509;

/// The memory table of one connection. A ring that runs holds its own `Arc` of the table it started with, so a region stays
/// mapped until the last ring that may touch it has stopped.
pub struct MemoryTable {
    mappings: Vec<Mapping>,
    memory: Arc<GuestMemoryMmap>,
    /// Where a region that vanishes is told of.
    wire: Arc<SessionSocket>,
}

/// A region as the front-end addresses it in SET_VRING_ADDR.
struct Mapping {
    user_addr: u64,
    guest_addr: u64,
    size: u64,
    source: FileOffset,
    /// Dropped while every ring is stopped, and before the last `Arc` of the region.
    _watched: GuardedMapping,
}

impl MemoryTable {
    /// No memory yet.
    pub(in crate::virtio) fn new(wire: Arc<SessionSocket>) -> Self {
        MemoryTable { mappings: Vec::new(), memory: Arc::new(GuestMemoryMmap::new()), wire }
    }

    /// The connection that ends when memory vanishes.
    pub(in crate::virtio) fn wire(&self) -> &Arc<SessionSocket> {
        &self.wire
    }

    /// The regions as the front-end told of them, each with its file.
    pub(in crate::virtio) fn record(&self) -> impl Iterator<Item = (VhostUserMemoryRegion, &File)> {
        self.mappings.iter().map(|mapping| (mapping.told(), mapping.source.file()))
    }

    /// Today's table.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// An `Arc` of today's table for one ring to hold while it runs. A fresh one a ring: its reference count is then
    /// on no other ring's cache line.
    pub fn pin(&self) -> Arc<GuestMemoryMmap> {
        Arc::new((*self.memory).clone())
    }

    /// SET_MEM_TABLE.
    pub fn replace(&mut self, table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let (mut regions, mut mappings) = (Vec::new(), Vec::new());
        for (region, file) in table.iter().zip(files) {
            let mapped = map(region, file)?;
            mappings.push(Mapping::of(region, &mapped, &self.wire));
            regions.push(Arc::new(mapped));
        }
        // vm-memory wants them in order; the message needs to have none.
        regions.sort_by_key(|region| region.start_addr());
        let memory = GuestMemoryMmap::from_arc_regions(regions).map_err(invalid)?;
        self.mappings = mappings;
        self.publish(memory);
        Ok(())
    }

    /// ADD_MEM_REG.
    pub fn add(&mut self, region: &VhostUserSingleMemoryRegion, file: File) -> Result<()> {
        if self.mappings.len() as u64 >= MAX_REGIONS {
            log_limited!(
                FRONT_END_LOG,
                Error,
                "the front-end adds more than the {MAX_REGIONS} memory regions that GET_MAX_MEM_SLOTS told it of"
            );
            return Err(Error::InvalidParam);
        }
        let mapped = map(region, file)?;
        let mapping = Mapping::of(region, &mapped, &self.wire);
        let memory = self.memory.insert_region(Arc::new(mapped)).map_err(invalid)?;
        self.mappings.push(mapping);
        self.publish(memory);
        Ok(())
    }

    /// REM_MEM_REG: the region is named by its guest address, user address and size.
    pub fn remove(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (memory, _) =
            self.memory.remove_region(GuestAddress(region.guest_phys_addr), region.memory_size).map_err(invalid)?;
        self.mappings.retain(|mapping| mapping.guest_addr != region.guest_phys_addr);
        self.publish(memory);
        Ok(())
    }

    /// The guest address behind one of the front-end's. `None`: it is not in memory that the front-end shares.
    pub fn guest_address(&self, user_addr: u64) -> Option<u64> {
        self.mappings.iter().find_map(|mapping| {
            let offset = user_addr.checked_sub(mapping.user_addr)?;
            (offset < mapping.size).then(|| mapping.guest_addr + offset)
        })
    }

    fn publish(&mut self, memory: GuestMemoryMmap) {
        log::debug!("guest memory: {} regions, {} bytes", memory.num_regions(), bytes(&memory));
        self.memory = Arc::new(memory);
    }
}

impl Mapping {
    fn of(region: &VhostUserMemoryRegion, mapped: &GuestRegionMmap, wire: &Arc<SessionSocket>) -> Self {
        Mapping {
            user_addr: region.user_addr,
            guest_addr: region.guest_phys_addr,
            size: region.memory_size,
            source: mapped.file_offset().expect("it was mapped from a file").clone(),
            _watched: GuardedMapping::new(mapped.as_ptr(), mapped.size(), wire),
        }
    }

    fn told(&self) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion {
            guest_phys_addr: self.guest_addr,
            memory_size: self.size,
            user_addr: self.user_addr,
            mmap_offset: self.source.start(),
        }
    }
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<GuestRegionMmap> {
    // `guest_addr + offset` must not overflow later.
    region.guest_phys_addr.checked_add(region.memory_size).ok_or(Error::InvalidParam)?;
    let end = region.mmap_offset.checked_add(region.memory_size).ok_or(Error::InvalidParam)?;
    let metadata = file.metadata().map_err(Error::ReqHandlerError)?;
    // Touching what lies behind the end of its file would kill us (SIGBUS). Only regular files have an end.
    if metadata.is_file() && metadata.len() < end {
        log_limited!(
            FRONT_END_LOG,
            Error,
            "the front-end maps bytes up to {end} of a memory file that has {}",
            metadata.len()
        );
        return Err(Error::InvalidParam);
    }
    whole_pages(&file, region.memory_size).map_err(|why| {
        log_limited!(FRONT_END_LOG, Error, "the front-end shares guest memory: {why}");
        Error::InvalidParam
    })?;
    GuestRegionMmap::new(region.mmap_region(file)?, GuestAddress(region.guest_phys_addr)).ok_or(Error::InvalidParam)
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(std::io::Error::other(error))
}

fn bytes(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}
