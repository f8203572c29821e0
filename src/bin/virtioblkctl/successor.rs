//! Starts the new daemon of an upgrade and waits until it has taken over. It can take over only while this process wants it
//! to, and every wait for it has a deadline.

use std::io::{self, PipeWriter, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags};
use serde_json::{Value, json};
use virtioblkd::internal::base::wait::poll_until;
use virtioblkd::internal::control::client::{Client, REPLY_TIMEOUT};
use virtioblkd::internal::snapshot::spawn;
use virtioblkd::internal::upgrade::STARTER_VARIABLE;

/// How long a new daemon may take to end by itself after the upgrade was given up, and to end after it was killed.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest line that a new daemon prints.
const MAX_LINE: usize = 64 << 10;
/// The signals that give an upgrade up.
const SIGNALS: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// The result of an upgrade.
pub enum Outcome {
    /// The new daemon serves the guest. The value has its figures, as it reported them.
    TookOver(Value),
    /// The new daemon did not take over and never will, for this reason.
    NotTakenOver(Failure),
    /// The result is unknown, because no daemon replies.
    Unknown,
}

/// Why an upgrade failed.
pub enum Failure {
    /// The new daemon could not be started.
    NotStarted(io::Error),
    /// The new daemon ended with this status, or closed its output.
    Ended(Option<ExitStatus>),
    /// The time is over. `true`: the new process has ended.
    Late(bool),
    /// This process received a signal. `true`: the new process has ended.
    Signal(Signal, bool),
}

/// A new daemon that was started.
struct NewDaemon {
    child: Child,
    output: ChildStdout,
    line: Vec<u8>,
    /// The starter's pipe. The new daemon may take over only while it is open ([`virtioblkd::internal::upgrade`]).
    permission: Option<PipeWriter>,
}

/// The result of a wait for the new daemon's report.
enum Report {
    TookOver(Value),
    /// The new daemon closed its output, or printed something else.
    End,
    Late,
    Signal(Signal),
}

/// Starts `command`, which takes over from the daemon `old_pid` behind `control`, and waits for its result.
pub fn run(command: Command, control: &Path, old_pid: u32, timeout: Duration) -> Outcome {
    let until = Instant::now() + timeout;
    let signals = match Signals::block() {
        Ok(signals) => signals,
        Err(error) => return Outcome::NotTakenOver(Failure::NotStarted(error)),
    };
    let mut new = match start(command, &signals, until) {
        Ok(new) => new,
        Err(failure) => return Outcome::NotTakenOver(failure),
    };
    let signal = match new.report(until, Some(&signals)) {
        Report::TookOver(figures) => return Outcome::TookOver(figures),
        Report::End => return Outcome::NotTakenOver(Failure::Ended(new.status())),
        Report::Late => None,
        Report::Signal(signal) => Some(signal),
    };
    // From here on the new daemon cannot take over any more, so a second signal may end this process at once.
    new.permission = None;
    drop(signals);
    new.end(control, old_pid, signal)
}

/// Starts the program. A thread does this, because spawn waits for ever if the storage of the program's file hangs.
fn start(mut command: Command, signals: &Signals, until: Instant) -> Result<NewDaemon, Failure> {
    let (stdin, permission) = io::pipe().map_err(Failure::NotStarted)?;
    command.stdin(stdin).stdout(Stdio::piped()).env(STARTER_VARIABLE, "1");
    let (sender, started) = channel();
    let (spawned, has_spawned) = io::pipe().map_err(Failure::NotStarted)?;
    let mask = signals.before;
    let work = move || {
        // This fails if the upgrade was given up meanwhile. The process's input is closed then, so it cannot take over.
        let _ = sender.send(spawn::with_mask(command, mask));
        drop(has_spawned);
    };
    std::thread::Builder::new().spawn(work).map_err(Failure::NotStarted)?;
    match wait(&spawned, until, Some(signals)) {
        Wait::Ready => {}
        Wait::Signal(signal) => return Err(Failure::Signal(signal, false)),
        Wait::Late => return Err(Failure::Late(false)),
    }
    let mut child = match started.recv_timeout(REPLY_TIMEOUT) {
        Ok(spawned) => spawned.map_err(Failure::NotStarted)?,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Err(Failure::Late(false)),
    };
    match child.stdout.take() {
        Some(output) => Ok(NewDaemon { child, output, line: Vec::new(), permission: Some(permission) }),
        None => Err(Failure::Ended(None)),
    }
}

