//! Freezing and thawing, hooks and guest, and finding out which level is reached.

use std::time::Duration;

use super::Run;
use crate::client::Failure;
use crate::snapshot::guard::{Ask, Begun, Guard, LATE, Orders};
use crate::snapshot::guest::Checked;
use crate::snapshot::plan::{AgentAt, Level};

/// How long we may be silent towards the guard, beside the timeouts: connections, figures, a machine under load.
const QUIET: Duration = Duration::from_secs(10);

impl Run<'_> {
    pub(super) fn start_guard(&mut self) -> Result<(), Failure> {
        let freezes = self.plan.level > Level::Crash;
        if !freezes && self.plan.agent.is_some() {
            self.warn("level crash freezes nothing: the guest's agent is not asked".into());
        }
        if !freezes && self.plan.hooks.is_none() {
            return Ok(());
        }
        let agent = self.plan.agent.as_ref().filter(|_| freezes);
        let environment = self.environment().into_iter().map(|(name, value)| {
            // Hooks get text; an image whose name is none is named as well as can be.
            (name, value.to_string_lossy().into_owned())
        });
        let orders = Orders {
            socket: agent.and_then(|at| if let AgentAt::Socket(path) = at { Some(path.clone()) } else { None }),
            domain: agent.and_then(|at| if let AgentAt::Domain(name) = at { Some(name.clone()) } else { None }),
            hooks: self.plan.hooks.clone(),
            environment: environment.collect(),
            patience: self.plan.freeze_timeout,
            silence: self.plan.timeout + self.plan.lease + QUIET,
            begun: Begun::default(),
        };
        self.guard = Some(Guard::start(orders)?);
        Ok(())
    }

    /// Hooks, then the guest's filesystems. Finds out which level is reached, and whether that is enough.
    pub(super) fn freeze(&mut self) -> Result<(), Failure> {
        if let Some(directory) = &self.plan.hooks {
            let shown = directory.join("freeze").display().to_string();
            match self.ask_guard(Ask::HooksFreeze) {
                Ok(_) => self.receipt.hooks.push(shown.clone()),
                Err(failure) if self.level == Level::Application => self.weaken(Level::Filesystem, failure)?,
                Err(failure) if failure.code == "interrupted" || !self.plan.or_weaker => return Err(failure),
                Err(failure) => self.warn(failure.message),
            }
            if self.receipt.hooks.is_empty() {
                // It may have frozen half of something.
                self.hooks_thaw();
            } else {
                self.receipt.verified.push(format!("the hook '{shown}' succeeded"));
                self.receipt.trusted.push(format!("that '{shown}' made its application still"));
            }
        }
        if self.level > Level::Crash
            && let Err(failure) = self.freeze_guest()
        {
            // Before the gates close: a freeze that is still under way would wait for them, and they for nothing.
            self.thaw_guest();
            self.weaken(Level::Crash, failure)?;
        }
        Ok(())
    }

    fn freeze_guest(&mut self) -> Result<(), Failure> {
        let host_hooks = !self.receipt.hooks.is_empty();
        let ask = if self.level == Level::Application && !host_hooks { Ask::CheckAll } else { Ask::Check };
        let checked = self.ask_guard(ask)?;
        let checked: Checked = serde_json::from_value(checked)
            .map_err(|error| Failure::new("internal", format!("the guard's answer: {error}")))?;
        if ask == Ask::CheckAll && checked.hook.is_none() {
            let why = checked.hook_unknown.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
            let text = format!(
                "no application was told: there are no --hooks, and the guest's agent does not say that it runs \
                 fsfreeze hooks{why}. Give --hooks DIR, or start qemu-ga with --fsfreeze-hook"
            );
            self.weaken(Level::Filesystem, Failure::new("no-hooks", text))?;
        }
        let frozen = self.ask_guard(Ask::Freeze)?["frozen"].as_u64().unwrap_or(0);
        let expected = checked.freezable.unwrap_or(1).max(1);
        if frozen < expected {
            let text = format!(
                "{} froze {frozen} filesystem(s) of {expected} that are mounted: see the guest's log",
                self.agent()
            );
            return Err(Failure::new("fewer", text));
        }
        self.receipt.filesystems_frozen = frozen;
        match checked.freezable {
            Some(count) => self.receipt.verified.push(format!("{frozen} filesystem(s) frozen of {count} that can be")),
            None => self.warn(format!("the guest does not list its filesystems: {frozen} frozen, of how many?")),
        }
        if !checked.never.is_empty() {
            let list = checked.never.join(", ");
            self.receipt
                .trusted
                .push(format!("that nothing that matters is written to {list}, which cannot be frozen"));
        }
        if self.level == Level::Application
            && let Some(hook) = checked.hook
        {
            self.receipt.verified.push(format!("the guest's agent runs the hook '{hook}', which agreed to the freeze"));
            self.receipt.trusted.push(format!("that '{hook}' in the guest made its applications still"));
            self.receipt.hooks.push(format!("guest:{hook}"));
        }
        Ok(())
    }

    /// Thaws the guest, calls the hooks. Whether the guest was frozen until now, if that is known.
    pub(super) fn thaw(&mut self) -> Option<bool> {
        let was_frozen = self.thaw_guest();
        self.hooks_thaw();
        was_frozen
    }

    /// Frozen at the instant means frozen before and after: a guest that was not, or of which nobody knows, does not
    /// have the level.
    pub(super) fn was_frozen(&mut self, was_frozen: Option<bool>) -> Result<(), Failure> {
        if self.level == Level::Crash || was_frozen == Some(true) {
            return Ok(());
        }
        let text = match was_frozen {
            Some(_) => format!(
                "the filesystems were thawed by somebody else before the snapshot was taken ({}; a Windows guest thaws \
                 by itself after 10 s)",
                self.agent()
            ),
            None => "whether the filesystems were frozen all the time is not known".to_owned(),
        };
        self.weaken(Level::Crash, Failure::new("thawed-early", text))
    }

    /// Thaws the guest if it was told to freeze. `Some(false)`: it was not frozen any more. What fails is said, and
    /// left to the guard.
    fn thaw_guest(&mut self) -> Option<bool> {
        let guard = self.guard.as_mut().filter(|guard| guard.begun().guest)?;
        match guard.thaw(Ask::Thaw) {
            Ok(thawed) => {
                self.receipt.frozen_us = thawed["frozen-us"].as_u64().unwrap_or(0);
                if let Some(why) = thawed["thawed"]["complaint"].as_str() {
                    self.warn(format!("the guest's filesystems are thawed, but its applications may not be: {why}"));
                }
                Some(thawed["thawed"]["was-frozen"] == true)
            }
            Err(failure) => {
                let minutes = LATE.as_secs() / 60;
                let text = format!(
                    "THE GUEST MAY BE FROZEN, or freeze later: {}. Process {} goes on trying to thaw it for {minutes} \
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
        let Some(guard) = self.guard.as_mut().filter(|guard| guard.begun().hooks) else { return };
        if let Err(failure) = guard.thaw(Ask::HooksThaw) {
            self.warn(format!("{}: WHAT IT SHOULD HAVE THAWED MAY BE FROZEN", failure.message));
        }
    }
}
