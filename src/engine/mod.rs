//! PURE. Which request runs, when it is acknowledged, and when the disk is quiet. Standard library only: no I/O, no
//! memory of the guest, no file descriptor, no thread, no clock.
//!
//! One [`Engine`] serves one virtqueue, in that virtqueue's thread. The caller reports what happened ([`Engine::offer`],
//! [`Engine::complete`], [`Engine::block_writes`], [`Engine::unblock_writes`]) and then carries out
//! [`Engine::next_action`] until that returns `None`. Reporting a whole batch first is better than one event at a time: a
//! sync starts only when the other actions are taken, so it covers all completions of the batch.
//!
//! # The life of a request
//! | kind | write back | write through | write through, durable writes native |
//! |---|---|---|---|
//! | `Read` | data, done | data, done | data, done |
//! | `Write` | data, done | data, sync, done | durable data, done |
//! | `Discard`, `WriteZeroes` | data, done | data, sync, done | data, sync, done |
//! | `Flush` | sync, done (`unsafe`: done) | sync, done | sync, done |
//!
//! A request whose transfer fails completes with that error at once, or is retained and retried ([`on_error`]). A sync
//! that fails fails exactly the requests that it covered. Every request but `Read` passes the gate, and leaves it when it
//! is done, its sync included.
//!
//! # The life of a quiesce
//! Open -> Draining (the gate is closed, changes are in flight) -> Flushing (a sync runs that began after the last of them
//! was done) -> Quiet (the caller has the result). A quiesce syncs in every mode, `unsafe` too: the mode decides what the
//! guest's flush does, not what the operator's quiesce does.

pub mod cache;
#[cfg(test)]
mod explore;
mod gate;
#[cfg(test)]
mod model;
pub mod on_error;
mod sync_line;
mod types;

use std::collections::VecDeque;

pub use cache::{CacheMode, CachePolicy};
use gate::WriteGate;
pub use on_error::OnError;
use sync_line::{SyncLine, Waiter};
pub use types::{Action, Admission, Errno, Kind, RequestId, Token};

/// The state of the request that has this number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Stage {
    /// No request has this number.
    #[default]
    Free,
    /// The back-end has a read's transfer. Reads do not pass the gate.
    Reading,
    /// The back-end has the transfer of a write, discard or write-zeroes.
    Changing {
        /// A sync must follow before the request completes.
        then_sync: bool,
        /// It was submitted as a durable write.
        durable: bool,
    },
    /// A read's transfer failed and will be retried.
    RetainedRead,
    /// A change's transfer failed and will be retried as it was.
    RetainedChange {
        /// As of `Changing`.
        then_sync: bool,
        /// As of `Changing`.
        durable: bool,
    },
    /// The request waits for a sync, the running one or the next.
    Syncing,
}

/// The state of the latest quiesce.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Quiesce {
    /// No quiesce is in progress.
    #[default]
    Open,
    /// Changes that passed the gate before it closed are still in flight.
    Draining,
    /// Those changes are done, and the barrier of this epoch waits for its sync. The sync of an abandoned quiesce may end
    /// while a later quiesce is in this state. It must not end the later one: it began before the writes in between.
    Flushing(u64),
    /// The result was reported, success or failure. The gate stays closed until the last holder leaves.
    Quiet,
}

/// Admission, acknowledgement and quiet for one virtqueue.
///
/// The virtqueue's thread owns it and alone calls it. No call blocks, and none panics on anything that a guest can do.
/// Every call takes constant time (a finished sync: constant for each request that it covered), and none allocates once the
/// queues have grown to the virtqueue's depth.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Engine {
    policy: CachePolicy,
    durable_writes: bool,
    driver_can_flush: bool,
    on_error: OnError,
    /// Requests whose transfers failed and will be retried, in the order in which they failed.
    retained: Vec<RequestId>,
    /// The state of each request, by its number. Grows to the highest number used.
    stages: Vec<Stage>,
    reads_in_flight: u32,
    gate: WriteGate,
    sync_line: SyncLine,
    quiesce: Quiesce,
    /// The number of the latest quiesce.
    epoch: u64,
    /// `Submit` of data and `Done`, in the order in which the caller must carry them out.
    actions: VecDeque<Action>,
    /// `Quiesced` that the caller has not taken yet. It is not in `actions`, because an abandoned quiesce takes its result
    /// with it: taken late, the result would seem to be that of the next quiesce.
    quiesce_result: Option<Result<(), Errno>>,
    /// `Resumed` that the caller has not taken yet. Closing the gate again withdraws it.
    resumed: bool,
}

