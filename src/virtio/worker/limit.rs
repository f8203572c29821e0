//! One virtqueue's part in the disk's limits ([`Limiter`]).
//!
//! **A request that must wait is not popped.** It stays in the guest's ring, so it is not in flight, and nothing that waits
//! for what is in flight (a quiesce, a stop, an upgrade) waits for a limit. The worker sleeps until the request may go.
//!
//! Where reads and writes have limits of their own, a write that must wait would keep back the reads behind it. It is then
//! popped and *set aside*, and marked in the in-flight region. From then on only this worker can be relied on to complete
//! it: the position in the ring is past it, and another host does not get the region. So what was set aside goes at once,
//! beyond the limits but counted, before a hold closes the gate, and when the virtqueue pauses or stops or the limits are
//! lifted ([`Worker::admit_aside`]). Nothing is set aside while writes are blocked.
//!
//! Flushes are free. So are GET_ID, empty requests and refused ones, which do no I/O. A discard is one operation of no
//! bytes: it transfers none, and a large one would keep the guest waiting for minutes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::Worker;
use crate::disk::ticks;
use crate::engine::Admission;
use crate::engine::throttle::{Direction, Slot};
use crate::virtio::blk::request::{BlkCommand, Request};
use crate::virtio::rings::Limiter;

/// A virtqueue's view of the limits.
pub(super) struct RingLimit {
    limiter: Arc<Limiter>,
    /// The foremost request of each direction, from the time at which it was counted until it is admitted.
    slots: [Option<Slot>; 2],
    /// When each of `slots` was counted, on the limiter's clock.
    counted_at: [u64; 2],
    /// When the request at the head of the virtqueue may go, while it must wait.
    head_goes_at: Option<u64>,
    /// Heads that were popped and must wait, oldest first. All are of `aside_direction`.
    aside: VecDeque<u16>,
    aside_direction: Direction,
    /// When the first of them may go.
    aside_goes_at: Option<u64>,
}

/// What the limits say of a request.
enum Verdict {
    Goes,
    /// It must wait until then.
    Waits(u64),
}

impl RingLimit {
    pub(super) fn new(limiter: Arc<Limiter>) -> Self {
        RingLimit {
            limiter,
            slots: [None; 2],
            counted_at: [0; 2],
            head_goes_at: None,
            aside: VecDeque::new(),
            aside_direction: Direction::Write,
            aside_goes_at: None,
        }
    }

    /// Whether the foremost request of its direction may go.
    fn ask(&mut self, direction: Direction, bytes: u64) -> Verdict {
        let now = self.limiter.now();
        let place = &mut self.slots[direction as usize];
        // Only a driver that changes what it has made available has another request here than before.
        if let Some(other) = place.take_if(|slot| slot.bytes != bytes) {
            self.limiter.give_back(other, now);
        }
        let slot = *place.get_or_insert_with(|| {
            self.counted_at[direction as usize] = now;
            self.limiter.take(direction, bytes, now)
        });
        if slot.at <= now { Verdict::Goes } else { Verdict::Waits(slot.at) }
    }

    /// Whether the request at the head of the virtqueue must still wait.
    fn head_waits(&self) -> bool {
        self.head_goes_at.is_some_and(|at| at > self.limiter.now())
    }

    /// Whether anything waits.
    fn waits(&self) -> bool {
        self.head_goes_at.is_some() || !self.aside.is_empty()
    }

    /// How long it is until something that waits may go.
    fn time_left(&self) -> Option<Duration> {
        let at = self.head_goes_at.into_iter().chain(self.aside_goes_at).min()?;
        Some(self.limiter.time_until(at))
    }

    /// Counts a request that goes before its time. Returns when its time would have come.
    fn charge(&mut self, direction: Direction, bytes: u64) -> u64 {
        match self.ask(direction, bytes) {
            Verdict::Goes => 0,
            Verdict::Waits(at) => at,
        }
    }

    fn give_back(&mut self) {
        let now = self.limiter.now();
        for slot in self.slots.iter_mut().filter_map(Option::take) {
            self.limiter.give_back(slot, now);
        }
        (self.head_goes_at, self.aside_goes_at) = (None, None);
    }
}

