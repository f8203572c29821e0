//! The guard: a small process that freezes and thaws for us, so that the guest is thawed even if we are killed.
//!
//! The guard is this program again, started with a socket as its standard input, in a session of its own and with the
//! signals blocked that end us. Only the guard talks to the guest's agent and calls the host's hooks; we send it
//! requests, with one JSON line each way. When the socket is closed, or we send nothing for longer than any snapshot
//! lasts, the guard undoes what it did, in the opposite order, and retries for [`THAW_WATCH_TIMEOUT`], so that it also
//! undoes a freeze which the agent carries out long after all timeouts. If the guard is killed, [`Guard::thaw`] starts
//! another one, which undoes the rest.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::agent::AgentError;
use super::guest::Guest;
use super::hooks::Hooks;
use super::plan::AgentAddress;
use super::wait::{CancelFd, WaitEnd, wait};
use crate::control::client::Failure;

/// The hidden subcommand of `virtioblkctl` that calls [`serve`].
pub const SUBCOMMAND: &str = "snapshot-guard";
/// How long the guard tries to thaw a guest whose agent does not answer.
pub const THAW_WATCH_TIMEOUT: Duration = Duration::from_secs(600);
/// How much later our deadline is than the guard's, so that the user sees the guard's message.
const GUARD_MARGIN: Duration = Duration::from_secs(15);

/// The guard's options, which are the first line that it reads. Paths are no `PathBuf`, because serde accepts that in
/// UTF-8 only.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuardSpec {
    /// The socket of the guest's agent.
    pub socket: Option<OsString>,
    /// The libvirt domain through which the agent is reached, instead of the socket.
    pub domain: Option<String>,
    /// The directory of hooks.
    pub hooks: Option<OsString>,
    /// Environment variables of the hooks.
    pub environment: Vec<(String, OsString)>,
    /// How long a freeze, a thaw and each hook may take.
    pub timeout: Duration,
    /// The guard thaws after this time without a request.
    pub silence: Duration,
    /// What another guard, which was killed, has left to undo.
    pub pending: PendingUndo,
}

/// What the guard must undo.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingUndo {
    /// A freeze of the guest was requested, and its thaw is not confirmed.
    pub guest: bool,
    /// The hook `freeze` was called, and the hook `thaw` was not.
    pub hooks: bool,
}

/// A request to the guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuardRequest {
    /// Calls the hook `freeze`.
    HooksFreeze,
    /// Calls [`Guest::check`], and also determines whether the agent runs a hook.
    CheckAll,
    /// Calls [`Guest::check`].
    Check,
    /// Calls [`Guest::freeze`].
    Freeze,
    /// Calls [`Guest::is_frozen`].
    IsFrozen,
    /// Calls [`Guest::thaw`].
    Thaw,
    /// Calls the hook `thaw`.
    HooksThaw,
}

/// The parent's handle of a guard.
pub struct Guard {
    spec: GuardSpec,
    pending: PendingUndo,
    child: Child,
    link: BufReader<UnixStream>,
    /// The number of outstanding replies. All but the last one are ignored, because the wait for them was given up.
    replies_due: u32,
}

