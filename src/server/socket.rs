//! The vhost-user socket: our own, bound last, or one inherited that somebody else bound.

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

/// Permission bits until the group is set: nobody else's before it is the right group's.
const OWNER_ONLY: u32 = 0o600;

/// Why there is no vhost-user socket.
#[derive(Debug)]
pub enum SocketError {
    /// Our own cannot be bound.
    Bind(BindError),
    /// `--socket-group` names no group; the lookup's error, if it failed.
    NoGroup(String, Option<io::Error>),
    /// The socket cannot be given to that group, or that mode.
    Permissions(PathBuf, String, io::Error),
    /// `--fd`: why it cannot be used.
    Inherited(i32, String),
    /// Its settings cannot be changed.
    Setting(io::Error),
}

impl fmt::Display for SocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketError::Bind(error) => write!(f, "--socket-path: {error}"),
            SocketError::NoGroup(name, None) => {
                write!(
                    f,
                    "--socket-group: there is no group '{name}' on this host: name one of getent(1) group, or its number"
                )
            }
            SocketError::NoGroup(name, Some(error)) => write!(f, "--socket-group: cannot look up '{name}': {error}"),
            SocketError::Permissions(path, what, error) => write!(
                f,
                "cannot give the socket '{}' {what}: {error}; run as root or as a member of the group, on a filesystem \
                 that has owners",
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

/// What can be checked before the image is opened.
pub(super) enum Prepared {
    Path { path: PathBuf, mode: u32, group: Option<Gid> },
    Fd(UnixListener),
}

/// Checks the inherited socket, or looks up the group. Before anything else is opened: a number that was not inherited
/// must not turn out to be a file of ours.
pub(super) fn prepare(listen: &Listen) -> Result<Prepared, SocketError> {
    match listen {
        Listen::Path { path, mode, group } => {
            let group = group.as_deref().map(find_group).transpose()?;
            Ok(Prepared::Path { path: path.clone(), mode: *mode, group })
        }
        Listen::Fd(number) => {
            let refuse = |why: String| SocketError::Inherited(*number, why);
            let fd = inherited::duplicate(*number)
                .map_err(|error| refuse(format!("nothing usable was inherited: {error}")))?;
            check_listening(&fd).map_err(|why| refuse(why.to_string()))?;
            Ok(Prepared::Fd(UnixListener::from(fd)))
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

impl Prepared {
    /// Makes the socket ready for front-ends.
    pub(super) fn bind(self) -> Result<FrontSocket, SocketError> {
        let socket = match self {
            Prepared::Path { path, mode, group: None } => {
                FrontSocket::Ours(bind(&path, mode).map_err(SocketError::Bind)?)
            }
            Prepared::Path { path, mode, group: Some(group) } => {
                let bound = bind(&path, OWNER_ONLY).map_err(SocketError::Bind)?;
                give_to_group(&path, mode, group)?;
                FrontSocket::Ours(bound)
            }
            Prepared::Fd(listener) => FrontSocket::Inherited(listener),
        };
        socket.listener().set_nonblocking(true).map_err(SocketError::Setting)?;
        Ok(socket)
    }
}

/// A listening socket and the guard that removes its path.
pub(super) fn bind(path: &Path, mode: u32) -> Result<(UnixListener, SocketFile), BindError> {
    let listener = bind_unix(path, mode)?;
    let file = SocketFile::of(path).map_err(|error| BindError::Other(path.to_path_buf(), error))?;
    Ok((listener, file))
}

/// The guard of a socket that somebody else bound and gave to us; none if it cannot be found.
pub(super) fn guard(path: &Path) -> Option<SocketFile> {
    SocketFile::of(path)
        .inspect_err(|error| log::warn!("'{}' will not be removed at the end: {error}", path.display()))
        .ok()
}

fn give_to_group(path: &Path, mode: u32, group: Gid) -> Result<(), SocketError> {
    let failed = |what: String| move |error: io::Error| SocketError::Permissions(path.to_path_buf(), what, error);
    let file = OwnFile::open(path).map_err(SocketError::Bind)?;
    file.set_group(rustix::fs::Gid::from_raw(group.as_raw())).map_err(failed(format!("to group {group}")))?;
    file.set_mode(mode).map_err(failed(format!("mode {mode:04o}")))
}

/// The vhost-user socket. Dropping it ends listening; our own path is removed, an inherited one's is its maker's.
pub(super) enum FrontSocket {
    Ours((UnixListener, SocketFile)),
    /// Somebody else's path; also another daemon's, until it is ours.
    Inherited(UnixListener),
}

impl FrontSocket {
    fn listener(&self) -> &UnixListener {
        match self {
            FrontSocket::Ours((listener, _)) => listener,
            FrontSocket::Inherited(listener) => listener,
        }
    }

    /// Of the daemon that we take over from.
    pub(super) fn taken_over(listener: UnixListener) -> Result<Self, SocketError> {
        listener.set_nonblocking(true).map_err(SocketError::Setting)?;
        Ok(FrontSocket::Inherited(listener))
    }

    /// Its path is ours to remove from now on.
    pub(super) fn own(self, path: &Path) -> Self {
        match self {
            FrontSocket::Inherited(listener) => match guard(path) {
                Some(file) => FrontSocket::Ours((listener, file)),
                None => FrontSocket::Inherited(listener),
            },
            ours => ours,
        }
    }

    /// Our own path.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            FrontSocket::Ours((_, file)) => Some(file.path()),
            FrontSocket::Inherited(_) => None,
        }
    }

    /// Another process goes on with it: its path stays.
    pub(super) fn give(self) {
        if let FrontSocket::Ours((_, file)) = self {
            file.keep();
        }
    }

    /// The next front-end, `WouldBlock` if there is none.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        self.listener().accept().map(|(stream, _)| stream)
    }
}

impl AsFd for FrontSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener().as_fd()
    }
}
