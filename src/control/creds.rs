//! Identifies the process at the other end of a Unix socket (SO_PEERCRED, unix(7)).

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// The process at the other end of a Unix socket, as it was when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The process id. 0: the process is outside of our process namespace.
    pub pid: i32,
    /// The effective user of the process.
    pub uid: u32,
}

impl Credentials {
    /// Reads the credentials of the peer of `socket` from the kernel. Fails if `socket` is not a Unix socket.
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
    fn the_peer_of_our_own_socket_is_this_process() {
        let (here, _there) = UnixStream::pair().unwrap();
        let credentials = Credentials::of(&here).unwrap();
        assert_eq!(credentials.pid, std::process::id() as i32);
        assert_eq!(credentials.uid, rustix::process::geteuid().as_raw());
        assert!(Credentials::of(std::fs::File::open("/dev/null").unwrap()).is_err());
    }
}
