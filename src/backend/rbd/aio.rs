//! UNSAFE. Operations in flight: each is a value of its own on the heap, which librbd hands back when it has finished.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::{Arc, Mutex, Weak};

use super::super::{Completion, Errno, IoBuf, Op, OpId};
use super::handle::{Image, check};
use super::sys::{self, Api, rbd_completion_t};

/// Where what has finished waits for its queue. Filled by librbd's threads, emptied by the queue's.
pub(super) struct Inbox {
    finished: Mutex<Vec<Completion>>,
    /// Written to when the first one arrives: several are often taken at once.
    bell: Weak<OwnedFd>,
}

impl Inbox {
    pub(super) fn new(bell: Weak<OwnedFd>) -> Arc<Self> {
        Arc::new(Inbox { finished: Mutex::default(), bell })
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.finished.lock().expect("no panic while held").is_empty()
    }

    /// Appends what waits.
    pub(super) fn take(&self, out: &mut Vec<Completion>) {
        out.append(&mut self.finished.lock().expect("no panic while held"));
    }

    fn put(&self, completion: Completion) {
        let mut finished = self.finished.lock().expect("no panic while held");
        let was_empty = finished.is_empty();
        finished.push(completion);
        drop(finished);
        if was_empty && let Some(bell) = self.bell.upgrade() {
            // A full counter is the only error, and it means "readable".
            let _ = rustix::io::write(&*bell, &1u64.to_ne_bytes());
        }
    }
}

/// An operation that librbd has.
struct Request {
    api: &'static Api,
    inbox: Arc<Inbox>,
    id: OpId,
    /// Bytes that a good read returns.
    expected: Option<usize>,
    /// librbd keeps the pointer to its list of parts until the end (`io/ReadResult.h`), and the memory too.
    buf: Option<IoBuf>,
}

/// Starts an operation whose range is inside the image; its completion comes to `inbox`. `thick`: write-zeroes never
/// deallocates. What cannot be started comes back at once as a completion with its error. Does not block, except that
/// librbd may let a write wait for room in its cache.
pub(super) fn start(image: &Image, inbox: &Arc<Inbox>, op: Op, id: OpId, thick: bool) -> Result<(), Completion> {
    let api = image.api;
    let (call, buf) = Call::of(op, thick);
    let expected = buf.as_ref().filter(|_| matches!(call, Call::Read(_))).map(IoBuf::len);
    // The list of parts is on the heap: it stays where it is when the buffer moves.
    let parts = buf.as_ref().map_or(Parts(ptr::null(), 0), |buf| Parts(buf.iovecs().as_ptr(), buf.iovecs().len()));
    let request = Box::into_raw(Box::new(Request { api, inbox: Arc::clone(inbox), id, expected, buf }));
    let mut completion = ptr::null_mut();
    // SAFETY: writes a handle; the callback's argument is the request, which nobody else uses until it was called.
    let made = check(unsafe {
        (api.rbd.rbd_aio_create_completion)(request.cast::<c_void>(), Some(finished), &raw mut completion)
    });
    let started = made.and_then(|()| {
        // SAFETY: the request lives until its callback, and with it the parts and the memory that they name, which
        // the buffer keeps mapped; the image is open and stays so, since the queue holds it until all have finished.
        let started = check(unsafe { call.start(image, parts, completion) });
        if started.is_err() {
            // SAFETY: librbd does not call back for what it refused; the completion is not used afterwards.
            unsafe { (api.rbd.rbd_aio_release)(completion) };
        }
        started
    });
    started.map_err(|errno| {
        // SAFETY: it came from `into_raw` and librbd does not have it: no callback will take it.
        let request = unsafe { Box::from_raw(request) };
        Completion { id, result: Err(errno), buf: request.buf }
    })
}

/// A buffer's list of parts, and how many there are.
struct Parts(*const libc::iovec, usize);

/// One of librbd's functions with its numbers.
enum Call {
    Read(u64),
    Write(u64),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, c_int),
}

impl Call {
    fn of(op: Op, thick: bool) -> (Call, Option<IoBuf>) {
        match op {
            Op::Read { offset, buf } => (Call::Read(offset), Some(buf)),
            Op::Write { offset, buf, .. } => (Call::Write(offset), Some(buf)),
            Op::Sync => (Call::Flush, None),
            Op::Discard { offset, len } => (Call::Discard(offset, len), None),
            Op::WriteZeroes { offset, len, unmap } => {
                let thin = unmap && !thick;
                let flags = if thin { 0 } else { sys::RBD_WRITE_ZEROES_FLAG_THICK_PROVISION };
                (Call::WriteZeroes(offset, len, flags), None)
            }
        }
    }

    /// # Safety
    /// The parts, and the memory that they name, live until the completion's callback.
    unsafe fn start(&self, image: &Image, parts: Parts, completion: rbd_completion_t) -> c_int {
        let (rbd, image) = (&image.api.rbd, image.raw);
        let Ok(count) = c_int::try_from(parts.1) else { return -libc::EINVAL };
        // SAFETY: the caller's promise for the parts, and an open image.
        unsafe {
            match *self {
                Call::Read(offset) => (rbd.rbd_aio_readv)(image, parts.0, count, offset, completion),
                Call::Write(offset) => (rbd.rbd_aio_writev)(image, parts.0, count, offset, completion),
                Call::Flush => (rbd.rbd_aio_flush)(image, completion),
                Call::Discard(offset, len) => (rbd.rbd_aio_discard)(image, offset, len, completion),
                Call::WriteZeroes(offset, len, flags) => {
                    let Ok(len) = usize::try_from(len) else { return -libc::EINVAL };
                    (rbd.rbd_aio_write_zeroes)(image, offset, len, completion, flags, 0)
                }
            }
        }
    }
}

/// Called once for each operation that was started, by a thread of librbd's.
unsafe extern "C" fn finished(completion: rbd_completion_t, request: *mut c_void) {
    // SAFETY: the argument is what `start` made of a box, and this is the only call that takes it back.
    let request = unsafe { Box::from_raw(request.cast::<Request>()) };
    // SAFETY: the completion is finished and was not released.
    let value = unsafe { (request.api.rbd.rbd_aio_get_return_value)(completion) };
    // SAFETY: as above, and it is not used afterwards.
    unsafe { (request.api.rbd.rbd_aio_release)(completion) };
    let Request { inbox, id, expected, buf, .. } = *request;
    inbox.put(Completion { id, result: judge(value, expected), buf });
}

/// A read that is short met the end of an image that has just become smaller. Operations that are no reads return 0.
fn judge(value: isize, expected: Option<usize>) -> Result<(), Errno> {
    match usize::try_from(value) {
        Ok(bytes) if expected.is_none_or(|expected| bytes == expected) => Ok(()),
        Ok(_) => Err(Errno(libc::EIO)),
        Err(_) => Err(Errno(i32::try_from(value.unsigned_abs()).unwrap_or(libc::EIO))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_every_byte_is_good() {
        assert_eq!(judge(4096, Some(4096)), Ok(()));
        assert_eq!(judge(0, None), Ok(()));
        assert_eq!(judge(512, Some(4096)), Err(Errno(libc::EIO)));
        assert_eq!(judge(8192, Some(4096)), Err(Errno(libc::EIO)));
        assert_eq!(judge(-108, Some(4096)), Err(Errno(libc::ESHUTDOWN)));
        assert_eq!(judge(-30, None), Err(Errno(libc::EROFS)));
        assert_eq!(judge(isize::MIN, None), Err(Errno(libc::EIO)));
    }
}
