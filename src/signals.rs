//! The signals that end the daemon, as a descriptor to poll (signalfd(2)).
//!
//! SIGTERM and SIGINT ask for an orderly end; a second one ends at once. SIGHUP asks for an orderly end too, as it does
//! in QEMU, but never counts as the second: a terminal that closes sends it twice. Under nohup(1) it is ignored.
//! SIGPIPE is ignored from the start, by Rust's runtime.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals' descriptor: readable when one came.
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks the signals in the calling thread and in those that it starts from now on, so that none but this
    /// descriptor sees them and no system call of a ring's thread is interrupted. Called once, by main, before any
    /// other thread exists. Errors: no file descriptor left.
    pub fn block() -> io::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        // A blocked signal is queued even if it was set to be ignored, so that must be found out here.
        if !hangups_are_ignored() {
            set.add(Signal::SIGHUP);
        }
        set.thread_block()?;
        Ok(Signals { fd: SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)? })
    }

    /// Nobody reads them any more: SIGTERM and SIGINT have their usual effect on the process from now on, those that
    /// wait included. Called by main, the thread that called [`Signals::block`], when all that is left may be cut off.
    pub fn release(&self) -> io::Result<()> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        Ok(set.thread_unblock()?)
    }

    /// The next signal that came, if any. Never blocks.
    pub fn next(&self) -> io::Result<Option<Signal>> {
        let Some(info) = self.fd.read_signal()? else {
            return Ok(None);
        };
        Ok(Some(Signal::try_from(info.ssi_signo as i32)?))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether whoever started the process wants it to live on when the terminal is gone (nohup(1)).
pub fn hangups_are_ignored() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| ignored(&status, Signal::SIGHUP))
}

/// Whether the process ignores a signal, by its /proc/self/status (proc(5), SigIgn: a mask in hexadecimal).
fn ignored(status: &str, signal: Signal) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 << (signal as i32 - 1) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_is_found_in_the_mask() {
        let status = "Name:\tx\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000001001\n";
        assert!(ignored(status, Signal::SIGHUP));
        assert!(ignored(status, Signal::SIGPIPE));
        assert!(!ignored(status, Signal::SIGTERM));
        assert!(!ignored("", Signal::SIGHUP));
    }

    #[test]
    fn rust_ignores_sigpipe() {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(ignored(&status, Signal::SIGPIPE));
    }
}
