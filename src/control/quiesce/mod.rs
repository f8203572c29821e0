//! PURE. Decides who holds the disk: a state machine with the clock passed in.
//!
//! The write gate is closed exactly while there is a hold or a request that waits for one. The first request closes it
//! and begins an epoch. Requests that come while it settles join that epoch and share its answer. Requests that come when
//! the disk is quiet are granted at once, because nothing can have changed since. The gate opens when the last hold or
//! waiting request has ended, for whatever reason. An answer of the disk counts only for the epoch it was asked for:
//! after a timeout, the late answer of the abandoned closing must not grant the next one.
//!
//! Holds that overlap or follow each other closely add up for the guest. With a bound on their sum (`--max-hold`) no lease
//! and no timeout goes beyond it, and a request that comes then is refused until writes have flowed.

mod held_time;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::creds::Credentials;
use crate::disk::HoldFigures;
use crate::engine::Errno;
use held_time::HeldTime;

/// A connection.
pub type PeerId = u64;
/// The image's store in place of a connection: another host takes a snapshot of the image.
pub const STORE: PeerId = 0;
/// A `quiesce` request that waits for its answer.
pub type RequestId = u64;

/// The most holds and waiting requests together.
pub const MAX_HOLDERS: usize = 64;
/// How many ended holds are remembered, so that the error of a late `resume` can say why its hold had ended.
const MAX_ENDED: usize = 64;

/// Who sent a request, as far as the kernel and the client say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientIdentity {
    /// The client's `who`.
    pub text: Option<String>,
    /// The process and its user when it connected; `None` for the image's store.
    pub client: Option<Credentials>,
}

/// A `quiesce` request.
#[derive(Clone, Debug)]
pub struct HoldRequest {
    /// The number of the request, which its answer repeats.
    pub id: RequestId,
    /// The token of the hold that may be granted: unguessable, never used before.
    pub token: String,
    /// The connection that asks.
    pub owner: PeerId,
    /// How long the request may wait until it is refused.
    pub timeout: Duration,
    /// How long the hold lasts, from its grant on; what is left of the bound on all holds, if that is less.
    pub lease: Duration,
    /// The hold outlives the connection.
    pub detached: bool,
    /// For status and events.
    pub who: ClientIdentity,
}

/// Why a request was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The gate did not settle in time.
    Timeout,
    /// The disk could not make everything durable.
    SyncFailed(Errno),
    /// A request that changes the disk failed with this error and is retained: part of it may be in the image.
    Stopped(Errno),
    /// Another process uses the image: it changes, whoever holds it here.
    NotOurs,
    /// A client resumed everything, or the requester gave up.
    Cancelled,
    /// There are [`MAX_HOLDERS`] already.
    TooMany,
    /// The disk was held for as long as its holders together may hold it.
    MaxHold,
    /// The attendant that must consent did not ([`super::AttendCommand`]). The coordinator itself never returns this.
    NotPrepared,
    /// The daemon ends.
    Shutdown,
}

/// Why a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// A client sent `resume` with its token, or for all holds.
    Resume,
    /// Its lease was not renewed in time.
    LeaseExpired,
    /// Its connection ended.
    ConnectionClosed,
    /// The daemon ends.
    Shutdown,
}

/// What the caller must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HoldEffect {
    /// [`crate::disk::Disk::close_gate`].
    CloseGate(u64),
    /// [`crate::disk::Disk::open_gate`].
    OpenGate,
    /// Reply to a request: the disk is held still.
    Granted {
        /// Which request.
        request: RequestId,
        /// The hold that it got.
        hold: Hold,
        /// The epoch that settled.
        epoch: u64,
        /// What settling the gate took.
        figures: HoldFigures,
        /// The number of holders now.
        holders: usize,
    },
    /// Reply to a request: it is refused.
    Refused {
        /// Which request.
        request: RequestId,
        /// Who sent it.
        who: ClientIdentity,
        /// Why.
        why: Refusal,
    },
    /// Report that a hold has ended.
    Ended {
        /// The hold that ended.
        hold: Hold,
        /// Why.
        reason: EndReason,
        /// How long it lasted.
        held: Duration,
        /// The number of holders left.
        holders: usize,
    },
}

