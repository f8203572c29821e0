//! The new daemon of an upgrade, as a process that we started: it takes over only while we want it to, and no wait for it is
//! without an end.

use std::io::{self, PipeWriter, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use virtioblkd::internal::control::client::{Client, REPLY_TIMEOUT};
use virtioblkd::internal::snapshot::spawn;
use virtioblkd::internal::upgrade::STARTER_VARIABLE;

/// How long a new daemon that is not wanted any more may take to end by itself, and to die when it was killed.
const FAREWELL: Duration = Duration::from_secs(1);
/// The longest line that a new daemon prints.
const MAX_LINE: usize = 64 << 10;
/// The signals that give an upgrade up.
const SIGNALS: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// What became of the new daemon.
pub enum Ending {
    /// It has the guest; its figures.
    TookOver(Value),
    /// It has not, and never will; why.
    Stayed(Why),
    /// It is not known, since the running daemon does not answer either.
    Unknown,
}

/// Why an upgrade was given up.
pub enum Why {
    /// The new daemon could not be started.
    NotStarted(io::Error),
    /// The new daemon ended, with this status, or closed its output.
    Ended(Option<ExitStatus>),
    /// The time was over; whether the process is gone.
    Late(bool),
    /// This signal came; whether the process is gone.
    Signal(Signal, bool),
}

/// A new daemon that was started, and wanted.
struct NewDaemon {
    child: Child,
    output: ChildStdout,
    line: Vec<u8>,
    /// Open for as long as it may take over.
    wanted: Option<PipeWriter>,
}

/// What it said, or what kept us from waiting.
enum Heard {
    Line(Value),
    End,
    Nothing,
    Signal(Signal),
}

/// Starts `command`, which takes over from the daemon `old_pid` behind `control`, and waits for the end of that.
pub fn run(command: Command, control: &Path, old_pid: &Value, timeout: Duration) -> Ending {
    let until = Instant::now() + timeout;
    let signals = match Signals::catch() {
        Ok(signals) => signals,
        Err(error) => return Ending::Stayed(Why::NotStarted(error)),
    };
    let mut successor = match start(command, &signals, until) {
        Ok(successor) => successor,
        Err(why) => return Ending::Stayed(why),
    };
    let why = match successor.hear(until, Some(&signals)) {
        Heard::Line(figures) => return Ending::TookOver(figures),
        Heard::End => return Ending::Stayed(Why::Ended(successor.status())),
        Heard::Nothing => None,
        Heard::Signal(signal) => Some(signal),
    };
    // A second signal ends us at once; nothing can be carried out any more.
    successor.wanted = None;
    drop(signals);
    successor.dismiss(control, old_pid, why)
}

/// Starts the program, in a thread: where its file's storage hangs, spawn waits for ever.
fn start(mut command: Command, signals: &Signals, until: Instant) -> Result<NewDaemon, Why> {
    let (stdin, wanted) = io::pipe().map_err(Why::NotStarted)?;
    command.stdin(stdin).stdout(Stdio::piped()).env(STARTER_VARIABLE, "1");
    let (sender, started) = channel();
    let (spawned, bell) = io::pipe().map_err(Why::NotStarted)?;
    let mask = signals.before;
    let work = move || {
        // Nobody waits any more when we have given up; the process's input is closed then, and it takes nothing over.
        let _ = sender.send(spawn::with_mask(command, mask));
        drop(bell);
    };
    std::thread::Builder::new().spawn(work).map_err(Why::NotStarted)?;
    match wait(&spawned, until, Some(signals)) {
        Wait::Ready => {}
        Wait::Signal(signal) => return Err(Why::Signal(signal, false)),
        Wait::Late => return Err(Why::Late(false)),
    }
    let mut child = match started.recv_timeout(REPLY_TIMEOUT) {
        Ok(spawned) => spawned.map_err(Why::NotStarted)?,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Err(Why::Late(false)),
    };
    match child.stdout.take() {
        Some(output) => Ok(NewDaemon { child, output, line: Vec::new(), wanted: Some(wanted) }),
        None => Err(Why::Ended(None)),
    }
}

impl NewDaemon {
    /// The line that a daemon prints when it has taken over.
    fn hear(&mut self, until: Instant, signals: Option<&Signals>) -> Heard {
        loop {
            match wait(&self.output, until, signals) {
                Wait::Ready => {}
                Wait::Signal(signal) => return Heard::Signal(signal),
                Wait::Late => return Heard::Nothing,
            }
            let mut bytes = [0; 4096];
            let count = match self.output.read(&mut bytes) {
                Ok(0) => return Heard::End,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Heard::End,
            };
            self.line.extend_from_slice(&bytes[..count]);
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let said: Option<Value> = serde_json::from_slice(&self.line[..end]).ok();
                return match said.and_then(|mut said| said.get_mut("took-over").map(Value::take)) {
                    Some(figures) => Heard::Line(figures),
                    None => Heard::End,
                };
            }
            if self.line.len() > MAX_LINE {
                return Heard::End;
            }
        }
    }

    /// Its status, if it ends soon.
    fn status(&mut self) -> Option<ExitStatus> {
        let until = Instant::now() + FAREWELL;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                ended => return ended.ok().flatten(),
            }
        }
    }

    /// Ends it, once it is not wanted any more: it is killed only if the old daemon serves, for one that has the guest must
    /// live. `signal`: what made us give up, `None`: the time.
    fn dismiss(mut self, control: &Path, old_pid: &Value, signal: Option<Signal>) -> Ending {
        let why = |gone| signal.map_or(Why::Late(gone), |signal| Why::Signal(signal, gone));
        match self.hear(Instant::now() + FAREWELL, None) {
            Heard::Line(figures) => return Ending::TookOver(figures),
            Heard::End if self.status().is_some() => return Ending::Stayed(why(true)),
            _ => {}
        }
        // Clients are answered by the old one only when it is not about to say `Go`, and it says that no more.
        let status =
            Client::connect(control).and_then(|mut client| client.ask("query-status", json!({}), REPLY_TIMEOUT));
        match status {
            Ok(status) if status["daemon"]["pid"] == *old_pid => {
                // It is not waited for, so its number is still its own. It has died before, or the wait below says so.
                let _ = self.child.kill();
                let gone = self.status().is_some();
                Ending::Stayed(why(gone))
            }
            Ok(status) => Ending::TookOver(status["daemon"]["took-over"].clone()),
            Err(_) => Ending::Unknown,
        }
    }
}

/// What a wait ended with.
enum Wait {
    Ready,
    Signal(Signal),
    Late,
}

/// Waits until there is something to read, a signal came, or the time is over.
fn wait(source: &impl std::os::fd::AsFd, until: Instant, signals: Option<&Signals>) -> Wait {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = vec![PollFd::new(source, PollFlags::IN)];
        fds.extend(signals.map(|signals| PollFd::new(&signals.fd, PollFlags::IN)));
        let polled = poll(&mut fds, Some(&timeout));
        let ready = polled.is_ok() && !fds[0].revents().is_empty();
        drop(fds);
        if let Some(signal) = signals.and_then(Signals::next) {
            return Wait::Signal(signal);
        }
        match polled {
            Ok(_) if ready => return Wait::Ready,
            Ok(0) => return Wait::Late,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // Nothing can be waited for: as if the time were over.
            Err(_) => return Wait::Late,
        }
    }
}

/// The signals that give an upgrade up, as a descriptor; dropped, they have their usual effect again.
struct Signals {
    fd: SignalFd,
    before: SigSet,
}

impl Signals {
    fn catch() -> io::Result<Signals> {
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
        // It cannot fail with a mask that was in force.
        let _ = self.before.thread_set_mask();
    }
}