impl Engine {
    /// An engine for one virtqueue. `durable_writes`: the back-end writes durably by itself (the flag of
    /// [`Action::Submit`]). Under write-through a write is then one durable write; otherwise it is data, then a sync that
    /// many writes share.
    pub fn new(policy: CachePolicy, durable_writes: bool) -> Self {
        Engine {
            policy,
            durable_writes,
            driver_can_flush: false,
            on_error: OnError::Report,
            retained: Vec::new(),
            stages: Vec::new(),
            reads_in_flight: 0,
            gate: WriteGate::default(),
            sync_line: SyncLine::default(),
            quiesce: Quiesce::Open,
            epoch: 0,
            actions: VecDeque::new(),
            quiesce_result: None,
            resumed: false,
        }
    }

    /// Sets whether the driver negotiated VIRTIO_BLK_F_FLUSH. The worker calls it before the first `offer`, and again when
    /// a driver negotiated anew and the engine [is idle](Engine::is_idle). Until then the driver counts as one that cannot
    /// flush, which is the safe assumption.
    pub fn set_driver_can_flush(&mut self, can: bool) {
        self.driver_can_flush = can;
    }

    /// Offers the request at the head of the virtqueue. `Blocked` leaves the engine unchanged; the request stays in the
    /// virtqueue.
    ///
    /// Offering a number that is in use is a bug of the caller: an assertion fails in debug builds, and release builds return
    /// `Blocked`.
    #[inline]
    pub fn offer(&mut self, id: RequestId, kind: Kind) -> Admission {
        let index = usize::from(id);
        if index >= self.stages.len() {
            self.stages.resize(index + 1, Stage::Free);
        }
        if self.stages[index] != Stage::Free {
            debug_assert!(false, "request {id} was offered while in flight");
            return Admission::Blocked;
        }
        if kind == Kind::Read {
            self.reads_in_flight += 1;
            self.stages[index] = Stage::Reading;
            self.submit(id, false);
            return Admission::Admitted;
        }
        if !self.retained.is_empty() || !self.gate.enter() {
            return Admission::Blocked;
        }
        match kind {
            Kind::Flush => self.flush(id),
            _ => self.change(id, kind),
        }
        Admission::Admitted
    }

    /// Reports the result of what was submitted. The caller reports every submitted token exactly once.
    ///
    /// A token that is not in flight is a bug of the caller: an assertion fails in debug builds, and release builds ignore
    /// it.
    #[inline]
    pub fn complete(&mut self, token: Token, result: Result<(), Errno>) {
        let Token::Data(id) = token else { return self.complete_sync(result) };
        match (self.stages.get(usize::from(id)), result) {
            (Some(Stage::Reading | Stage::Changing { .. }), Err(errno)) if self.on_error.retains(errno) => {
                self.retain(id, errno);
            }
            (Some(Stage::Reading), _) => {
                self.reads_in_flight -= 1;
                self.done(id, result);
            }
            (Some(Stage::Changing { then_sync: true, .. }), Ok(())) => self.wait_for_sync(id),
            (Some(Stage::Changing { .. }), _) => self.done_with_change(id, result),
            _ => debug_assert!(false, "{token:?} completed, which is not in flight"),
        }
    }

    /// Closes the gate for one more holder. The first holder begins a quiesce, which ends with one `Quiesced`; a further
    /// holder only adds to the count.
    pub fn block_writes(&mut self) {
        if !self.gate.block() {
            return;
        }
        self.epoch += 1;
        self.quiesce = Quiesce::Draining;
        self.flush_if_drained();
        self.resumed = false;
    }

    /// Undoes one `block_writes`. Undoing the last one yields `Resumed`, and abandons a quiesce that is still in progress
    /// or whose `Quiesced` was not taken yet.
    ///
    /// A call without a `block_writes` to undo is a bug of the caller: an assertion fails in debug builds, and release
    /// builds ignore it.
    pub fn unblock_writes(&mut self) {
        if !self.gate.unblock() {
            return;
        }
        self.quiesce = Quiesce::Open;
        self.resumed = true;
        self.quiesce_result = None;
    }

    /// The number of requests that passed the gate and are not done (flushes too): what a quiesce would drain.
    pub fn writes_in_flight(&self) -> u32 {
        self.gate.in_flight()
    }

    /// Whether a sync is running or due.
    pub fn is_syncing(&self) -> bool {
        !self.sync_line.is_idle()
    }

    /// Whether every request admitted is done, no sync is running or due, and `next_action` would return `None`: the worker
    /// may stop. It makes no difference whether writes are blocked.
    pub fn is_idle(&self) -> bool {
        self.retained.is_empty() && self.is_idle_but_for_retained()
    }

