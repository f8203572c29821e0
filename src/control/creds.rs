//! UNSAFE. Who is at the other end of a Unix socket (SO_PEERCRED, unix(7)).
//!
//! By hand, because the safe wrapper at hand stores the process id in a type that cannot be zero, and the kernel does
//! say zero for a peer outside of our process namespace.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The peer when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process; 0: outside of our process namespace.
    pub pid: i32,
    /// Effective user.
    pub uid: u32,
}

impl Credentials {
    /// Asks the kernel.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut length = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: both pointers are to locals of the sizes given, which outlive the call; the descriptor is borrowed
        // for the length of the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut credentials).cast(),
                &raw mut length,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Credentials { pid: credentials.pid, uid: credentials.uid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn our_own_peer_is_us() {
        let (here, _there) = UnixStream::pair().unwrap();
        let credentials = Credentials::of(&here).unwrap();
        assert_eq!(credentials.pid, std::process::id() as i32);
        assert_eq!(credentials.uid, rustix::process::geteuid().as_raw());
        assert!(Credentials::of(std::fs::File::open("/dev/null").unwrap()).is_err());
    }
}
