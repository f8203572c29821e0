//! Carries out one command. Every [`Command`] has its arm, so a command that is not answered does not compile.

use std::time::Instant;

use serde_json::{Value, json};

use super::replies;
use super::{Client, Service, to_json};
use crate::base::rate_limit::{COMMAND_LOG, log_limited};
use crate::control::protocol::{self, Command, Error, QuiesceArgs};
use crate::control::quiesce::{Ask, Hold, Reason, Who};

/// When a command is answered.
pub(super) enum Answer {
    /// With this, at once.
    Now(Result<Value, Error>),
    /// By [`Service::reply_later`].
    Later,
}

impl Service {
    /// Carries a command out. `id`: of its request.
    pub(super) fn execute(
        &mut self,
        client: Client,
        negotiated: &mut bool,
        id: Option<&Value>,
        command: Command,
        now: Instant,
    ) -> Answer {
        Answer::Now(match command {
            Command::QmpCapabilities => {
                *negotiated = true;
                Ok(json!({}))
            }
            Command::QueryCommands => Ok(protocol::command_list(client.access)),
            Command::QueryVersion => Ok(protocol::version()),
            Command::QueryStatus => self.status(now),
            Command::QueryStats => self.stats(),
            Command::QueryCommandLine => self.command_line(),
            Command::Quiesce(args) => {
                self.quiesce(client, id, args, now);
                return Answer::Later;
            }
            Command::RenewLease { token, lease } => match self.coordinator.renew(&token, lease, now) {
                Ok(left) => Ok(json!({"lease-ms": left.as_millis() as u64})),
                Err(ended) => Err(self.no_such_hold(ended)),
            },
            Command::Resume { token } => match self.coordinator.resume(&token, now) {
                Ok(holders) => Ok(json!({"resumed": 1, "holders": holders})),
                Err(ended) => Err(self.no_such_hold(ended)),
            },
            Command::ResumeAll => Ok(json!({"resumed": self.coordinator.resume_all(now), "holders": 0})),
            Command::Copy(command) => {
                let holds = self.coordinator.holds();
                let is_held = |token: &str| holds.iter().any(|hold| hold.token == token);
                self.copies.answer(&*self.disk, client.peer, command, is_held)
            }
            Command::ImageSnapshot(command) => return self.image_snapshot(client.peer, id, command),
            Command::Continue => {
                let retried = self.disk.continue_io();
                log_limited!(COMMAND_LOG, Info, "continue: {retried} failed requests are retried");
                Ok(json!({ "retried": retried }))
            }
            Command::Resize { size, force } => match self.disk.resize(size, force) {
                Ok(size) => Ok(json!({ "size": size })),
                Err(why) => Err(Error::new("resize", why)),
            },
            Command::Attend(command) => self.attend(client, command, now),
            Command::HandOver { version } => self.hand_over(client.peer, version),
            Command::Quit => {
                self.quit = true;
                Ok(json!({}))
            }
        })
    }

    fn quiesce(&mut self, client: Client, id: Option<&Value>, args: QuiesceArgs, now: Instant) {
        let (request, token) = self.pending.next_hold();
        self.pending.add(request, client.peer, id.cloned());
        let QuiesceArgs { timeout, lease, detached, who } = args;
        let who = Who { text: who, client: Some(client.credentials) };
        self.coordinator.quiesce(Ask { request, token, owner: client.peer, timeout, lease, detached, who }, now);
        self.carry_out(now);
        self.refuse_if_stopped(now);
    }

    /// The error for a token that names no hold. `ended`: why its hold ended, if it had one.
    pub(super) fn no_such_hold(&self, ended: Option<Reason>) -> Error {
        replies::no_such_hold(ended, !self.coordinator.holds().is_empty())
    }

    fn stats(&self) -> Result<Value, Error> {
        let status = self.disk.status();
        Ok(json!({
            "rings": to_json(&status.rings)?,
            "total": to_json(&status.total)?,
            "stable-writes": to_json(&status.image_status.stable_writes)?,
        }))
    }

    fn command_line(&self) -> Result<Value, Error> {
        match &self.info.command_line {
            Some(line) => to_json(line),
            None => {
                let desc =
                    "how this daemon was started cannot be reported: its arguments are not UTF-8. Restart it instead";
                Err(Error::new("no-upgrade", desc))
            }
        }
    }

    fn status(&self, now: Instant) -> Result<Value, Error> {
        let mut status = to_json(&self.disk.status())?;
        let milliseconds = |since: Instant| now.saturating_duration_since(since).as_millis() as u64;
        let holder = |hold: &Hold| {
            let mut value = replies::holder_json(hold);
            value["detached"] = json!(hold.detached);
            value["held-ms"] = json!(milliseconds(hold.since));
            value["lease-left-ms"] = json!(hold.until.saturating_duration_since(now).as_millis() as u64);
            value
        };
        status["quiesce"] = json!({
            "state": self.coordinator.state(),
            "closed-ms": self.closed_at.map(milliseconds),
            "held-ms": self.coordinator.held_time(now).as_millis() as u64,
            "max-hold-ms": self.coordinator.max_hold().map(|max| max.as_millis() as u64),
            "waiting": self.coordinator.waiting(),
            "holders": self.coordinator.holds().iter().map(holder).collect::<Vec<_>>(),
        });
        status["image-snapshots"] = json!(self.disk.snapshots().is_some());
        status["attendant"] = self.store.attendant_status();
        status["daemon"] = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "uptime-seconds": now.saturating_duration_since(self.started).as_secs(),
            "vhost-socket": self.info.vhost_socket,
            "took-over": self.upgrade.took_over(),
        });
        Ok(status)
    }
}