impl Guard {
    /// Starts a guard. Fails if no process can be started.
    pub fn start(spec: GuardSpec) -> Result<Self, Failure> {
        let failed =
            |error: std::io::Error| Failure::new("guard", format!("the guard process cannot be started: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        // /proc/self/exe is this program even if the file was replaced. Our signals are blocked, and the guard inherits
        // that.
        let mut command = Command::new("/proc/self/exe");
        command.arg(SUBCOMMAND).stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        let child = command.spawn().map_err(failed)?;
        drop(command);
        let pending = spec.pending;
        let mut guard = Guard { spec, pending, child, link: BufReader::new(ours), replies_due: 0 };
        let line = serde_json::to_value(&guard.spec).map_err(|error| failed(error.into()))?;
        guard.send(&line)?;
        Ok(guard)
    }

    /// Sends a request and waits for its reply. `cancel` ends the wait, but not the request.
    pub fn execute(&mut self, request: GuardRequest, cancel: CancelFd<'_>) -> Result<Value, Failure> {
        match request {
            GuardRequest::Freeze => self.pending.guest = true,
            GuardRequest::HooksFreeze => self.pending.hooks = true,
            _ => {}
        }
        self.send(&json!(request))?;
        self.replies_due += 1;
        // A freeze that is refused is followed by a thaw.
        let deadline = Instant::now() + 2 * self.spec.timeout + GUARD_MARGIN;
        let mut reply = Value::Null;
        while self.replies_due > 0 {
            reply = self.line(deadline, cancel)?;
            self.replies_due -= 1;
        }
        if let Some(error) = reply.get("error") {
            let text = |name: &str| error[name].as_str().unwrap_or("").to_owned();
            if request == GuardRequest::Freeze && error["code"] == REFUSED {
                // The guard froze nothing, and what another program froze must stay frozen.
                self.pending.guest = false;
            }
            return Err(Failure { code: text("code"), message: text("message") });
        }
        match request {
            GuardRequest::Thaw => self.pending.guest = false,
            GuardRequest::HooksThaw => self.pending.hooks = false,
            _ => {}
        }
        Ok(reply["ok"].take())
    }

    /// Requests `Thaw` or `HooksThaw`; no signal interrupts it. Starts a new guard if the present one has died or
    /// hangs.
    pub fn thaw(&mut self, request: GuardRequest) -> Result<Value, Failure> {
        let first = self.execute(request, None);
        if !matches!(&first, Err(failure) if failure.code == DEAD) {
            return first;
        }
        // The guard is dead or hangs. It must release the agent before the next one starts.
        let ended = self.child.kill().and_then(|()| self.child.wait());
        ended.map_err(|error| Failure::new("guard", format!("the guard process cannot be ended: {error}")))?;
        *self = Guard::start(GuardSpec { pending: self.pending, ..self.spec.clone() })?;
        self.execute(request, None)
    }

    /// Returns what the guard has begun and not undone.
    pub fn pending_undo(&self) -> PendingUndo {
        self.pending
    }

    /// Returns the process id of the guard. The process outlives us while something is not undone.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn send(&mut self, value: &Value) -> Result<(), Failure> {
        self.link.get_mut().write_all(format!("{value}\n").as_bytes()).map_err(|error| dead(&error.to_string()))
    }

    fn line(&mut self, deadline: Instant, cancel: CancelFd<'_>) -> Result<Value, Failure> {
        loop {
            // Two replies may have arrived at once; the socket does not become readable again for the second one.
            let is_here = self.link.buffer().contains(&b'\n');
            let wake = if is_here { Ok(WaitEnd::Ready(Vec::new())) } else { wait(&[self.as_fd()], cancel, deadline) };
            match wake {
                Ok(WaitEnd::Ready(_)) => {}
                Ok(WaitEnd::Cancelled) => return Err(super::disks::interrupted()),
                Ok(WaitEnd::TimedOut) => return Err(dead("it does not answer")),
                Err(error) => return Err(Failure::new("internal", format!("poll: {error}"))),
            }
            let mut line = String::new();
            return match self.link.read_line(&mut line) {
                Ok(0) => Err(dead("it ended")),
                Ok(_) => serde_json::from_str(&line).map_err(|error| dead(&error.to_string())),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => Err(dead(&error.to_string())),
            };
        }
    }
}

impl Drop for Guard {
    /// Closes the socket, which makes the guard undo what it began. Does not wait for that.
    fn drop(&mut self) {
        if self.pending == PendingUndo::default() {
            // Both fail only if the guard has ended.
            let _ = self.link.get_ref().shutdown(std::net::Shutdown::Both);
            let _ = self.child.wait();
        }
    }
}

/// The code of a failure that the guest's agent reported.
const REFUSED: &str = "agent-refused";
/// The code of a guard that has ended.
const DEAD: &str = "guard-dead";

fn dead(why: &str) -> Failure {
    Failure::new(DEAD, format!("the guard process is lost: {why}"))
}

/// Runs the guard: the main function of `virtioblkctl` when started with [`SUBCOMMAND`]. `link`: its standard input.
pub fn serve(link: OwnedFd) -> ExitCode {
    // A new session, so that Ctrl-C on our terminal does not end the guard. This fails only for the leader of a process
    // group, which Ctrl-C does not reach.
    let _ = rustix::process::setsid();
    let mut link = BufReader::new(UnixStream::from(link));
    let mut line = String::new();
    let spec = match link.read_line(&mut line).map(|_| serde_json::from_str::<GuardSpec>(&line)) {
        Ok(Ok(spec)) => spec,
        Ok(Err(_)) | Err(_) => {
            crate::base::logging::message(format_args!(
                "{SUBCOMMAND}: this is started by 'virtioblkctl snapshot', not by hand"
            ));
            return ExitCode::from(2);
        }
    };
    let mut state = GuardState::new(spec);
    while let Some(request) = next(&mut link, &state) {
        let reply = match state.carry_out(request, Some(link.get_ref().as_fd())) {
            Ok(value) => json!({"ok": value}),
            Err(failure) => json!({"error": {"code": failure.code, "message": failure.message}}),
        };
        if link.get_mut().write_all(format!("{reply}\n").as_bytes()).is_err() {
            break;
        }
    }
    // No more requests follow: undo what is not undone yet.
    drop(link);
    if state.pending != PendingUndo::default() { state.undo() } else { ExitCode::SUCCESS }
}

/// Reads the next request. `None`: no request follows, because the parent has ended or was silent for too long.
fn next(link: &mut BufReader<UnixStream>, state: &GuardState) -> Option<GuardRequest> {
    if link.buffer().is_empty() {
        let frozen = state.pending != PendingUndo::default();
        let silence = if frozen { state.spec.silence } else { Duration::from_secs(86_400) };
        let wake = wait(&[link.get_ref().as_fd()], None, Instant::now() + silence);
        if !matches!(wake, Ok(WaitEnd::Ready(_))) {
            return None;
        }
    }
    let mut line = String::new();
    match link.read_line(&mut line) {
        Ok(0) | Err(_) => None,
        Ok(_) => serde_json::from_str(&line).ok(),
    }
}

/// The state of the guard's process: carries out the requests, and knows what to undo.
struct GuardState {
    spec: GuardSpec,
    pending: PendingUndo,
    guest: Option<Guest>,
    hooks: Option<Hooks>,
    frozen_at: Option<Instant>,
}

impl GuardState {
    fn new(spec: GuardSpec) -> Self {
        let socket = spec.socket.clone().map(|path| AgentAddress::Socket(path.into()));
        let guest =
            socket.or_else(|| spec.domain.clone().map(AgentAddress::Domain)).map(|at| Guest::new(&at, spec.timeout));
        let hooks = spec.hooks.as_deref().map(|directory| Hooks::new(Path::new(directory), spec.environment.clone()));
        GuardState { pending: spec.pending, guest, hooks, frozen_at: None, spec }
    }

