//! The model that checks the engine: a medium that retains what was synced and loses the rest, a back-end that completes ops
//! in any order, a worker that may be late, and the [`Oracle`]s. It shares nothing with the engine but its public types; even
//! the table of the modes is written a second time.

use super::oracle::Oracle;
use super::setup::{RequestSet, Setup};
use super::{Action, Admission, CacheMode, CachePolicy, Engine, Errno, Kind, OnError, RequestId, Token};

/// Requests in one script, at most.
pub const MAX_REQUESTS: usize = 6;
/// The error of every transfer that fails.
pub const DATA_ERROR: Errno = Errno(5);
/// The error of every sync that fails.
pub const SYNC_ERROR: Errno = Errno(28);

/// What a worker may do next.
#[derive(Clone, Copy, Debug)]
pub enum WorkerStep {
    /// Offer the request at the head of the virtqueue.
    Offer,
    /// Report a completion.
    Complete(Token, Result<(), Errno>),
    /// A holder blocks writes.
    Block,
    /// A holder stops blocking writes.
    Unblock,
    /// Retry the retained requests.
    Retry,
    /// Retry the retained requests for the last time.
    StopRetaining,
    /// Take and carry out all actions.
    Act,
}

/// Whether a quiesce waits for its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum QuiesceState {
    Open,
    Waiting,
    Ended,
}

/// The running sync, and the state at its submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Sync {
    /// Transfers that had finished: these it makes durable.
    landed: RequestSet,
    /// Requests that waited for nothing but a sync.
    waiting: RequestSet,
    /// It began within a quiesce with no change in flight; which quiesce.
    barrier: Option<u8>,
}

/// The engine and everything around it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub engine: Engine,
    /// The script's request that has each number. Numbers are reused, the lowest first.
    requests: [Option<u8>; MAX_REQUESTS],
    /// The next request of the script.
    next: u8,
    /// The next request was offered and blocked.
    head_is_blocked: bool,
    holders: u8,
    blocks_left: u8,
    errors_left: u8,
    quiesce: QuiesceState,
    /// Counts quiesces, from the first holder of each.
    quiesces: u8,
    /// The result of the latest sync that could end the present quiesce.
    barrier: Option<Result<(), Errno>>,
    resume_due: bool,
    /// Something happened since the actions were taken.
    act_due: bool,
    sync: Option<Sync>,
    /// The back-end has their transfer.
    in_backend: RequestSet,
    /// Of those, the ones with the durable flag.
    flagged: RequestSet,
    offered: RequestSet,
    done: RequestSet,
    acked: RequestSet,
    landed: RequestSet,
    durable: RequestSet,
    data_failed: RequestSet,
    sync_failed: RequestSet,
    /// A transfer that fails now is retained.
    retains: bool,
    /// Retained, in the order in which they failed: each failed, and was not submitted again.
    retained: Vec<u8>,
    /// Of `retained`: the engine reported it, or the retry is due.
    reported: RequestSet,
    /// To be submitted again before anything else, in this order.
    retries: Vec<u8>,
    /// For a flush: the changes that had been acknowledged when it was offered.
    to_cover: [RequestSet; MAX_REQUESTS],
}

impl World {
    pub fn new(setup: &Setup) -> World {
        assert!(setup.script.len() <= MAX_REQUESTS);
        let mut engine = Engine::new(CachePolicy::from(setup.mode), setup.durable_writes);
        engine.set_driver_can_flush(setup.driver_can_flush);
        engine.set_on_error(if setup.retains { OnError::Stop } else { OnError::Report });
        World {
            engine,
            requests: [None; MAX_REQUESTS],
            next: 0,
            head_is_blocked: false,
            holders: 0,
            blocks_left: setup.blocks,
            errors_left: setup.errors,
            quiesce: QuiesceState::Open,
            quiesces: 0,
            barrier: None,
            resume_due: false,
            act_due: false,
            sync: None,
            in_backend: 0,
            flagged: 0,
            offered: 0,
            done: 0,
            acked: 0,
            landed: 0,
            durable: 0,
            data_failed: 0,
            sync_failed: 0,
            retains: setup.retains,
            retained: Vec::new(),
            reported: 0,
            retries: Vec::new(),
            to_cover: [0; MAX_REQUESTS],
        }
    }