    /// The next action for the caller. The worker calls it until it returns `None` after every batch of `offer` and of
    /// `complete`, and after `block_writes` and `unblock_writes`.
    #[inline]
    pub fn next_action(&mut self) -> Option<Action> {
        if let Some(action) = self.actions.pop_front() {
            return Some(action);
        }
        // This comes after the queue, so that one sync covers the whole batch, and `Quiesced` follows every `Done`.
        if self.sync_line.start() {
            return Some(Action::Submit { token: Token::Sync, durable: false });
        }
        if let Some(result) = self.quiesce_result.take() {
            return Some(Action::Quiesced(result));
        }
        std::mem::take(&mut self.resumed).then_some(Action::Resumed)
    }

    /// Starts a flush that passed the gate.
    fn flush(&mut self, id: RequestId) {
        if self.policy.ignores_flush() {
            return self.done_with_change(id, Ok(()));
        }
        self.wait_for_sync(id);
    }

    /// Starts a write, discard or write-zeroes that passed the gate. Only writes have a durable form. (QEMU acknowledges a
    /// write-zeroes under write-through before it is durable; here it gets its sync.)
    #[inline]
    fn change(&mut self, id: RequestId, kind: Kind) {
        let through = self.policy.syncs_each_write(self.driver_can_flush);
        let durable = through && self.durable_writes && kind == Kind::Write;
        self.stages[usize::from(id)] = Stage::Changing { then_sync: through && !durable, durable };
        self.submit(id, durable);
    }

    #[inline]
    fn submit(&mut self, id: RequestId, durable: bool) {
        self.actions.push_back(Action::Submit { token: Token::Data(id), durable });
    }

    fn wait_for_sync(&mut self, id: RequestId) {
        self.stages[usize::from(id)] = Stage::Syncing;
        self.sync_line.join(Waiter::Request(id));
    }

    fn complete_sync(&mut self, result: Result<(), Errno>) {
        let Some(covered) = self.sync_line.finish() else {
            debug_assert!(false, "a sync completed, but none is running");
            return;
        };
        for &waiter in &covered {
            match waiter {
                Waiter::Request(id) => self.done_with_change(id, result),
                Waiter::Barrier(epoch) => self.barrier_synced(epoch, result),
            }
        }
        self.sync_line.recycle(covered);
    }

    /// Ends the quiesce of this epoch with the result of its sync, unless the quiesce was abandoned.
    fn barrier_synced(&mut self, epoch: u64, result: Result<(), Errno>) {
        if self.quiesce != Quiesce::Flushing(epoch) {
            return;
        }
        self.quiesce = Quiesce::Quiet;
        self.quiesce_result = Some(result);
    }

    /// Completes a request that passed the gate.
    #[inline]
    fn done_with_change(&mut self, id: RequestId, result: Result<(), Errno>) {
        self.done(id, result);
        self.gate.leave();
        self.flush_if_drained();
    }

    #[inline]
    fn done(&mut self, id: RequestId, result: Result<(), Errno>) {
        self.stages[usize::from(id)] = Stage::Free;
        self.actions.push_back(Action::Done { id, result });
    }