/// What a request counts as. `None`: it is free.
fn counted(request: &Request) -> Option<(Direction, u64)> {
    match request.command.ok()? {
        BlkCommand::Flush | BlkCommand::GetId => None,
        BlkCommand::Read { len: 0, .. }
        | BlkCommand::Write { len: 0, .. }
        | BlkCommand::Discard { len: 0, .. }
        | BlkCommand::WriteZeroes { len: 0, .. } => None,
        BlkCommand::Read { len, .. } => Some((Direction::Read, len.into())),
        BlkCommand::Write { len, .. } => Some((Direction::Write, len.into())),
        BlkCommand::WriteZeroes { len, .. } => Some((Direction::Write, len)),
        BlkCommand::Discard { .. } => Some((Direction::Write, 0)),
    }
}

impl Worker {
    /// Pops new requests as far as the limits allow, those set aside first.
    pub(super) fn pop_within_limits(&mut self, walk_limit: u64) {
        self.pop_aside(walk_limit);
        let may_pop = !self.broken && !self.requests.blocked && !self.turn.poll_again;
        if may_pop && !self.limit.as_deref().is_some_and(RingLimit::head_waits) {
            if let Some(limit) = &mut self.limit {
                limit.head_goes_at = None;
            }
            self.pop_new::<true>(walk_limit);
        }
        let waits = self.limit.as_deref().is_some_and(RingLimit::waits);
        self.counters.limited.store(waits, Relaxed);
    }

    /// Takes the requests that were set aside and may go now. Pops nothing from the ring.
    fn pop_aside(&mut self, walk_limit: u64) {
        if let Some(limit) = &mut self.limit {
            limit.aside_goes_at = None;
        }
        while let Some(&head) = self.limit.as_deref().and_then(|limit| limit.aside.front())
            && !self.broken
            && !self.backend.has_backlog()
        {
            if self.parser.walked() > walk_limit {
                self.turn.poll_again = true;
                return;
            }
            let Some(request) = self.parse(head) else {
                self.forget_aside();
                continue;
            };
            if let Some(at) = self.asks_to_wait(&request) {
                if let Some(limit) = &mut self.limit {
                    limit.aside_goes_at = Some(at);
                }
                return;
            }
            if self.carry_out(&request) == Admission::Blocked {
                self.block();
                return;
            }
            self.forget_slot(&request);
            self.forget_aside();
        }
    }

    fn forget_aside(&mut self) {
        if let Some(limit) = &mut self.limit {
            limit.aside.pop_front();
            if limit.aside.is_empty() {
                self.look_at_head_again();
            }
        }
    }

    /// Whatever kept the request at the head of the virtqueue from being set aside is over: requests of the other direction
    /// that were, a closed gate, a retained request. Now it can be, so that what is behind it need not wait for its time.
    pub(super) fn look_at_head_again(&mut self) {
        if let Some(limit) = &mut self.limit {
            limit.head_goes_at = None;
        }
    }

    /// Takes the head at the front of the virtqueue, if the limits allow. `Blocked`: the caller must put the head back; the
    /// gate is closed, or the request must wait ([`Worker::is_limited`]).
    pub(super) fn take_within_limits(&mut self, head: u16) -> Admission {
        let Some(request) = self.parse(head) else { return Admission::Admitted };
        let behind = self.is_behind_aside(&request);
        match if behind { None } else { self.asks_to_wait(&request) } {
            None if !behind => {
                let admission = self.carry_out(&request);
                if admission == Admission::Admitted {
                    self.forget_slot(&request);
                }
                admission
            }
            at if behind || self.may_set_aside(&request) => {
                self.set_aside(head, &request, at);
                Admission::Admitted
            }
            at => {
                if let Some(limit) = &mut self.limit {
                    limit.head_goes_at = at;
                }
                Admission::Blocked
            }
        }
    }

    /// Whether the request at the head of the virtqueue waits for the limits, and not for the gate.
    pub(super) fn is_limited(&self) -> bool {
        self.limit.as_deref().is_some_and(|limit| limit.head_goes_at.is_some())
    }

    /// When the request may go, if not now.
    fn asks_to_wait(&mut self, request: &Request) -> Option<u64> {
        let (limit, (direction, bytes)) = (self.limit.as_mut()?, counted(request)?);
        match limit.ask(direction, bytes) {
            Verdict::Goes => None,
            Verdict::Waits(at) => Some(at),
        }
    }

    /// Whether the request must wait because another one of its direction was set aside.
    fn is_behind_aside(&self, request: &Request) -> bool {
        let (Some(limit), Some((direction, _))) = (&self.limit, counted(request)) else { return false };
        !limit.aside.is_empty() && limit.aside_direction == direction
    }