    /// All that may happen now. A blocked request is offered again only once the gate is open, whether or not `Resumed`
    /// has come: a kick may come first.
    pub fn steps(&self, setup: &Setup, steps: &mut Vec<WorkerStep>) {
        steps.clear();
        if self.act_due {
            steps.push(WorkerStep::Act);
        }
        if usize::from(self.next) < setup.script.len() && !(self.head_is_blocked && self.is_blocked()) {
            steps.push(WorkerStep::Offer);
        }
        let mut complete = |token, error| {
            steps.push(WorkerStep::Complete(token, Ok(())));
            if self.errors_left > 0 {
                steps.push(WorkerStep::Complete(token, Err(error)));
            }
        };
        for (id, request) in self.requests.iter().enumerate() {
            if request.is_some_and(|request| self.in_backend & 1 << request != 0) {
                complete(Token::Data(id as RequestId), DATA_ERROR);
            }
        }
        if self.sync.is_some() {
            complete(Token::Sync, SYNC_ERROR);
        }
        if self.blocks_left > 0 {
            steps.push(WorkerStep::Block);
        }
        if self.holders > 0 {
            steps.push(WorkerStep::Unblock);
        }
        if !self.retained.is_empty() {
            steps.extend([WorkerStep::Retry, WorkerStep::StopRetaining]);
        }
    }

    fn is_blocked(&self) -> bool {
        self.holders > 0 || !self.retained.is_empty()
    }

    /// Does one step and asks the oracles that judge events. [`World::judge`] asks the others.
    pub fn step(&mut self, setup: &Setup, step: WorkerStep) -> Result<(), Oracle> {
        match step {
            WorkerStep::Offer => self.offer(setup)?,
            WorkerStep::Complete(token, result) => self.complete(setup, token, result),
            WorkerStep::Block => {
                self.blocks_left -= 1;
                self.holders += 1;
                if self.holders == 1 {
                    self.quiesce = QuiesceState::Waiting;
                    self.quiesces += 1;
                    self.barrier = None;
                    self.resume_due = false;
                }
                self.engine.block_writes();
            }
            WorkerStep::Unblock => {
                self.holders -= 1;
                if self.holders == 0 {
                    self.quiesce = QuiesceState::Open;
                    self.resume_due = true;
                }
                self.engine.unblock_writes();
            }
            WorkerStep::Retry => self.retry(),
            WorkerStep::StopRetaining => {
                self.retains = false;
                self.retry();
            }
            WorkerStep::Act => {
                while let Some(action) = self.engine.next_action() {
                    self.act(setup, action)?;
                }
            }
        }
        self.act_due = match step {
            WorkerStep::Act => false,
            // A blocked request changes nothing, so there is nothing to do.
            WorkerStep::Offer => self.act_due || !self.head_is_blocked,
            _ => true,
        };
        Ok(())
    }

    fn retry(&mut self) {
        self.retries.append(&mut self.retained);
        self.resume_due |= self.holders == 0;
        if self.retains { self.engine.retry() } else { self.engine.stop_retaining() }
    }

    fn offer(&mut self, setup: &Setup) -> Result<(), Oracle> {
        let request = self.next;
        let kind = setup.script[usize::from(request)];
        let id = self.requests.iter().position(Option::is_none).expect("a number for each request");
        let may_pass = kind == Kind::Read || !self.is_blocked();
        match self.engine.offer(id as RequestId, kind) {
            Admission::Admitted if !may_pass => return Err(Oracle::AdmittedWhileBlocked),
            Admission::Blocked if may_pass => return Err(Oracle::BlockedWithoutReason),
            Admission::Blocked => {
                self.head_is_blocked = true;
                return Ok(());
            }
            Admission::Admitted => {}
        }
        self.head_is_blocked = false;
        self.next += 1;
        self.requests[id] = Some(request);
        self.offered |= 1 << request;
        self.to_cover[usize::from(request)] = if kind == Kind::Flush { self.acked & setup.changes() } else { 0 };
        Ok(())
    }

    fn complete(&mut self, setup: &Setup, token: Token, result: Result<(), Errno>) {
        self.errors_left -= u8::from(result.is_err());
        self.engine.complete(token, result);
        match token {
            Token::Data(id) => {
                let request = self.requests[usize::from(id)].expect("this request is in the back-end");
                let bit = 1 << request;
                self.in_backend &= !bit;
                match result {
                    Ok(()) => self.landed |= bit & setup.changes(),
                    Err(_) if self.retains => self.retained.push(request),
                    Err(_) => self.data_failed |= bit,
                }
                if result.is_ok() && self.flagged & bit != 0 {
                    self.durable |= bit;
                }
            }
            Token::Sync => {
                let sync = self.sync.take().expect("a sync is running");
                match result {
                    Ok(()) => self.durable |= sync.landed,
                    Err(_) => self.sync_failed |= sync.waiting & !self.done,
                }
                if sync.barrier == Some(self.quiesces) && self.holders > 0 {
                    self.barrier = Some(result);
                }
            }
        }
    }