    fn carry_out(&mut self, request: GuardRequest, cancel: CancelFd<'_>) -> Result<Value, Failure> {
        let timeout = self.spec.timeout;
        match request {
            GuardRequest::HooksFreeze => {
                self.pending.hooks = true;
                self.hook("freeze", cancel)
            }
            GuardRequest::HooksThaw => {
                self.pending.hooks = false;
                self.hook("thaw", None)
            }
            GuardRequest::Check | GuardRequest::CheckAll => {
                let checked = self.guest()?.check(request == GuardRequest::CheckAll, cancel).map_err(failure)?;
                Ok(json!(checked))
            }
            GuardRequest::Freeze => {
                self.frozen_at = Some(Instant::now());
                self.pending.guest = true;
                let frozen = self.guest()?.freeze(timeout, cancel);
                self.pending.guest = !matches!(frozen, Err(AgentError::Refused(_)));
                frozen.map(|count| json!({"frozen": count})).map_err(failure)
            }
            GuardRequest::IsFrozen => {
                let frozen = self.guest()?.is_frozen(cancel).map_err(failure)?;
                Ok(json!({"frozen": frozen}))
            }
            GuardRequest::Thaw => {
                let deadline = Instant::now() + timeout;
                let thawed = self.guest()?.thaw(deadline, cancel).map_err(failure)?;
                self.pending.guest = false;
                let frozen = self.frozen_at.map_or(0, |since| since.elapsed().as_micros() as u64);
                Ok(json!({"thawed": thawed, "frozen-us": frozen}))
            }
        }
    }

    fn guest(&mut self) -> Result<&mut Guest, Failure> {
        self.guest.as_mut().ok_or_else(|| Failure::new("internal", "the guard was given no agent"))
    }

    fn hook(&self, name: &str, cancel: CancelFd<'_>) -> Result<Value, Failure> {
        let Some(hooks) = &self.hooks else { return Err(Failure::new("internal", "the guard was given no hooks")) };
        hooks.call(name, self.spec.timeout, cancel).map(|()| Value::Null).map_err(|why| Failure::new("hook", why))
    }

    /// Thaws the guest, then calls the hook `thaw`, after the parent has ended or given up.
    fn undo(&mut self) -> ExitCode {
        // The process that started the parent may wait for the end of our output, which it does not need.
        if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
            // If this fails, the messages are lost as well.
            let _ = rustix::stdio::dup2_stderr(&null);
        }
        let mut status = ExitCode::SUCCESS;
        // The daemons release the disks when our parent has ended. The thaw's writes wait until then.
        if self.pending.guest {
            let thawed = self.guest.as_mut().map(|guest| guest.thaw(Instant::now() + THAW_WATCH_TIMEOUT, None));
            if !matches!(thawed, Some(Ok(_))) {
                status = ExitCode::FAILURE;
            }
        }
        if self.pending.hooks && self.hook("thaw", None).is_err() {
            status = ExitCode::FAILURE;
        }
        status
    }
}

/// Converts an agent's error to the error of a reply.
fn failure(error: AgentError) -> Failure {
    let code = match error {
        AgentError::Silent(_) => "agent-silent",
        AgentError::Lost(_) => "agent-lost",
        AgentError::Refused(_) => REFUSED,
        AgentError::Cancelled => "interrupted",
    };
    Failure::new(code, error.to_string())
}

impl AsFd for Guard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.get_ref().as_fd()
    }
}
