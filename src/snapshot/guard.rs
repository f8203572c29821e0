//! The guard: a small process that freezes and thaws for us, so that our death cannot leave a guest frozen.
//!
//! It is this program again, started with a socket as its standard input, in a session of its own and deaf to the
//! signals that end us. It alone talks to the guest's agent and calls the host's hooks; we ask it, a JSON line each
//! way. When the socket ends, or we are silent for longer than any snapshot lasts, it undoes what it did, in the
//! opposite order, and goes on trying for [`THAW_WATCH_TIMEOUT`]: a freeze that the agent carries out long after everybody lost
//! patience is found and undone. Should the guard die instead, [`Guard::thaw`] starts another one for the rest.

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
use super::plan::AgentAt;
use super::wait::{Stop, Wake, wait};
use crate::control::client::Failure;

/// The hidden subcommand of `virtioblkctl` that calls [`serve`].
pub const SUBCOMMAND: &str = "snapshot-guard";
/// How long a guest is watched that does not answer.
pub const THAW_WATCH_TIMEOUT: Duration = Duration::from_secs(600);
/// The guard's own deadline comes first, so that its words are heard.
const GUARD_MARGIN: Duration = Duration::from_secs(15);

/// What the guard is for: its first line. Paths are no `PathBuf`, which serde takes as UTF-8 only.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuardSpec {
    /// The socket of the guest's agent.
    pub socket: Option<OsString>,
    /// Or libvirt's domain.
    pub domain: Option<String>,
    /// The directory of hooks.
    pub hooks: Option<OsString>,
    /// What the hooks are told.
    pub environment: Vec<(String, OsString)>,
    /// For a freeze, a thaw and each hook.
    pub timeout: Duration,
    /// We are never silent for longer while something is frozen.
    pub silence: Duration,
    /// Begun by another guard, which died.
    pub begun: PendingUndo,
}

/// What must be undone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingUndo {
    /// The guest was told to freeze.
    pub guest: bool,
    /// The hook `freeze` was called.
    pub hooks: bool,
}

/// What the guard is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// Calls the hook.
    HooksFreeze,
    /// [`Guest::check`], its hook included.
    CheckAll,
    /// [`Guest::check`].
    Check,
    /// [`Guest::freeze`].
    Freeze,
    /// [`Guest::is_frozen`].
    IsFrozen,
    /// [`Guest::thaw`].
    Thaw,
    /// Calls the hook.
    HooksThaw,
}

/// Our side.
pub struct Guard {
    orders: GuardSpec,
    begun: PendingUndo,
    child: Child,
    link: BufReader<UnixStream>,
    /// Answers that nobody waited for.
    owed: u32,
}

