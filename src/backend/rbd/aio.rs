//! UNSAFE. Starts asynchronous operations of librbd. Each is a value on the heap, which librbd's callback hands back
//! when the operation has finished.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::{Arc, Mutex, Weak};

use super::super::{Completion, Errno, IoBuf, Op, OpId};
use super::handle::{Image, check};
use super::sys::{self, Api, rbd_completion_t};

/// The completions that wait for their queue. librbd's threads add them, and the queue's thread takes them.
pub(super) struct CompletionInbox {
    finished: Mutex<Vec<Completion>>,
    /// The queue's eventfd. It is written to only for the first completion, because several are often taken at once.
    eventfd: Weak<OwnedFd>,
}

impl CompletionInbox {
    pub(super) fn new(eventfd: Weak<OwnedFd>) -> Arc<Self> {
        Arc::new(CompletionInbox { finished: Mutex::default(), eventfd })
    }

    /// Whether no completion waits.
    pub(super) fn is_empty(&self) -> bool {
        self.finished.lock().expect("no panic while held").is_empty()
    }

    /// Appends all completions to `out`.
    pub(super) fn take(&self, out: &mut Vec<Completion>) {
        out.append(&mut self.finished.lock().expect("no panic while held"));
    }

    fn put(&self, completion: Completion) {
        let mut finished = self.finished.lock().expect("no panic while held");
        let was_empty = finished.is_empty();
        finished.push(completion);
        drop(finished);
        if was_empty && let Some(eventfd) = self.eventfd.upgrade() {
            // The only error is a counter that is full, which is readable, too.
            let _ = rustix::io::write(&*eventfd, &1u64.to_ne_bytes());
        }
    }
}

/// An op that librbd carries out.
struct PendingOp {
    api: &'static Api,
    inbox: Arc<CompletionInbox>,
    id: OpId,
    /// The number of bytes that a successful read returns.
    expected: Option<usize>,
    /// The buffer. librbd uses the pointer to its iovecs (`io/ReadResult.h`) and its memory until the end.
    buf: Option<IoBuf>,
}

/// Starts an operation whose range is inside the image; its completion comes to `inbox`. `thick`: write-zeroes never
/// deallocates. An operation that cannot be started is returned as a completion with its error. Does not block, except that
/// librbd may let a write wait for space in its cache.
pub(super) fn start(
    image: &Image,
    inbox: &Arc<CompletionInbox>,
    op: Op,
    id: OpId,
    thick: bool,
) -> Result<(), Completion> {
    let api = image.api;
    let (call, buf) = RbdCall::of(op, thick);
    let expected = buf.as_ref().filter(|_| matches!(call, RbdCall::Read(_))).map(IoBuf::len);
    // The iovecs are on the heap, so they do not move with the buffer.
    let iovecs = buf.as_ref().map_or(Iovecs(ptr::null(), 0), |buf| Iovecs(buf.iovecs().as_ptr(), buf.iovecs().len()));
    let request = Box::into_raw(Box::new(PendingOp { api, inbox: Arc::clone(inbox), id, expected, buf }));
    let mut completion = ptr::null_mut();
    // SAFETY: writes a handle; the callback's argument is the request, which only the callback uses from now on.
    let created = check(unsafe {
        (api.rbd.rbd_aio_create_completion)(request.cast::<c_void>(), Some(finished), &raw mut completion)
    });
    let started = created.and_then(|()| {
        // SAFETY: the request lives until its callback, and with it the iovecs and their memory, which the buffer keeps
        // mapped. The image stays open, because the queue owns a reference to it until all operations have finished.
        let started = check(unsafe { call.start(image, iovecs, completion) });
        if started.is_err() {
            // SAFETY: librbd does not call back for an operation that it refused; the completion is not used afterwards.
            unsafe { (api.rbd.rbd_aio_release)(completion) };
        }
        started
    });
    started.map_err(|errno| {
        // SAFETY: it came from `into_raw`, and librbd does not have it, so no callback will take it.
        let request = unsafe { Box::from_raw(request) };
        Completion { id, result: Err(errno), buf: request.buf }
    })
}

