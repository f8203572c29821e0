//! UNSAFE. The callbacks of librbd for events of the image. librbd's threads call them; they must not block and must not
//! call a synchronous function of librbd.
//!
//! The memory whose address librbd has is never freed, because a thread may still be inside a callback when the watch is
//! gone: a few words for each opened image. It must not own the image, which would then never be closed.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;

use super::super::Errno;
use super::Shared;
use super::handle::check;

/// A function that a watch calls.
pub(super) type Callback = Box<dyn Fn() + Send + Sync>;

/// The functions that a watch calls: `first` at an update or a quiesce, `second` at an unquiesce.
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
enum WatchKind {
    Update,
    Quiesce,
}

/// A watch on an image, which calls its functions until it is stopped. librbd registers it with the cluster again after an
/// interruption.
pub(super) struct Watch {
    shared: Arc<Shared>,
    kind: WatchKind,
    handle: u64,
}

impl Watch {
    /// Starts a watch that calls `changed` when the image's header has changed: its size, its snapshots or other metadata.
    pub(super) fn updates(shared: Arc<Shared>, changed: Callback) -> Result<Watch, Errno> {
        let callbacks = Callbacks::leak(changed, Box::new(|| {}));
        let mut handle = 0;
        let image = &shared.image;
        // SAFETY: the image is open; the callbacks live for ever.
        let result =
            check(unsafe { (image.api.rbd.rbd_update_watch)(image.raw, &raw mut handle, Some(call_first), callbacks) });
        result.map(|()| Watch { shared, kind: WatchKind::Update, handle })
    }

    /// Starts a watch that calls `quiesce` before a snapshot is taken, which waits for [`Watch::complete`], and `unquiesce`
    /// after it was taken. ENOTSUP: this librbd does not support it.
    pub(super) fn quiesces(shared: Arc<Shared>, quiesce: Callback, unquiesce: Callback) -> Result<Watch, Errno> {
        let image = &shared.image;
        let rbd = &image.api.rbd;
        let (Some(watch), Some(_), Some(_)) =
            (rbd.rbd_quiesce_watch, rbd.rbd_quiesce_complete, rbd.rbd_quiesce_unwatch)
        else {
            return Err(Errno(libc::ENOTSUP));
        };
        let callbacks = Callbacks::leak(quiesce, unquiesce);
        let mut handle = 0;
        // SAFETY: as above.
        let result =
            check(unsafe { watch(image.raw, Some(call_first), Some(call_second), callbacks, &raw mut handle) });
        result.map(|()| Watch { shared, kind: WatchKind::Quiesce, handle })
    }

    /// Replies to a quiesce request with 0 or a negative error number. Called exactly once for each request, because librbd
    /// aborts at the second reply. Does not block.
    pub(super) fn complete(&self, result: i32) {
        let image = &self.shared.image;
        if let Some(complete) = image.api.rbd.rbd_quiesce_complete {
            // SAFETY: the image is open and the watch is registered: callers reply before `stop`.
            unsafe { complete(image.raw, self.handle, result) }
        }
    }

    /// Stops the watch; no function is called after it returns. Called once. Hangs while a quiesce request has no reply.
    pub(super) fn stop(&self) -> Result<(), Errno> {
        let image = &self.shared.image;
        let stop = match self.kind {
            WatchKind::Update => Some(image.api.rbd.rbd_update_unwatch),
            WatchKind::Quiesce => image.api.rbd.rbd_quiesce_unwatch,
        };
        // SAFETY: the image is open and the watch is registered.
        stop.map_or(Ok(()), |stop| check(unsafe { stop(image.raw, self.handle) }))
    }
}

unsafe extern "C" fn call_first(callbacks: *mut c_void) {
    // SAFETY: the argument comes from `Callbacks::leak`.
    (unsafe { &*callbacks.cast::<Callbacks>() }.first)();
}

unsafe extern "C" fn call_second(callbacks: *mut c_void) {
    // SAFETY: as above.
    (unsafe { &*callbacks.cast::<Callbacks>() }.second)();
}
