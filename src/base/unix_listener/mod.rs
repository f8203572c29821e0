//! Binds a Unix socket in the filesystem: the vhost-user socket and the control socket.
//!
//! The socket is never more open than its mode, not for a moment. On Linux, bind(2) makes the file with the mode of the
//! unbound socket (fchmod(2) on its descriptor) less the umask. So the umask of the process need not change, and there
//! is no window before a chmod. The permission bits that the umask removed, and a group, are set through a descriptor
//! of the bound file (`OwnFile`), never by its path: the directory may belong to another user, who may put a link
//! there.
//!
//! A socket that a dead server left behind is replaced. That of a running server never is; only connect(2)
//! distinguishes them. Two servers that start at once take turns by a lock on the directory, which leaves no file
//! behind.

use std::fmt;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, chownat, fchmod, flock, fstat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use rustix::process::geteuid;

/// The longest path that fits into a `sockaddr_un` with its final zero (unix(7)).
pub const MAX_PATH: usize = 107;
/// The most connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// How often to try to lock the directory. A lock of another program only delays us.
const MAX_LOCK_TRIES: u32 = 50;
/// The delay between two of these tries.
const LOCK_RETRY_DELAY: Duration = Duration::from_millis(20);

/// The advice of the message when no descriptors are left.
pub(crate) const MORE_DESCRIPTORS: &str =
    "raise the limit of open files (RLIMIT_NOFILE; ulimit -n, or LimitNOFILE= in the systemd unit)";

/// Whether the process or the host has no descriptor left.
pub(crate) fn out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Why a socket could not be bound. Each message names the path and what to do.
#[derive(Debug)]
pub enum BindError {
    /// The path is longer than [`MAX_PATH`].
    TooLong(PathBuf),
    /// A running server listens on the path.
    InUse(PathBuf),
    /// The path names a file of another kind; the text names the kind.
    NotASocket(PathBuf, &'static str),
    /// The directory does not exist (or is not a directory).
    NoDirectory(PathBuf),
    /// Permission denied.
    Denied(PathBuf, io::Error),
    /// The path named another file right after the socket was bound.
    Replaced(PathBuf),
    /// Any other error.
    Other(PathBuf, io::Error),
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BindError::TooLong(path) => write!(
                f,
                "the socket path '{}' has {} bytes, and a socket address holds {MAX_PATH}: use a shorter path",
                path.display(),
                path.as_os_str().len()
            ),
            BindError::InUse(path) => {
                write!(f, "a server is listening on '{}' already: stop it, or use another socket path", path.display())
            }
            BindError::NotASocket(path, what) => write!(
                f,
                "'{}' is {what}, not a socket, and is left alone: remove it, or use another socket path",
                path.display()
            ),
            BindError::NoDirectory(path) => write!(
                f,
                "the directory of the socket '{}' does not exist: create it first, or use another socket path",
                path.display()
            ),
            BindError::Denied(path, error) => write!(
                f,
                "the socket '{}' cannot be created: {error}; give this user write permission in its directory, or use \
                 another socket path",
                path.display()
            ),
            BindError::Replaced(path) => write!(
                f,
                "the socket '{}' was replaced by another file while it was created: check who may write in its directory, or \
                 use another one",
                path.display()
            ),
            BindError::Other(path, error) if out_of_descriptors(error) => {
                write!(f, "the socket '{}' cannot be created: {error}; {MORE_DESCRIPTORS}", path.display())
            }
            BindError::Other(path, error) => write!(
                f,
                "the socket '{}' cannot be created: {error}; check the directory and its filesystem",
                path.display()
            ),
        }
    }
}

impl std::error::Error for BindError {}

impl BindError {
    fn new(path: &Path, errno: Errno) -> Self {
        let path = path.to_owned();
        match errno {
            Errno::NOENT | Errno::NOTDIR => BindError::NoDirectory(path),
            Errno::ACCESS | Errno::PERM => BindError::Denied(path, errno.into()),
            _ => BindError::Other(path, errno.into()),
        }
    }

