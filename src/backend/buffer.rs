//! UNSAFE. The memory of one transfer: a list of iovecs, and a handle that keeps their memory mapped.
#![allow(unsafe_code)]

use std::any::Any;
use std::sync::{Arc, OnceLock};

/// Bytes of the longest buffer that [`IoBuf::zeroes`] creates.
pub const MAX_ZEROES: usize = 1 << 20;

/// Bytes of the shared zero memory, and its alignment.
pub const ZERO_PART: usize = 64 << 10;

/// The memory of one read or write: iovecs into guest memory (or into memory of our own, in tests), and a handle that
/// keeps it mapped. It moves into an [`super::Op`] and comes back in its [`super::Completion`].
///
/// The guest may change the bytes at any time, so they are only ever copied, never borrowed as a slice.
pub struct IoBuf {
    iovecs: Vec<libc::iovec>,
    len: usize,
    /// Keeps every iovec's memory mapped for as long as this value lives.
    _keep: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: the iovecs point into memory kept mapped by `_keep`, which is Send + Sync; access to the bytes is by raw
// copies only, never through references, so no aliasing rule is broken.
unsafe impl Send for IoBuf {}

/// An empty iovec list to be reused.
#[derive(Default)]
pub(super) struct IovecList(pub(super) Vec<libc::iovec>);

// SAFETY: a list of addresses alone; code that dereferences them has its own safety argument.
unsafe impl Send for IovecList {}

impl std::fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBuf({} bytes in {} parts)", self.len, self.iovecs.len())
    }
}

/// Memory of our own behind an [`IoBuf`]. It is a raw allocation, because it is accessed through raw pointers only.
struct Owned {
    start: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: plain heap memory, freed once by `drop`; accessed by raw copies alone, through an IoBuf.
unsafe impl Send for Owned {}
// SAFETY: as above; no method hands out a reference to the bytes.
unsafe impl Sync for Owned {}

impl Owned {
    fn zeroed(len: usize, align: usize) -> Self {
        assert!(len > 0);
        let layout = std::alloc::Layout::from_size_align(len, align).expect("a valid layout");
        // SAFETY: the size is not zero.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        if start.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Owned { start, layout }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with this layout and is freed only here.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
    }
}

/// Memory of our own that one transfer after the other uses.
pub(super) struct Memory(Arc<Owned>);

impl Memory {
    /// Allocates `len` > 0 zeroed bytes, aligned to `align` (a power of two).
    pub(super) fn new(len: usize, align: usize) -> Self {
        Memory(Arc::new(Owned::zeroed(len, align)))
    }

    /// Returns the size in bytes.
    pub(super) fn len(&self) -> usize {
        self.0.layout.size()
    }

    /// Returns the first `len` bytes as a buffer, which keeps them allocated. `scratch` is an old iovec list to reuse.
    /// Panics if the memory is shorter.
    pub(super) fn lend(&self, len: usize, scratch: Vec<libc::iovec>) -> IoBuf {
        assert!(len <= self.len(), "longer than the memory");
        let mut iovecs = scratch;
        iovecs.clear();
        iovecs.push(libc::iovec { iov_base: self.0.start.cast(), iov_len: len });
        IoBuf { iovecs, len, _keep: Some(self.0.clone()) }
    }

    /// Whether every buffer of [`Memory::lend`] was dropped.
    pub(super) fn is_free(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl IoBuf {
    /// Wraps iovecs.
    ///
    /// # Safety
    /// Every iovec must stay valid for reads and writes for as long as `keep` lives, and no Rust reference to that
    /// memory may exist meanwhile.
    pub unsafe fn from_iovecs(iovecs: Vec<libc::iovec>, keep: Arc<dyn Any + Send + Sync>) -> Self {
        let len = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        IoBuf { iovecs, len, _keep: Some(keep) }
    }

    /// Allocates `len` > 0 zeroed bytes of our own. They start `skew` bytes after a multiple of `align` (a power of
    /// two); tests make unaligned buffers with that.
    pub fn owned(len: usize, align: usize, skew: usize) -> Self {
        let owned = Owned::zeroed(len + skew, align);
        // SAFETY: start + skew .. + len lies inside the allocation of len + skew bytes.
        let base = unsafe { owned.start.add(skew) };
        let iovec = libc::iovec { iov_base: base.cast(), iov_len: len };
        IoBuf { iovecs: vec![iovec], len, _keep: Some(Arc::new(owned)) }
    }

    /// Allocates memory as [`IoBuf::owned`] does, as several iovecs of the given lengths. For tests.
    pub fn owned_parts(lens: &[usize], align: usize) -> Self {
        let mut whole = Self::owned(lens.iter().sum(), align, 0);
        let mut base = whole.iovecs[0].iov_base.cast::<u8>();
        whole.iovecs.clear();
        for &len in lens {
            whole.iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: len });
            // SAFETY: the lengths add up to the allocation's, so this stays inside it or one past its end.
            base = unsafe { base.add(len) };
        }
        whole
    }