/// One holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Names the hold.
    pub token: String,
    /// The connection that asked.
    pub owner: PeerId,
    /// The hold outlives that connection.
    pub detached: bool,
    /// Who asked.
    pub who: ClientIdentity,
    /// When it was granted.
    pub since: Instant,
    /// When it ends unless it is renewed.
    pub until: Instant,
}

struct WaitingRequest {
    request: HoldRequest,
    deadline: Instant,
}

#[derive(Clone, Copy)]
enum Gate {
    /// There is no hold and no waiting request.
    Open,
    /// Requests wait, and there is no hold.
    Settling { epoch: u64 },
    /// There is a hold, and no request waits.
    Quiet { epoch: u64, rings: u32 },
}

/// The holders of one disk. Every method takes the time and leaves what the caller must do in [`Coordinator::effects`].
pub struct Coordinator {
    gate: Gate,
    last_epoch: u64,
    waiting: Vec<WaitingRequest>,
    holds: Vec<Hold>,
    ended: VecDeque<(String, EndReason)>,
    effects: VecDeque<HoldEffect>,
    held: HeldTime,
}

impl Default for Coordinator {
    fn default() -> Self {
        Coordinator::new(None)
    }
}

impl Coordinator {
    /// `max_hold`: how long the holders together may keep writes waiting; `None`: no bound.
    pub fn new(max_hold: Option<Duration>) -> Self {
        Coordinator {
            gate: Gate::Open,
            last_epoch: 0,
            waiting: Vec::new(),
            holds: Vec::new(),
            ended: VecDeque::new(),
            effects: VecDeque::new(),
            held: HeldTime::new(max_hold),
        }
    }

    /// Takes what the caller must do, oldest first, before its next call.
    pub fn effects(&mut self) -> Vec<HoldEffect> {
        self.effects.drain(..).collect()
    }

    /// Takes a `quiesce` request. It is answered by exactly one [`HoldEffect::Granted`] or [`HoldEffect::Refused`], unless its connection ends.
    pub fn quiesce(&mut self, request: HoldRequest, now: Instant) {
        if self.waiting.len() + self.holds.len() >= MAX_HOLDERS {
            self.refuse(request, Refusal::TooMany);
            return;
        }
        if self.held.is_spent(now) {
            self.refuse(request, Refusal::MaxHold);
            return;
        }
        match self.gate {
            Gate::Open => {
                self.last_epoch += 1;
                self.gate = Gate::Settling { epoch: self.last_epoch };
                self.effects.push_back(HoldEffect::CloseGate(self.last_epoch));
                self.held.close(now);
                self.wait(request, now);
            }
            Gate::Settling { .. } => self.wait(request, now),
            Gate::Quiet { epoch, rings } => {
                let figures = HoldFigures { rings, ..HoldFigures::default() };
                self.grant(vec![request], epoch, figures, now);
            }
        }
    }

    /// The disk has settled, or failed to. Ignored for another epoch than the one that settles now.
    pub fn settled(&mut self, epoch: u64, result: Result<HoldFigures, Errno>, now: Instant) {
        if !self.is_settling(epoch) {
            return;
        }
        match result {
            Ok(figures) => {
                let requests = self.waiting.drain(..).map(|waiting| waiting.request).collect();
                self.gate = Gate::Quiet { epoch, rings: figures.rings };
                self.grant(requests, epoch, figures, now);
            }
            Err(errno) => self.refuse_all(Refusal::SyncFailed(errno), now),
        }
    }

