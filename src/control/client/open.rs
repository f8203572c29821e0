//! Opens a connection to a control socket; the error says why there is none, and how to fix it.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt::PassCred};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::Failure;

/// Connects to the socket, within `deadline`. The socket is non-blocking and connect(2) is retried, because it would
/// wait for ever on a socket whose queue is full.
pub(super) fn open(path: &Path, deadline: Instant) -> Result<UnixStream, Failure> {
    let shown = path.display();
    let failed = |errno: Errno| describe(path, errno);
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
    // Set before any byte is written to the socket, because the kernel attaches credentials only then.
    setsockopt(&socket, PassCred, &true).map_err(|errno| failed(Errno::from_raw_os_error(errno as i32)))?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(Errno::AGAIN | Errno::INTR) => {
                let message = format!(
                    "the daemon behind '{shown}' accepts no connection: it is stopped or stuck; see its log and \
                     whether it was stopped by a signal"
                );
                return Err(Failure::new("no-answer", message));
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
}

fn describe(path: &Path, errno: Errno) -> Failure {
    let shown = path.display();
    let is_socket = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let (code, message) = match errno {
        Errno::NOENT => (
            "no-daemon",
            format!("there is no socket '{shown}': start virtioblkd with --control-path {shown}, or correct the path"),
        ),
        Errno::CONNREFUSED if is_socket => (
            "no-daemon",
            format!("nobody listens on '{shown}': its daemon is gone; start it again, it replaces the socket"),
        ),
        Errno::CONNREFUSED | Errno::NOTSOCK => {
            ("no-daemon", format!("'{shown}' is not a socket: give the path of virtioblkd's --control-path"))
        }
        Errno::ACCESS | Errno::PERM => (
            "no-permission",
            format!(
                "permission denied on '{shown}': be root or the daemon's user, or widen the socket's mode (and look at \
                 the directories above it)"
            ),
        ),
        Errno::NAMETOOLONG | Errno::INVAL => {
            ("no-daemon", format!("the socket path '{shown}' is longer than the 107 bytes that a socket address holds"))
        }
        _ => ("no-daemon", format!("cannot connect to '{shown}': {}", io::Error::from(errno))),
    };
    Failure::new(code, message)
}