    fn act(&mut self, setup: &Setup, action: Action) -> Result<(), Oracle> {
        match action {
            Action::Submit { token: Token::Data(id), durable } => {
                let request = self.requests[usize::from(id)].expect("only offered requests are submitted");
                let is_write = setup.script[usize::from(request)] == Kind::Write;
                if durable && !(setup.durable_writes && is_write) {
                    return Err(Oracle::DurableFlagMisused);
                }
                if let Some(at) = self.retries.iter().position(|retried| *retried == request) {
                    self.retries.remove(at);
                    self.reported &= !(1 << request);
                    if at > 0 {
                        return Err(Oracle::RetriedOutOfOrder);
                    }
                }
                self.in_backend |= 1 << request;
                self.flagged = self.flagged & !(1 << request) | u8::from(durable) << request;
            }
            Action::Submit { token: Token::Sync, .. } => {
                if self.sync.is_some() {
                    return Err(Oracle::TwoSyncs);
                }
                let open = self.offered & !self.done;
                let waiting = open & ((self.landed & setup.changes()) | setup.flushes());
                let quiet = self.holders > 0 && open & !setup.reads() == 0;
                self.sync = Some(Sync { landed: self.landed, waiting, barrier: quiet.then_some(self.quiesces) });
            }
            Action::Retained { id, errno } => {
                let request = self.requests[usize::from(id)].ok_or(Oracle::RetainedWrongly)?;
                let is_retained = self.retained.contains(&request) || self.retries.contains(&request);
                if !is_retained || self.reported & 1 << request != 0 || errno != DATA_ERROR {
                    return Err(Oracle::RetainedWrongly);
                }
                self.reported |= 1 << request;
            }
            Action::Done { id, result } => self.done(setup, id, result)?,
            Action::Quiesced(result) => self.quiesced(setup, result)?,
            Action::Resumed => {
                if self.holders > 0 || !self.resume_due {
                    return Err(Oracle::ResumedWithoutReason);
                }
                self.resume_due = false;
            }
        }
        Ok(())
    }

    fn done(&mut self, setup: &Setup, id: RequestId, result: Result<(), Errno>) -> Result<(), Oracle> {
        let request = self.requests[usize::from(id)].take().ok_or(Oracle::DoneTwice)?;
        let bit = 1 << request;
        self.done |= bit;
        if self.retained.contains(&request) || self.retries.contains(&request) {
            return Err(Oracle::RetainedWrongly);
        }
        let expected = match (self.data_failed & bit != 0, self.sync_failed & bit != 0) {
            (true, _) => Err(DATA_ERROR),
            (_, true) => Err(SYNC_ERROR),
            _ => Ok(()),
        };
        match (expected, result) {
            (Ok(()), Err(_)) => return Err(Oracle::FailedWithoutReason),
            (Err(_), _) if result != expected => return Err(Oracle::FailureAcknowledged),
            (Err(_), _) => return Ok(()),
            (Ok(()), Ok(())) => {}
        }
        self.acked |= bit;
        if setup.is_through() && bit & setup.changes() & !self.durable != 0 {
            return Err(Oracle::ThroughNotDurable);
        }
        if setup.mode != CacheMode::Unsafe && self.to_cover[usize::from(request)] & !self.durable != 0 {
            return Err(Oracle::FlushNotDurable);
        }
        Ok(())
    }

    fn quiesced(&mut self, setup: &Setup, result: Result<(), Errno>) -> Result<(), Oracle> {
        if self.quiesce != QuiesceState::Waiting {
            return Err(Oracle::QuiescedTwice);
        }
        self.quiesce = QuiesceState::Ended;
        if result.is_ok() && self.offered & !self.done & !setup.reads() != 0 {
            return Err(Oracle::QuietInFlight);
        }
        if result.is_ok() && self.acked & setup.changes() & !self.durable != 0 {
            return Err(Oracle::QuietNotDurable);
        }
        if self.barrier != Some(result) {
            return Err(Oracle::QuietUnsynced);
        }
        Ok(())
    }

    /// What must hold in every state, and what must have happened once nothing is in progress.
    pub fn judge(&self, setup: &Setup) -> Result<(), Oracle> {
        let open = self.offered & !self.done;
        let in_progress = open != 0 || self.sync.is_some();
        if in_progress && self.engine.is_idle() {
            return Err(Oracle::IdleWrong);
        }
        if self.act_due {
            return Ok(());
        }
        if self.engine.writes_in_flight() != (open & !setup.reads()).count_ones() {
            return Err(Oracle::Miscounted);
        }
        let only_retained = self.in_backend == 0 && self.sync.is_none();
        if !only_retained {
            return if self.engine.is_idle_but_for_retained() { Err(Oracle::IdleWrong) } else { Ok(()) };
        }
        let retained = self.retained.iter().fold(0, |set, request| set | 1 << request);
        match () {
            _ if open != retained => Err(Oracle::NeverDone),
            _ if retained != self.reported => Err(Oracle::RetainedWrongly),
            _ if self.quiesce == QuiesceState::Waiting && retained & !setup.reads() == 0 => {
                Err(Oracle::QuiesceNeverEnds)
            }
            _ if self.resume_due => Err(Oracle::ResumedLost),
            _ if !self.engine.is_idle_but_for_retained() || self.engine.is_idle() != (open == 0) => {
                Err(Oracle::IdleWrong)
            }
            _ => Ok(()),
        }
    }
}
