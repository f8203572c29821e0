//! Freezes and thaws a guest, calls the host's hooks, and determines which level is reached. Used by `snapshot` and
//! `attend`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::disks::interrupted;
use super::guard::{Guard, GuardRequest, GuardSpec, PendingUndo, THAW_WATCH_TIMEOUT};
use super::guest::{GuestReport, ThawResult, VSS_HOLD_TIMEOUT};
use super::plan::{AgentAddress, Consistency};
use super::receipt::Receipt;
use super::wait::{CancelFd, WaitEnd, wait};
use crate::base::figures::count;
use crate::control::client::Failure;

/// What to freeze, and how.
#[derive(Clone, Debug)]
pub struct FreezeOptions {
    /// The level to reach.
    pub level: Consistency,
    /// The agent that freezes the guest's filesystems.
    pub agent: Option<AgentAddress>,
    /// The directory of the host's hooks.
    pub hooks: Option<PathBuf>,
    /// Continue with a weaker level if `level` is not reached.
    pub or_weaker: bool,
    /// How long the guest's freeze, its thaw, and each hook may take.
    pub timeout: Duration,
    /// While something is frozen, the guard thaws by itself after this time without a message from us.
    pub silence: Duration,
}

/// One freeze and its thaw. If this is dropped while something is frozen, the guard thaws it.
pub struct Freezer {
    options: FreezeOptions,
    guard: Option<Guard>,
    /// When the guest's filesystems were frozen. `None`: they were not.
    frozen_at: Option<Instant>,
    /// The guest is Windows.
    windows: bool,
    /// The level that is reached so far.
    pub level: Consistency,
    /// The findings so far.
    pub receipt: Receipt,
}

/// Fails with `interrupted` if `cancel` is readable. Never waits.
pub fn check(cancel: CancelFd<'_>) -> Result<(), Failure> {
    match wait(&[], cancel, Instant::now()) {
        Ok(WaitEnd::Cancelled) => Err(interrupted()),
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new("internal", format!("poll: {error}"))),
    }
}

impl Freezer {
    /// Creates a freezer. Starts no process yet.
    pub fn new(options: FreezeOptions) -> Self {
        let level = options.level;
        let receipt = Receipt { requested_level: level.name(), ..Receipt::default() };
        Freezer { options, guard: None, frozen_at: None, windows: false, level, receipt }
    }

    /// Starts the guard, if there is anything to freeze. `environment`: the environment variables of the hooks.
    pub fn start(&mut self, environment: Vec<(String, OsString)>) -> Result<(), Failure> {
        let options = &self.options;
        let freezes = options.level > Consistency::Crash;
        if !freezes && options.agent.is_some() {
            self.warn("level crash freezes nothing: the guest's agent is not asked".into());
        }
        let options = &self.options;
        if !freezes && options.hooks.is_none() {
            return Ok(());
        }
        let agent = options.agent.as_ref().filter(|_| freezes);
        let spec = GuardSpec {
            socket: agent
                .and_then(|at| if let AgentAddress::Socket(path) = at { Some(path.clone().into()) } else { None }),
            domain: agent.and_then(|at| if let AgentAddress::Domain(name) = at { Some(name.clone()) } else { None }),
            hooks: options.hooks.clone().map(Into::into),
            environment,
            timeout: options.timeout,
            silence: options.silence,
            pending: PendingUndo::default(),
        };
        self.guard = Some(Guard::start(spec)?);
        Ok(())
    }

    /// Calls the hook, then freezes the guest's filesystems. Fails if the level that is reached is too weak.
    pub fn freeze(&mut self, cancel: CancelFd<'_>) -> Result<(), Failure> {
        if let Some(directory) = &self.options.hooks {
            let shown = directory.join("freeze").display().to_string();
            match self.execute_in_guard(GuardRequest::HooksFreeze, cancel) {
                Ok(_) => self.receipt.hooks.push(shown.clone()),
                Err(failure) if self.level == Consistency::Application => {
                    self.lower_level(Consistency::Filesystem, failure)?
                }
                Err(failure) if failure.code == "interrupted" || !self.options.or_weaker => return Err(failure),
                Err(failure) => self.warn(failure.message),
            }
            if self.receipt.hooks.is_empty() {
                // The hook may have frozen a part of its application.
                self.hooks_thaw();
            } else {
                self.receipt.verified.push(format!("the hook '{shown}' succeeded"));
                self.receipt.trusted.push(format!("that '{shown}' made its application still"));
            }
        }
        if self.level > Consistency::Crash
            && let Err(failure) = self.freeze_guest(cancel)
        {
            // This thaw precedes the closing of the gates: a freeze that the agent still carries out would wait for
            // them.
            self.thaw_guest();
            self.lower_level(Consistency::Crash, failure)?;
        }
        Ok(())
    }

