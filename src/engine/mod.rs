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
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod setup;
mod sync_line;
#[cfg(test)]
mod tests;
pub mod throttle;
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
        if kind != Kind::Read && !self.retained.is_empty() {
            return Admission::Blocked;
        }
        self.offer_taken(id, kind)
    }

    /// Does the same for a request that the caller cannot leave in the virtqueue: it does not wait for those retained. While
    /// the gate is closed, it is blocked like any other.
    #[inline]
    pub fn offer_taken(&mut self, id: RequestId, kind: Kind) -> Admission {
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
        if !self.gate.enter() {
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

    /// Whether a holder keeps the gate closed.
    pub fn is_gate_closed(&self) -> bool {
        self.gate.is_closed()
    }

    /// Whether [`Engine::offer`] blocks writes: the gate is closed, or a failed request is retained.
    pub fn blocks_writes(&self) -> bool {
        self.gate.is_closed() || !self.retained.is_empty()
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
