//! PURE. Who holds the disk: a state machine with the clock passed in.
//!
//! The write gate is closed exactly while somebody holds the disk or waits to. The first request closes it and begins
//! an epoch; requests that come while it settles join that epoch and share its answer; those that come when the disk
//! is quiet are answered at once, because nothing can have changed since. The gate opens when the last holder or
//! waiting request is gone, however it went. An answer of the disk counts only for the epoch it was asked for: after a
//! timeout, the late answer of the abandoned closing must not vouch for the next one.
//!
//! Holds that overlap or follow each other closely add up for the guest. With a bound on their sum (`--max-hold`) no lease
//! and no timeout goes beyond it, and who asks then is refused until writes have flowed.

mod held_time;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::creds::Credentials;
use crate::disk::HoldFigures;
use crate::engine::Errno;
use held_time::HeldTime;

/// A connection.
pub type PeerId = u64;
/// No connection, but the store of the image: somebody elsewhere takes a snapshot of it.
pub const STORE: PeerId = 0;
/// A `quiesce` request that waits for its answer.
pub type RequestId = u64;

/// Holders and waiting requests at most.
pub const MAX_HOLDERS: usize = 64;
/// How many ended holds are remembered, so that a late `resume` can be told what became of its hold.
const MAX_ENDED: usize = 64;

/// Who asked, as far as the kernel and the client tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Who {
    /// The client's own words.
    pub text: Option<String>,
    /// The process and its user when it connected; `None`: no client, but the image's store.
    pub client: Option<Credentials>,
}

/// A `quiesce` request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Names the answer.
    pub request: RequestId,
    /// Of the hold to be: unguessable, never used before.
    pub token: String,
    /// The connection that asks.
    pub owner: PeerId,
    /// Until the request is answered with an error.
    pub timeout: Duration,
    /// From the grant on; what is left of the bound on all holds, if that is less.
    pub lease: Duration,
    /// The hold outlives the connection.
    pub detached: bool,
    /// For status and events.
    pub who: Who,
}

/// Why a request was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The gate did not settle in time.
    Timeout,
    /// The disk could not make everything durable.
    SyncFailed(Errno),
    /// A request that changes the disk failed so and is kept: part of it may be in the image.
    Stopped(Errno),
    /// The image is somebody else's: it changes, whoever holds it here.
    NotOurs,
    /// Somebody resumed everything, or whoever asked gave up.
    Cancelled,
    /// [`MAX_HOLDERS`].
    TooMany,
    /// The disk was held for as long as its holders together may hold it.
    MaxHold,
    /// Whoever must consent did not ([`super::AttendCommand`]). Never the coordinator's own.
    NotPrepared,
    /// The daemon ends.
    Shutdown,
}

/// Why a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its holder, or somebody for all, said so.
    Resume,
    /// Nobody renewed it.
    LeaseExpired,
    /// Its connection ended.
    ConnectionClosed,
    /// The daemon ends.
    Shutdown,
}

/// What the caller must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// [`crate::disk::Disk::close_gate`].
    CloseGate(u64),
    /// [`crate::disk::Disk::open_gate`].
    OpenGate,
    /// Answer a request: the disk is still.
    Granted {
        /// Which.
        request: RequestId,
        /// The hold, as it stands.
        hold: Hold,
        /// The epoch that settled.
        epoch: u64,
        /// What settling it took.
        figures: HoldFigures,
        /// Holders now.
        holders: usize,
    },
    /// Answer a request: it failed.
    Refused {
        /// Which.
        request: RequestId,
        /// Whose.
        who: Who,
        /// Why.
        why: Refusal,
    },
    /// A holder is gone.
    Left {
        /// The hold that ended.
        hold: Hold,
        /// Why.
        reason: Reason,
        /// How long it lasted.
        held: Duration,
        /// Holders left.
        holders: usize,
    },
}

/// One holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Its name.
    pub token: String,
    /// The connection that asked.
    pub owner: PeerId,
    /// It outlives that connection.
    pub detached: bool,
    /// Who asked.
    pub who: Who,
    /// Granted when.
    pub since: Instant,
    /// Ends when.
    pub until: Instant,
}

struct Waiting {
    ask: Ask,
    deadline: Instant,
}

