//! Serves one running virtqueue: pops the guest's requests, has the back-end carry them out, and completes them. The worker
//! owns the virtqueue, the engine and the back-end's queue. Nothing else touches them, so the request path takes no
//! contended lock.
//!
//! A turn, which [`relay`] runs again and again in the virtqueue's thread:
//! 1. [`Worker::begin_turn`] reaps the back-end's completions, carries out what the engine decides about them, pops new
//!    requests, and carries out what the engine decides about those;
//! 2. [`relay`] makes the calls that may block;
//! 3. [`Worker::end_turn`] interrupts the guest, at most once;
//! 4. [`Worker::sleep`] submits the whole batch, sleeps, and obeys commands.
//!
//! | file | what |
//! |---|---|
//! | `relay` | the threads of a virtqueue: another one continues when a call does not return |
//! | `lifecycle` | serving, pausing, stopping |
//! | `pop` | from a descriptor chain to the engine |
//! | `requests` | the requests from pop to completion |
//! | `backend_ops` | the ops that the back-end has, and those that it has no room for |
//! | `completion` | status byte, used ring, interrupt |
//! | `busy_poll` | spinning before a sleep (`--poll-max-ns`) |
//! | `clock` | the time, read once for a batch |
//! | `hold` | the virtqueue's part in an operator's hold |
//! | `limit` | requests that wait in the virtqueue for the disk's limits |
//! | `retained` | failed requests that are retried instead of completed |
//! | `resubmit` | requests that an earlier server took and did not complete |
//! | `stall` | requests that have been in flight for too long |
//! | `unshared` | guest memory that is not shared with this process |
//! | `stopped_ring` | what remains of a virtqueue while no worker serves it |

mod backend_ops;
mod busy_poll;
mod clock;
mod completion;
mod hold;
mod lifecycle;
mod limit;
mod pop;
mod relay;
mod requests;
mod resubmit;
mod retained;
mod stall;
pub(super) mod stopped_ring;
mod unshared;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::blk::features;
use super::blk::request::{ID_BYTES, Parser};
use super::rings::{RingJoined, Rings, SyncCover, WorkerCommand};
use super::shared_memory::dirty_log::DirtyLog;
use super::shared_memory::inflight::Tracker;
use super::virtqueue::guest_memory::GuestMemory;
use super::virtqueue::split_ring::SplitRing;
use crate::backend::{Completion, DurableWrite, Geometry, Op};
use crate::base::sync::EventNotifier;
#[cfg(all(test, feature = "model"))]
use crate::base::sync::interleavings::{Mutant, planted};
use crate::base::sync::mpsc::Receiver;
use crate::disk::Event;
use crate::disk::{RingCounters, add};
use crate::engine::{Action, Engine, Kind, Token};
use backend_ops::{BackendOps, SYNC, op_id, token};
use busy_poll::Polling;
use clock::TurnClock;
use hold::{HoldTimer, UnsyncedBytes};
use lifecycle::Lifecycle;
use limit::RingLimit;
pub(super) use relay::Relay;
use requests::Requests;
use stopped_ring::StoppedRing;
use unshared::FirstRequest;

/// What a worker needs besides the virtqueue itself.
pub(super) struct Setup {
    pub index: u32,
    pub rings: Arc<Rings>,
    /// Held while the virtqueue runs, so no request outlives its memory.
    pub memory: GuestMemory,
    /// Where heads in flight are marked for the next server.
    pub inflight: Option<Tracker>,
    /// Where written pages are logged, during a live migration.
    pub log: Option<Arc<DirtyLog>>,
    pub acked_features: u64,
    pub serial: Arc<[u8; ID_BYTES]>,
    pub commands: Receiver<WorkerCommand>,
    pub wake: Arc<EventNotifier>,
}

struct Worker {
    setup: Setup,
    ring: SplitRing,
    /// The guest broke the virtqueue: nothing is popped until the front-end sets it up anew. This is no state of
    /// `lifecycle`, because a broken virtqueue is drained, paused and stopped like any other.
    broken: bool,
    counters: Arc<RingCounters>,
    geometry: Geometry,
    engine: Engine,
    parser: Parser,
    backend: BackendOps,
    requests: Requests,
    lifecycle: Lifecycle,
    turn: Turn,
    clock: TurnClock,
    polling: Polling,
    hold: Option<HoldTimer>,
    /// The disk's limits, if it has any.
    limit: Option<Box<RingLimit>>,
    unsynced: UnsyncedBytes,
    /// Writes are acknowledged when they are durable.
    acknowledges_durable: bool,
    sync_cover: SyncCover,
    /// When the running sync was given to the back-end, on `clock`.
    sync_since: u64,
    first_request: FirstRequest,
}

