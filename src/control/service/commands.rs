//! Carries out one command. Every [`Command`] has a match arm, so a command without a reply does not compile.

use std::time::Instant;

use serde_json::{Value, json};

use super::pending_replies::NewHold;
use super::replies;
use super::{ClientInfo, Service, to_json};
use crate::base::rate_limit::{COMMAND_LOG, log_limited};
use crate::base::version::revision;
use crate::control::protocol::return_types::{
    Continued, DaemonStatus, HolderStatus, QuiesceStatus, Resized, Resumed, Stats, Status,
};
use crate::control::protocol::{self, Command, Error, QuiesceArgs};
use crate::control::quiesce::{ClientIdentity, EndReason, Hold, HoldRequest};
use crate::disk::DiskStatus;

/// When the reply to a command is sent.
pub(super) enum CommandReply {
    /// This reply is sent at once.
    Now(Result<Value, Error>),
    /// [`Service::reply_later`] sends the reply.
    Later,
}

impl Service {
    /// Carries a command out. `id`: the `id` that its request has.
    pub(super) fn execute(
        &mut self,
        client: ClientInfo,
        negotiated: &mut bool,
        id: Option<&Value>,
        command: Command,
        now: Instant,
    ) -> CommandReply {
        CommandReply::Now(match command {
            Command::QmpCapabilities => {
                *negotiated = true;
                Ok(json!({}))
            }
            Command::QueryCommands => Ok(protocol::command_list(client.access)),
            Command::QueryVersion => Ok(protocol::version()),
            Command::QueryQmpSchema => Ok(protocol::schema()),
            Command::QueryStatus => self.status(now),
            Command::QueryStats => self.stats(),
            Command::QueryCommandLine => self.command_line(),
            Command::Quiesce(args) => {
                self.quiesce(client, id, args, now);
                return CommandReply::Later;
            }
            Command::RenewLease { token, lease } => match self.coordinator.renew(&token, lease, now) {
                Ok(left) => Ok(json!({"lease-ms": left.as_millis() as u64})),
                Err(ended) => Err(self.no_such_hold(ended)),
            },
            Command::Resume { token } => match self.coordinator.resume(&token, now) {
                Ok(holders) => to_json(&Resumed { resumed: Some(1), holders }),
                Err(ended) => Err(self.no_such_hold(ended)),
            },
            Command::ResumeAll => to_json(&Resumed { resumed: Some(self.coordinator.resume_all(now)), holders: 0 }),
            Command::Copy(command) => {
                let holds = self.coordinator.holds();
                let is_held = |token: &str| holds.iter().any(|hold| hold.token == token);
                self.copies.execute(&*self.disk, client.peer, command, is_held)
            }
            Command::Export(command) => self.export(client.peer, command),
            Command::ImageSnapshot(command) => return self.image_snapshot(client.peer, id, command),
            Command::Continue => {
                let retried = self.disk.continue_io();
                log_limited!(COMMAND_LOG, Info, "continue: {retried} failed requests are retried");
                to_json(&Continued { retried })
            }
            Command::Resize { size, force } => match self.disk.resize(size, force) {
                Ok(size) => to_json(&Resized { size }),
                Err(why) => Err(Error::new("resize", why)),
            },
            Command::SetIoThrottle(limits) => {
                self.disk.set_limits(limits);
                log_limited!(COMMAND_LOG, Info, "block_set_io_throttle: {limits}");
                Ok(json!({}))
            }
            Command::Attend(command) => self.attend(client, command, now),
            Command::HandOver { version } => self.hand_over(client.peer, version),
            Command::Quit => {
                self.quit = true;
                Ok(json!({}))
            }
        })
    }

    fn quiesce(&mut self, client: ClientInfo, id: Option<&Value>, args: QuiesceArgs, now: Instant) {
        let NewHold { request, token } = self.pending.next_hold();
        self.pending.add(request, client.peer, id.cloned());
        let QuiesceArgs { timeout, lease, detached, who } = args;
        let who = ClientIdentity { text: who, client: Some(client.credentials) };
        self.coordinator
            .quiesce(HoldRequest { id: request, token, owner: client.peer, timeout, lease, detached, who }, now);
        self.carry_out(now);
        self.refuse_if_stopped(now);
    }

    /// The error for a token that names no hold. `ended`: why its hold ended, if it had one.
    pub(super) fn no_such_hold(&self, ended: Option<EndReason>) -> Error {
        replies::no_such_hold(ended, !self.coordinator.holds().is_empty())
    }

    fn stats(&self) -> Result<Value, Error> {
        let DiskStatus { rings, total, image_status, .. } = self.disk.status();
        to_json(&Stats {
            rings,
            total,
            stable_writes: image_status.stable_writes,
            latency: self.disk.latency(),
            unsynced: self.disk.unsynced(),
        })
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
        to_json(&Status {
            disk: self.disk.status(),
            quiesce: self.quiesce_status(now),
            image_snapshots: self.disk.snapshots().is_some(),
            attendant: self.store.attendant_status(),
            daemon: DaemonStatus {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                revision: revision().map(str::to_owned),
                pid: std::process::id(),
                uptime_seconds: now.saturating_duration_since(self.started).as_secs(),
                vhost_socket: self.info.vhost_socket.clone(),
                took_over: self.upgrade.took_over().cloned(),
            },
        })
    }

    fn quiesce_status(&self, now: Instant) -> QuiesceStatus {
        let milliseconds = |since: Instant| now.saturating_duration_since(since).as_millis() as u64;
        let holder = |hold: &Hold| HolderStatus {
            requester: replies::requester(&hold.who),
            token: hold.token.clone(),
            detached: hold.detached,
            held_ms: milliseconds(hold.since),
            lease_left_ms: hold.until.saturating_duration_since(now).as_millis() as u64,
        };
        QuiesceStatus {
            state: self.coordinator.state().to_owned(),
            closed_ms: self.closed_at.map(milliseconds),
            held_ms: self.coordinator.held_time(now).as_millis() as u64,
            max_hold_ms: self.coordinator.max_hold().map(|max| max.as_millis() as u64),
            waiting: self.coordinator.waiting(),
            holders: self.coordinator.holds().iter().map(holder).collect(),
        }
    }
}
