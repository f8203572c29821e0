//! UNSAFE. What librbd calls when something happens to the image. Its threads call; what is called must not block and
//! must not call a synchronous function of librbd's.
//!
//! What librbd has the address of is never freed, as it may still be inside when the watch is gone: a few words for each
//! image opened. It must not hold the image, which would then never be closed.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;

use super::super::Errno;
use super::Shared;
use super::handle::check;

/// What is called.
pub(super) type Callback = Box<dyn Fn() + Send + Sync>;

/// What a watch calls: at the first event, and, for quiesces, at the second.
struct Callbacks {
    first: Callback,
    second: Callback,
}

impl Callbacks {
    fn leak(first: Callback, second: Callback) -> *mut c_void {
        Box::into_raw(Box::new(Callbacks { first, second })).cast::<c_void>()
    }
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
}

impl Watch {
    /// Calls `changed` when the image's header changed: its size, its snapshots, anything.
    pub(super) fn updates(shared: Arc<Shared>, changed: Callback) -> Result<Watch, Errno> {
        let ears = Callbacks::leak(changed, Box::new(|| {}));
        let mut handle = 0;
        let image = &shared.image;
        // SAFETY: the image is open; the ears live for ever.
        let result =
            check(unsafe { (image.api.rbd.rbd_update_watch)(image.raw, &raw mut handle, Some(call_first), ears) });
        result.map(|()| Watch { shared, kind: Kind::Update, handle })
    }

    /// Calls `quiesce` when a snapshot is about to be taken, which waits for [`Watch::complete`], and `unquiesce` when
    /// it was. ENOTSUP: this librbd does not ask.
    pub(super) fn quiesces(shared: Arc<Shared>, quiesce: Callback, unquiesce: Callback) -> Result<Watch, Errno> {
        let image = &shared.image;
        let rbd = &image.api.rbd;
        let (Some(watch), Some(_), Some(_)) =
            (rbd.rbd_quiesce_watch, rbd.rbd_quiesce_complete, rbd.rbd_quiesce_unwatch)
        else {
            return Err(Errno(libc::ENOTSUP));
        };
        let ears = Callbacks::leak(quiesce, unquiesce);
        let mut handle = 0;
        // SAFETY: as above.
        let result = check(unsafe { watch(image.raw, Some(call_first), Some(call_second), ears, &raw mut handle) });
        result.map(|()| Watch { shared, kind: Kind::Quiesce, handle })
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
        stop.map_or(Ok(()), |stop| check(unsafe { stop(image.raw, self.handle) }))
    }
}

unsafe extern "C" fn call_first(ears: *mut c_void) {
    // SAFETY: what `Callbacks::leak` made.
    (unsafe { &*ears.cast::<Callbacks>() }.first)();
}

unsafe extern "C" fn call_second(ears: *mut c_void) {
    // SAFETY: as above.
    (unsafe { &*ears.cast::<Callbacks>() }.second)();
}