    fn io(path: &Path, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) => BindError::new(path, Errno::from_raw_os_error(number)),
            None => BindError::Other(path.to_owned(), error),
        }
    }
}

/// Listens on a socket at `path` with the permission bits `mode`, whatever the umask is. Replaces the socket of a dead
/// server. Called by any thread; may wait up to a second for another server that starts in the same directory.
pub fn bind_unix(path: &Path, mode: u32) -> Result<UnixListener, BindError> {
    if path.as_os_str().len() > MAX_PATH {
        return Err(BindError::TooLong(path.to_owned()));
    }
    let failed = |errno| BindError::new(path, errno);
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let _turn = lock_directory(path)?;
    remove_dead_socket(path, &address)?;
    let socket = new_socket().map_err(failed)?;
    let mode = Mode::from_raw_mode(mode & 0o777);
    fchmod(&socket, mode).map_err(failed)?;
    match bind(&socket, &address) {
        Ok(()) => {}
        // A program that does not use the lock was faster.
        Err(Errno::ADDRINUSE) => return Err(BindError::InUse(path.to_owned())),
        Err(errno) => return Err(failed(errno)),
    }
    // The socket is bound. From here on, a failure must not leave the file behind.
    let file = SocketFile::of(path).map_err(|error| BindError::io(path, error))?;
    let own = OwnFile::open(path)?;
    // Sets the bits that the umask removed.
    own.set_mode(mode.as_raw_mode()).map_err(|error| BindError::io(path, error))?;
    listen(&socket, BACKLOG).map_err(failed)?;
    file.keep();
    Ok(UnixListener::from(socket))
}

/// Removes the socket of a dead server, if `path` names one. Fails when a running server listens on it, or it is no
/// socket.
pub(crate) fn remove_dead(path: &Path) -> Result<(), BindError> {
    let address = SocketAddrUnix::new(path).map_err(|errno| BindError::new(path, errno))?;
    let _turn = lock_directory(path)?;
    remove_dead_socket(path, &address)
}

/// The file of a socket that this process has bound, by a descriptor, so that it stays the same file whatever its path
/// names later.
pub(crate) struct OwnFile(OwnedFd);

impl OwnFile {
    /// Opens the file at `path` if it is a socket with one name; its owner is checked before a change. A user who may
    /// write in the directory may have put another file there, and a link of either kind would lead to a file that is
    /// not that user's.
    pub(crate) fn open(path: &Path) -> Result<OwnFile, BindError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path, flags, Mode::empty()).and_then(|file| Ok((fstat(&file)?, file)));
        let (stat, file) = opened.map_err(|errno| match errno {
            Errno::NOENT => BindError::Replaced(path.to_owned()),
            errno => BindError::new(path, errno),
        })?;
        let is_socket = FileType::from_raw_mode(stat.st_mode) == FileType::Socket;
        if !is_socket || stat.st_nlink != 1 {
            return Err(BindError::Replaced(path.to_owned()));
        }
        Ok(OwnFile(file))
    }

    /// Sets the permission bits, by the name in /proc that leads to the open file itself: fchmod(2) takes no such
    /// descriptor, and fchmodat2(2) needs Linux 6.6. A mode that is right already is not set, so that this works on a
    /// host without /proc.
    pub(crate) fn set_mode(&self, mode: u32) -> io::Result<()> {
        let stat = fstat(&self.0)?;
        if stat.st_mode & 0o7777 == mode {
            return Ok(());
        }
        check_owner(stat.st_uid)?;
        fs::set_permissions(format!("/proc/self/fd/{}", self.0.as_raw_fd()), Permissions::from_mode(mode))
    }

    /// Sets the group of the file.
    pub(crate) fn set_group(&self, group: Gid) -> io::Result<()> {
        check_owner(fstat(&self.0)?.st_uid)?;
        Ok(chownat(&self.0, "", None, Some(group), AtFlags::EMPTY_PATH)?)
    }
}