    /// Whether requests behind this one may be popped though this one must wait: the other direction has limits of its own.
    /// Only one direction is set aside at a time. Nothing is while writes are blocked: a hold would keep it from completing.
    fn may_set_aside(&self, request: &Request) -> bool {
        let (Some(limit), Some((direction, _))) = (&self.limit, counted(request)) else { return false };
        !self.engine.blocks_writes()
            && (limit.aside.is_empty() || limit.aside_direction == direction)
            && limit.limiter.may_set_aside()
    }

    fn set_aside(&mut self, head: u16, request: &Request, at: Option<u64>) {
        let (Some(limit), Some((direction, _))) = (&mut self.limit, counted(request)) else { return };
        if limit.aside.len() >= self.requests.pending.len() {
            return self.break_ring("more heads were made available than the queue has descriptors");
        }
        limit.aside.push_back(head);
        limit.aside_direction = direction;
        limit.aside_goes_at = limit.aside_goes_at.or(at);
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.taken(head);
        }
    }

    /// Forgets when the request was to go, because it has been admitted or completed. Records how long it waited.
    fn forget_slot(&mut self, request: &Request) {
        if let (Some(limit), Some((direction, _))) = (&mut self.limit, counted(request))
            && let Some(slot) = limit.slots[direction as usize].take()
            && slot.at > limit.counted_at[direction as usize]
        {
            // What it waited after its time, it waited at the gate.
            let waited_until = slot.at.min(limit.limiter.now());
            let waited = waited_until.saturating_sub(limit.counted_at[direction as usize]);
            self.counters.latency.limited.record(ticks(Duration::from_nanos(waited)));
        }
    }

    /// How long the worker may sleep before something that waits for the limits may go. `None`: nothing does, or something
    /// else keeps it from being popped.
    #[inline]
    pub(super) fn time_until_limit_allows(&self) -> Option<Duration> {
        let limit = self.limit.as_ref()?;
        if self.takes_requests() { limit.time_left() } else { None }
    }

    /// Carries out [`super::WorkerCommand::Limit`].
    pub(super) fn set_limit(&mut self, limiter: Option<Arc<Limiter>>) {
        if limiter.is_none() {
            self.admit_aside();
        }
        let old = self.limit.take();
        self.limit = limiter.map(|limiter| Box::new(RingLimit::new(limiter)));
        if let (Some(new), Some(old)) = (&mut self.limit, old) {
            (new.aside, new.aside_direction) = (old.aside, old.aside_direction);
        }
        self.counters.limited.store(false, Relaxed);
    }

    /// Has everything that was set aside go at once, because the virtqueue stops: the next server may not know the marks in
    /// the in-flight region. The guest can cause this (a reset of the device), so until that has leaked nothing is set aside.
    pub(super) fn stop_limiting(&mut self) {
        let in_debt_until = self.admit_aside();
        if let Some(limit) = &self.limit {
            limit.limiter.owe_until(in_debt_until);
        }
    }

    /// Admits everything that was set aside, and counts it. Returns when the last of it might have gone. The caller has not
    /// closed the gate.
    pub(super) fn admit_aside(&mut self) -> u64 {
        self.clock.forget();
        let mut last_goes_at = 0;
        while !self.broken
            && let Some(limit) = &mut self.limit
            && let Some(head) = limit.aside.pop_front()
        {
            limit.aside_goes_at = None;
            let Some(request) = self.parse(head) else { continue };
            let admission = self.carry_out_taken(&request);
            debug_assert_eq!(admission, Admission::Admitted, "nothing is set aside while the gate is closed");
            if let (Some(limit), Some((direction, bytes))) = (&mut self.limit, counted(&request)) {
                let was_foremost = limit.slots[direction as usize].is_some();
                last_goes_at = last_goes_at.max(limit.charge(direction, bytes));
                if was_foremost {
                    self.forget_slot(&request);
                } else {
                    limit.slots[direction as usize] = None;
                }
            }
        }
        self.look_at_head_again();
        last_goes_at
    }

    /// Leaves the limits to the other virtqueues, when this one has stopped.
    pub(super) fn leave_limit(&mut self) {
        if let Some(mut limit) = self.limit.take() {
            limit.give_back();
        }
    }
}