impl NewDaemon {
    /// Waits for the line that a daemon prints when it has taken over.
    fn report(&mut self, until: Instant, signals: Option<&Signals>) -> Report {
        loop {
            match wait(&self.output, until, signals) {
                Wait::Ready => {}
                Wait::Signal(signal) => return Report::Signal(signal),
                Wait::Late => return Report::Late,
            }
            let mut bytes = [0; 4096];
            let count = match self.output.read(&mut bytes) {
                Ok(0) => return Report::End,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Report::End,
            };
            self.line.extend_from_slice(&bytes[..count]);
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line: Option<Value> = serde_json::from_slice(&self.line[..end]).ok();
                return match line.and_then(|mut line| line.get_mut("took-over").map(Value::take)) {
                    Some(figures) => Report::TookOver(figures),
                    None => Report::End,
                };
            }
            if self.line.len() > MAX_LINE {
                return Report::End;
            }
        }
    }

    /// The process's status, if it ends within [`END_TIMEOUT`].
    fn status(&mut self) -> Option<ExitStatus> {
        let until = Instant::now() + END_TIMEOUT;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                ended => return ended.ok().flatten(),
            }
        }
    }

    /// Ends the new process after the upgrade was given up. It is killed only if the old daemon serves, because a process
    /// that has taken the guest over must live. `signal`: why the upgrade was given up; `None`: the time is over.
    fn end(mut self, control: &Path, old_pid: u32, signal: Option<Signal>) -> Outcome {
        let failure = |ended| signal.map_or(Failure::Late(ended), |signal| Failure::Signal(signal, ended));
        match self.report(Instant::now() + END_TIMEOUT, None) {
            Report::TookOver(figures) => return Outcome::TookOver(figures),
            Report::End if self.status().is_some() => return Outcome::NotTakenOver(failure(true)),
            _ => {}
        }
        // The old daemon replies to clients only while it is not about to send `Go`, and without the permission it never
        // sends `Go` again.
        let status = Client::connect(control).and_then(|mut client| client.query_status(REPLY_TIMEOUT));
        let Ok(status) = status else { return Outcome::Unknown };
        if status.daemon.pid == old_pid {
            // The process was not waited for, so its id is still its own. If it has ended, kill fails.
            let _ = self.child.kill();
            let ended = self.status().is_some();
            return Outcome::NotTakenOver(failure(ended));
        }
        Outcome::TookOver(json!(status.daemon.took_over))
    }
}

/// The result of [`wait`].
enum Wait {
    Ready,
    Signal(Signal),
    Late,
}

/// Waits until `source` is readable, a signal arrives, or the time is over.
fn wait(source: &impl std::os::fd::AsFd, until: Instant, signals: Option<&Signals>) -> Wait {
    loop {
        let mut fds = vec![PollFd::new(source, PollFlags::IN)];
        fds.extend(signals.map(|signals| PollFd::new(&signals.fd, PollFlags::IN)));
        let polled = poll_until(&mut fds, Some(until));
        let ready = polled.is_ok() && !fds[0].revents().is_empty();
        drop(fds);
        if let Some(signal) = signals.and_then(Signals::next) {
            return Wait::Signal(signal);
        }
        match polled {
            Ok(_) if ready => return Wait::Ready,
            Ok(_) if Instant::now() < until => {}
            Ok(_) => return Wait::Late,
            // poll(2) failed, so no wait is possible.
            Err(_) => return Wait::Late,
        }
    }
}

/// Blocks the signals that give an upgrade up, and receives them. Dropping this restores the signals' usual effect.
struct Signals {
    fd: SignalFd,
    before: SigSet,
}

impl Signals {
    fn block() -> io::Result<Signals> {
        let set: SigSet = SIGNALS.into_iter().collect();
        let before = set.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        Ok(Signals { fd: SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?, before })
    }

    fn next(&self) -> Option<Signal> {
        let info = self.fd.read_signal().ok()??;
        Signal::try_from(info.ssi_signo as i32).ok()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // This cannot fail, because the mask was in force before.
        let _ = self.before.thread_set_mask();
    }
}