#[derive(Clone, Copy)]
enum Gate {
    /// Nobody holds, nobody waits.
    Open,
    /// Somebody waits, nobody holds.
    Settling { epoch: u64 },
    /// Somebody holds, nobody waits.
    Quiet { epoch: u64, rings: u32 },
}

/// The holders of one disk. Every method takes the time and leaves its orders in [`Coordinator::effects`].
pub struct Coordinator {
    gate: Gate,
    last_epoch: u64,
    waiting: Vec<Waiting>,
    holds: Vec<Hold>,
    ended: VecDeque<(String, Reason)>,
    effects: VecDeque<Effect>,
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

    /// The orders that piled up, oldest first. To be carried out before the next call.
    pub fn effects(&mut self) -> Vec<Effect> {
        self.effects.drain(..).collect()
    }

    /// A `quiesce`. Answered by exactly one [`Effect::Granted`] or [`Effect::Refused`], unless its connection ends.
    pub fn quiesce(&mut self, ask: Ask, now: Instant) {
        if self.waiting.len() + self.holds.len() >= MAX_HOLDERS {
            self.refuse(ask, Refusal::TooMany);
            return;
        }
        if self.held.is_spent(now) {
            self.refuse(ask, Refusal::MaxHold);
            return;
        }
        match self.gate {
            Gate::Open => {
                self.last_epoch += 1;
                self.gate = Gate::Settling { epoch: self.last_epoch };
                self.effects.push_back(Effect::CloseGate(self.last_epoch));
                self.held.close(now);
                self.wait(ask, now);
            }
            Gate::Settling { .. } => self.wait(ask, now),
            Gate::Quiet { epoch, rings } => {
                let figures = HoldFigures { rings, ..HoldFigures::default() };
                self.grant(vec![ask], epoch, figures, now);
            }
        }
    }

    /// The disk's answer. An answer for another epoch than the one that settles now is nobody's.
    pub fn settled(&mut self, epoch: u64, result: Result<HoldFigures, Errno>, now: Instant) {
        if !self.is_settling(epoch) {
            return;
        }
        match result {
            Ok(figures) => {
                let asks = self.waiting.drain(..).map(|waiting| waiting.ask).collect();
                self.gate = Gate::Quiet { epoch, rings: figures.rings };
                self.grant(asks, epoch, figures, now);
            }
            Err(errno) => self.refuse_all(Refusal::SyncFailed(errno), now),
        }
    }

    /// The disk's other answer: the image is somebody else's.
    pub fn not_ours(&mut self, epoch: u64, now: Instant) {
        if self.is_settling(epoch) {
            self.refuse_all(Refusal::NotOurs, now);
        }
    }

    fn is_settling(&self, epoch: u64) -> bool {
        matches!(self.gate, Gate::Settling { epoch: current } if current == epoch)
    }

    /// All who wait. The guest goes on first; the answers can wait.
    fn refuse_all(&mut self, why: Refusal, now: Instant) {
        let asks: Vec<Ask> = self.waiting.drain(..).map(|waiting| waiting.ask).collect();
        self.open_if_free(now);
        for ask in asks {
            self.refuse(ask, why);
        }
    }

    /// A request that changes the disk failed and is kept, for how long nobody knows: whoever waits for the disk to be
    /// still is refused. Who holds it already has it still.
    pub fn stopped(&mut self, errno: Errno, now: Instant) {
        self.refuse_all(Refusal::Stopped(errno), now);
    }

    /// Whoever asked gave up: a request that waits is refused. Nothing else changes, also if it is granted already.
    pub fn cancel(&mut self, request: RequestId, now: Instant) {
        let Some(at) = self.waiting.iter().position(|waiting| waiting.ask.request == request) else { return };
        let waiting = self.waiting.remove(at);
        self.open_if_free(now);
        self.refuse(waiting.ask, Refusal::Cancelled);
    }

    /// Ends one hold and returns how many are left. `Err`: what became of the token, `None` if it was never one.
    pub fn resume(&mut self, token: &str, now: Instant) -> Result<usize, Option<Reason>> {
        match self.holds.iter().position(|hold| hold.token == token) {
            Some(_) => {
                self.end_holds(now, Reason::Resume, |hold| hold.token == token);
                Ok(self.holds.len())
            }
            None => Err(self.what_became_of(token)),
        }
    }

