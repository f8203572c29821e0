//! Who is at the other end of a Unix socket (SO_PEERCRED, unix(7)).

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

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
        let credentials = getsockopt(&socket, PeerCredentials)?;
        Ok(Credentials { pid: credentials.pid(), uid: credentials.uid() })
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