    #[inline]
    fn flush_if_drained(&mut self) {
        if self.quiesce == Quiesce::Draining && self.gate.is_drained() {
            self.quiesce = Quiesce::Flushing(self.epoch);
            self.sync_line.join(Waiter::Barrier(self.epoch));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(mode: CacheMode, durable_writes: bool) -> Engine {
        let mut engine = Engine::new(CachePolicy::from(mode), durable_writes);
        engine.set_driver_can_flush(true);
        engine
    }

    fn drain(engine: &mut Engine) -> Vec<Action> {
        std::iter::from_fn(|| engine.next_action()).collect()
    }

    fn data(id: RequestId, durable: bool) -> Action {
        Action::Submit { token: Token::Data(id), durable }
    }

    fn done(id: RequestId) -> Action {
        Action::Done { id, result: Ok(()) }
    }

    const SYNC: Action = Action::Submit { token: Token::Sync, durable: false };

    #[test]
    fn a_batch_of_write_through_writes_shares_one_sync() {
        let mut engine = engine(CacheMode::Writethrough, false);
        (0..64).for_each(|id| assert_eq!(engine.offer(id, Kind::Write), Admission::Admitted));
        assert_eq!(drain(&mut engine), (0..64).map(|id| data(id, false)).collect::<Vec<_>>());
        (0..64).for_each(|id| engine.complete(Token::Data(id), Ok(())));
        assert_eq!(drain(&mut engine), [SYNC]);
        assert_eq!(engine.writes_in_flight(), 64);
        engine.complete(Token::Sync, Ok(()));
        assert_eq!(drain(&mut engine), (0..64).map(done).collect::<Vec<_>>());
        assert!(engine.is_idle());
    }

    #[test]
    fn a_native_durable_write_needs_no_sync_but_a_discard_does() {
        let mut engine = engine(CacheMode::Directsync, true);
        engine.offer(0, Kind::Write);
        engine.offer(1, Kind::Discard);
        assert_eq!(drain(&mut engine), [data(0, true), data(1, false)]);
        engine.complete(Token::Data(0), Ok(()));
        engine.complete(Token::Data(1), Ok(()));
        assert_eq!(drain(&mut engine), [done(0), SYNC]);
    }

    #[test]
    fn unsafe_syncs_for_the_operator_and_never_for_the_guest() {
        let mut engine = engine(CacheMode::Unsafe, true);
        engine.set_driver_can_flush(false);
        engine.offer(0, Kind::Write);
        engine.offer(1, Kind::Flush);
        assert_eq!(drain(&mut engine), [data(0, false), done(1)]);
        engine.complete(Token::Data(0), Ok(()));
        assert_eq!(drain(&mut engine), [done(0)]);
        engine.block_writes();
        assert_eq!(drain(&mut engine), [SYNC]);
        engine.complete(Token::Sync, Ok(()));
        assert_eq!(drain(&mut engine), [Action::Quiesced(Ok(()))]);
    }

    #[test]
    fn is_syncing_from_the_first_waiter_to_the_end_of_the_sync() {
        let mut engine = engine(CacheMode::None, false);
        engine.offer(0, Kind::Write);
        assert!(!engine.is_syncing());
        engine.offer(1, Kind::Flush);
        assert!(engine.is_syncing(), "due");
        assert_eq!(drain(&mut engine), [data(0, false), SYNC]);
        assert!(engine.is_syncing(), "running");
        engine.complete(Token::Sync, Ok(()));
        assert!(!engine.is_syncing());
    }

    #[test]
    fn a_result_not_taken_before_the_resume_does_not_end_the_next_quiesce() {
        let mut engine = engine(CacheMode::None, false);
        engine.block_writes();
        assert_eq!(drain(&mut engine), [SYNC]);
        engine.complete(Token::Sync, Ok(()));
        engine.unblock_writes();
        assert_eq!(engine.offer(0, Kind::Write), Admission::Admitted);
        engine.block_writes();
        assert_eq!(drain(&mut engine), [data(0, false)], "neither Quiesced nor Resumed");
    }

    #[test]
    fn a_driver_with_unknown_features_is_served_write_through() {
        let mut engine = Engine::new(CachePolicy::from(CacheMode::None), true);
        engine.offer(0, Kind::Write);
        assert_eq!(drain(&mut engine), [data(0, true)]);
    }

    #[test]
    fn steady_state_allocates_nothing() {
        let mut engine = engine(CacheMode::Writethrough, false);
        let mut round = || {
            (0..32).for_each(|id| assert_eq!(engine.offer(id, Kind::Write), Admission::Admitted));
            while engine.next_action().is_some() {}
            (0..32).for_each(|id| engine.complete(Token::Data(id), Ok(())));
            while engine.next_action().is_some() {}
            engine.complete(Token::Sync, Ok(()));
            while engine.next_action().is_some() {}
            (engine.actions.capacity(), engine.stages.capacity())
        };
        let first = round();
        (0..10).for_each(|_| assert_eq!(round(), first));
    }

    #[test]
    fn the_highest_number_names_a_request() {
        let mut engine = engine(CacheMode::None, false);
        assert_eq!(engine.offer(RequestId::MAX, Kind::Read), Admission::Admitted);
        assert_eq!(drain(&mut engine), [data(RequestId::MAX, false)]);
        engine.complete(Token::Data(RequestId::MAX), Err(Errno(5)));
        assert_eq!(drain(&mut engine), [Action::Done { id: RequestId::MAX, result: Err(Errno(5)) }]);
    }

    /// Bugs of a caller; a hostile guest cannot cause one.
    const CALLERS_BUGS: [fn(&mut Engine); 5] = [
        |engine| assert_eq!(engine.offer(0, Kind::Flush), Admission::Blocked),
        |engine| engine.complete(Token::Data(1), Ok(())),
        |engine| engine.complete(Token::Data(RequestId::MAX), Err(Errno(5))),
        |engine| engine.complete(Token::Sync, Ok(())),
        |engine| engine.unblock_writes(),
    ];

    #[test]
    fn a_callers_bug_panics_in_debug_builds_and_changes_nothing_in_release_builds() {
        for (number, bug) in CALLERS_BUGS.into_iter().enumerate() {
            let mut engine = engine(CacheMode::None, false);
            engine.offer(0, Kind::Write);
            assert_eq!(drain(&mut engine), [data(0, false)]);
            let before = engine.clone();
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| bug(&mut engine)));
            assert_eq!(caught.is_err(), cfg!(debug_assertions), "bug {number}");
            assert_eq!(engine, before, "bug {number} changed the engine");
            engine.complete(Token::Data(0), Ok(()));
            assert_eq!(drain(&mut engine), [done(0)]);
            assert!(engine.is_idle());
        }
    }
}