/// Refuses to change another user's socket, because it is not the one that this process bound. It is checked only
/// before a change, since some filesystems give every file the same owner.
fn check_owner(owner: u32) -> io::Result<()> {
    match owner == geteuid().as_raw() {
        true => Ok(()),
        false => Err(io::Error::other(format!("its file belongs to user {owner}, not to the one that made it"))),
    }
}

/// Removes the socket of a dead server. Fails when the path names any other file.
fn remove_dead_socket(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(BindError::io(path, error)),
    };
    check_is_socket(path, metadata.file_type())?;
    let probe = new_socket().map_err(|errno| BindError::new(path, errno))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        // A full queue (AGAIN) and another kind of socket (PROTOTYPE) show a running server, too.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => return Err(BindError::InUse(path.to_owned())),
        // It was removed meanwhile.
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(BindError::new(path, errno)),
    }
    log::info!("removing '{}', the socket of a server that is gone", path.display());
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BindError::io(path, error)),
        _ => Ok(()),
    }
}

/// Checks that a socket can be bound at `path` as far as its length and a file that exists there matter. Binds nothing.
pub(crate) fn check_path(path: &Path) -> Result<(), BindError> {
    if path.as_os_str().len() > MAX_PATH {
        return Err(BindError::TooLong(path.to_owned()));
    }
    match fs::symlink_metadata(path) {
        Ok(metadata) => check_is_socket(path, metadata.file_type()),
        // The directory is checked by the caller.
        Err(_) => Ok(()),
    }
}

fn check_is_socket(path: &Path, kind: fs::FileType) -> Result<(), BindError> {
    let what = match kind {
        _ if kind.is_socket() => return Ok(()),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_symlink() => "a symbolic link",
        _ if kind.is_file() => "a file",
        _ => "a device or a pipe",
    };
    Err(BindError::NotASocket(path.to_owned(), what))
}

/// Creates a socket, which is non-blocking so that a probe of a full queue does not hang.
fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    Ok(socket)
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Locks the directory of `path` until the returned file is closed. Returns `None`, and the caller continues without a
/// lock, when the directory cannot be read or another program keeps the lock.
fn lock_directory(path: &Path) -> Result<Option<File>, BindError> {
    let directory = match File::open(directory_of(path)) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        Err(error) => return Err(BindError::io(path, error)),
    };
    for _ in 0..MAX_LOCK_TRIES {
        match flock(directory.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(directory)),
            Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_RETRY_DELAY),
            Err(_) => return Ok(None),
        }
    }
    Ok(None)
}

/// Removes a socket when dropped, if its path still names the same file. A daemon that has put its own socket there
/// keeps it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Identity,
    armed: bool,
}

/// Device, inode, and where the filesystem reports it the time of birth, because inode numbers are reused.
type Identity = (u64, u64, Option<SystemTime>);

fn identity(path: &Path) -> io::Result<Identity> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino(), metadata.created().ok()))
}

impl SocketFile {
    /// The absolute path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Guards the socket at `path`. Called right after [`bind_unix`].
    pub fn of(path: &Path) -> io::Result<Self> {
        let identity = identity(path)?;
        Ok(SocketFile { path: std::path::absolute(path)?, identity, armed: true })
    }

    /// Leaves the file where it is.
    pub(crate) fn keep(mut self) {
        self.armed = false;
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.armed || !identity(&self.path).is_ok_and(|found| found == self.identity) {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            log::log!(
                level_of(&error),
                "the socket '{}' cannot be removed: {error}; the next start replaces it, as it does a dead server's",
                self.path.display()
            );
        }
    }
}

/// The log level for a file that cannot be removed at the end. A file that was made as root, before `--user`, is
/// expected to stay in a directory of root's.
pub(crate) fn level_of(error: &io::Error) -> log::Level {
    match error.kind() {
        io::ErrorKind::PermissionDenied => log::Level::Info,
        _ => log::Level::Warn,
    }
}

#[cfg(test)]
mod tests;