    /// Returns `len` zero bytes to write, at most [`MAX_ZEROES`]. All such buffers share one small allocation, aligned
    /// to [`ZERO_PART`], so nothing may be read into one.
    pub fn zeroes(len: usize) -> Self {
        assert!(len <= MAX_ZEROES);
        static PAGE: OnceLock<Arc<Owned>> = OnceLock::new();
        let page = PAGE.get_or_init(|| Arc::new(Owned::zeroed(ZERO_PART, ZERO_PART)));
        let part = |at: usize| libc::iovec { iov_base: page.start.cast(), iov_len: (len - at).min(ZERO_PART) };
        IoBuf { iovecs: (0..len).step_by(ZERO_PART).map(part).collect(), len, _keep: Some(page.clone()) }
    }

    /// Visits all bytes in order, copied part by part into `scratch`, so that they cannot change during a visit.
    pub fn visit(&self, scratch: &mut [u8], mut visit: impl FnMut(&[u8])) {
        assert!(!scratch.is_empty());
        for iovec in &self.iovecs {
            for at in (0..iovec.iov_len).step_by(scratch.len()) {
                let len = (iovec.iov_len - at).min(scratch.len());
                // SAFETY: at + len <= iov_len, and `_keep` keeps the iovec's memory mapped; `scratch` is ours and does
                // not overlap it (no Rust reference to an iovec's memory exists).
                unsafe {
                    let from = iovec.iov_base.cast::<u8>().add(at);
                    std::ptr::copy_nonoverlapping(from, scratch.as_mut_ptr(), len);
                }
                visit(&scratch[..len]);
            }
        }
    }

    /// Whether every iovec starts at a multiple of `address` and is a multiple of `length` bytes long (powers of two),
    /// as O_DIRECT requires.
    #[inline]
    pub fn is_aligned(&self, address: usize, length: usize) -> bool {
        self.iovecs.iter().all(|part| (part.iov_base as usize) & (address - 1) == 0 && part.iov_len & (length - 1) == 0)
    }

    /// Returns the length of all iovecs in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the iovecs, for the kernel.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// Appends the iovecs of `len` bytes from `offset` on to `to`. Panics if the range is not inside.
    pub fn push_range(&self, offset: usize, len: usize, to: &mut Vec<libc::iovec>) {
        self.walk(offset, len, |part, _, len| to.push(libc::iovec { iov_base: part.cast(), iov_len: len }));
    }

    /// Returns the buffer and leaves one without any memory.
    #[inline]
    pub(super) fn take(&mut self) -> IoBuf {
        std::mem::replace(self, IoBuf { iovecs: Vec::new(), len: 0, _keep: None })
    }

    /// Returns the emptied iovec list for reuse, and releases the memory.
    pub fn into_iovecs(self) -> Vec<libc::iovec> {
        self.into_parts().0
    }

    /// Returns the emptied iovec list, and the handle of its memory, for the next buffer over the same memory.
    pub fn into_parts(mut self) -> (Vec<libc::iovec>, Option<Arc<dyn Any + Send + Sync>>) {
        self.iovecs.clear();
        (std::mem::take(&mut self.iovecs), self._keep.take())
    }

    /// Copies from `offset` of this buffer into `to`. Panics if the range is not inside (a bug, not input).
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) {
        self.walk(offset, to.len(), |part, at, len| {
            // SAFETY: `part` is inside an iovec that `_keep` keeps mapped; `to` is ours and does not overlap it (no
            // Rust reference to an iovec's memory exists).
            unsafe { std::ptr::copy_nonoverlapping(part, to[at..at + len].as_mut_ptr(), len) }
        });
    }

