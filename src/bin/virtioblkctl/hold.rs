//! `quiesce -- COMMAND`: holds the disk while a command runs. The command's status is passed on as a success only if the
//! hold lasted as long as the command ran.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

use crate::show::units;
use crate::{parse, show};
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::wait::poll_until;
use virtioblkd::internal::control::client::{Client, Failure, Message, REPLY_TIMEOUT};
use virtioblkd::internal::control::protocol::return_types::{HoldEnded, Quiesced, Resumed};
use virtioblkd::internal::snapshot::spawn;

/// The exit status of a failure of virtioblkctl itself, as timeout(1), env(1) and nice(1) have it.
pub const FAILED: u8 = 125;
const CANNOT_RUN: u8 = 126;
const NOT_FOUND: u8 = 127;
/// How much shorter than requested a lease may be without a message.
const GRANT_TOLERANCE_MS: u64 = 50;

/// The signals that are passed on to the command. They do not end this process while the command runs.
const PASSED_ON: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// A hold during which a command runs.
struct Hold {
    client: Client,
    token: String,
    /// The lease that each renewal asks for.
    lease: Duration,
    /// Why the hold ended before the command did; the snapshot cannot be trusted then.
    lost: Option<String>,
    renew_at: Instant,
}

/// Quiesces the disk with these `arguments` of the command `quiesce`, runs `command`, and resumes the disk. Returns this
/// program's exit status.
pub fn run(
    mut client: Client,
    arguments: Value,
    timeout: Duration,
    lease: Duration,
    command: &[OsString],
) -> Result<u8, Failure> {
    // A signal that arrives before the reply ends this process, and its connection's end cancels the quiesce.
    let reply: Quiesced = parse(client.execute("quiesce", arguments, timeout + REPLY_TIMEOUT)?)?;
    logging::message(format_args!(
        "the disk is held{}: {}",
        shorter(lease, reply.lease_ms),
        show::figures(&reply.figures)
    ));
    let mut hold = Hold { client, token: reply.token, lease, lost: None, renew_at: Instant::now() + lease / 3 };
    let status = match hold.start(command) {
        Ok((mut child, signals)) => match hold.wait(&mut child, &signals) {
            Ok(status) => status,
            Err(failure) => {
                // This process can no longer watch the hold, which may end before the command does.
                hold.lost = Some(failure.message.clone());
                child.wait().map_err(|error| Failure::new("command", format!("cannot wait: {error}")))?
            }
        },
        Err(error) => {
            let name = command[0].to_string_lossy();
            logging::message(format_args!("cannot run '{name}': {error}"));
            hold.resume();
            return Ok(if error.kind() == std::io::ErrorKind::NotFound { NOT_FOUND } else { CANNOT_RUN });
        }
    };
    hold.resume();
    Ok(hold.exit_status(status))
}

