//! The cloner: a small process that lets a file share an image's blocks (ioctl_ficlone(2)).
//!
//! The time of the call grows with the number of the image's extents, and in a filesystem that hangs it never returns;
//! the calling process then cannot even exit. Therefore another process makes the call: at the end of the lease we kill
//! that process and continue. XFS (`xfs_reflink_remap_blocks`) and btrfs (`btrfs_clone`) stop between two extents at a
//! fatal signal, so the guest can soon write to the image again. A process that hangs in the kernel is left behind.
//!
//! The cloner is this program again, started with a socket as its standard input. It ends when the socket is closed.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::ioctl_ficlone;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use super::wait::{CancelFd, WaitEnd, wait};
use crate::control::client::Failure;
use crate::upgrade::Channel;

/// The hidden subcommand of `virtioblkctl` that calls [`serve`].
pub const SUBCOMMAND: &str = "snapshot-cloner";
/// How long a message to a running cloner may take.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the cloner waits for a request: longer than any snapshot takes to prepare.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(86_400);
/// How long to wait for the end of a killed cloner, and then for a removal.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// A request to the cloner.
#[derive(Debug, Serialize, Deserialize)]
enum ClonerRequest {
    /// Sends two descriptors: the image and the target.
    Files,
    /// Makes the target share all blocks of the image.
    Clone,
    /// Removes the file of this name, if it is still the one whose descriptor comes with the request.
    Remove(OsString),
}

/// The cloner's reply: the error number, if the request failed.
#[derive(Debug, Serialize, Deserialize)]
struct ClonerReply {
    errno: Option<i32>,
}

/// The parent's handle of a cloner.
pub struct Cloner {
    child: Child,
    channel: Channel,
}

impl Cloner {
    /// Starts a process that is ready to share the blocks of `source` with `target`.
    pub fn start(source: &File, target: &File) -> io::Result<Self> {
        let cloner = Cloner::spawn()?;
        let files = [source.try_clone()?, target.try_clone()?].map(OwnedFd::from);
        cloner.channel.send(&ClonerRequest::Files, &files, REPLY_TIMEOUT)?;
        Ok(cloner)
    }

    fn spawn() -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        // /proc/self/exe is this program even if the file was replaced. Our signals are blocked, and so are the
        // cloner's. It may outlive us, and the process that started us may wait for the end of our output.
        let mut command = Command::new("/proc/self/exe");
        command.arg(SUBCOMMAND).stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn()?;
        Ok(Cloner { child, channel: Channel::new(ours)? })
    }

    /// Makes the cloner begin to share the blocks. [`Cloner::outcome`] returns the result.
    pub fn begin(&self) -> io::Result<()> {
        self.channel.send(&ClonerRequest::Clone, &[], REPLY_TIMEOUT)
    }

    /// Returns the result. Called when [`Cloner::as_fd`] is readable.
    pub fn outcome(&self) -> io::Result<()> {
        let (done, _): (ClonerReply, _) = self.channel.receive(REPLY_TIMEOUT)?;
        done.errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    /// Returns the process id of the cloner.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills the cloner without waiting for its end.
    pub fn kill(&mut self) {
        // This fails only if the cloner has ended.
        let _ = self.child.kill();
    }

    /// Waits a short time for the end of a killed cloner. Returns `false` if it hangs in the kernel.
    pub fn has_ended(&mut self) -> bool {
        let Ok(pidfd) = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()) else { return true };
        let ended = matches!(wait(&[pidfd.as_fd()], None, Instant::now() + END_TIMEOUT), Ok(WaitEnd::Ready(_)));
        if ended {
            // The cloner has ended; reap it.
            let _ = self.child.wait();
        }
        ended
    }
}

impl AsFd for Cloner {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.stream().as_fd()
    }
}

impl Drop for Cloner {
    /// Does not wait for a cloner that hangs.
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.try_wait();
    }
}

