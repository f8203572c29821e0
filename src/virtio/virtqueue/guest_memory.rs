//! UNSAFE. Guest memory as this process maps it: the one place where a guest address becomes a pointer.
//!
//! The guest chooses every address, so every access checks it. `vm-memory` does that, too, through so many layers that it
//! took a third of the instructions of a small request; here it is one or two comparisons.
#![allow(unsafe_code)]

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{
    AtomicInteger, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::backend::IoBuf;

/// Up to this many regions are scanned one by one; more are searched by bisection. A guest has two or three, unless memory is plugged into it.
const MAX_SCANNED_REGIONS: usize = 8;

/// A piece of guest memory: address and length.
pub type Segment = (GuestAddress, u32);

/// An address outside the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadAddress;

/// The guest's memory for one running virtqueue. Only its worker uses it.
pub struct GuestMemory {
    /// The regions, sorted by address.
    regions: Box<[Region]>,
    memory: Arc<GuestMemoryMmap>,
}

struct Region {
    start: u64,
    len: u64,
    at: NonNull<u8>,
}

// SAFETY: the pointers are into mappings that `memory`, which is Send and Sync, keeps for as long as this value lives. The
// bytes behind them are only copied or accessed as atomics.
unsafe impl Send for GuestMemory {}

/// Sixteen bytes at any address.
#[repr(C, packed)]
struct Unaligned(u128);

impl GuestMemory {
    /// Covers all of `memory`, which stays mapped while this value, or any [`AtomicSlice`] or buffer made from it, lives.
    pub fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        let region = |region: &GuestRegionMmap| {
            let at = NonNull::new(region.as_ptr()).expect("mmap(2) never returns a null pointer");
            Region { start: region.start_addr().0, len: region.len(), at }
        };
        let regions = memory.iter().map(region).collect();
        GuestMemory { regions, memory }
    }

    /// The regions, with their files.
    pub fn table(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Returns a pointer to the byte at `address`, and the number of bytes from there to the end of its region (at least
    /// one).
    #[inline]
    fn find(&self, address: GuestAddress) -> Option<(NonNull<u8>, u64)> {
        let scans = self.regions.len() <= MAX_SCANNED_REGIONS;
        let region = if scans { self.regions.iter().find(|region| region.has(address)) } else { self.search(address) }?;
        let offset = address.0 - region.start;
        // SAFETY: the region contains the address, so the offset is inside its mapping, which `memory` keeps.
        Some((unsafe { region.at.add(offset as usize) }, region.len - offset))
    }

    fn search(&self, address: GuestAddress) -> Option<&Region> {
        let index = self.regions.partition_point(|region| region.start <= address.0).checked_sub(1)?;
        Some(&self.regions[index]).filter(|region| region.has(address))
    }

    /// Makes a buffer of the bytes that `segments` name; the buffer keeps them mapped. A segment may cross from one region
    /// into the next. `spare`: an old buffer whose allocations are reused.
    pub fn buffer(&self, segments: &[Segment], spare: Option<IoBuf>) -> Result<IoBuf, BadAddress> {
        let (mut iovecs, keep) = spare.map(IoBuf::into_parts).unwrap_or_default();
        for &(mut address, len) in segments {
            let mut left = u64::from(len);
            while left > 0 {
                let (at, rest) = self.find(address).ok_or(BadAddress)?;
                let part = left.min(rest);
                iovecs.push(libc::iovec { iov_base: at.as_ptr().cast(), iov_len: part as usize });
                left -= part;
                // This does not wrap to address 0: no region ends at the last address (`memory_table`).
                address = GuestAddress(address.0.wrapping_add(part));
            }
        }
        // SAFETY: every iovec lies inside a region of `memory`, which stays mapped for as long as an Arc of it lives, and
        // the IoBuf keeps one until it is dropped. No code makes references to guest memory but to atomics.
        Ok(unsafe { IoBuf::from_iovecs(iovecs, self.keep(keep)) })
    }

    /// Returns a handle that keeps the memory mapped: that of `spare` if it keeps the same memory, which is cheaper than a
    /// new one.
    #[inline]
    fn keep(&self, old: Option<Arc<dyn Any + Send + Sync>>) -> Arc<dyn Any + Send + Sync> {
        match old {
            Some(old) if std::ptr::addr_eq(Arc::as_ptr(&old), Arc::as_ptr(&self.memory)) => old,
            _ => self.memory.clone(),
        }
    }

    /// Reads the sixteen bytes at `address`: a descriptor, the header of a request, or a range. They are read once, so the
    /// caller checks the same bytes that it uses.
    #[inline]
    pub fn read_sixteen(&self, address: GuestAddress) -> Result<[u8; 16], BadAddress> {
        let (at, rest) = self.find(address).ok_or(BadAddress)?;
        if rest < 16 {
            let mut bytes = [0; 16];
            self.read(address, &mut bytes)?;
            return Ok(bytes);
        }
        // SAFETY: sixteen bytes from `at` on are inside a mapping that `memory` keeps; the type needs no alignment and
        // accepts any bytes. The guest may write to them meanwhile: a volatile read happens here and only here.
        let Unaligned(bytes) = unsafe { at.cast::<Unaligned>().as_ptr().read_volatile() };
        Ok(bytes.to_ne_bytes())
    }

    /// Copies the bytes from `address` on, across regions if necessary. Slower than the other methods, for rare requests.
    pub fn read(&self, address: GuestAddress, to: &mut [u8]) -> Result<(), BadAddress> {
        self.memory.read_slice(to, address).map_err(|_| BadAddress)
    }

    /// Stores one byte: the status of a request.
    #[inline]
    pub fn store(&self, address: GuestAddress, byte: u8) -> Result<(), BadAddress> {
        let (at, _) = self.find(address).ok_or(BadAddress)?;
        // SAFETY: one byte inside a mapping that `memory`, borrowed for longer than the reference, keeps.
        unsafe { at.cast::<AtomicU8>().as_ref() }.store(byte, Ordering::Relaxed);
        Ok(())
    }

    /// Returns `count` atomics from `address` on, or `None` when they are not aligned or do not lie in one region.
    pub fn atomic_slice<A: AtomicInteger>(&self, address: u64, count: usize) -> Option<AtomicSlice<A>> {
        let (at, rest) = self.find(GuestAddress(address))?;
        let bytes = count.checked_mul(size_of::<A>())?;
        let first = at.cast::<A>();
        let fits = first.is_aligned() && rest >= bytes as u64;
        fits.then(|| AtomicSlice { first, count, _memory: self.memory.clone(), _atomics: PhantomData })
    }
}

impl Region {
    #[inline]
    fn has(&self, address: GuestAddress) -> bool {
        address.0.wrapping_sub(self.start) < self.len
    }
}

/// Atomics in guest memory, such as a part of a virtqueue. They keep that memory mapped.
pub struct AtomicSlice<A> {
    first: NonNull<A>,
    count: usize,
    _memory: Arc<GuestMemoryMmap>,
    _atomics: PhantomData<A>,
}

// SAFETY: as for `GuestMemory`; atomics may be used from any thread.
unsafe impl<A: AtomicInteger> Send for AtomicSlice<A> {}

impl<A: AtomicInteger> Deref for AtomicSlice<A> {
    type Target = [A];

    #[inline]
    fn deref(&self) -> &[A] {
        // SAFETY: `atomic_slice` found that many aligned atomics inside one region, which `_memory` keeps mapped for longer
        // than the reference. The guest changes them meanwhile, which atomics allow, and every value of the bytes is valid.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU16, AtomicU64};

    use super::*;

    /// Two regions side by side, a hole, and one more.
    fn mapped() -> GuestMemory {
        let regions = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000), (GuestAddress(0x8000), 0x1000)];
        let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let bytes: Vec<u8> = (0..0x2000u32).map(|at| (at % 251) as u8).collect();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        GuestMemory::new(Arc::new(memory))
    }

    fn wanted<const N: usize>(at: usize) -> [u8; N] {
        std::array::from_fn(|index| ((at + index) % 251) as u8)
    }

    #[test]
    fn addresses_are_found_in_any_order() {
        let mapped = mapped();
        let places: [u64; 8] = [0, 0xfff, 0x1000, 0x8000, 0x1fff, 0x8fff, 1, 0x1001];
        for (byte, at) in (1..).zip(places) {
            mapped.store(GuestAddress(at), byte).unwrap();
        }
        for (byte, at) in (1..).zip(places) {
            assert_eq!(mapped.memory.read_obj::<u8>(GuestAddress(at)).unwrap(), byte, "{at:#x}");
        }
        for at in [0x2000, 0x7fff, 0x9000, u64::MAX] {
            assert_eq!(mapped.store(GuestAddress(at), 1), Err(BadAddress), "{at:#x}");
        }
    }

    #[test]
    fn many_regions_are_searched_and_few_looked_through() {
        for count in [1, MAX_SCANNED_REGIONS, MAX_SCANNED_REGIONS + 1, 100] {
            let regions: Vec<_> =
                (0..count as u64).map(|index| (GuestAddress(index * 0x3000 + 0x1000), 0x1000)).collect();
            let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
            regions.iter().for_each(|&(at, _)| memory.write_obj(at.0, at).unwrap());
            let mapped = GuestMemory::new(Arc::new(memory));
            for (GuestAddress(at), len) in regions {
                let start = mapped.read_sixteen(GuestAddress(at)).unwrap();
                assert_eq!(start[..8], at.to_ne_bytes(), "of {count}");
                let last = at + len as u64 - 1;
                assert_eq!(
                    [at - 1, at, last, last + 1].map(|at| mapped.store(GuestAddress(at), 0).is_ok()),
                    [false, true, true, false]
                );
            }
        }
    }

    #[test]
    fn no_memory_has_no_addresses() {
        let mapped = GuestMemory::new(Arc::new(GuestMemoryMmap::new()));
        assert_eq!(mapped.read_sixteen(GuestAddress(0)), Err(BadAddress));
        assert!(mapped.atomic_slice::<AtomicU16>(0, 0).is_none());
    }

    #[test]
    fn what_is_read_may_cross_regions_and_be_anywhere() {
        let mapped = mapped();
        for at in [0, 1, 7, 0xff0, 0xff1, 0xfff, 0x1000, 0x1ff0] {
            assert_eq!(mapped.read_sixteen(GuestAddress(at as u64)), Ok(wanted(at)), "{at:#x}");
        }
        for at in [0x1ff1, 0x7ff8, 0x8ff1, 0x9000, u64::MAX - 7] {
            assert_eq!(mapped.read_sixteen(GuestAddress(at)), Err(BadAddress), "{at:#x}");
        }
        let mut bytes = [0; 5];
        mapped.read(GuestAddress(0xffe), &mut bytes).unwrap();
        assert_eq!(bytes, wanted(0xffe));
        assert_eq!(mapped.read(GuestAddress(0x1ffe), &mut bytes), Err(BadAddress));
    }

    #[test]
    fn a_buffer_has_the_bytes_that_were_named_in_their_order() {
        let mapped = mapped();
        let named = [(GuestAddress(0xf00), 0x200), (GuestAddress(5), 3), (GuestAddress(0x9000), 0)];
        let buffer = mapped.buffer(&named, None).unwrap();
        assert_eq!((buffer.len(), buffer.iovecs().len()), (0x203, 3));
        let mut bytes = [0; 0x203];
        buffer.copy_to(0, &mut bytes);
        assert_eq!((&bytes[..0x200], &bytes[0x200..]), (&wanted::<0x200>(0xf00)[..], &wanted::<3>(5)[..]));
        for outside in [(0x1f00, 0x200), (0x8000, 0x1001), (0x7fff, 2), (u64::MAX, 2), (0, u32::MAX)] {
            let (at, len) = outside;
            assert!(mapped.buffer(&[(GuestAddress(at), len)], None).is_err(), "{at:#x} {len:#x}");
        }
    }

    #[test]
    fn an_old_buffer_is_reused_only_where_it_keeps_the_same_memory() {
        let (mapped, other) = (mapped(), super::tests::mapped());
        let old = mapped.buffer(&[(GuestAddress(1), 2), (GuestAddress(3), 4)], None).unwrap();
        let handles = Arc::strong_count(&mapped.memory);
        let new = mapped.buffer(&[(GuestAddress(5), 3)], Some(old)).unwrap();
        assert_eq!((Arc::strong_count(&mapped.memory), new.len(), new.iovecs().len()), (handles, 3, 1));
        let foreign = other.buffer(&[(GuestAddress(5), 3)], Some(new)).unwrap();
        assert_eq!((Arc::strong_count(&mapped.memory), Arc::strong_count(&other.memory)), (handles - 1, 2));
        drop(other);
        let mut bytes = [0; 3];
        foreign.copy_to(0, &mut bytes);
        assert_eq!(bytes, wanted(5));
    }

    #[test]
    fn atomic_slices_lie_in_one_region_and_are_aligned() {
        let mapped = mapped();
        let atomic_slice = mapped.atomic_slice::<AtomicU16>(0xff0, 8).unwrap();
        atomic_slice[7].store(0x1234, Ordering::Relaxed);
        assert_eq!((atomic_slice.len(), mapped.memory.read_obj::<u16>(GuestAddress(0xffe)).unwrap()), (8, 0x1234));
        assert!(mapped.atomic_slice::<AtomicU16>(0xff0, 9).is_none(), "across regions");
        assert!(mapped.atomic_slice::<AtomicU16>(0xff1, 1).is_none(), "not aligned");
        assert!(mapped.atomic_slice::<AtomicU64>(0xff4, 1).is_none(), "not aligned");
        assert!(mapped.atomic_slice::<AtomicU64>(0, usize::MAX).is_none(), "longer than all memory");
    }

    #[test]
    fn an_atomic_slice_keeps_its_memory_mapped() {
        let atomic_slice = mapped().atomic_slice::<AtomicU16>(0x8000, 1).unwrap();
        atomic_slice[0].store(1, Ordering::Relaxed);
        assert_eq!(atomic_slice[0].load(Ordering::Relaxed), 1);
    }
}