    /// Ends every hold and refuses every waiting request. Returns how many holds there were.
    pub fn resume_all(&mut self, now: Instant) -> usize {
        let count = self.holds.len();
        self.end_all(now, Reason::Resume, Refusal::Cancelled);
        count
    }

    /// Lets a hold last until `lease` from now, or the end of the bound on all holds. Returns how long that is. Errors as
    /// of [`Coordinator::resume`].
    pub fn renew(&mut self, token: &str, lease: Duration, now: Instant) -> Result<Duration, Option<Reason>> {
        let until = self.bounded(now + lease, now);
        match self.holds.iter_mut().find(|hold| hold.token == token) {
            Some(hold) => {
                hold.until = until;
                Ok(until.saturating_duration_since(now))
            }
            None => Err(self.what_became_of(token)),
        }
    }

    /// A connection ended: its requests are nobody's, and its holds end unless they are detached.
    pub fn peer_gone(&mut self, peer: PeerId, now: Instant) {
        self.waiting.retain(|waiting| waiting.ask.owner != peer);
        self.end_holds(now, Reason::ConnectionClosed, |hold| hold.owner == peer && !hold.detached);
    }

    /// The daemon ends: nobody holds any more.
    pub fn shutdown(&mut self, now: Instant) {
        self.end_all(now, Reason::Shutdown, Refusal::Shutdown);
    }

    /// Lets leases and timeouts run out. Called no later than [`Coordinator::next_deadline`].
    pub fn tick(&mut self, now: Instant) {
        let (late, rest) = self.waiting.drain(..).partition(|waiting| waiting.deadline <= now);
        self.waiting = rest;
        let late: Vec<Waiting> = late;
        self.end_holds(now, Reason::LeaseExpired, |hold| hold.until <= now);
        for waiting in late {
            self.refuse(waiting.ask, Refusal::Timeout);
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

    /// Nobody holds or waits.
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

    /// How long writes have not flowed, for whichever holds and requests.
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

    fn wait(&mut self, ask: Ask, now: Instant) {
        let deadline = self.bounded(now + ask.timeout, now);
        self.waiting.push(Waiting { ask, deadline });
    }

    fn grant(&mut self, asks: Vec<Ask>, epoch: u64, figures: HoldFigures, now: Instant) {
        let granted = asks.len();
        let mut requests = Vec::with_capacity(granted);
        for ask in asks {
            let Ask { request, token, owner, lease, detached, who, timeout: _ } = ask;
            requests.push(request);
            let until = self.bounded(now + lease, now);
            self.holds.push(Hold { token, owner, detached, who, since: now, until });
        }
        let holders = self.holds.len();
        for (request, hold) in requests.into_iter().zip(&self.holds[holders - granted..]) {
            self.effects.push_back(Effect::Granted { request, hold: hold.clone(), epoch, figures, holders });
        }
    }

    fn refuse(&mut self, ask: Ask, why: Refusal) {
        self.effects.push_back(Effect::Refused { request: ask.request, who: ask.who, why });
    }

    fn end_all(&mut self, now: Instant, reason: Reason, refusal: Refusal) {
        let asks: Vec<Ask> = self.waiting.drain(..).map(|waiting| waiting.ask).collect();
        self.end_holds(now, reason, |_| true);
        for ask in asks {
            self.refuse(ask, refusal);
        }
    }

    /// Ends the holds that `which` names, and opens the gate if nobody is left (also when only waiting requests went).
    fn end_holds(&mut self, now: Instant, reason: Reason, which: impl Fn(&Hold) -> bool) {
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
            self.effects.push_back(Effect::Left { hold, reason, held, holders });
        }
    }

    fn open_if_free(&mut self, now: Instant) {
        if self.holds.is_empty() && self.waiting.is_empty() && !matches!(self.gate, Gate::Open) {
            self.gate = Gate::Open;
            self.held.open(now);
            self.effects.push_back(Effect::OpenGate);
        }
    }

    /// Why a token's hold ended; `None`: it never had one, or has it still.
    pub fn what_became_of(&self, token: &str) -> Option<Reason> {
        self.ended.iter().rev().find(|(ended, _)| ended == token).map(|(_, reason)| *reason)
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