    fn freeze_guest(&mut self, cancel: CancelFd<'_>) -> Result<(), Failure> {
        let host_hooks = !self.receipt.hooks.is_empty();
        let request = if self.level == Consistency::Application && !host_hooks {
            GuardRequest::CheckAll
        } else {
            GuardRequest::Check
        };
        let checked = self.execute_in_guard(request, cancel)?;
        let checked: GuestReport = serde_json::from_value(checked)
            .map_err(|error| Failure::new("internal", format!("the guard's answer: {error}")))?;
        if request == GuardRequest::CheckAll && checked.hook.is_none() {
            let why = checked.hook_unknown.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
            let text = format!(
                "no application was told: there are no --hooks, and the guest's agent does not say that it runs \
                 fsfreeze hooks{why}. Give --hooks DIR, or start qemu-ga with --fsfreeze-hook"
            );
            self.lower_level(Consistency::Filesystem, Failure::new("no-hooks", text))?;
        }
        self.windows = checked.windows;
        let frozen = self.execute_in_guard(GuardRequest::Freeze, cancel)?["frozen"].as_u64().unwrap_or(0);
        // VSS began to hold writes a moment before the agent answered (`requester_freeze` waits for the provider's
        // event).
        self.frozen_at = Some(Instant::now());
        let expected = checked.freezable.unwrap_or(1).max(1);
        if frozen < expected {
            let text = format!(
                "{} froze {} of {expected} that are mounted: see the guest's log",
                self.agent(),
                count(frozen, "filesystem")
            );
            return Err(Failure::new("fewer", text));
        }
        self.receipt.filesystems_frozen = frozen;
        let (verified, open) = checked.verified(frozen);
        match verified {
            Some(text) => self.receipt.verified.push(text),
            None => self.warn(format!("the guest does not list its filesystems: {frozen} frozen, of how many?")),
        }
        if !open.is_empty() {
            let list = open.join(", ");
            let which = if checked.unsure.is_empty() { "cannot be frozen" } else { "may not be frozen" };
            self.receipt.trusted.push(format!("that nothing that matters is written to {list}, which {which}"));
        }
        if self.level == Consistency::Application
            && let Some(hook) = checked.hook
        {
            self.receipt.verified.push(format!("the guest's agent runs the hook '{hook}', which agreed to the freeze"));
            self.receipt.trusted.push(format!("that '{hook}' in the guest made its applications still"));
            self.receipt.hooks.push(format!("guest:{hook}"));
        }
        Ok(())
    }

    /// Thaws the guest, then calls the hook. Returns whether the guest was frozen until now; the error is the agent's
    /// message. `None`: that is not known.
    pub fn thaw(&mut self) -> Option<Result<(), String>> {
        let was_frozen = self.thaw_guest();
        self.hooks_thaw();
        was_frozen
    }

    /// Returns when Windows ends the freeze by itself, so that a longer snapshot is useless. `None`: the guest does not
    /// end it, or a weaker level is acceptable.
    pub fn frozen_until(&self) -> Option<Instant> {
        let is_needed = self.windows && self.level > Consistency::Crash && !self.options.or_weaker;
        self.frozen_at.filter(|_| is_needed).map(|at| at + VSS_HOLD_TIMEOUT)
    }

    /// Checks that the guest is still frozen. Fails if it is not, or if that is not known.
    pub fn is_frozen_still(&mut self, cancel: CancelFd<'_>) -> Result<(), Failure> {
        if self.level == Consistency::Crash {
            return Ok(());
        }
        let is_over = self.windows && self.frozen_at.is_none_or(|at| at.elapsed() > VSS_HOLD_TIMEOUT);
        let text = match is_over {
            true => {
                format!("Windows (VSS) holds writes for {} s at most ({})", VSS_HOLD_TIMEOUT.as_secs(), self.agent())
            }
            false if self.execute_in_guard(GuardRequest::IsFrozen, cancel)?["frozen"] == true => return Ok(()),
            false => format!("the filesystems were thawed by another program meanwhile ({})", self.agent()),
        };
        self.lower_level(Consistency::Crash, Failure::new("thawed-early", text))
    }

