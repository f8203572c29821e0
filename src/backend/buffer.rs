//! UNSAFE. The memory of one transfer: a list of iovecs and whatever keeps them mapped.
#![allow(unsafe_code)]

use std::any::Any;
use std::sync::Arc;

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
// copies only, never through references, so no aliasing rule of a thread's is broken.
unsafe impl Send for IoBuf {}

impl std::fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBuf({} bytes in {} parts)", self.len, self.iovecs.len())
    }
}

/// Memory of our own behind an [`IoBuf`]. The `UnsafeCell`-like access through raw pointers is why it is boxed.
struct Owned {
    start: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: plain heap memory, freed once by `drop`; accessed through raw copies by whoever holds the IoBuf.
unsafe impl Send for Owned {}
// SAFETY: as above; no method hands out a reference to the bytes.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with this layout and is freed only here.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
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

    /// Zeroed memory of our own, `len` > 0 bytes, aligned to `align` (a power of two) plus `skew` bytes (to make
    /// unaligned buffers in tests).
    pub fn owned(len: usize, align: usize, skew: usize) -> Self {
        assert!(len > 0);
        let layout = std::alloc::Layout::from_size_align(len + skew, align).expect("a valid layout");
        // SAFETY: the size is not zero.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        if start.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        // SAFETY: start + skew .. + len lies inside the allocation of len + skew bytes.
        let base = unsafe { start.add(skew) };
        let iovec = libc::iovec { iov_base: base.cast(), iov_len: len };
        IoBuf { iovecs: vec![iovec], len, _keep: Some(Arc::new(Owned { start, layout })) }
    }

    /// The same memory as `owned`, seen as several iovecs of the lengths given (their sum is the length). For tests.
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

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The iovecs, for the kernel.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// Gives the iovec list back for reuse; the memory is no longer held.
    pub fn into_iovecs(mut self) -> Vec<libc::iovec> {
        self.iovecs.clear();
        std::mem::take(&mut self.iovecs)
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
    fn copies_cross_the_parts() {
        let buf = IoBuf::owned_parts(&[3, 5, 8], 512);
        assert_eq!(buf.len(), 16);
        let pattern: Vec<u8> = (1..=16).collect();
        buf.copy_from(0, &pattern);
        let mut middle = [0; 9];
        buf.copy_to(2, &mut middle);
        assert_eq!(middle[..], pattern[2..11]);
    }

    #[test]
    #[should_panic(expected = "outside the buffer")]
    fn a_copy_past_the_end_is_a_bug() {
        IoBuf::owned(8, 8, 1).copy_to(1, &mut [0; 8]);
    }
}
