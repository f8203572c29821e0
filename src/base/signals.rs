//! The signals that end the daemon, as a descriptor to poll (signalfd(2)).
//!
//! SIGTERM and SIGINT ask for an orderly end; a second one ends at once. SIGHUP asks for an orderly end too, as it does
//! in QEMU, but never counts as the second: a terminal that closes sends it twice. Under nohup(1) it is ignored.
//! SIGPIPE is ignored from the start, by Rust's runtime.
//!
//! The default action of most other signals ends the process, and a guest would lose its disk. So each of them is
//! handled here:
//! - SIGXFSZ and SIGTTOU accompany a system call that fails or succeeds by itself (`SILENT`): they have no effect.
//! - SIGXCPU, SIGALRM and SIGVTALRM say that a time limit has passed (`TIME_LIMITS`): they ask for an orderly end.
//! - SIGUSR1, SIGUSR2, SIGIO and SIGPWR mean nothing to this program (`IGNORED`): they are logged and ignored.
//! - SIGQUIT and SIGABRT, which ask for a core dump, SIGPROF, which profilers use, the real-time signals and those of
//!   faults keep their default action.

use crate::base::rate_limit::{HOST_LOG, log_limited};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// A write beyond RLIMIT_FSIZE fails with EFBIG, and a write to a terminal by a background process succeeds, where the
/// signal of each is blocked.
const SILENT: [Signal; 2] = [Signal::SIGXFSZ, Signal::SIGTTOU];

/// The soft limit of RLIMIT_CPU, or a timer that survived execve(2). The kernel repeats SIGXCPU every second, so these
/// never count as a second signal.
const TIME_LIMITS: [Signal; 3] = [Signal::SIGXCPU, Signal::SIGALRM, Signal::SIGVTALRM];

/// Other programs rotate a log or report their progress on these signals, and a sender may expect that here too.
const IGNORED: [Signal; 4] = [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGIO, Signal::SIGPWR];

/// The descriptor of the signals. It is readable when a signal is pending.
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks the signals in the calling thread and in those that it starts from now on. So only this descriptor
    /// receives them, and no system call of a virtqueue's thread is interrupted. Called once, by main, before any other
    /// thread exists. An error: no file descriptor is left.
    pub fn block() -> io::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        // A blocked signal is queued even if the process ignores it, so this is checked here.
        if !hangups_are_ignored() {
            set.add(Signal::SIGHUP);
        }
        TIME_LIMITS.into_iter().chain(IGNORED).for_each(|signal| set.add(signal));
        SILENT.into_iter().collect::<SigSet>().thread_block()?;
        set.thread_block()?;
        Ok(Signals { fd: SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)? })
    }

    /// Gives SIGTERM and SIGINT their default action from now on, also those that are pending. Called by main, the
    /// thread that called [`Signals::block`], when the rest of the process's work may be interrupted.
    pub fn release(&self) -> io::Result<()> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        Ok(set.thread_unblock()?)
    }

    /// The next pending signal that asks for an end, if any. Never blocks.
    pub fn next(&self) -> io::Result<Option<Signal>> {
        while let Some(info) = self.fd.read_signal()? {
            let signal = Signal::try_from(info.ssi_signo as i32)?;
            if !IGNORED.contains(&signal) {
                return Ok(Some(signal));
            }
            log_limited!(
                HOST_LOG,
                Info,
                "{signal} from process {} means nothing here and is ignored; SIGTERM ends",
                info.ssi_pid
            );
        }
        Ok(None)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether the process was started to survive the end of its terminal (nohup(1)).
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
    use nix::sys::signal::raise;

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
    fn each_signal_ends_in_order_or_is_ignored_or_has_no_effect() {
        let signals = Signals::block().unwrap();
        for signal in SILENT.into_iter().chain(IGNORED) {
            raise(signal).unwrap();
            assert_eq!(signals.next().unwrap(), None, "{signal}");
        }
        for signal in TIME_LIMITS.into_iter().chain([Signal::SIGTERM, Signal::SIGINT]) {
            raise(signal).unwrap();
            assert_eq!(signals.next().unwrap(), Some(signal));
        }
    }

    #[test]
    fn rust_ignores_sigpipe() {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(ignored(&status, Signal::SIGPIPE));
    }
}
