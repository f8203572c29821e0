//! The vhost-user socket: one that this process binds, or one that it inherits from the service manager.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group};
use rustix::net::{AddressFamily, SocketType, sockopt};

use super::inherited;
use crate::base::unix_listener::{BindError, OwnFile, SocketFile, bind_unix};
use crate::config::Listen;

/// The permission bits until the socket belongs to the right group: before that, no other user may connect.
const OWNER_ONLY: u32 = 0o600;

/// Why there is no vhost-user socket.
#[derive(Debug)]
pub enum SocketError {
    /// The socket of `--socket-path` cannot be bound.
    Bind(BindError),
    /// The group of `--socket-group` does not exist, or its lookup failed with the error.
    NoGroup(String, Option<io::Error>),
    /// The socket's group or mode, which the text describes, cannot be set.
    Permissions(PathBuf, String, io::Error),
    /// The descriptor of `--fd` cannot be used, for the reason in the text.
    Inherited(i32, String),
    /// The socket cannot be made non-blocking.
    Setting(io::Error),
}

impl fmt::Display for SocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketError::Bind(error) => write!(f, "--socket-path: {error}"),
            SocketError::NoGroup(name, None) => {
                write!(
                    f,
                    "--socket-group: there is no group '{name}' on this host: give a name that 'getent group' lists, or a \
                     group's number"
                )
            }
            SocketError::NoGroup(name, Some(error)) => write!(f, "--socket-group: cannot look up '{name}': {error}"),
            SocketError::Permissions(path, what, error) => write!(
                f,
                "cannot set the {what} of the socket '{}': {error}; run as root or as a member of the group, on a file \
                 system that has owners",
                path.display()
            ),
            SocketError::Inherited(fd, why) => {
                write!(
                    f,
                    "--fd {fd}: {why}; pass a Unix stream socket on which listen(2) was called, or use --socket-path"
                )
            }
            SocketError::Setting(error) => write!(f, "cannot make the vhost-user socket non-blocking: {error}"),
        }
    }
}

impl std::error::Error for SocketError {}

/// A vhost-user socket that was checked, as far as that is possible before the image is opened.
pub(super) enum PreparedSocket {
    /// The socket will be bound to this path, with these permissions.
    Path { path: PathBuf, mode: u32, group: Option<Gid> },
    /// The socket was inherited.
    Fd(UnixListener),
}

/// Checks the inherited socket, or looks up the group. Called before anything else is opened: otherwise the number of
/// `--fd`, if it was not inherited, could be the number of a file that this process opened.
pub(super) fn prepare(listen: &Listen) -> Result<PreparedSocket, SocketError> {
    match listen {
        Listen::Path { path, mode, group } => {
            let group = group.as_deref().map(find_group).transpose()?;
            Ok(PreparedSocket::Path { path: path.clone(), mode: *mode, group })
        }
        Listen::Fd(number) => {
            let refuse = |why: String| SocketError::Inherited(*number, why);
            let fd = inherited::duplicate(*number)
                .map_err(|error| refuse(format!("no usable descriptor was inherited: {error}")))?;
            check_listening(&fd).map_err(|why| refuse(why.to_string()))?;
            Ok(PreparedSocket::Fd(UnixListener::from(fd)))
        }
    }
}

fn find_group(name: &str) -> Result<Gid, SocketError> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(SocketError::NoGroup(name.to_string(), None)),
        Err(errno) => Err(SocketError::NoGroup(name.to_string(), Some(errno.into()))),
    }
}

fn check_listening(fd: &OwnedFd) -> Result<(), &'static str> {
    match (sockopt::socket_domain(fd), sockopt::socket_type(fd)) {
        (Err(_), _) | (_, Err(_)) => return Err("it is not a socket"),
        (Ok(AddressFamily::UNIX), Ok(SocketType::STREAM)) => {}
        _ => return Err("it is not a Unix stream socket"),
    }
    match sockopt::socket_acceptconn(fd) {
        Ok(true) => Ok(()),
        _ => Err("it is a socket that does not listen"),
    }
}

