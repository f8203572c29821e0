//! UNSAFE. Starting a command with the signal mask that we had, not the one that we have.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::sys::signal::SigSet;

/// Starts `command` with the signals blocked that are in `mask`, and no others.
pub fn with_mask(mut command: Command, mask: SigSet) -> io::Result<Child> {
    let reset = move || Ok(mask.thread_set_mask()?);
    // SAFETY: between fork and exec, in the child, the closure makes one system call (sigprocmask through
    // pthread_sigmask, async-signal-safe) on a value that it owns; it allocates nothing and takes no lock. The closure
    // and its mask are kept by `command` until spawn has returned.
    unsafe { command.pre_exec(reset) };
    command.spawn()
}