/// What the worker learns during one turn. The step that uses a field resets it.
struct Turn {
    /// The virtqueue may hold requests that this turn did not take, so the next turn begins without a sleep.
    poll_again: bool,
    /// A request was put into the used ring, and the guest was not interrupted for it yet.
    completed: bool,
    /// The turn ended without re-enabling the guest's kicks, because the worker polls.
    notifications_disabled: bool,
    /// The virtqueue broke, and the front-end must be signalled (SET_VRING_ERR).
    signal_broken: bool,
}

impl Worker {
    fn new(setup: Setup, ring: SplitRing, stopped: &StoppedRing, joined: RingJoined) -> Self {
        let counters = joined.counters;
        let size = ring.size();
        counters.size.store(size, Relaxed);
        counters.untracked.store(setup.inflight.is_none(), Relaxed);
        counters.kicked_empty.store(false, Relaxed);
        let geometry = Geometry { size: setup.rings.capacity().get(), ..setup.rings.backend().geometry() };
        let backend = BackendOps::open(&setup, size, stopped.kick.as_ref());
        let mut engine = Engine::new(setup.rings.policy(), geometry.durable_write == DurableWrite::Native);
        let driver_can_flush = features::driver_can_flush(setup.acked_features);
        engine.set_driver_can_flush(driver_can_flush);
        engine.set_on_error(setup.rings.tuning().on_error);
        let polling = Polling::new(setup.rings.tuning().poll_max);
        let acknowledges_durable = setup.rings.policy().syncs_each_write(driver_can_flush);
        let clock = TurnClock::new(setup.rings.started());
        Worker {
            setup,
            ring,
            broken: false,
            counters,
            geometry,
            engine,
            parser: Parser::default(),
            backend,
            requests: Requests::new(size),
            lifecycle: Lifecycle::Serving,
            turn: Turn { poll_again: false, completed: false, notifications_disabled: false, signal_broken: false },
            clock,
            polling,
            hold: None,
            limit: joined.limiter.map(|limiter| Box::new(RingLimit::new(limiter))),
            unsynced: UnsyncedBytes::default(),
            acknowledges_durable,
            sync_cover: SyncCover::default(),
            sync_since: 0,
            first_request: FirstRequest::at_start(stopped.next_available),
        }
    }

    /// Reaps what the back-end has finished, pops what the guest has made available, and carries out what the engine
    /// decides about both. The status shows the new requests before the thread makes any call that may block.
    fn begin_turn(&mut self) {
        self.clock.forget();
        self.reap();
        self.act();
        self.backend.retry_backlog();
        self.pop();
        self.act();
        self.update_status();
    }

    /// Reaps and completes what the back-end did on the spot in this turn, because the next turn may sleep at once.
    fn drain_completions(&mut self) {
        self.clock.forget();
        let (was_blocked, had_backlog) = (self.requests.blocked, self.backend.has_backlog());
        while self.reap() {
            self.act();
            self.backend.retry_backlog();
        }
        // What kept the virtqueue from being emptied is gone, and no kick will announce the requests left in it.
        self.turn.poll_again |= (was_blocked && !self.requests.blocked) || (had_backlog && !self.backend.has_backlog());
    }

    /// Makes the turn's results visible: to the dirty log, the status, the guest and the front-end.
    fn end_turn(&mut self, stopped: &StoppedRing) {
        self.log_used_ring();
        self.update_status();
        if self.wants_interrupt() {
            stopped.interrupt(self.setup.index);
        }
        if std::mem::take(&mut self.turn.signal_broken) {
            stopped.signal_error(self.setup.index);
        }
    }

    /// Sleeps until there is something to do, and obeys the commands that arrived.
    fn sleep(&mut self, stopped: &mut StoppedRing) {
        if self.skips_sleep() {
            return;
        }
        let timeout = match self.turn.poll_again {
            true => Some(Duration::ZERO),
            false => self.time_until_limit_allows(),
        };
        // The back-end retries what can be retried, so an error means that the process cannot go on.
        let woken = self.backend.io.wait(timeout).unwrap_or_else(|error| panic!("cannot wait for I/O: {error}"));
        if self.first_request != FirstRequest::Settled {
            self.note_first_kick(woken.kick);
        }
        if woken.wake {
            while let Ok(command) = self.setup.commands.try_recv() {
                self.obey(command, stopped);
                #[cfg(all(test, feature = "model"))]
                if planted(Mutant::OneCommandPerWakeUp) {
                    break;
                }
            }
        }
    }