/// Waits for the results of all cloners, each of which has begun. Returns the results in the same order. Kills the
/// cloners that have not finished at `deadline`, or when `cancel` becomes readable.
pub fn wait_for(cloners: &mut [&mut Cloner], deadline: Instant, cancel: CancelFd<'_>) -> Vec<CloneOutcome> {
    let mut outcomes: Vec<Option<CloneOutcome>> = cloners.iter().map(|_| None).collect();
    let over = loop {
        let waiting: Vec<usize> = (0..cloners.len()).filter(|at| outcomes[*at].is_none()).collect();
        if waiting.is_empty() {
            break CloneOutcome::TimedOut;
        }
        let fds: Vec<BorrowedFd<'_>> = waiting.iter().map(|at| cloners[*at].as_fd()).collect();
        match wait(&fds, cancel, deadline) {
            Ok(WaitEnd::Ready(ready)) => {
                for (at, _) in waiting.into_iter().zip(ready).filter(|(_, ready)| *ready) {
                    outcomes[at] =
                        Some(cloners[at].outcome().map_or_else(CloneOutcome::Failed, |()| CloneOutcome::Shared));
                }
            }
            Ok(WaitEnd::Cancelled) => break CloneOutcome::Cancelled,
            Ok(WaitEnd::TimedOut) => break CloneOutcome::TimedOut,
            Err(error) => break CloneOutcome::Failed(error),
        }
    };
    for (cloner, outcome) in cloners.iter_mut().zip(&outcomes) {
        if outcome.is_none() {
            cloner.kill();
        }
    }
    let rest = |outcome: Option<CloneOutcome>| {
        outcome.unwrap_or(match &over {
            CloneOutcome::Failed(error) => CloneOutcome::Failed(io::Error::from(error.kind())),
            CloneOutcome::Cancelled => CloneOutcome::Cancelled,
            _ => CloneOutcome::TimedOut,
        })
    };
    outcomes.into_iter().map(rest).collect()
}

/// The result of one clone.
#[derive(Debug)]
pub enum CloneOutcome {
    /// The target shares all blocks of the image.
    Shared,
    /// The kernel refused the clone, or the cloner ended.
    Failed(io::Error),
    /// The clone had not finished at the deadline.
    TimedOut,
    /// A signal arrived before the clone had finished.
    Cancelled,
}

/// Removes `path`, the name of `file`, in a process of its own, because the filesystem may hang. The error names what
/// is left behind.
pub fn remove(path: &std::path::Path, file: &File) -> Result<(), Failure> {
    let shown = path.display();
    let left = |why: String| Failure::new("target", format!("'{shown}', which is no snapshot, is left behind: {why}"));
    let cloner = Cloner::spawn().map_err(|error| left(error.to_string()))?;
    let sent = file.try_clone().and_then(|file| {
        let request = ClonerRequest::Remove(path.as_os_str().to_owned());
        cloner.channel.send(&request, &[OwnedFd::from(file)], REPLY_TIMEOUT)
    });
    sent.map_err(|error| left(error.to_string()))?;
    match wait(&[cloner.as_fd()], None, Instant::now() + END_TIMEOUT) {
        Ok(WaitEnd::Ready(_)) => cloner.outcome().map_err(|error| left(format!("{error}; remove it"))),
        _ => {
            let pid = cloner.pid();
            // The process continues the removal.
            std::mem::forget(cloner);
            Err(left(format!("its filesystem does not answer; process {pid} removes it when it does")))
        }
    }
}

/// Runs the cloner: the main function of `virtioblkctl` when started with [`SUBCOMMAND`]. `link`: its standard input.
pub fn serve(link: OwnedFd) -> ExitCode {
    // A new session, so that Ctrl-C on our terminal does not end the cloner. This fails only for the leader of a
    // process group, which Ctrl-C does not reach.
    let _ = rustix::process::setsid();
    match Channel::new(UnixStream::from(link)).and_then(|channel| carry_out(&channel)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => ExitCode::SUCCESS,
        Err(_) => {
            crate::base::logging::message(format_args!(
                "{SUBCOMMAND}: this is started by 'virtioblkctl snapshot', not by hand"
            ));
            ExitCode::from(2)
        }
    }
}

fn carry_out(channel: &Channel) -> io::Result<()> {
    let (request, files): (ClonerRequest, _) = channel.receive(REQUEST_TIMEOUT)?;
    let done = match (request, files.as_slice()) {
        (ClonerRequest::Files, [source, target]) => match channel.receive(REQUEST_TIMEOUT)? {
            (ClonerRequest::Clone, _) => ioctl_ficlone(target, source).map_err(io::Error::from),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        },
        (ClonerRequest::Remove(path), [file]) => remove_own(path.as_ref(), file),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    let errno = done.err().map(|error| error.raw_os_error().unwrap_or(libc::EIO));
    channel.send(&ClonerReply { errno }, &[], REPLY_TIMEOUT)
}

/// Removes the file, unless it is gone already or another file has its name.
pub fn remove_own(path: &std::path::Path, file: &impl AsFd) -> io::Result<()> {
    let file = File::from(file.as_fd().try_clone_to_owned()?).metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(named) if (named.dev(), named.ino()) == (file.dev(), file.ino()) => std::fs::remove_file(path),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
