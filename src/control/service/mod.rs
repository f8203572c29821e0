//! Carries commands out: the coordinator's orders to the disk, and replies and events to the peers. Knows no socket.

pub(super) mod attendance;
pub(super) mod copies;
mod disk_events;
mod image_snapshot;
#[cfg(test)]
mod recorded;
pub(super) mod replies;
pub(super) mod snapshot_jobs;
mod store_quiesce;
mod upgrade;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use serde_json::{Value, json};

use super::access::Access;
use super::creds::Credentials;
use super::image_notices::Inbox;
use super::protocol;
use super::protocol::json_stream::MalformedInput;
use super::protocol::{Command, Error, QuiesceArgs};
use super::quiesce::{Ask, Coordinator, Effect, Hold, PeerId, Reason, Refusal, RequestId, Who};
use attendance::Attendance;
use copies::CopyOwners;
use snapshot_jobs::Jobs;

use crate::base::rate_limit::{COMMAND_LOG, RateLimiter, log_limited};
use crate::disk::{Disk, HoldFigures, ImageStatus};
use store_quiesce::ForeignSnapshot;

/// What `query-status` says of the daemon itself.
#[derive(Clone, Debug, Default)]
pub struct Info {
    /// Where the front-end connects, for people: a path, or `fd N`.
    pub vhost_socket: String,
    /// How the daemon was started, for whoever starts the next one; `None`: it is not told.
    pub command_line: Option<CommandLine>,
}

/// A daemon's program, its arguments and its directory.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CommandLine {
    /// The program's path when it was started.
    pub program: String,
    /// Without the program's name and `--take-over`.
    pub arguments: Vec<String>,
    /// What relative paths are relative to.
    pub directory: String,
    /// Where the service manager listens (sd_notify(3)).
    pub notify_socket: Option<String>,
}

/// What the daemon does for one that takes over.
pub struct Upgrade {
    /// Called from the control thread with the connection that the two speak on from now on, and whether an attendant is
    /// relied on; must not block.
    pub begin: Box<dyn Fn(UnixStream, bool) + Send>,
    /// Set by the control thread right before that; cleared by whoever was called, when nothing comes of it.
    pub under_way: Arc<AtomicBool>,
    /// Clients that come are the other process's, or have to wait: set shortly before that is decided, and cleared so.
    pub leaving: Arc<AtomicBool>,
}

/// Whom a line is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recipient {
    /// The reply that this connection waits for.
    Reply(PeerId),
    /// An event that concerns this connection alone.
    Only(PeerId),
    /// An event: every connection that has negotiated.
    Everyone,
}

/// The disk, who holds it, and the lines that are due.
pub(super) struct Service {
    disk: Arc<dyn Disk>,
    info: Info,
    started: Instant,
    coordinator: Coordinator,
    copies: CopyOwners,
    /// Snapshots of the image that clients asked for.
    jobs: Jobs,
    inbox: Arc<Inbox>,
    /// Of the image, by somebody else.
    foreign_snapshot: Option<ForeignSnapshot>,
    /// Who is asked before that.
    attendance: Attendance,
    /// For such a one, until it is refused.
    store_timeout: Duration,
    resized: Box<dyn Fn(u64) + Send>,
    /// As it was told last.
    image_state: ImageStatus,
    /// The gate closed when, as long as it is closed.
    closed_at: Option<Instant>,
    asked: HashMap<RequestId, (PeerId, Option<Value>)>,
    next_request: RequestId,
    tokens: RandomState,
    /// Limits the events of the disk's own errors.
    error_events: RateLimiter,
    /// Limits the events of errors that a guest or a front-end causes: they cannot crowd out the disk's own.
    guest_error_events: RateLimiter,
    upgrade: Option<Upgrade>,
    /// The connection that asked for the hand-over, until it has its answer.
    hands_over_to: Option<PeerId>,
    /// The hand-over that made us the disk's daemon.
    took_over: Value,
    outgoing: Vec<(Recipient, Vec<u8>)>,
    quit: bool,
}