    /// The disk cannot settle, because another process uses the image.
    pub fn not_ours(&mut self, epoch: u64, now: Instant) {
        if self.is_settling(epoch) {
            self.refuse_all(Refusal::NotOurs, now);
        }
    }

    fn is_settling(&self, epoch: u64) -> bool {
        matches!(self.gate, Gate::Settling { epoch: current } if current == epoch)
    }

    /// Refuses all waiting requests. The gate opens first, because the guest waits; the replies can wait.
    fn refuse_all(&mut self, why: Refusal, now: Instant) {
        let requests: Vec<HoldRequest> = self.waiting.drain(..).map(|waiting| waiting.request).collect();
        self.open_if_free(now);
        for request in requests {
            self.refuse(request, why);
        }
    }

    /// A request that changes the disk failed and is retained, for an unknown time: the requests that wait for the disk to
    /// settle are refused. Holds that are granted stay, because their disk is still.
    pub fn stopped(&mut self, errno: Errno, now: Instant) {
        self.refuse_all(Refusal::Stopped(errno), now);
    }

    /// The requester gave up: its request is refused if it still waits. If it is granted already nothing changes.
    pub fn cancel(&mut self, request: RequestId, now: Instant) {
        let Some(at) = self.waiting.iter().position(|waiting| waiting.request.id == request) else { return };
        let waiting = self.waiting.remove(at);
        self.open_if_free(now);
        self.refuse(waiting.request, Refusal::Cancelled);
    }

    /// Ends one hold and returns how many are left. `Err`: why the token's hold had ended, `None` if it never had one.
    pub fn resume(&mut self, token: &str, now: Instant) -> Result<usize, Option<EndReason>> {
        match self.holds.iter().position(|hold| hold.token == token) {
            Some(_) => {
                self.end_holds(now, EndReason::Resume, |hold| hold.token == token);
                Ok(self.holds.len())
            }
            None => Err(self.end_reason(token)),
        }
    }

    /// Ends every hold and refuses every waiting request. Returns how many holds there were.
    pub fn resume_all(&mut self, now: Instant) -> usize {
        let count = self.holds.len();
        self.end_all(now, EndReason::Resume, Refusal::Cancelled);
        count
    }

    /// Lets a hold last until `lease` from now, or the end of the bound on all holds. Returns how long that is. Errors as
    /// of [`Coordinator::resume`].
    pub fn renew(&mut self, token: &str, lease: Duration, now: Instant) -> Result<Duration, Option<EndReason>> {
        let until = self.bounded(now + lease, now);
        match self.holds.iter_mut().find(|hold| hold.token == token) {
            Some(hold) => {
                hold.until = until;
                Ok(until.saturating_duration_since(now))
            }
            None => Err(self.end_reason(token)),
        }
    }

    /// A connection ended: its requests are dropped, and its holds end unless they are detached.
    pub fn peer_gone(&mut self, peer: PeerId, now: Instant) {
        self.waiting.retain(|waiting| waiting.request.owner != peer);
        self.end_holds(now, EndReason::ConnectionClosed, |hold| hold.owner == peer && !hold.detached);
    }

    /// The daemon ends: all holds end.
    pub fn shutdown(&mut self, now: Instant) {
        self.end_all(now, EndReason::Shutdown, Refusal::Shutdown);
    }

    /// Ends the leases and timeouts that have run out. Called no later than [`Coordinator::next_deadline`].
    pub fn tick(&mut self, now: Instant) {
        let (late, rest) = self.waiting.drain(..).partition(|waiting| waiting.deadline <= now);
        self.waiting = rest;
        let late: Vec<WaitingRequest> = late;
        self.end_holds(now, EndReason::LeaseExpired, |hold| hold.until <= now);
        for waiting in late {
            self.refuse(waiting.request, Refusal::Timeout);
        }
    }

    /// When the next lease or timeout runs out.
    pub fn next_deadline(&self) -> Option<Instant> {
        let waiting = self.waiting.iter().map(|waiting| waiting.deadline);
        waiting.chain(self.holds.iter().map(|hold| hold.until)).min()
    }

