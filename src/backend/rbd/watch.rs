//! UNSAFE. What librbd calls when something happens to the image. Its threads call; what is called must not block and
//! must not call a synchronous function of librbd's.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::Errno;
use super::Shared;
use super::handle::check;

/// What is called.
pub(super) type Ear = Box<dyn Fn() + Send + Sync>;

/// What a watch calls: at the first event, and, for quiesces, at the second.
struct Ears {
    first: Ear,
    second: Ear,
}

#[derive(Clone, Copy)]
enum Kind {
    Update,
    Quiesce,
}

/// Calls for as long as it is not stopped. librbd registers it with the cluster anew by itself after an interruption.
pub(super) struct Watch {
    shared: Arc<Shared>,
    kind: Kind,
    handle: u64,
    /// Made by `Box::into_raw`.
    ears: *mut Ears,
    stopped: AtomicBool,
}

// SAFETY: `ears` is only freed, by `drop`; what it points to is Send and Sync.
unsafe impl Send for Watch {}
// SAFETY: as above.
unsafe impl Sync for Watch {}

impl Watch {
    /// Calls `changed` when the image's header changed: its size, its snapshots, anything.
    pub(super) fn updates(shared: Arc<Shared>, changed: Ear) -> Result<Watch, Errno> {
        let ears = Box::into_raw(Box::new(Ears { first: changed, second: Box::new(|| {}) }));
        let mut handle = 0;
        let image = &shared.image;
        // SAFETY: the image is open; the ears live until the watch was stopped, or longer.
        let result = check(unsafe {
            (image.api.rbd.rbd_update_watch)(image.raw, &raw mut handle, Some(call_first), ears.cast::<c_void>())
        });
        Self::made(shared, Kind::Update, handle, ears, result)
    }

    /// Calls `quiesce` when a snapshot is about to be taken, which waits for [`Watch::complete`], and `unquiesce` when
    /// it was. ENOTSUP: this librbd does not ask.
    pub(super) fn quiesces(shared: Arc<Shared>, quiesce: Ear, unquiesce: Ear) -> Result<Watch, Errno> {
        let image = &shared.image;
        let rbd = &image.api.rbd;
        let (Some(watch), Some(_), Some(_)) =
            (rbd.rbd_quiesce_watch, rbd.rbd_quiesce_complete, rbd.rbd_quiesce_unwatch)
        else {
            return Err(Errno(libc::ENOTSUP));
        };
        let ears = Box::into_raw(Box::new(Ears { first: quiesce, second: unquiesce }));
        let mut handle = 0;
        // SAFETY: as above.
        let result = check(unsafe {
            watch(image.raw, Some(call_first), Some(call_second), ears.cast::<c_void>(), &raw mut handle)
        });
        Self::made(shared, Kind::Quiesce, handle, ears, result)
    }

    fn made(
        shared: Arc<Shared>,
        kind: Kind,
        handle: u64,
        ears: *mut Ears,
        result: Result<(), Errno>,
    ) -> Result<Watch, Errno> {
        if let Err(errno) = result {
            // SAFETY: made by `into_raw`; librbd did not register it.
            drop(unsafe { Box::from_raw(ears) });
            return Err(errno);
        }
        Ok(Watch { shared, kind, handle, ears, stopped: AtomicBool::new(false) })
    }

    /// Answers the quiesce that was asked for: 0 or a negative error number. Exactly once for each: librbd aborts at
    /// the second. Does not block.
    pub(super) fn complete(&self, result: i32) {
        let image = &self.shared.image;
        if let Some(complete) = image.api.rbd.rbd_quiesce_complete {
            // SAFETY: the image is open and the watch is registered: callers answer before `stop`.
            unsafe { complete(image.raw, self.handle, result) }
        }
    }

    /// Returns when nothing is called any more. Hangs while a quiesce is not answered. Once.
    pub(super) fn stop(&self) -> Result<(), Errno> {
        let image = &self.shared.image;
        let stop = match self.kind {
            Kind::Update => Some(image.api.rbd.rbd_update_unwatch),
            Kind::Quiesce => image.api.rbd.rbd_quiesce_unwatch,
        };
        // SAFETY: the image is open and the watch is registered.
        let result = stop.map_or(Ok(()), |stop| check(unsafe { stop(image.raw, self.handle) }));
        self.stopped.store(result.is_ok(), Ordering::Release);
        result
    }
}

impl Drop for Watch {
    /// What is still registered is leaked rather than freed.
    fn drop(&mut self) {
        if self.stopped.load(Ordering::Acquire) {
            // SAFETY: made by `into_raw`, freed only here, and librbd calls it no more.
            drop(unsafe { Box::from_raw(self.ears) });
        }
    }
}

unsafe extern "C" fn call_first(ears: *mut c_void) {
    // SAFETY: the ears of a watch that is not stopped.
    (unsafe { &*ears.cast::<Ears>() }.first)();
}

unsafe extern "C" fn call_second(ears: *mut c_void) {
    // SAFETY: as above.
    (unsafe { &*ears.cast::<Ears>() }.second)();
}
