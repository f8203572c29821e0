//! UNSAFE. Starts a command with another signal mask than this process has now, such as the one that it had at its
//! start.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::sys::signal::SigSet;

/// Starts `command` with exactly the signals in `mask` blocked.
pub fn with_mask(command: Command, mask: SigSet) -> io::Result<Child> {
    start(command, move || Ok(mask.thread_set_mask()?))
}

/// Starts `command` as [`with_mask`] does, and has the kernel send it SIGTERM if the calling thread ends first
/// (prctl(2), PR_SET_PDEATHSIG), because its result would then be useless.
pub fn ended_with_parent(command: Command, mask: SigSet) -> io::Result<Child> {
    start(command, move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
        Ok(mask.thread_set_mask()?)
    })
}

fn start(mut command: Command, before: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> io::Result<Child> {
    // SAFETY: both callers' closures make one or two system calls (prctl, and sigprocmask through pthread_sigmask,
    // which are async-signal-safe) between fork and exec, in the child, on values that they own; they allocate nothing
    // and take no lock. The closure is kept by `command` until spawn has returned.
    unsafe { command.pre_exec(before) };
    command.spawn()
}