    /// The holders, oldest first.
    pub fn holds(&self) -> &[Hold] {
        &self.holds
    }

    /// How many requests wait for the gate to settle.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether there is no hold and no waiting request.
    pub fn is_open(&self) -> bool {
        matches!(self.gate, Gate::Open)
    }

    /// `open`, `settling` or `quiesced`.
    pub fn state(&self) -> &'static str {
        match self.gate {
            Gate::Open => "open",
            Gate::Settling { .. } => "settling",
            Gate::Quiet { .. } => "quiesced",
        }
    }

    /// How long writes have been waiting, for all holds and requests that add up.
    pub fn held_time(&self, now: Instant) -> Duration {
        self.held.sum(now)
    }

    /// The bound on that, if there is one.
    pub fn max_hold(&self) -> Option<Duration> {
        self.held.max()
    }

    fn bounded(&self, until: Instant, now: Instant) -> Instant {
        self.held.end(now).map_or(until, |end| end.min(until))
    }

    fn wait(&mut self, request: HoldRequest, now: Instant) {
        let deadline = self.bounded(now + request.timeout, now);
        self.waiting.push(WaitingRequest { request, deadline });
    }

    fn grant(&mut self, requests: Vec<HoldRequest>, epoch: u64, figures: HoldFigures, now: Instant) {
        let granted = requests.len();
        let mut ids = Vec::with_capacity(granted);
        for request in requests {
            let HoldRequest { id, token, owner, lease, detached, who, timeout: _ } = request;
            ids.push(id);
            let until = self.bounded(now + lease, now);
            self.holds.push(Hold { token, owner, detached, who, since: now, until });
        }
        let holders = self.holds.len();
        for (request, hold) in ids.into_iter().zip(&self.holds[holders - granted..]) {
            self.effects.push_back(HoldEffect::Granted { request, hold: hold.clone(), epoch, figures, holders });
        }
    }

    fn refuse(&mut self, request: HoldRequest, why: Refusal) {
        self.effects.push_back(HoldEffect::Refused { request: request.id, who: request.who, why });
    }

    fn end_all(&mut self, now: Instant, reason: EndReason, refusal: Refusal) {
        let requests: Vec<HoldRequest> = self.waiting.drain(..).map(|waiting| waiting.request).collect();
        self.end_holds(now, reason, |_| true);
        for request in requests {
            self.refuse(request, refusal);
        }
    }

    /// Ends the holds for which `which` is true, and opens the gate if no hold and no request is left (also when only
    /// waiting requests ended).
    fn end_holds(&mut self, now: Instant, reason: EndReason, which: impl Fn(&Hold) -> bool) {
        let (ended, rest): (Vec<Hold>, Vec<Hold>) = self.holds.drain(..).partition(|hold| which(hold));
        self.holds = rest;
        self.open_if_free(now);
        let mut holders = self.holds.len() + ended.len();
        for hold in ended {
            holders -= 1;
            if self.ended.len() == MAX_ENDED {
                self.ended.pop_front();
            }
            self.ended.push_back((hold.token.clone(), reason));
            let held = now.saturating_duration_since(hold.since);
            self.effects.push_back(HoldEffect::Ended { hold, reason, held, holders });
        }
    }

    fn open_if_free(&mut self, now: Instant) {
        if self.holds.is_empty() && self.waiting.is_empty() && !matches!(self.gate, Gate::Open) {
            self.gate = Gate::Open;
            self.held.open(now);
            self.effects.push_back(HoldEffect::OpenGate);
        }
    }

    /// Why a token's hold ended; `None`: it never had one, or still has it.
    pub fn end_reason(&self, token: &str) -> Option<EndReason> {
        self.ended.iter().rev().find(|(ended, _)| ended == token).map(|(_, reason)| *reason)
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
