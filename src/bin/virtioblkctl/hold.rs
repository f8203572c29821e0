//! `quiesce -- COMMAND`: the disk is held while a command runs, and the command's status is only passed on as a success
//! if the hold lasted as long as the command did.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

use crate::show;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::control::client::{Client, Failure, Message, REPLY_TIMEOUT};
use virtioblkd::internal::snapshot::spawn;

/// Our own failure, as timeout(1), env(1) and nice(1) say it.
pub const FAILED: u8 = 125;
const CANNOT_RUN: u8 = 126;
const NOT_FOUND: u8 = 127;

/// The signals that are passed on to the command; they do not end us while it runs.
const PASSED_ON: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// A hold with a command under it.
struct Hold {
    client: Client,
    token: String,
    lease: Duration,
    /// Why the snapshot cannot be trusted.
    lost: Option<String>,
    renew_at: Instant,
}

/// Quiesces (with these arguments of the `quiesce` command), runs `command`, resumes. Returns our exit status.
pub fn run(mut client: Client, arguments: Value, timeout: Duration, command: &[OsString]) -> Result<u8, Failure> {
    let lease = Duration::from_millis(arguments["lease-ms"].as_u64().unwrap_or(0));
    // Until here a signal ends us, and with our connection the quiesce.
    let answer = client.ask("quiesce", arguments, timeout + REPLY_TIMEOUT)?;
    let token = answer["token"].as_str().unwrap_or_default().to_owned();
    logging::message(format_args!("the disk is held: {}", show::figures(&answer)));
    let mut hold = Hold { client, token, lease, lost: None, renew_at: Instant::now() + lease / 3 };
    let status = match hold.start(command) {
        Ok((mut child, signals)) => match hold.wait(&mut child, &signals) {
            Ok(status) => status,
            Err(failure) => {
                // We can no longer watch; the command must not outlive the hold unnoticed.
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
    Ok(hold.verdict(status))
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

    /// Waits for the command; meanwhile passes signals on, renews the lease and listens for the hold's end.
    fn wait(&mut self, child: &mut Child, signals: &SignalFd) -> Result<ExitStatus, Failure> {
        let failed = |what: &str, error: std::io::Error| Failure::new("command", format!("{what}: {error}"));
        let pid = Pid::from_child(child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| failed("pidfd_open", errno.into()))?;
        loop {
            // What came together with an earlier message makes no descriptor readable.
            self.listen(false);
            let timeout = self.lost.is_none().then(|| self.renew_at.saturating_duration_since(Instant::now()));
            let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
            if self.lost.is_none() {
                fds.push(PollFd::from_borrowed_fd(self.client.as_fd(), PollFlags::IN));
            }
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed("poll", errno.into())),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            pass_on(signals, &pidfd).map_err(|error| failed("passing a signal on", error))?;
            if ready.get(2) == Some(&true) {
                self.listen(true);
            }
            if ready[0] {
                return child.wait().map_err(|error| failed("waiting for the command", error));
            }
            self.renew();
        }
    }

    /// Reads what the daemon said (`readable`: there is something in the socket); the end of our hold is what matters.
    fn listen(&mut self, mut readable: bool) {
        while self.lost.is_none() && (std::mem::take(&mut readable) || self.client.has_more()) {
            match self.client.next(Some(Instant::now() + REPLY_TIMEOUT)) {
                Ok(Message::Event(event)) if event["event"] == "RESUMED" && event["data"]["token"] == *self.token => {
                    self.lose(match event["data"]["reason"].as_str() {
                        Some("lease-expired") => "its lease ran out".to_owned(),
                        Some("resume") => "somebody else resumed the disk".to_owned(),
                        Some("shutdown") => "the daemon ends".to_owned(),
                        other => format!("it ended: {}", other.unwrap_or("no reason given")),
                    });
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

    /// A third of the lease has passed: asks for all of it again. The answer comes by [`Hold::listen`].
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

    /// The command is over. That the daemon still knows our token is the proof that the disk was held all the time.
    fn resume(&mut self) {
        if self.lost.is_some() {
            return;
        }
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let mut sent = self.client.send("resume", json!({"token": self.token}));
        while sent.is_ok() {
            match self.client.next(Some(deadline)) {
                Ok(Message::Reply(Ok(value))) if value.get("resumed").is_some() => return,
                // Answers to renewals, and events.
                Ok(Message::Reply(Ok(_)) | Message::Event(_)) => {}
                Ok(Message::Reply(Err(failure))) | Err(failure) => sent = Err(failure),
            }
        }
        self.lost = sent.err().map(|failure| failure.message);
    }

    fn verdict(&self, status: ExitStatus) -> u8 {
        let own = match (status.code(), status.signal()) {
            (Some(code), _) => code as u8,
            (None, signal) => 128 + signal.unwrap_or(0) as u8,
        };
        match &self.lost {
            None => own,
            Some(why) => {
                logging::message(format_args!(
                    "the disk was not held until the command ended, so what it copied cannot be trusted: \
                     {why}"
                ));
                if own == 0 { FAILED } else { own }
            }
        }
    }
}

/// Hands the signals that came to the command. What the terminal sent (Ctrl-C) it has already got itself.
fn pass_on(signals: &SignalFd, command: &OwnedFd) -> std::io::Result<()> {
    while let Some(info) = signals.read_signal()? {
        if info.ssi_code == libc::SI_KERNEL {
            continue;
        }
        let Some(signal) = rustix::process::Signal::from_named_raw(info.ssi_signo as i32) else { continue };
        match pidfd_send_signal(command, signal) {
            // It ended just now.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
