//! The process that wants an upgrade: `virtioblkctl upgrade`, which started the new daemon.
//!
//! It holds one end of a pipe for as long as it wants the upgrade; the other end is the new daemon's standard input. The new
//! daemon sends a copy with `Begin`, and the old one looks at it right before `Go`. So an upgrade that was given up, by a
//! signal, by `--timeout` or by the starter's death, is never carried out later, however long the new daemon was stuck.
//!
//! That holds if the new program sends the pipe. An older one does not know it: an upgrade to it (a downgrade) that was
//! given up may still be carried out, once the new program comes to `Begin`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;

/// The environment variable that tells a new daemon that its standard input is its starter's pipe. Older daemons do not
/// know it, and take over all the same.
pub const VARIABLE: &str = "VIRTIOBLKD_UPGRADE_STDIN";

/// What the old and the new daemon say when it has given up.
pub(crate) const GAVE_UP: &str = "virtioblkctl, which started the new virtioblkd, has ended or given up";

/// The reading end of a starter's pipe.
pub(crate) struct Starter {
    pipe: OwnedFd,
}

impl Starter {
    /// The starter of this process; `None`: it was started by hand, or by an older virtioblkctl. Errors: no descriptor left.
    pub(crate) fn of_this_process() -> io::Result<Option<Starter>> {
        match std::env::var_os(VARIABLE) {
            Some(_) => Ok(Some(Starter { pipe: io::stdin().as_fd().try_clone_to_owned()? })),
            None => Ok(None),
        }
    }

    /// The starter whose pipe came with `Begin`. Errors: it is no pipe, whose end nobody could miss or forge.
    pub(crate) fn received(mut descriptors: Vec<OwnedFd>) -> io::Result<Option<Starter>> {
        let Some(pipe) = descriptors.pop() else { return Ok(None) };
        if FileType::from_raw_mode(rustix::fs::fstat(&pipe)?.st_mode) != FileType::Fifo {
            return Err(io::Error::other("what it sent of its starter is no pipe"));
        }
        Ok(Some(Starter { pipe }))
    }

    /// A copy of the pipe's end, to be sent.
    pub(crate) fn copy(&self) -> io::Result<OwnedFd> {
        self.pipe.try_clone()
    }

    /// Whether it wants the upgrade no more. Never blocks. A failure counts as yes: the guest stays where it is.
    pub(crate) fn has_given_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.pipe, PollFlags::empty())];
        poll(&mut fds, Some(&Timespec::default())).map_or(true, |ready| ready > 0)
    }
}

impl AsFd for Starter {
    /// To poll: it reports the end (HUP) whatever is asked for.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_starter_gives_up_by_closing_its_end_only() {
        let (reader, mut writer) = io::pipe().unwrap();
        let starter = Starter::received(vec![reader.into()]).unwrap().unwrap();
        assert!(!starter.has_given_up());
        io::Write::write_all(&mut writer, b"said something").unwrap();
        assert!(!starter.has_given_up());
        let copy = Starter::received(vec![starter.copy().unwrap()]).unwrap().unwrap();
        drop(writer);
        assert!(starter.has_given_up() && copy.has_given_up());
    }

    #[test]
    fn what_is_no_pipe_is_refused() {
        assert!(Starter::received(Vec::new()).unwrap().is_none());
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Starter::received(vec![file.into()]).is_err());
    }
}