    fn obey(&mut self, command: WorkerCommand, stopped: &mut StoppedRing) {
        match command {
            WorkerCommand::CloseGate(epoch) => self.close_gate(epoch),
            WorkerCommand::OpenGate => self.open_gate(),
            WorkerCommand::Resize(bytes) => self.geometry.size = bytes,
            WorkerCommand::CheckStalls => {
                self.check_stalls();
                self.check_first_request();
            }
            WorkerCommand::Retry => self.retry(),
            WorkerCommand::Limit(limiter) => self.set_limit(limiter),
            WorkerCommand::SetCall(call, done) => {
                stopped.set_call(self.setup.index, call);
                // The handler may have ended with its connection; then nothing waits for the reply.
                let _ = done.send(());
            }
            WorkerCommand::Pause(reached) => self.pause(reached),
            WorkerCommand::Resume(done) => self.resume(&done),
            WorkerCommand::Stop(mode) => self.stop(mode),
        }
    }

    /// Passes the back-end's completions to the engine, all of them before any action is carried out, so that one sync
    /// covers many writes. Returns whether there were any.
    fn reap(&mut self) -> bool {
        if !self.backend.has_ops() {
            return false;
        }
        let mut completions = self.backend.reap();
        let any = !completions.is_empty();
        for Completion { id, result, buf } in completions.drain(..) {
            let token = token(id);
            self.note_backend_latency(token);
            match (token, result) {
                (Token::Sync, Ok(())) => {
                    self.unsynced.sync_succeeded();
                    self.sync_cover.succeeded(&self.setup.rings);
                }
                (Token::Sync, Err(errno)) => {
                    self.setup.rings.report(Event::SyncError(errno));
                    if self.setup.rings.backend().sync_failed().is_some() {
                        self.stop_retaining();
                    }
                }
                (Token::Data(head), Err(errno)) if self.retains(errno) => {
                    self.record_failed_attempt(head);
                    self.requests.restore_op(head, buf);
                    self.engine.complete(token, result);
                    continue;
                }
                _ => {}
            }
            self.backend.spare_buffers.extend(buf);
            self.engine.complete(token, result);
        }
        self.backend.recycle(completions);
        any
    }

    /// Carries out the engine's decisions until there are no more.
    fn act(&mut self) {
        while let Some(action) = self.engine.next_action() {
            match action {
                Action::Submit { token: Token::Sync, .. } => {
                    add(&self.counters.syncs, 1);
                    self.unsynced.sync_started();
                    self.sync_since = self.clock.now();
                    self.sync_cover.begin(&self.setup.rings, self.sync_since);
                    self.note_drained();
                    self.backend.push(Op::Sync, SYNC);
                }
                Action::Submit { token: token @ Token::Data(head), durable } => {
                    match self.requests.take_op(head, self.clock.now()) {
                        Op::Write { offset, buf, .. } => {
                            self.backend.push(Op::Write { offset, buf, durable }, op_id(token));
                        }
                        op => self.backend.push(op, op_id(token)),
                    }
                }
                Action::Done { id, result } => self.finish(id, result),
                Action::Retained { id, errno } => self.retain(id, errno),
                Action::Quiesced(result) => self.hold_settled(result),
                #[cfg(all(test, feature = "model"))]
                Action::Resumed if planted(Mutant::IgnoresResume) => {}
                Action::Resumed => self.unblock(),
            }
        }
    }

    /// The completion of an op was found: records how long a sync took, and notes how long an op of a request took.
    #[inline]
    fn note_backend_latency(&mut self, token: Token) {
        let now = self.clock.now();
        match token {
            Token::Data(head) => {
                let request = self.requests.get_mut(head);
                request.backend_took = Some(now.saturating_sub(request.since));
            }
            Token::Sync => {
                let took = now.saturating_sub(self.sync_since);
                self.counters.latency.backend[Kind::Flush as usize].record(took);
            }
        }
    }

    /// Records the latency of an op that failed and will be tried again.
    fn record_failed_attempt(&mut self, head: u16) {
        let request = self.requests.get_mut(head);
        if let Some(took) = request.backend_took.take() {
            self.counters.latency.backend[request.kind as usize].record(took);
        }
    }

    /// A write at the head of the virtqueue waits at the closed gate.
    fn block(&mut self) {
        self.requests.blocked = true;
        self.requests.blocked_since = self.clock.now();
    }

    /// The gate may be open again.
    fn unblock(&mut self) {
        self.look_at_head_again();
        if std::mem::take(&mut self.requests.blocked) {
            let waited = self.clock.now().saturating_sub(self.requests.blocked_since);
            self.counters.latency.held.record(waited);
        }
    }

    fn update_status(&self) {
        self.counters.in_flight.store(self.requests.in_flight, Relaxed);
        self.counters.held.store(self.requests.blocked, Relaxed);
    }

    /// Ends the worker of a virtqueue that [has stopped](Worker::has_stopped). Returns what the next start needs.
    fn leave(mut self, mut stopped: StoppedRing) -> StoppedRing {
        stopped.next_available = self.ring.next_available();
        stopped.resubmit = self.take_unfinished();
        self.check_stalls();
        self.counters.in_flight.store(0, Relaxed);
        stopped
    }
}
