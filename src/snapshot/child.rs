//! Runs a command within a time limit: a hook, `exec:`, virsh.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::spawn;
use super::wait::{CancelFd, WaitEnd, wait};

/// How long a command may take to end after SIGTERM.
const TERMINATION_TIMEOUT: Duration = Duration::from_secs(2);
/// The most bytes of output that are read.
pub(crate) const MAX_OUTPUT: u64 = 4 << 20;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandEnd {
    /// The command ended by itself, with this status.
    Status(ExitStatus),
    /// We ended the command, because it took too long.
    TimedOut,
    /// We ended the command, because a signal arrived.
    Cancelled,
}

impl CommandEnd {
    /// Returns what went wrong, as the end of a sentence that begins with the command's name. `None`: the command
    /// succeeded. `allowed`: how long the command was allowed to take.
    pub fn describe_failure(&self, allowed: Duration) -> Option<String> {
        match self {
            CommandEnd::Status(status) if status.success() => None,
            CommandEnd::Status(status) => Some(format!("failed ({status})")),
            CommandEnd::TimedOut => Some(format!("did not end within {allowed:?} and was killed")),
            CommandEnd::Cancelled => Some("was ended, because the snapshot was interrupted".into()),
        }
    }
}

/// Runs `command` in a process group of its own, without input and with `mask` as its blocked signals, until
/// `deadline`. If the command takes too long, or `cancel` becomes readable, the whole group is ended. `ends_with_parent`: the
/// kernel sends the command SIGTERM if we die. Fails if the command cannot be started.
pub fn run(
    mut command: Command,
    mask: SigSet,
    ends_with_parent: bool,
    deadline: Instant,
    cancel: CancelFd<'_>,
) -> io::Result<CommandEnd> {
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command.stdin(Stdio::null());
    let mut child =
        if ends_with_parent { spawn::ended_with_parent(command, mask)? } else { spawn::with_mask(command, mask)? };
    let watched = watch(&mut child, deadline, cancel);
    match watched {
        Ok(Some(status)) => Ok(CommandEnd::Status(status)),
        Ok(None) => {
            let is_cancelled =
                cancel.is_some_and(|fd| wait(&[fd], None, Instant::now()).is_ok_and(|wake| wake != WaitEnd::TimedOut));
            end(&mut child)?;
            Ok(if is_cancelled { CommandEnd::Cancelled } else { CommandEnd::TimedOut })
        }
        Err(error) => {
            end(&mut child)?;
            Err(error)
        }
    }
}

/// Runs a command as [`run`] does and returns what it printed, standard output and standard error.
pub fn output(
    mut command: Command,
    deadline: Instant,
    cancel: CancelFd<'_>,
) -> io::Result<(CommandEnd, String, String)> {
    let file = || memfd_create("output", MemfdFlags::CLOEXEC).map(File::from);
    let (out, err) = (file()?, file()?);
    command.stdout(out.try_clone()?).stderr(err.try_clone()?);
    let ended = run(command, SigSet::empty(), false, deadline, cancel)?;
    Ok((ended, text(out)?, text(err)?))
}

fn text(mut file: File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(MAX_OUTPUT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn watch(child: &mut Child, deadline: Instant, cancel: CancelFd<'_>) -> io::Result<Option<ExitStatus>> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    match wait(&[pidfd.as_fd()], cancel, deadline)? {
        WaitEnd::Ready(_) => Ok(Some(child.wait()?)),
        WaitEnd::Cancelled | WaitEnd::TimedOut => Ok(None),
    }
}

/// Sends SIGTERM to the group, and SIGKILL if the command has not ended in time. A command that waits for a filesystem
/// which we had frozen cannot be killed before the thaw, and the thaw must not wait for it, so such a command is left
/// running.
fn end(child: &mut Child) -> io::Result<()> {
    let group = Pid::from_child(child);
    signal(group, Signal::TERM)?;
    if watch(child, Instant::now() + TERMINATION_TIMEOUT, None)?.is_none() {
        signal(group, Signal::KILL)?;
        watch(child, Instant::now() + TERMINATION_TIMEOUT, None)?;
    }
    // This ends the processes that the command started and left behind.
    signal(group, Signal::KILL)
}

fn signal(group: Pid, signal: Signal) -> io::Result<()> {
    match kill_process_group(group, signal) {
        // No process of the group is left.
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