    /// Whether the guard has nothing left to undo.
    pub fn is_undone(&self) -> bool {
        self.guard.as_ref().is_none_or(|guard| guard.pending_undo() == PendingUndo::default())
    }

    /// Takes the result of [`Freezer::thaw`]: a guest was frozen at the instant if it was frozen before and after it.
    /// Lowers the level, or fails, if the guest was not frozen all the time or that is not known.
    pub fn record_thaw(&mut self, was_frozen: Option<Result<(), String>>) -> Result<(), Failure> {
        let text = match was_frozen {
            _ if self.level == Consistency::Crash => return Ok(()),
            Some(Ok(())) => return Ok(()),
            Some(Err(why)) => {
                format!("the guest did not stay frozen until the snapshot was taken ({}): {why}", self.agent())
            }
            None => "whether the filesystems were frozen all the time is not known".to_owned(),
        };
        self.lower_level(Consistency::Crash, Failure::new("thawed-early", text))
    }

    /// Thaws the guest if a freeze was requested. `Some(Err)`: the guest was frozen no longer. If the thaw fails, this
    /// warns, and the guard continues to try.
    fn thaw_guest(&mut self) -> Option<Result<(), String>> {
        let guard = self.guard.as_mut().filter(|guard| guard.pending_undo().guest)?;
        // The disks were resumed before this, so later writes are not in the snapshot.
        let since = self.frozen_at.map_or(Duration::ZERO, |at| at.elapsed());
        match guard.thaw(GuardRequest::Thaw) {
            Ok(thawed) => {
                self.receipt.frozen_us = thawed["frozen-us"].as_u64().unwrap_or(0);
                let thawed: ThawResult = serde_json::from_value(thawed["thawed"].clone()).ok()?;
                if let Some(why) = thawed.lost(self.receipt.filesystems_frozen, since, self.windows) {
                    return Some(Err(why));
                }
                if let Some(why) = thawed.agent_error {
                    self.warn(format!("the guest's filesystems are thawed, but its applications may not be: {why}"));
                }
                Some(Ok(()))
            }
            Err(failure) => {
                let minutes = THAW_WATCH_TIMEOUT.as_secs() / 60;
                let text = format!(
                    "THE GUEST MAY BE FROZEN, or freeze later: {}. Process {} retries the thaw for {minutes} \
                     minutes",
                    failure.message,
                    guard.pid()
                );
                self.warn(text);
                None
            }
        }
    }

    fn hooks_thaw(&mut self) {
        let Some(guard) = self.guard.as_mut().filter(|guard| guard.pending_undo().hooks) else { return };
        if let Err(failure) = guard.thaw(GuardRequest::HooksThaw) {
            self.warn(format!("{}: WHAT IT SHOULD HAVE THAWED MAY BE FROZEN", failure.message));
        }
    }

    /// Lowers the level and warns, if a weaker level is allowed. Fails otherwise.
    fn lower_level(&mut self, level: Consistency, failure: Failure) -> Result<(), Failure> {
        if failure.code == "interrupted" || !self.options.or_weaker {
            return Err(failure);
        }
        self.warn(format!("level {} is not reached, {} is: {}", self.level.name(), level.name(), failure.message));
        self.level = level;
        if level == Consistency::Crash {
            self.receipt.filesystems_frozen = 0;
            self.receipt.verified.retain(|text| !text.contains("frozen"));
        }
        Ok(())
    }

    fn execute_in_guard(&mut self, request: GuardRequest, cancel: CancelFd<'_>) -> Result<Value, Failure> {
        check(cancel)?;
        let Some(guard) = &mut self.guard else { return Err(Failure::new("internal", "there is no guard")) };
        guard.execute(request, cancel)
    }

    fn agent(&self) -> String {
        self.options.agent.as_ref().map(AgentAddress::to_string).unwrap_or_default()
    }

    /// Prints a warning and adds it to the receipt.
    pub fn warn(&mut self, text: String) {
        crate::base::logging::message(&text);
        self.receipt.warnings.push(text);
    }
}
