//! UNSAFE. Guest memory as iovecs: the one place where an address of the guest's becomes a pointer of ours.
#![allow(unsafe_code)]

use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::request::Segment;
use crate::backend::IoBuf;

/// An address outside the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadAddress;

/// An [`IoBuf`] over the guest memory that `segments` name. `scratch` is an old iovec list to reuse.
///
/// Called by a ring's worker with the memory that the ring holds while it runs.
pub fn guest_buffer(
    memory: &Arc<GuestMemoryMmap>,
    segments: &[Segment],
    scratch: Vec<libc::iovec>,
) -> Result<IoBuf, BadAddress> {
    let mut iovecs = scratch;
    iovecs.clear();
    for &(address, len) in segments {
        if len == 0 {
            continue;
        }
        // A segment may cross from one region into the next.
        for slice in memory.get_slices(address, len as usize) {
            let slice = slice.map_err(|_| BadAddress)?;
            iovecs.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        }
    }
    // SAFETY: every iovec lies inside a region of `memory`, which stays mapped for as long as an Arc of it lives, and
    // the IoBuf keeps one until it is dropped. vm-memory hands out no references to guest memory, nor do we.
    Ok(unsafe { IoBuf::from_iovecs(iovecs, memory.clone()) })
}
