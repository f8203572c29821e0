//! The model that checks the engine: a medium that retains what was synced and loses the rest, a back-end that completes ops
//! in any order, a worker that may be late, and the [`Oracle`]s. It shares nothing with the engine but its public types; even
//! the table of the modes is written a second time.

use super::{Action, Admission, CacheMode, CachePolicy, Engine, Errno, Kind, OnError, RequestId, Token};

/// Requests in one script, at most.
pub const MAX_REQUESTS: usize = 6;
/// The error of every transfer that fails.
pub const DATA_ERROR: Errno = Errno(5);
/// The error of every sync that fails.
pub const SYNC_ERROR: Errno = Errno(28);

/// A set of requests of the script, one bit each.
type Set = u8;

/// The promises. A path that breaks one ends there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Oracle {
    /// A request was done that is not in flight.
    DoneTwice,
    /// Every op has completed and every action was taken, but a request has no result.
    NeverDone,
    /// A change or a flush was admitted while writes were blocked or a request was retained.
    AdmittedWhileBlocked,
    /// A read was blocked, or any request while the gate was open.
    BlockedWithoutReason,
    /// A change was acknowledged under write-through and is not durable.
    ThroughNotDurable,
    /// A flush was acknowledged, and a write acknowledged before the flush was offered is not durable.
    FlushNotDurable,
    /// A request whose transfer failed, or whose sync failed, was acknowledged (or got the other's error).
    FailureAcknowledged,
    /// A request failed though neither its transfer nor a sync that covered it did.
    FailedWithoutReason,
    /// Quiesced(Ok) while a change was in flight.
    QuietInFlight,
    /// Quiesced(Ok) while an acknowledged write was not durable.
    QuietNotDurable,
    /// Quiesced, but not with the result of a sync that began within this quiesce after the last change was done.
    QuietUnsynced,
    /// Quiesced while no quiesce waits for its result.
    QuiescedTwice,
    /// Every op has completed and writes are still blocked, but no Quiesced came.
    QuiesceNeverEnds,
    /// Resumed while writes were blocked, or without an unblock.
    ResumedWithoutReason,
    /// Writes are unblocked and Resumed never came.
    ResumedLost,
    /// A sync was submitted while one was running.
    TwoSyncs,
    /// The durable flag on anything but a write, or where the back-end has no durable writes.
    DurableFlagMisused,
    /// A failure was retained that should go to the guest, was retained twice, or went to the guest although it should be
    /// retained.
    RetainedWrongly,
    /// Retained requests were retried, but not in the order in which they failed.
    RetriedOutOfOrder,
    /// `writes_in_flight` differs from the number of requests admitted and not done.
    Miscounted,
    /// `is_idle` while something is in flight, or not although nothing is.
    IdleWrong,
}

/// What one exploration starts from.
#[derive(Clone, Debug)]
pub struct Setup {
    pub mode: CacheMode,
    pub durable_writes: bool,
    pub driver_can_flush: bool,
    /// The requests, in the virtqueue's order.
    pub script: Vec<Kind>,
    /// How often writes are blocked, at most.
    pub blocks: u8,
    /// How many completions fail, at most.
    pub errors: u8,
    /// Failed transfers are retained.
    pub retains: bool,
}

impl Setup {
    fn is_through(&self) -> bool {
        match self.mode {
            CacheMode::Directsync | CacheMode::Writethrough => true,
            CacheMode::None | CacheMode::Writeback => !self.driver_can_flush,
            CacheMode::Unsafe => false,
        }
    }
}

/// What a worker may do next.
#[derive(Clone, Copy, Debug)]
pub enum Step {
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
    landed: Set,
    /// Requests that waited for nothing but a sync.
    waiting: Set,
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
    in_backend: Set,
    /// Of those, the ones with the durable flag.
    flagged: Set,
    offered: Set,
    done: Set,
    acked: Set,
    landed: Set,
    durable: Set,
    data_failed: Set,
    sync_failed: Set,
    /// A transfer that fails now is retained.
    retains: bool,
    /// Retained, in the order in which they failed: each failed, and was not submitted again.
    retained: Vec<u8>,
    /// Of `retained`: the engine reported it, or the retry is due.
    reported: Set,
    /// To be submitted again before anything else, in this order.
    retries: Vec<u8>,
    /// For a flush: the changes that had been acknowledged when it was offered.
    to_cover: [Set; MAX_REQUESTS],
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
    pub fn steps(&self, setup: &Setup, steps: &mut Vec<Step>) {
        steps.clear();
        if self.act_due {
            steps.push(Step::Act);
        }
        if usize::from(self.next) < setup.script.len() && !(self.head_is_blocked && self.is_blocked()) {
            steps.push(Step::Offer);
        }
        let mut complete = |token, error| {
            steps.push(Step::Complete(token, Ok(())));
            if self.errors_left > 0 {
                steps.push(Step::Complete(token, Err(error)));
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
            steps.push(Step::Block);
        }
        if self.holders > 0 {
            steps.push(Step::Unblock);
        }
        if !self.retained.is_empty() {
            steps.extend([Step::Retry, Step::StopRetaining]);
        }
    }

    fn is_blocked(&self) -> bool {
        self.holders > 0 || !self.retained.is_empty()
    }

    /// Does one step and asks the oracles that judge events. [`World::judge`] asks the others.
    pub fn step(&mut self, setup: &Setup, step: Step) -> Result<(), Oracle> {
        match step {
            Step::Offer => self.offer(setup)?,
            Step::Complete(token, result) => self.complete(setup, token, result),
            Step::Block => {
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
            Step::Unblock => {
                self.holders -= 1;
                if self.holders == 0 {
                    self.quiesce = QuiesceState::Open;
                    self.resume_due = true;
                }
                self.engine.unblock_writes();
            }
            Step::Retry => self.retry(),
            Step::StopRetaining => {
                self.retains = false;
                self.retry();
            }
            Step::Act => {
                while let Some(action) = self.engine.next_action() {
                    self.act(setup, action)?;
                }
            }
        }
        self.act_due = match step {
            Step::Act => false,
            // A blocked request changes nothing, so there is nothing to do.
            Step::Offer => self.act_due || !self.head_is_blocked,
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
        self.to_cover[usize::from(request)] = if kind == Kind::Flush { self.acked & changes(setup) } else { 0 };
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
                    Ok(()) => self.landed |= bit & changes(setup),
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
                let waiting = open & ((self.landed & changes(setup)) | flushes(setup));
                let quiet = self.holders > 0 && open & !reads(setup) == 0;
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
        if setup.is_through() && bit & changes(setup) & !self.durable != 0 {
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
        if result.is_ok() && self.offered & !self.done & !reads(setup) != 0 {
            return Err(Oracle::QuietInFlight);
        }
        if result.is_ok() && self.acked & changes(setup) & !self.durable != 0 {
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
        if self.engine.writes_in_flight() != (open & !reads(setup)).count_ones() {
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
            _ if self.quiesce == QuiesceState::Waiting && retained & !reads(setup) == 0 => {
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

fn of(setup: &Setup, is: impl Fn(Kind) -> bool) -> Set {
    setup.script.iter().enumerate().filter(|(_, kind)| is(**kind)).map(|(request, _)| 1 << request).sum()
}

fn reads(setup: &Setup) -> Set {
    of(setup, |kind| kind == Kind::Read)
}

fn flushes(setup: &Setup) -> Set {
    of(setup, |kind| kind == Kind::Flush)
}

fn changes(setup: &Setup) -> Set {
    of(setup, |kind| !matches!(kind, Kind::Read | Kind::Flush))
}