    /// Copies `from` into this buffer at `offset`. Panics if the range is not inside.
    pub fn copy_from(&self, offset: usize, from: &[u8]) {
        self.walk(offset, from.len(), |part, at, len| {
            // SAFETY: as in `copy_to`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(from[at..at + len].as_ptr(), part, len) }
        });
    }

    /// Copies `len` bytes at `from_offset` of `from` into this buffer at `offset`. Both may have several iovecs. Panics
    /// if a range is not inside.
    pub fn copy_between(&self, offset: usize, from: &IoBuf, from_offset: usize, len: usize) {
        self.walk(offset, len, |to, at, part| {
            from.walk(from_offset + at, part, |source, done, step| {
                // SAFETY: both pointers are inside iovecs that their buffers keep mapped, and `done + step` <= `part`.
                // `copy`, not `copy_nonoverlapping`: a hostile guest may name the same memory twice.
                unsafe { std::ptr::copy(source, to.add(done), step) }
            });
        });
    }

    /// Calls `visit` for each part of a range, with its address, its offset in the range and its length.
    fn walk(&self, mut offset: usize, len: usize, mut visit: impl FnMut(*mut u8, usize, usize)) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "range outside the buffer");
        let mut done = 0;
        for iovec in &self.iovecs {
            if done == len {
                break;
            }
            if offset >= iovec.iov_len {
                offset -= iovec.iov_len;
                continue;
            }
            let part = (iovec.iov_len - offset).min(len - done);
            // SAFETY: offset < iov_len, so the pointer stays inside the iovec.
            visit(unsafe { iovec.iov_base.cast::<u8>().add(offset) }, done, part);
            done += part;
            offset = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_spans_several_iovecs() {
        let buf = IoBuf::owned_parts(&[3, 5, 8], 512);
        assert_eq!(buf.len(), 16);
        let pattern: Vec<u8> = (1..=16).collect();
        buf.copy_from(0, &pattern);
        let mut middle = [0; 9];
        buf.copy_to(2, &mut middle);
        assert_eq!(middle[..], pattern[2..11]);
    }

    #[test]
    fn a_copy_between_buffers_of_different_iovecs() {
        let from = IoBuf::owned_parts(&[5, 1, 10], 512);
        from.copy_from(0, &(1..=16).collect::<Vec<u8>>());
        let to = IoBuf::owned_parts(&[2, 9, 7], 512);
        to.copy_between(3, &from, 1, 14);
        let mut seen = [9; 18];
        to.copy_to(0, &mut seen);
        assert_eq!(seen, [0, 0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0]);
    }

    #[test]
    fn a_visit_sees_every_byte_once() {
        let buf = IoBuf::owned_parts(&[3, 10, 1, 7], 512);
        let pattern: Vec<u8> = (1..=21).collect();
        buf.copy_from(0, &pattern);
        let mut seen = Vec::new();
        buf.visit(&mut [0; 4], |bytes| seen.extend_from_slice(bytes));
        assert_eq!(seen, pattern);
    }

    #[test]
    fn memory_is_free_when_its_buffers_are_gone() {
        let memory = Memory::new(4096, 4096);
        let (one, other) = (memory.lend(4096, Vec::new()), memory.lend(512, vec![]));
        assert_eq!((one.len(), other.len()), (4096, 512));
        drop(one);
        assert!(!memory.is_free());
        drop(other.into_iovecs());
        assert!(memory.is_free());
    }

    #[test]
    fn zeroes_are_zero_and_aligned() {
        let zeroes = IoBuf::zeroes(MAX_ZEROES - 512);
        assert_eq!(zeroes.len(), MAX_ZEROES - 512);
        assert!(zeroes.is_aligned(4096, 512) && !zeroes.is_aligned(4096, 4096));
        let mut bytes = vec![1; zeroes.len()];
        zeroes.copy_to(0, &mut bytes);
        assert!(bytes.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn alignment_is_checked_of_every_iovec() {
        assert!(IoBuf::owned_parts(&[512, 1024], 512).is_aligned(512, 512));
        assert!(!IoBuf::owned_parts(&[512, 8, 504], 512).is_aligned(8, 512));
        assert!(!IoBuf::owned(512, 512, 4).is_aligned(8, 512));
    }

    #[test]
    #[should_panic(expected = "outside the buffer")]
    fn a_copy_past_the_end_is_a_bug() {
        IoBuf::owned(8, 8, 1).copy_to(1, &mut [0; 8]);
    }
}
