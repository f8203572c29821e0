//! An eventfd: any thread rings, main hears.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use super::ServerError;

/// Readable from `ring` until `was_rung`.
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub(super) fn new() -> Result<Arc<Self>, ServerError> {
        match eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK) {
            Ok(fd) => Ok(Arc::new(Bell(fd))),
            Err(errno) => Err(ServerError::System("cannot make an eventfd", errno.into())),
        }
    }

    pub(super) fn ring(&self) {
        // A full counter is the only error, and it is readable.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Whether it was rung since last asked. Never blocks.
    pub(super) fn was_rung(&self) -> bool {
        rustix::io::read(&self.0, &mut [0u8; 8]).is_ok()
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