impl Guard {
    /// Starts one. Errors: no process.
    pub fn start(orders: GuardSpec) -> Result<Self, Failure> {
        let failed =
            |error: std::io::Error| Failure::new("guard", format!("the guard process cannot be started: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        // Itself, even if the file was replaced. Our signals are blocked, and so are the guard's for ever.
        let mut command = Command::new("/proc/self/exe");
        command.arg(SUBCOMMAND).stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        let child = command.spawn().map_err(failed)?;
        drop(command);
        let begun = orders.begun;
        let mut guard = Guard { orders, begun, child, link: BufReader::new(ours), owed: 0 };
        let line = serde_json::to_value(&guard.orders).map_err(|error| failed(error.into()))?;
        guard.send(&line)?;
        Ok(guard)
    }

    /// Asks; `stop` ends the wait, not what was asked.
    pub fn ask(&mut self, ask: Ask, stop: Stop<'_>) -> Result<Value, Failure> {
        match ask {
            Ask::Freeze => self.begun.guest = true,
            Ask::HooksFreeze => self.begun.hooks = true,
            _ => {}
        }
        self.send(&json!(ask))?;
        self.owed += 1;
        // A freeze that is refused is followed by a thaw.
        let deadline = Instant::now() + 2 * self.orders.timeout + GUARD_MARGIN;
        let mut answer = Value::Null;
        while self.owed > 0 {
            answer = self.line(deadline, stop)?;
            self.owed -= 1;
        }
        if let Some(error) = answer.get("error") {
            let text = |name: &str| error[name].as_str().unwrap_or("").to_owned();
            if ask == Ask::Freeze && error["code"] == REFUSED {
                // Nothing of ours is frozen, and what is somebody else's stays so.
                self.begun.guest = false;
            }
            return Err(Failure { code: text("code"), message: text("message") });
        }
        match ask {
            Ask::Thaw => self.begun.guest = false,
            Ask::HooksThaw => self.begun.hooks = false,
            _ => {}
        }
        Ok(answer["ok"].take())
    }

    /// Asks for a thaw of either kind, which no signal interrupts; if the guard is dead, by another one.
    pub fn thaw(&mut self, ask: Ask) -> Result<Value, Failure> {
        let first = self.ask(ask, None);
        if !matches!(&first, Err(failure) if failure.code == DEAD) {
            return first;
        }
        // It cannot undo anything any more, or is stuck, and must let go of the agent.
        let ended = self.child.kill().and_then(|()| self.child.wait());
        ended.map_err(|error| Failure::new("guard", format!("the guard process cannot be ended: {error}")))?;
        *self = Guard::start(GuardSpec { begun: self.begun, ..self.orders.clone() })?;
        self.ask(ask, None)
    }

    /// What is not undone yet.
    pub fn begun(&self) -> PendingUndo {
        self.begun
    }

    /// Its process, which goes on after our end while something is not undone.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn send(&mut self, value: &Value) -> Result<(), Failure> {
        self.link.get_mut().write_all(format!("{value}\n").as_bytes()).map_err(|error| dead(&error.to_string()))
    }

    fn line(&mut self, deadline: Instant, stop: Stop<'_>) -> Result<Value, Failure> {
        loop {
            // Two answers may have come at once; then nothing makes the socket readable again.
            let is_here = self.link.buffer().contains(&b'\n');
            let wake = if is_here { Ok(Wake::Ready(Vec::new())) } else { wait(&[self.as_fd()], stop, deadline) };
            match wake {
                Ok(Wake::Ready(_)) => {}
                Ok(Wake::Stopped) => return Err(super::disks::interrupted()),
                Ok(Wake::TimedOut) => return Err(dead("it does not answer")),
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
    /// The end of the socket tells the guard to undo what is begun. Nobody waits for that here.
    fn drop(&mut self) {
        if self.begun == PendingUndo::default() {
            // Both fail only if it is gone.
            let _ = self.link.get_ref().shutdown(std::net::Shutdown::Both);
            let _ = self.child.wait();
        }
    }
}

/// The code of a guest's agent that says no.
const REFUSED: &str = "agent-refused";
/// The code of a guard that is no more.
const DEAD: &str = "guard-dead";

fn dead(why: &str) -> Failure {
    Failure::new(DEAD, format!("the guard process is lost: {why}"))
}

/// The guard's side: `virtioblkctl`, when started with [`SUBCOMMAND`]. `link` is its standard input.
pub fn serve(link: OwnedFd) -> ExitCode {
    // Ctrl-C on our terminal is not for the guard. It fails only for the leader of a group, which has its own already.
    let _ = rustix::process::setsid();
    let mut link = BufReader::new(UnixStream::from(link));
    let mut line = String::new();
    let orders = match link.read_line(&mut line).map(|_| serde_json::from_str::<GuardSpec>(&line)) {
        Ok(Ok(orders)) => orders,
        Ok(Err(_)) | Err(_) => {
            crate::base::logging::say(format_args!(
                "{SUBCOMMAND}: this is started by 'virtioblkctl snapshot', not by hand"
            ));
            return ExitCode::from(2);
        }
    };
    let mut keeper = Keeper::new(orders);
    while let Some(ask) = next(&mut link, &keeper) {
        let answer = match keeper.carry_out(ask, Some(link.get_ref().as_fd())) {
            Ok(value) => json!({"ok": value}),
            Err(failure) => json!({"error": {"code": failure.code, "message": failure.message}}),
        };
        if link.get_mut().write_all(format!("{answer}\n").as_bytes()).is_err() {
            break;
        }
    }
    // Nobody asks any more; what is not undone by now is undone here.
    drop(link);
    if keeper.begun != PendingUndo::default() { keeper.undo() } else { ExitCode::SUCCESS }
}

/// The next question; `None`: there will be none.
fn next(link: &mut BufReader<UnixStream>, keeper: &Keeper) -> Option<Ask> {
    if link.buffer().is_empty() {
        let frozen = keeper.begun != PendingUndo::default();
        let silence = if frozen { keeper.orders.silence } else { Duration::from_secs(86_400) };
        let wake = wait(&[link.get_ref().as_fd()], None, Instant::now() + silence);
        if !matches!(wake, Ok(Wake::Ready(_))) {
            return None;
        }
    }
    let mut line = String::new();
    match link.read_line(&mut line) {
        Ok(0) | Err(_) => None,
        Ok(_) => serde_json::from_str(&line).ok(),
    }
}

/// Does what the guard is asked, and knows what is begun.
struct Keeper {
    orders: GuardSpec,
    begun: PendingUndo,
    guest: Option<Guest>,
    hooks: Option<Hooks>,
    frozen_at: Option<Instant>,
}

impl Keeper {
    fn new(orders: GuardSpec) -> Self {
        let socket = orders.socket.clone().map(|path| AgentAt::Socket(path.into()));
        let guest =
            socket.or_else(|| orders.domain.clone().map(AgentAt::Domain)).map(|at| Guest::new(&at, orders.timeout));
        let hooks =
            orders.hooks.as_deref().map(|directory| Hooks::new(Path::new(directory), orders.environment.clone()));
        Keeper { begun: orders.begun, guest, hooks, frozen_at: None, orders }
    }

    fn carry_out(&mut self, ask: Ask, stop: Stop<'_>) -> Result<Value, Failure> {
        let timeout = self.orders.timeout;
        match ask {
            Ask::HooksFreeze => {
                self.begun.hooks = true;
                self.hook("freeze", stop)
            }
            Ask::HooksThaw => {
                self.begun.hooks = false;
                self.hook("thaw", None)
            }
            Ask::Check | Ask::CheckAll => {
                let checked = self.guest()?.check(ask == Ask::CheckAll, stop).map_err(failure)?;
                Ok(json!(checked))
            }
            Ask::Freeze => {
                self.frozen_at = Some(Instant::now());
                self.begun.guest = true;
                let frozen = self.guest()?.freeze(timeout, stop);
                self.begun.guest = !matches!(frozen, Err(AgentError::Refused(_)));
                frozen.map(|count| json!({"frozen": count})).map_err(failure)
            }
            Ask::IsFrozen => {
                let frozen = self.guest()?.is_frozen(stop).map_err(failure)?;
                Ok(json!({"frozen": frozen}))
            }
            Ask::Thaw => {
                let deadline = Instant::now() + timeout;
                let thawed = self.guest()?.thaw(deadline, stop).map_err(failure)?;
                self.begun.guest = false;
                let frozen = self.frozen_at.map_or(0, |since| since.elapsed().as_micros() as u64);
                Ok(json!({"thawed": thawed, "frozen-us": frozen}))
            }
        }
    }

    fn guest(&mut self) -> Result<&mut Guest, Failure> {
        self.guest.as_mut().ok_or_else(|| Failure::new("internal", "the guard was given no agent"))
    }

    fn hook(&self, name: &str, stop: Stop<'_>) -> Result<Value, Failure> {
        let Some(hooks) = &self.hooks else { return Err(Failure::new("internal", "the guard was given no hooks")) };
        hooks.call(name, self.orders.timeout, stop).map(|()| Value::Null).map_err(|why| Failure::new("hook", why))
    }

    /// Thaws the guest, then calls the hook: we are alone.
    fn undo(&mut self) -> ExitCode {
        // Who started us may wait for the end of our output, and nobody reads it.
        if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
            // What is said is said in vain in either case.
            let _ = rustix::stdio::dup2_stderr(&null);
        }
        let mut status = ExitCode::SUCCESS;
        // The disks are released by our parent's death, at the same time: the thaw's writes wait until they are.
        if self.begun.guest {
            let thawed = self.guest.as_mut().map(|guest| guest.thaw(Instant::now() + THAW_WATCH_TIMEOUT, None));
            if !matches!(thawed, Some(Ok(_))) {
                status = ExitCode::FAILURE;
            }
        }
        if self.begun.hooks && self.hook("thaw", None).is_err() {
            status = ExitCode::FAILURE;
        }
        status
    }
}

/// A trouble as an answer.
fn failure(trouble: AgentError) -> Failure {
    let code = match trouble {
        AgentError::Silent(_) => "agent-silent",
        AgentError::Lost(_) => "agent-lost",
        AgentError::Refused(_) => REFUSED,
        AgentError::Stopped => "interrupted",
    };
    Failure::new(code, trouble.to_string())
}

impl AsFd for Guard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.get_ref().as_fd()
    }
}
