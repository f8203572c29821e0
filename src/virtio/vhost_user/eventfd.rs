//! Checks the descriptors that a front-end sends for a ring (kick, call, error). They must be eventfds. Anything else can
//! stop the ring's thread (writing an interrupt to a full pipe blocks) or keep it awake for ever (a regular file is always
//! readable). Nor may they block: a write to an eventfd whose counter is full waits until the counter is read.

use crate::base::rate_limit::{FRONT_END_LOG, log_limited};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat, readlink};
use vhost::vhost_user::{Error, Result};

/// Returns the descriptor if it is an eventfd, and makes it non-blocking, as QEMU's own servers do (vmsg_unblock_fds). That
/// is a property of the open file, so the front-end's descriptor changes too. A front-end that changes it back and then fills
/// the counter stops its ring's thread until it reads the counter. `what` and `ring` name the descriptor in the log.
pub(in crate::virtio) fn checked(fd: Option<File>, what: &str, ring: u8) -> Result<Option<File>> {
    if let Some(fd) = &fd
        && !is_eventfd(fd)
    {
        log_limited!(
            FRONT_END_LOG,
            Error,
            "the front-end's {what} descriptor for queue {ring} is not an eventfd; it must be one"
        );
        return Err(Error::InvalidParam);
    }
    if let Some(fd) = &fd {
        let unblocked = fcntl_getfl(fd).and_then(|flags| fcntl_setfl(fd, flags | OFlags::NONBLOCK));
        unblocked.map_err(|error| Error::ReqHandlerError(error.into()))?;
    }
    Ok(fd)
}

fn is_eventfd(fd: &impl AsFd) -> bool {
    let fd = fd.as_fd();
    match readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new()) {
        Ok(name) => name.as_bytes() == b"anon_inode:[eventfd]",
        // In a sandbox without procfs: a file, a pipe, a socket and a device have a file type, and an eventfd has none.
        Err(_) => fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn only_an_eventfd_is_accepted_and_made_non_blocking() {
        assert!(is_eventfd(&eventfd(0, EventfdFlags::CLOEXEC).unwrap()));
        assert!(!is_eventfd(&tempfile::tempfile().unwrap()));
        assert!(!is_eventfd(&rustix::pipe::pipe().unwrap().1));
        let event: File = eventfd(0, EventfdFlags::CLOEXEC).unwrap().into();
        let event = checked(Some(event), "kick", 0).unwrap().expect("the descriptor");
        assert!(fcntl_getfl(&event).unwrap().contains(OFlags::NONBLOCK));
        assert!(checked(None, "call", 0).unwrap().is_none());
        assert!(checked(Some(tempfile::tempfile().unwrap()), "call", 0).is_err());
    }
}
