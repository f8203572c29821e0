//! Opens the directories of `--copy-dir` and `--scratch` for their rules on paths. Their filesystems may hang or be
//! gone, and the disk must be served regardless. Therefore a process of its own opens each directory, and the daemon
//! waits for it only a short time.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::backend::point_in_time::CopyDirectory;
use crate::base::syscalls;

/// How long the daemon's start waits for all directories together.
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);

/// A `--copy-dir` or `--scratch` at the daemon's start.
pub(super) struct StartDirectory {
    /// The open directory. `None`: it could not be opened, so there is no rule for it.
    pub(super) place: Option<OwnedFd>,
    /// The path, and the result of opening it.
    pub(super) facts: CopyDirectory,
    /// The directory is that of `--scratch`.
    pub(super) scratch: bool,
}

/// Opens all directories, and warns of each one that cannot be opened. Called by main.
pub(super) fn open_all(copy_dirs: &[PathBuf], scratch: Option<&PathBuf>) -> Vec<StartDirectory> {
    let end = Instant::now() + OPEN_TIMEOUT;
    // All processes are started first, so that one wait is enough for all of them.
    let paths = copy_dirs.iter().map(|path| (path, false)).chain(scratch.map(|path| (path, true)));
    let started: Vec<_> = paths.map(|(path, scratch)| (DirectoryOpener::start(path), path, scratch)).collect();
    let mut lingering = Vec::new();
    let opened = started.into_iter().map(|(opening, path, scratch)| {
        let opened = opening.and_then(|opening| {
            let (opened, child) = opening.finish(end);
            lingering.extend(child);
            opened
        });
        let (place, at_start) = match opened {
            Ok((place, identity)) => (Some(place), Ok(identity)),
            Err(error) => (None, Err(why(&error))),
        };
        if let Err(why) = &at_start {
            log::warn!(
                "{} '{}' {why}: the disk is served, but {}. Once that is put right, start virtioblkd again or run \
                 virtioblkctl upgrade",
                if scratch { "--scratch" } else { "--copy-dir" },
                path.display(),
                if scratch { "copies make do without it" } else { "no copy can go there" }
            );
        }
        // Clients name copies by absolute paths.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        StartDirectory { place, facts: CopyDirectory { path, at_start }, scratch }
    });
    let opened = opened.collect();
    if !lingering.is_empty() {
        leave_to_kernel(&lingering);
    }
    opened
}

/// Makes the kernel reap the processes that hang in their filesystem, whenever they end. The daemon starts no other
/// processes.
fn leave_to_kernel(children: &[Pid]) {
    if let Err(error) = syscalls::ignore_children() {
        log::debug!("processes that hang in a filesystem are not reaped when they end: {error}");
    }
    for child in children {
        // A process that ended before that must still be reaped. ECHILD: the kernel has reaped it.
        let _ = waitpid(Some(*child), WaitOptions::NOHANG);
    }
}

fn why(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT) => "does not exist".into(),
        Some(libc::ENOTDIR) => "is not a directory".into(),
        Some(libc::ETIMEDOUT) => "does not answer: its filesystem hangs".into(),
        _ => format!("cannot be opened ({error})"),
    }
}

/// An open directory, and its device and inode.
type OpenedDirectory = (OwnedFd, (u64, u64));

/// A process that opens one directory.
struct DirectoryOpener {
    child: Pid,
    reply_socket: UnixStream,
}

impl DirectoryOpener {
    fn start(path: &Path) -> io::Result<DirectoryOpener> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let (reply_socket, theirs) = UnixStream::pair()?;
        let child = syscalls::fork(theirs.as_fd(), |socket| send(socket, open_directory(&path)))?;
        Ok(DirectoryOpener { child, reply_socket })
    }

    /// Returns the directory, and the process if it has not ended. The error is ETIMEDOUT if the directory is not open
    /// at `end`.
    fn finish(self, end: Instant) -> (io::Result<OpenedDirectory>, Option<Pid>) {
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let received = self.reply_socket.set_read_timeout(Some(left)).and_then(|()| receive(self.reply_socket.as_fd()));
        // The process has nothing more to do. If it cannot be killed yet, it ends when the filesystem replies.
        let _ = kill_process(self.child, Signal::KILL);
        for _ in 0..10 {
            match waitpid(Some(self.child), WaitOptions::NOHANG) {
                Ok(None) => std::thread::sleep(Duration::from_millis(1)),
                _ => return (received, None),
            }
        }
        (received, Some(self.child))
    }
}

/// Opens the directory. Runs in the child process, which may make only system calls.
fn open_directory(path: &std::ffi::CStr) -> Result<OpenedDirectory, Errno> {
    let directory = open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let stat = fstat(&directory)?;
    Ok((directory, (stat.st_dev, stat.st_ino)))
}

/// Sends the result to the daemon: an errno or 0, the device and the inode, and the directory's descriptor. Runs in the
/// child process, which may make only system calls.
fn send(socket: BorrowedFd<'_>, opened: Result<OpenedDirectory, Errno>) {
    let (errno, device, inode) = match &opened {
        Ok((_, (device, inode))) => (0, *device, *inode),
        Err(errno) => (errno.raw_os_error() as u64, 0, 0),
    };
    let mut bytes = [0; 24];
    for (number, place) in [errno, device, inode].iter().zip(bytes.chunks_mut(8)) {
        place.copy_from_slice(&number.to_ne_bytes());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = opened.as_ref().map(|(directory, _)| [directory.as_fd()]);
    if let Ok(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    // The daemon may have stopped waiting; then it does not need the result.
    let _ = sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<OpenedDirectory> {
    let mut bytes = [0; 24];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let received = received.map_err(|errno| if errno == Errno::AGAIN { Errno::TIMEDOUT } else { errno })?;
    if received.bytes != bytes.len() {
        return Err(io::Error::other("the process that opens it ended"));
    }
    let number = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    if number(0) != 0 {
        return Err(io::Error::from_raw_os_error(number(0) as i32));
    }
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let fd = fd.ok_or_else(|| io::Error::other("no descriptor left; raise RLIMIT_NOFILE"))?;
    Ok((fd, (number(8), number(16))))
}