impl Service {
    /// `store`: [`super::Setup::store_timeout`], [`super::Setup::attended`] and [`super::Setup::max_hold`]. `resized`: [`super::Setup::resized`].
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        info: Info,
        inbox: Arc<Inbox>,
        (store_timeout, attended, max_hold): (Duration, bool, Option<Duration>),
        resized: Box<dyn Fn(u64) + Send>,
        upgrade: Option<Upgrade>,
    ) -> Self {
        Service {
            disk,
            info,
            jobs: Jobs::default(),
            inbox,
            foreign_snapshot: None,
            attendance: Attendance::new(attended),
            store_timeout,
            resized,
            image_state: ImageStatus::default(),
            started: Instant::now(),
            coordinator: Coordinator::new(max_hold),
            copies: CopyOwners::default(),
            closed_at: None,
            asked: HashMap::new(),
            next_request: 0,
            tokens: RandomState::new(),
            error_events: RateLimiter::for_events(),
            guest_error_events: RateLimiter::for_events(),
            upgrade,
            hands_over_to: None,
            took_over: Value::Null,
            outgoing: Vec::new(),
            quit: false,
        }
    }

    /// The lines that are due, in order.
    pub(super) fn outgoing(&mut self) -> Vec<(Recipient, Vec<u8>)> {
        std::mem::take(&mut self.outgoing)
    }

    /// Somebody said `quit`.
    pub(super) fn quit_asked(&self) -> bool {
        self.quit
    }

    /// We are the disk's daemon by a hand-over; what it took, for the status. `misses`: an attendant is missed.
    pub(super) fn took_over(&mut self, figures: Value, misses: bool) {
        self.took_over = figures;
        if misses {
            self.attendance.misses();
        }
    }

    /// Passes the connection that asked for the hand-over on.
    pub(super) fn pass_on(&self, stream: UnixStream) {
        if let Some(upgrade) = &self.upgrade {
            (upgrade.begin)(stream, self.misses_attendant());
        }
    }

    /// When [`Service::tick`] is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        [self.coordinator.next_deadline(), self.attendance.next_deadline()].into_iter().flatten().min()
    }

    /// Lets leases and timeouts run out.
    pub(super) fn tick(&mut self, now: Instant) {
        self.coordinator.tick(now);
        self.carry_out(now);
        if let Some(outcome) = self.attendance.tick(now) {
            self.prepared(outcome, now);
        }
    }

    /// A connection ended.
    pub(super) fn peer_gone(&mut self, peer: PeerId, now: Instant) {
        self.asked.retain(|_, (asker, _)| *asker != peer);
        self.coordinator.peer_gone(peer, now);
        self.carry_out(now);
        self.copies.peer_gone(&*self.disk, peer);
        self.jobs.peer_gone(peer);
        self.next_job();
        if let Some(outcome) = self.attendance.gone(peer) {
            self.prepared(outcome, now);
        }
    }

    /// The daemon ends: everybody is told, nobody holds.
    pub(super) fn shutdown(&mut self, now: Instant) {
        self.coordinator.shutdown(now);
        self.carry_out(now);
        self.store_ends(now);
        self.tell_left_snapshots();
        self.event("SHUTDOWN", json!({}));
    }

    /// One request of a connection, whose client is `credentials` and has `access`. Its reply comes out of [`Service::outgoing`], now or later, exactly once.
    pub(super) fn request(
        &mut self,
        peer: PeerId,
        (credentials, access): (Credentials, Access),
        negotiated: &mut bool,
        found: Result<Value, MalformedInput>,
        now: Instant,
    ) {
        let request = match found {
            Ok(value) => protocol::parse(value, *negotiated, access),
            Err(garbage) => {
                let error = Error::new("parse-error", garbage.to_string());
                protocol::Request { id: None, command: Err(error) }
            }
        };
        let command = request.command.and_then(|command| self.refuse_while_upgrading(&command).map(|()| command));
        let result = match command {
            Ok(Command::Quiesce(args)) => {
                self.quiesce(peer, request.id, credentials, args, now);
                return;
            }
            Ok(Command::ImageSnapshot(command)) => match self.image_snapshot(peer, request.id.as_ref(), command) {
                Some(result) => result,
                None => return,
            },
            Ok(Command::QmpCapabilities) => {
                *negotiated = true;
                Ok(json!({}))
            }
            Ok(Command::HandOver { version }) => self.hand_over(peer, version),
            Ok(Command::Attend(command)) => self.attend(peer, credentials, command, now),
            Ok(Command::QueryCommands) => Ok(protocol::command_list(access)),
            Ok(command) => self.answer(peer, command, now),
            Err(error) => Err(error),
        };
        // As in QEMU: the events of a command come before its reply. And the guest goes on before anybody is told.
        self.carry_out(now);
        self.outgoing.push((Recipient::Reply(peer), protocol::reply(request.id.as_ref(), result)));
    }

    fn quiesce(&mut self, peer: PeerId, id: Option<Value>, from: Credentials, args: QuiesceArgs, now: Instant) {
        let (request, token) = self.next_hold();
        self.asked.insert(request, (peer, id));
        let QuiesceArgs { timeout, lease, detached, who } = args;
        let who = Who { text: who, client: Some(from) };
        self.coordinator.quiesce(Ask { request, token, owner: peer, timeout, lease, detached, who }, now);
        self.carry_out(now);
        self.refuse_if_stopped(now);
    }

    /// While a failed change is kept no hold can succeed: those who wait need not wait for their deadlines.
    fn refuse_if_stopped(&mut self, now: Instant) {
        if let Some(failed) = self.disk.stopped_change() {
            self.coordinator.stopped(failed.errno, now);
            self.carry_out(now);
        }
    }

    /// The number of a request and the token of its hold to be, keyed with the system's randomness: no stale script can
    /// name another's hold.
    fn next_hold(&mut self) -> (RequestId, String) {
        self.next_request += 1;
        (self.next_request, format!("{:016x}", self.tokens.hash_one(self.next_request)))
    }

    fn answer(&mut self, peer: PeerId, command: Command, now: Instant) -> Result<Value, Error> {
        match command {
            Command::QueryVersion => Ok(protocol::version()),
            Command::RenewLease { token, lease } => match self.coordinator.renew(&token, lease, now) {
                Ok(left) => Ok(json!({"lease-ms": left.as_millis() as u64})),
                Err(ended) => Err(replies::no_such_hold(ended, !self.coordinator.holds().is_empty())),
            },
            Command::Resume { token } => match self.coordinator.resume(&token, now) {
                Ok(holders) => Ok(json!({"resumed": 1, "holders": holders})),
                Err(ended) => Err(replies::no_such_hold(ended, !self.coordinator.holds().is_empty())),
            },
            Command::ResumeAll => Ok(json!({"resumed": self.coordinator.resume_all(now), "holders": 0})),
            Command::QueryStatus => self.status(now),
            Command::QueryCommandLine => match &self.info.command_line {
                Some(line) => to_json(line),
                None => {
                    Err(Error::new("no-upgrade", "how this daemon was started is not known: its arguments are no text"))
                }
            },
            Command::QueryStats => {
                let status = self.disk.status();
                let stable = to_json(&status.image_status.stable_writes)?;
                Ok(json!({
                    "rings": to_json(&status.rings)?, "total": to_json(&status.total)?, "stable-writes": stable,
                }))
            }
            Command::Copy(command) => {
                let holds = self.coordinator.holds();
                let is_held = |token: &str| holds.iter().any(|hold| hold.token == token);
                self.copies.answer(&*self.disk, peer, command, is_held)
            }
            Command::Continue => {
                let retried = self.disk.continue_io();
                log_limited!(COMMAND_LOG, Info, "continue: {retried} failed requests are tried again");
                Ok(json!({ "retried": retried }))
            }
            Command::Resize { size, force } => match self.disk.resize(size, force) {
                Ok(size) => Ok(json!({ "size": size })),
                Err(why) => Err(Error::new("resize", why)),
            },
            Command::Quit => {
                self.quit = true;
                Ok(json!({}))
            }
            Command::Quiesce(_)
            | Command::Attend(_)
            | Command::ImageSnapshot(_)
            | Command::HandOver { .. }
            | Command::QueryCommands
            | Command::QmpCapabilities => {
                Err(Error::new("internal", "this command is answered elsewhere; please report it as a defect"))
            }
        }
    }

    fn status(&self, now: Instant) -> Result<Value, Error> {
        let mut status = to_json(&self.disk.status())?;
        let milliseconds = |since: Instant| now.saturating_duration_since(since).as_millis() as u64;
        let holder = |hold: &Hold| {
            let mut value = replies::named(hold);
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
        status["attendant"] = self.attendance.status();
        status["daemon"] = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "uptime-seconds": now.saturating_duration_since(self.started).as_secs(),
            "vhost-socket": self.info.vhost_socket,
            "took-over": self.took_over,
        });
        Ok(status)
    }

    fn carry_out(&mut self, now: Instant) {
        for effect in self.coordinator.effects() {
            match effect {
                Effect::CloseGate(epoch) => {
                    self.closed_at = Some(now);
                    self.disk.close_gate(epoch);
                }
                Effect::OpenGate => {
                    self.closed_at = None;
                    self.disk.open_gate();
                }
                Effect::Granted { request, hold, epoch, figures, holders } => {
                    self.granted(request, &hold, epoch, figures, holders);
                }
                Effect::Refused { request, who, why } => self.refused(request, &who, why),
                Effect::Left { hold, reason, held, holders } => self.left(&hold, reason, held, holders),
            }
        }
        self.tell_released();
    }

    fn granted(&mut self, request: RequestId, hold: &Hold, epoch: u64, figures: HoldFigures, holders: usize) {
        let microseconds = |time: Duration| time.as_micros() as u64;
        let figures = json!({
            "epoch": epoch,
            "rings": figures.rings,
            "drained": figures.drained,
            "drain-us": microseconds(figures.drain),
            "sync-us": microseconds(figures.sync),
            "bytes-synced": figures.bytes_synced,
            "holders": holders,
        });
        log_limited!(COMMAND_LOG, Info, "quiesced for {}, {holders} holder(s): {figures}", replies::shown(&hold.who));
        let mut told = replies::named(hold);
        told["detached"] = json!(hold.detached);
        let lease = hold.until.saturating_duration_since(hold.since).as_millis() as u64;
        told["lease-ms"] = json!(lease);
        let mut answer = json!({"token": hold.token, "lease-ms": lease});
        for part in [&mut told, &mut answer] {
            for (name, value) in figures.as_object().into_iter().flatten() {
                part[name] = value.clone();
            }
        }
        // The store waits with somebody's snapshot.
        let is_stores = self.store_granted(request, hold);
        self.event("QUIESCED", told);
        if !is_stores {
            self.reply_later(request, Ok(answer));
        }
    }

    fn refused(&mut self, request: RequestId, who: &Who, why: Refusal) {
        let error = replies::refused(why);
        log_limited!(COMMAND_LOG, Warn, "quiesce for {} failed: {}", replies::shown(who), error.desc);
        let mut told = replies::who(who);
        told["code"] = json!(error.code);
        self.event("QUIESCE_FAILED", told);
        if !self.store_refused(request, why) {
            self.reply_later(request, Err(error));
        }
    }

    fn left(&mut self, hold: &Hold, reason: Reason, held: Duration, holders: usize) {
        let word = replies::reason(reason);
        let told = replies::shown(&hold.who);
        if reason == Reason::LeaseExpired {
            log_limited!(
                COMMAND_LOG,
                Warn,
                "the lease of {told} ran out after {} ms, {holders} holder(s) left",
                held.as_millis()
            );
            self.event("LEASE_EXPIRED", replies::named(hold));
        } else {
            log_limited!(
                COMMAND_LOG,
                Info,
                "{told} held for {} ms, ended by {word}, {holders} holder(s) left",
                held.as_millis()
            );
        }
        let mut data = replies::named(hold);
        data["reason"] = json!(word);
        data["held-ms"] = json!(held.as_millis() as u64);
        data["holders"] = json!(holders);
        self.event("RESUMED", data);
        self.store_left(hold, reason);
    }

    fn reply_later(&mut self, request: RequestId, result: Result<Value, Error>) {
        // Nobody asked any more: the connection ended.
        let Some((peer, id)) = self.asked.remove(&request) else { return };
        self.outgoing.push((Recipient::Reply(peer), protocol::reply(id.as_ref(), result)));
    }

    fn event(&mut self, name: &str, data: Value) {
        self.tell(Recipient::Everyone, name, data);
    }

    fn tell(&mut self, to: Recipient, name: &str, data: Value) {
        self.outgoing.push((to, protocol::event(name, data, SystemTime::now())));
    }
}

impl Drop for Service {
    /// Whatever ends the control thread, a guest is not left frozen.
    fn drop(&mut self) {
        if self.closed_at.is_some() {
            log::error!("the control thread ends while the disk is quiesced: the disk goes on");
            self.disk.open_gate();
        }
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<Value, Error> {
    serde_json::to_value(value).map_err(|error| Error::new("internal", error.to_string()))
}