impl Hold {
    fn start(&self, command: &[OsString]) -> std::io::Result<(Child, SignalFd)> {
        let set: SigSet = PASSED_ON.into_iter().collect();
        let before = set.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK)?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let mut what = Command::new(&command[0]);
        what.args(&command[1..]).env("VIRTIOBLK_QUIESCE_TOKEN", &self.token);
        Ok((spawn::with_mask(what, before)?, signals))
    }

    /// Waits for the command's end. Meanwhile this passes signals on, renews the lease and reads the daemon's messages.
    fn wait(&mut self, child: &mut Child, signals: &SignalFd) -> Result<ExitStatus, Failure> {
        let failed = |what: &str, error: std::io::Error| Failure::new("command", format!("{what}: {error}"));
        let pid = Pid::from_child(child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| failed("pidfd_open", errno.into()))?;
        loop {
            // A message that was read together with an earlier one does not make the descriptor readable.
            self.read_messages(false);
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
            if self.lost.is_none() {
                fds.push(PollFd::from_borrowed_fd(self.client.as_fd(), PollFlags::IN));
            }
            let deadline = self.lost.is_none().then_some(self.renew_at);
            poll_until(&mut fds, deadline).map_err(|error| failed("poll", error))?;
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            pass_on(signals, &pidfd).map_err(|error| failed("passing a signal on", error))?;
            if ready.get(2) == Some(&true) {
                self.read_messages(true);
            }
            if ready[0] {
                return child.wait().map_err(|error| failed("waiting for the command", error));
            }
            self.renew();
        }
    }

    /// Reads the daemon's messages, to detect the end of the hold. `readable`: the socket has data.
    fn read_messages(&mut self, mut readable: bool) {
        while self.lost.is_none() && (std::mem::take(&mut readable) || self.client.has_more()) {
            match self.client.next(Some(Instant::now() + REPLY_TIMEOUT)) {
                Ok(Message::Event(mut event)) if event["event"] == "RESUMED" => {
                    match parse::<HoldEnded>(event["data"].take()) {
                        Ok(ended) if ended.token == self.token => self.lose(describe_end(&ended.reason)),
                        Ok(_) => {}
                        Err(failure) => self.lose(failure.message),
                    }
                }
                Ok(Message::Event(_) | Message::Reply(Ok(_))) => {}
                Ok(Message::Reply(Err(failure))) | Err(failure) => self.lose(failure.message),
            }
        }
    }

    fn lose(&mut self, why: String) {
        logging::message(format_args!("THE HOLD IS LOST while the command runs: {why}"));
        self.lost = Some(why);
    }

    /// Requests the whole lease again when a third of it has passed. [`Hold::read_messages`] reads the reply.
    fn renew(&mut self) {
        if self.lost.is_some() || Instant::now() < self.renew_at {
            return;
        }
        self.renew_at = Instant::now() + self.lease / 3;
        let arguments = json!({"token": self.token, "lease-ms": self.lease.as_millis() as u64});
        if let Err(failure) = self.client.send("renew-lease", arguments) {
            self.lose(failure.message);
        }
    }

    /// Ends the hold after the command. If the daemon still knows the token, the disk was held all the time.
    fn resume(&mut self) {
        if self.lost.is_some() {
            return;
        }
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let mut sent = self.client.send("resume", json!({"token": self.token}));
        while sent.is_ok() {
            match self.client.next(Some(deadline)) {
                Ok(Message::Reply(Ok(value))) => match parse::<Resumed>(value) {
                    Ok(Resumed { resumed: Some(_), .. }) => return,
                    // This is the reply to a renewal.
                    Ok(_) => {}
                    Err(failure) => sent = Err(failure),
                },
                Ok(Message::Event(_)) => {}
                Ok(Message::Reply(Err(failure))) | Err(failure) => sent = Err(failure),
            }
        }
        self.lost = sent.err().map(|failure| failure.message);
    }

    /// The exit status of this program for the command's `status`.
    fn exit_status(&self, status: ExitStatus) -> u8 {
        let status = match (status.code(), status.signal()) {
            (Some(code), _) => code as u8,
            (None, signal) => 128 + signal.unwrap_or(0) as u8,
        };
        match &self.lost {
            None => status,
            Some(why) => {
                logging::message(format_args!(
                    "the disk was not held until the command ended, so what the command copied cannot be trusted: {why}"
                ));
                if status == 0 { FAILED } else { status }
            }
        }
    }
}

/// Says for how long the disk is held if that is shorter than the lease that was asked for. Returns an empty text otherwise.
pub fn shorter(asked: Duration, granted_ms: u64) -> String {
    match Duration::from_millis(granted_ms) < asked {
        // The reply counts whole milliseconds, from which those since the grant are missing.
        true if asked.as_millis() as u64 > granted_ms + GRANT_TOLERANCE_MS => format!(
            " for {} only, not {}, because the daemon's --max-hold ends every hold then",
            units::time(granted_ms),
            units::time(asked.as_millis() as u64)
        ),
        _ => String::new(),
    }
}

/// Describes the `reason` of the event `RESUMED`.
fn describe_end(reason: &str) -> String {
    match reason {
        "lease-expired" => {
            "its lease ran out, because the daemon's --max-hold ended it or virtioblkctl could not renew it in \
                            time (a longer --lease allows for that)"
                .to_owned()
        }
        "resume" => "another client resumed the disk".to_owned(),
        "shutdown" => "the daemon ends".to_owned(),
        "" => "it ended, and the daemon gives no reason".to_owned(),
        other => format!("it ended: {other}"),
    }
}

/// Passes the signals that arrived on to the command. A signal of the terminal (Ctrl-C) has reached the command already.
fn pass_on(signals: &SignalFd, command: &OwnedFd) -> std::io::Result<()> {
    while let Some(info) = signals.read_signal()? {
        if info.ssi_code == libc::SI_KERNEL {
            continue;
        }
        let Some(signal) = rustix::process::Signal::from_named_raw(info.ssi_signo as i32) else { continue };
        match pidfd_send_signal(command, signal) {
            // SRCH: the command has ended meanwhile.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