impl PreparedSocket {
    /// Binds the socket, if it was not inherited. Front-ends can connect from then on.
    pub(super) fn bind(self) -> Result<FrontSocket, SocketError> {
        let socket = match self {
            PreparedSocket::Path { path, mode, group: None } => {
                FrontSocket::Ours(bind(&path, mode).map_err(SocketError::Bind)?)
            }
            PreparedSocket::Path { path, mode, group: Some(group) } => {
                let bound = bind(&path, OWNER_ONLY).map_err(SocketError::Bind)?;
                set_group_and_mode(&path, mode, group)?;
                FrontSocket::Ours(bound)
            }
            PreparedSocket::Fd(listener) => FrontSocket::Inherited(listener),
        };
        socket.listener().set_nonblocking(true).map_err(SocketError::Setting)?;
        Ok(socket)
    }
}

/// Binds a listening socket. Returns it with the guard that removes its path.
pub(super) fn bind(path: &Path, mode: u32) -> Result<(UnixListener, SocketFile), BindError> {
    let listener = bind_unix(path, mode)?;
    let file = SocketFile::of(path).map_err(|error| BindError::Other(path.to_path_buf(), error))?;
    Ok((listener, file))
}

/// Makes the guard of a socket that the old daemon bound and handed over. Returns `None` if the path cannot be checked.
pub(super) fn guard(path: &Path) -> Option<SocketFile> {
    SocketFile::of(path)
        .inspect_err(|error| log::warn!("'{}' will not be removed when the daemon ends: {error}", path.display()))
        .ok()
}

fn set_group_and_mode(path: &Path, mode: u32, group: Gid) -> Result<(), SocketError> {
    let failed = |what: String| move |error: io::Error| SocketError::Permissions(path.to_path_buf(), what, error);
    let file = OwnFile::open(path).map_err(SocketError::Bind)?;
    file.set_group(rustix::fs::Gid::from_raw(group.as_raw())).map_err(failed(format!("group {group}")))?;
    file.set_mode(mode).map_err(failed(format!("mode {mode:04o}")))
}

/// The vhost-user socket. Dropping it closes the socket, and removes the path if this process owns it.
pub(super) enum FrontSocket {
    /// This process owns the path.
    Ours((UnixListener, SocketFile)),
    /// The service manager owns the path, or the old daemon does until the take-over is complete.
    Inherited(UnixListener),
}

impl FrontSocket {
    fn listener(&self) -> &UnixListener {
        match self {
            FrontSocket::Ours((listener, _)) => listener,
            FrontSocket::Inherited(listener) => listener,
        }
    }

    /// Uses the socket of the old daemon.
    pub(super) fn taken_over(listener: UnixListener) -> Result<Self, SocketError> {
        listener.set_nonblocking(true).map_err(SocketError::Setting)?;
        Ok(FrontSocket::Inherited(listener))
    }

    /// Makes this process remove the socket's path at its end.
    pub(super) fn take_ownership(self, path: &Path) -> Self {
        match self {
            FrontSocket::Inherited(listener) => match guard(path) {
                Some(file) => FrontSocket::Ours((listener, file)),
                None => FrontSocket::Inherited(listener),
            },
            ours => ours,
        }
    }

    /// The socket's path, if this process owns it.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            FrontSocket::Ours((_, file)) => Some(file.path()),
            FrontSocket::Inherited(_) => None,
        }
    }

    /// Closes the socket without removing its path, because the new daemon uses it.
    pub(super) fn hand_over(self) {
        if let FrontSocket::Ours((_, file)) = self {
            file.keep();
        }
    }

    /// Accepts the next front-end. Fails with `WouldBlock` if there is none.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        self.listener().accept().map(|(stream, _)| stream)
    }
}

impl AsFd for FrontSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener().as_fd()
    }
}
