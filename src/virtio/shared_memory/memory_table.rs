//! The front-end's memory table: the guest's memory regions, and the front-end's own addresses of them.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vhost::vhost_user::{Error, Result};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::region::whole_pages;
use super::sigbus::{GuardedMapping, SessionSocket};
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};

/// How many memory regions a front-end may add. QEMU asks for this number; its own limit is 512.
pub const MAX_REGIONS: u64 = 509;

/// The memory table of one session. A running ring holds its own `Arc` of the table that it started with, so a region stays
/// mapped until the last ring that may access it has stopped.
pub struct MemoryTable {
    mappings: Vec<Mapping>,
    memory: Arc<GuestMemoryMmap>,
    /// The session that ends when a region vanishes.
    socket: Arc<SessionSocket>,
}

/// A region as the front-end addresses it in SET_VRING_ADDR.
struct Mapping {
    user_addr: u64,
    guest_addr: u64,
    size: u64,
    source: FileOffset,
    /// Dropped while every ring is stopped, and before the last `Arc` of the region.
    _guard: GuardedMapping,
}

impl MemoryTable {
    /// A table without memory.
    pub(in crate::virtio) fn new(socket: Arc<SessionSocket>) -> Self {
        MemoryTable { mappings: Vec::new(), memory: Arc::new(GuestMemoryMmap::new()), socket }
    }

    /// The session that ends when memory vanishes.
    pub(in crate::virtio) fn socket(&self) -> &Arc<SessionSocket> {
        &self.socket
    }

    /// The regions as the front-end described them, each with its file.
    pub(in crate::virtio) fn record(&self) -> impl Iterator<Item = (VhostUserMemoryRegion, &File)> {
        self.mappings.iter().map(|mapping| (mapping.description(), mapping.source.file()))
    }

    /// The present memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// An `Arc` of the present memory, for one ring to hold while it runs. Each ring gets an `Arc` of its own, so that no two
    /// rings share the cache line of a reference count.
    pub fn pin(&self) -> Arc<GuestMemoryMmap> {
        Arc::new((*self.memory).clone())
    }

    /// Replaces all regions (SET_MEM_TABLE).
    pub fn replace(&mut self, table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let (mut regions, mut mappings) = (Vec::new(), Vec::new());
        for (region, file) in table.iter().zip(files) {
            let mapped = map(region, file)?;
            mappings.push(Mapping::of(region, &mapped, &self.socket));
            regions.push(Arc::new(mapped));
        }
        // vm-memory needs the regions in order; the message may have them in any order.
        regions.sort_by_key(|region| region.start_addr());
        let memory = GuestMemoryMmap::from_arc_regions(regions).map_err(invalid)?;
        self.mappings = mappings;
        self.publish(memory);
        Ok(())
    }

    /// Adds a region (ADD_MEM_REG).
    pub fn add(&mut self, region: &VhostUserSingleMemoryRegion, file: File) -> Result<()> {
        if self.mappings.len() as u64 >= MAX_REGIONS {
            log_limited!(
                FRONT_END_LOG,
                Error,
                "the front-end adds more than the {MAX_REGIONS} memory regions that GET_MAX_MEM_SLOTS allows"
            );
            return Err(Error::InvalidParam);
        }
        let mapped = map(region, file)?;
        let mapping = Mapping::of(region, &mapped, &self.socket);
        let memory = self.memory.insert_region(Arc::new(mapped)).map_err(invalid)?;
        self.mappings.push(mapping);
        self.publish(memory);
        Ok(())
    }

    /// Removes the region with this guest address and size (REM_MEM_REG).
    pub fn remove(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (memory, _) =
            self.memory.remove_region(GuestAddress(region.guest_phys_addr), region.memory_size).map_err(invalid)?;
        self.mappings.retain(|mapping| mapping.guest_addr != region.guest_phys_addr);
        self.publish(memory);
        Ok(())
    }

    /// Translates an address of the front-end's to a guest address. `None`: the front-end does not share that memory.
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
    fn of(region: &VhostUserMemoryRegion, mapped: &GuestRegionMmap, socket: &Arc<SessionSocket>) -> Self {
        Mapping {
            user_addr: region.user_addr,
            guest_addr: region.guest_phys_addr,
            size: region.memory_size,
            source: mapped.file_offset().expect("it was mapped from a file").clone(),
            _guard: GuardedMapping::new(mapped.as_ptr(), mapped.size(), socket),
        }
    }

    fn description(&self) -> VhostUserMemoryRegion {
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
    // An access behind the end of the file would cause SIGBUS. Only regular files have an end.
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
