//! The starter of an upgrade: the process `virtioblkctl upgrade`, which started the new daemon.
//!
//! The starter holds one end of a pipe for as long as it wants the upgrade; the other end is the new daemon's standard
//! input. The new daemon sends a copy of that end with `Begin`, and the old one checks it right before `Go`. An upgrade that
//! the starter gave up, because of a signal, of `--timeout` or of its death, is therefore never carried out later, however
//! long the new daemon was stuck.
//!
//! That holds only if the new program sends the pipe. A program of an older version does not: an upgrade to it (a
//! downgrade) that was given up may still be carried out when that program sends `Begin`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::PollFlags;
use rustix::fs::FileType;

use crate::base::wait::is_ready;

/// The environment variable that is set if a new daemon's standard input is its starter's pipe. Older daemons ignore it and
/// take over all the same.
pub const VARIABLE: &str = "VIRTIOBLKD_UPGRADE_STDIN";

/// The error of the old and the new daemon when the starter has given up.
pub(crate) const GAVE_UP: &str = "virtioblkctl, which started the new virtioblkd, has ended or given up";

/// The reading end of a starter's pipe.
pub(crate) struct Starter {
    pipe: OwnedFd,
}

impl Starter {
    /// Returns the starter of this process. `None`: the process was started by hand, or by an older virtioblkctl. Fails when
    /// no descriptor is left.
    pub(crate) fn of_this_process() -> io::Result<Option<Starter>> {
        match std::env::var_os(VARIABLE) {
            Some(_) => Ok(Some(Starter { pipe: io::stdin().as_fd().try_clone_to_owned()? })),
            None => Ok(None),
        }
    }

    /// Returns the starter whose pipe came with `Begin`. Fails if the descriptor is not a pipe: only for a pipe can the old
    /// daemon rely on the end that it sees.
    pub(crate) fn received(mut descriptors: Vec<OwnedFd>) -> io::Result<Option<Starter>> {
        let Some(pipe) = descriptors.pop() else { return Ok(None) };
        if FileType::from_raw_mode(rustix::fs::fstat(&pipe)?.st_mode) != FileType::Fifo {
            return Err(io::Error::other("the descriptor that it sent for its starter is not a pipe"));
        }
        Ok(Some(Starter { pipe }))
    }

    /// Returns a copy of the pipe's end, to send it.
    pub(crate) fn copy(&self) -> io::Result<OwnedFd> {
        self.pipe.try_clone()
    }

    /// Whether the starter no longer wants the upgrade. Never blocks. An error counts as yes, because then the guest stays
    /// with the old daemon.
    pub(crate) fn has_given_up(&self) -> bool {
        is_ready(&self.pipe, PollFlags::empty()).unwrap_or(true)
    }
}

impl AsFd for Starter {
    /// The descriptor to poll: it reports the starter's end as HUP, with any event mask.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_starter_gives_up_only_by_closing_its_end() {
        let (reader, mut writer) = io::pipe().unwrap();
        let starter = Starter::received(vec![reader.into()]).unwrap().unwrap();
        assert!(!starter.has_given_up());
        io::Write::write_all(&mut writer, b"said something").unwrap();
        assert!(!starter.has_given_up());
        let copy = Starter::received(vec![starter.copy().unwrap()]).unwrap().unwrap();
        drop(writer);
        // A program that another test starts has a copy of the pipe until its exec.
        let end = Instant::now() + Duration::from_secs(60);
        while !(starter.has_given_up() && copy.has_given_up()) {
            assert!(Instant::now() < end, "the starter is not seen to have given up");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_descriptor_that_is_not_a_pipe_is_refused() {
        assert!(Starter::received(Vec::new()).unwrap().is_none());
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Starter::received(vec![file.into()]).is_err());
    }
}