/// A buffer's iovecs and their number.
struct Iovecs(*const libc::iovec, usize);

/// A function of librbd and its arguments.
enum RbdCall {
    Read(u64),
    Write(u64),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, c_int),
}

impl RbdCall {
    fn of(op: Op, thick: bool) -> (RbdCall, Option<IoBuf>) {
        match op {
            Op::Read { offset, buf } => (RbdCall::Read(offset), Some(buf)),
            Op::Write { offset, buf, .. } => (RbdCall::Write(offset), Some(buf)),
            Op::Sync => (RbdCall::Flush, None),
            Op::Discard { offset, len } => (RbdCall::Discard(offset, len), None),
            Op::WriteZeroes { offset, len, unmap } => {
                let thin = unmap && !thick;
                let flags = if thin { 0 } else { sys::RBD_WRITE_ZEROES_FLAG_THICK_PROVISION };
                (RbdCall::WriteZeroes(offset, len, flags), None)
            }
        }
    }

    /// # Safety
    /// The iovecs and their memory live until the completion's callback.
    unsafe fn start(&self, image: &Image, iovecs: Iovecs, completion: rbd_completion_t) -> c_int {
        let (rbd, image) = (&image.api.rbd, image.raw);
        let Ok(count) = c_int::try_from(iovecs.1) else { return -libc::EINVAL };
        // SAFETY: the caller's promise for the iovecs, and an open image.
        unsafe {
            match *self {
                RbdCall::Read(offset) => (rbd.rbd_aio_readv)(image, iovecs.0, count, offset, completion),
                RbdCall::Write(offset) => (rbd.rbd_aio_writev)(image, iovecs.0, count, offset, completion),
                RbdCall::Flush => (rbd.rbd_aio_flush)(image, completion),
                RbdCall::Discard(offset, len) => (rbd.rbd_aio_discard)(image, offset, len, completion),
                RbdCall::WriteZeroes(offset, len, flags) => {
                    let Ok(len) = usize::try_from(len) else { return -libc::EINVAL };
                    (rbd.rbd_aio_write_zeroes)(image, offset, len, completion, flags, 0)
                }
            }
        }
    }
}

/// The callback of an operation. A thread of librbd calls it once for each operation that was started.
unsafe extern "C" fn finished(completion: rbd_completion_t, request: *mut c_void) {
    // SAFETY: `start` created the argument from a box, and this is the only call that takes it back.
    let request = unsafe { Box::from_raw(request.cast::<PendingOp>()) };
    // SAFETY: the completion is finished and was not released.
    let value = unsafe { (request.api.rbd.rbd_aio_get_return_value)(completion) };
    // SAFETY: as above, and it is not used afterwards.
    unsafe { (request.api.rbd.rbd_aio_release)(completion) };
    let PendingOp { inbox, id, expected, buf, .. } = *request;
    inbox.put(Completion { id, result: convert_result(value, expected), buf });
}

/// Converts librbd's return value. A short read is an error: it reached the end of an image that has just become smaller.
/// Operations other than reads return 0.
fn convert_result(value: isize, expected: Option<usize>) -> Result<(), Errno> {
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
    fn a_read_succeeds_only_with_every_byte() {
        assert_eq!(convert_result(4096, Some(4096)), Ok(()));
        assert_eq!(convert_result(0, None), Ok(()));
        assert_eq!(convert_result(512, Some(4096)), Err(Errno(libc::EIO)));
        assert_eq!(convert_result(8192, Some(4096)), Err(Errno(libc::EIO)));
        assert_eq!(convert_result(-108, Some(4096)), Err(Errno(libc::ESHUTDOWN)));
        assert_eq!(convert_result(-30, None), Err(Errno(libc::EROFS)));
        assert_eq!(convert_result(isize::MIN, None), Err(Errno(libc::EIO)));
    }
}
