//! PURE. Decides who holds the disk: a state machine to which the caller passes the time.
//!
//! The write gate is closed exactly while there is a hold or a request that waits for one. The first request closes the
//! gate and begins an epoch. Requests that arrive while the disk settles join that epoch and share its result. Requests
//! that arrive when the disk is quiet are granted at once, because nothing can have changed since. The gate opens when
//! the last hold or waiting request has ended, for whatever reason. A result of the disk counts only for its own epoch:
//! after a timeout, the late result of the abandoned epoch must not grant the next one.
//!
//! Holds that overlap or follow each other closely add up for the guest. With a bound on their sum (`--max-hold`) no
//! lease and no timeout exceeds it, and a request that arrives at the bound is refused until writes have flowed again.

mod held_time;
mod hold;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::disk::HoldFigures;
use crate::engine::Errno;
use held_time::HeldTime;
pub use hold::*;

/// The most ended holds that are remembered, so that the error of a late `resume` can give the reason of its end.
const MAX_ENDED: usize = 64;

struct WaitingRequest {
    request: HoldRequest,
    deadline: Instant,
}

#[derive(Clone, Copy)]
enum Gate {
    /// The gate is open: there is no hold and no waiting request.
    Open,
    /// The gate is closed and the disk is not quiet yet: requests wait, and there is no hold.
    Settling { epoch: u64 },
    /// The disk is quiet: there is a hold, and no request waits.
    Quiet { epoch: u64, rings: u32 },
}

/// The holders of one disk. Methods that change the state get the current time, and leave what the caller must do in
/// [`Coordinator::effects`]. Owned by the control thread.
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
    /// Creates a coordinator for a disk that no client holds. `max_hold`: how long the holders together may keep writes
    /// waiting; `None`: no bound.
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

    /// Takes the effects that the caller must carry out, oldest first, before it calls another method.
    pub fn effects(&mut self) -> Vec<HoldEffect> {
        self.effects.drain(..).collect()
    }

    /// Takes a request to hold the disk. Exactly one [`HoldEffect::Granted`] or [`HoldEffect::Refused`] follows, unless
    /// the request's connection ends first.
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

    /// Grants the waiting requests when the disk is quiet, or refuses them when it failed to become quiet. A result of
    /// another epoch than the current one is ignored.
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

    /// Refuses the waiting requests of this epoch, because another process uses the image.
    pub fn not_ours(&mut self, epoch: u64, now: Instant) {
        if self.is_settling(epoch) {
            self.refuse_all(Refusal::NotOurs, now);
        }
    }

    fn is_settling(&self, epoch: u64) -> bool {
        matches!(self.gate, Gate::Settling { epoch: current } if current == epoch)
    }

    /// Refuses all waiting requests. The gate opens before the replies are sent, because the guest waits for it.
    fn refuse_all(&mut self, why: Refusal, now: Instant) {
        let requests: Vec<HoldRequest> = self.waiting.drain(..).map(|waiting| waiting.request).collect();
        self.open_if_free(now);
        for request in requests {
            self.refuse(request, why);
        }
    }

    /// Refuses the requests that wait, because a guest's request that changes the disk failed and is retained for an
    /// unknown time. Granted holds stay, because the disk is quiet under them.
    pub fn stopped(&mut self, errno: Errno, now: Instant) {
        self.refuse_all(Refusal::Stopped(errno), now);
    }

    /// Refuses a request that its sender withdrew, if the request still waits. A request that is granted already stays
    /// granted.
    pub fn cancel(&mut self, request: RequestId, now: Instant) {
        let Some(at) = self.waiting.iter().position(|waiting| waiting.request.id == request) else { return };
        let waiting = self.waiting.remove(at);
        self.open_if_free(now);
        self.refuse(waiting.request, Refusal::Cancelled);
    }

    /// Ends the hold with this token. Returns how many holds are left. The error is the reason why the hold had ended
    /// before; `None`: no hold ever had this token.
    pub fn resume(&mut self, token: &str, now: Instant) -> Result<usize, Option<EndReason>> {
        match self.holds.iter().position(|hold| hold.token == token) {
            Some(_) => {
                self.end_holds(now, EndReason::Resume, |hold| hold.token == token);
                Ok(self.holds.len())
            }
            None => Err(self.end_reason(token)),
        }
    }

    /// Ends every hold and refuses every waiting request. Returns the number of holds that ended.
    pub fn resume_all(&mut self, now: Instant) -> usize {
        let count = self.holds.len();
        self.end_all(now, EndReason::Resume, Refusal::Cancelled);
        count
    }

    /// Extends a hold until `lease` from now, or until the bound on all holds, if that is sooner. Returns how long the
    /// hold lasts from now on. The errors are those of [`Coordinator::resume`].
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

    /// Drops the requests of a connection that ended, and ends its holds unless they are detached.
    pub fn peer_gone(&mut self, peer: PeerId, now: Instant) {
        self.waiting.retain(|waiting| waiting.request.owner != peer);
        self.end_holds(now, EndReason::ConnectionClosed, |hold| hold.owner == peer && !hold.detached);
    }

    /// Whether a hold or a request for one would end with a connection.
    pub fn ends_with(&self, peer: PeerId) -> bool {
        self.waiting.iter().any(|waiting| waiting.request.owner == peer)
            || self.holds.iter().any(|hold| hold.owner == peer && !hold.detached)
    }

    /// Ends all holds, because the daemon ends.
    pub fn shutdown(&mut self, now: Instant) {
        self.end_all(now, EndReason::Shutdown, Refusal::Shutdown);
    }

    /// Ends the holds whose lease has run out, and refuses the requests whose timeout has passed. Called no later than
    /// [`Coordinator::next_deadline`].
    pub fn tick(&mut self, now: Instant) {
        let (late, rest) = self.waiting.drain(..).partition(|waiting| waiting.deadline <= now);
        self.waiting = rest;
        let late: Vec<WaitingRequest> = late;
        self.end_holds(now, EndReason::LeaseExpired, |hold| hold.until <= now);
        for waiting in late {
            self.refuse(waiting.request, Refusal::Timeout);
        }
    }

    /// Returns when the next lease or timeout runs out. `None`: the disk is not held and no request waits.
    pub fn next_deadline(&self) -> Option<Instant> {
        let waiting = self.waiting.iter().map(|waiting| waiting.deadline);
        waiting.chain(self.holds.iter().map(|hold| hold.until)).min()
    }

    /// The holders, oldest first.
    pub fn holds(&self) -> &[Hold] {
        &self.holds
    }

    /// Returns the number of requests that wait for the disk to become quiet.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether there is no hold and no waiting request.
    pub fn is_open(&self) -> bool {
        matches!(self.gate, Gate::Open)
    }

    /// Returns the gate's state for the status: `open`, `settling` or `quiesced`.
    pub fn state(&self) -> &'static str {
        match self.gate {
            Gate::Open => "open",
            Gate::Settling { .. } => "settling",
            Gate::Quiet { .. } => "quiesced",
        }
    }

    /// Returns how long writes have been waiting, over all holds and requests that add up.
    pub fn held_time(&self, now: Instant) -> Duration {
        self.held.sum(now)
    }

    /// Returns the bound on [`Coordinator::held_time`], if there is one.
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

    /// Returns why the hold with this token ended. `None`: the hold still lasts, or no hold had this token.
    pub fn end_reason(&self, token: &str) -> Option<EndReason> {
        self.ended.iter().rev().find(|(ended, _)| ended == token).map(|(_, reason)| *reason)
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
