//! One running ring: descriptors in, answers out. Owns the ring, the engine and the back-end queue; nothing else
//! touches them, so the request path takes no contended lock.
//!
//! A turn: reap completions, let the engine say what follows, answer, pop new requests, make the calls that may block
//! ([`relay`]), interrupt at most once; then one `wait`, which submits the whole batch and sleeps.

mod busy_poll;
mod completion;
mod relay;
mod resubmit;
mod stall;
mod stop;
pub(super) mod stopped_ring;

use crate::virtio::rings::StopMode;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;

use super::blk::features;
use super::blk::request;
use super::blk::request::{Command as Ask, ID_BYTES, Parser, Request, Status};
use super::rings::counters::{Counters, add};
use super::rings::{Command, RingHoldStats, Rings, errno_of};
use super::shared_memory::dirty_log::DirtyLog;
use super::shared_memory::inflight::Tracker;
use super::virtqueue::guest_memory::GuestMemory;
use super::virtqueue::guest_memory::Segment;
use super::virtqueue::split_ring::SplitRing;
use crate::backend::null;
use crate::backend::{Completion, DurableWrite, Errno, Geometry, IoBuf, IoQueue, Op, OpId, Source};
use crate::base::sync::Bell;
use crate::base::sync::mpsc::Receiver;
use crate::disk::{Event, FailedRequest};
use crate::engine::{Action, Admission, Engine, Kind, Token};
use busy_poll::Polling;
pub(super) use relay::Relay;
use stop::Rest;
use stopped_ring::StoppedRing;

/// What a worker starts with, besides the ring.
pub(super) struct Setup {
    pub index: u32,
    pub rings: Arc<Rings>,
    /// Held while the ring runs: no request outlives its memory.
    pub memory: GuestMemory,
    /// Where heads in flight are marked for the next server.
    pub inflight: Option<Tracker>,
    /// Where written pages are logged.
    pub log: Option<Arc<DirtyLog>>,
    pub acked_features: u64,
    pub serial: Arc<[u8; ID_BYTES]>,
    pub commands: Receiver<Command>,
    pub wake: Arc<Bell>,
}

/// A request from pop to answer.
struct PendingRequest {
    kind: Kind,
    /// Until the engine says `Submit`, and again while it is kept.
    op: Option<Op>,
    /// Its transfer failed and is to be tried again.
    kept: bool,
    /// Of a write-zeroes.
    unmap: bool,
    status_at: GuestAddress,
    /// What the used ring says the device wrote: data (for a read) and the status byte.
    written: u32,
    offset: u64,
    len: u64,
    /// When its batch was popped.
    since: Instant,
    /// Guest memory that it writes: to be logged. Empty without a log.
    writes: Vec<Segment>,
}

/// An operator's hold, timed for its figures.
struct HoldTimer {
    epoch: u64,
    closed: Instant,
    drained: u64,
    drained_at: Option<Instant>,
}

struct Worker {
    setup: Setup,
    ring: SplitRing,
    counters: Arc<Counters>,
    geometry: Geometry,
    io: Box<dyn IoQueue>,
    engine: Engine,
    parser: Parser,
    /// By head: a head is a request's name until it is answered.
    slots: Vec<Option<PendingRequest>>,
    /// Heads that an earlier server took and did not answer, to be done before anything new; oldest first.
    replay: VecDeque<u16>,
    in_flight: u64,
    /// Ops that the back-end has taken and not handed back.
    under_way: usize,
    /// The time of this turn's pop: one look at the clock a batch.
    now: Instant,
    /// `Event::IoStalled` was told.
    stalled: bool,
    /// Ops that the queue handed back as full, oldest first.
    backlog: VecDeque<(Op, OpId)>,
    completions: Vec<Completion>,
    /// Buffers for reuse.
    spares: Vec<IoBuf>,
    /// A write waits at the head of the ring.
    held: bool,
    hold: Option<HoldTimer>,
    /// The guest broke the ring: nothing is popped until it is set up anew.
    broken: bool,
    /// And the front-end is to be told so.
    tell_broken: bool,
    /// The ring is to stop.
    stopping: Option<StopMode>,
    /// It is only to rest, and whoever waits for that is to be told.
    resting: Option<Rest>,
    /// The first of the failed requests that are kept, the first change if there is one.
    stopped_by: Option<FailedRequest>,
    answered: bool,
    /// The ring may hold more than this turn took.
    more: bool,
    /// Looking for work before a sleep; and the guest was left without a wish for kicks because of it.
    polling: Polling,
    unarmed: bool,
    /// Bytes acknowledged and not known to be durable; and how many of them the running sync covers.
    dirty: u64,
    syncing: u64,
}

/// Ops handed to the back-end at once at most, whatever the ring's size; more wait for their turn. An io_uring holds
/// 32768.
const MAX_OPS: usize = 4096;

/// Descriptors looked at in one turn, the last chain apart: a ring full of the longest chains takes seconds, in which
/// its worker would hear no command.
const MAX_WALKED: u64 = 1 << 16;

/// No head: these have sixteen bits.
const SYNC: OpId = OpId(1 << 16);

fn op_id(token: Token) -> OpId {
    match token {
        Token::Data(slot) => OpId(u64::from(slot)),
        Token::Sync => SYNC,
    }
}

fn token(id: OpId) -> Token {
    if id == SYNC { Token::Sync } else { Token::Data(id.0 as u16) }
}

impl Worker {
    fn new(setup: Setup, ring: SplitRing, stopped: &StoppedRing, counters: Arc<Counters>) -> Self {
        let size = ring.size();
        counters.size.store(u64::from(size), Relaxed);
        counters.untracked.store(setup.inflight.is_none(), Relaxed);
        let backend = setup.rings.backend().clone();
        let geometry = Geometry { size: setup.rings.capacity().get(), ..backend.geometry() };
        // One more than the ring holds: the engine's sync.
        let depth = usize::from(size).min(MAX_OPS) + 1;
        let mut io = backend.open_queue(depth).unwrap_or_else(|error| {
            let what = format!("ring {}: the image's queue cannot be opened: {error}; all I/O fails", setup.index);
            setup.rings.report(Event::ProtocolError(what));
            // No descriptor left even for that: the process ends, which a front-end sees.
            null::failing_queue(depth, errno_of(&error)).unwrap_or_else(|error| give_up(setup.index, &error))
        });
        watch(&mut *io, setup.index, Source::Wake, setup.wake.as_fd());
        if let Some(kick) = &stopped.kick {
            watch(&mut *io, setup.index, Source::Kick, kick.as_fd());
        }
        let mut engine = Engine::new(setup.rings.policy(), geometry.durable_write == DurableWrite::Native);
        engine.set_driver_can_flush(features::driver_can_flush(setup.acked_features));
        engine.set_on_error(setup.rings.tuning().on_error);
        let polling = Polling::new(setup.rings.tuning().poll_max);
        Worker {
            setup,
            ring,
            counters,
            geometry,
            io,
            engine,
            parser: Parser::default(),
            slots: (0..size).map(|_| None).collect(),
            replay: VecDeque::new(),
            in_flight: 0,
            under_way: 0,
            now: Instant::now(),
            stalled: false,
            backlog: VecDeque::new(),
            completions: Vec::new(),
            spares: Vec::new(),
            held: false,
            hold: None,
            broken: false,
            tell_broken: false,
            stopping: None,
            resting: None,
            stopped_by: None,
            answered: false,
            more: false,
            polling,
            unarmed: false,
            dirty: 0,
            syncing: 0,
        }
    }

    /// Takes what has finished and what is new to the back-end. The status shows it before any call is made that may
    /// block.
    fn begin_turn(&mut self) {
        self.reap();
        self.act();
        self.retry_backlog();
        self.pop();
        self.act();
        self.show();
    }

    fn end_turn(&mut self) {
        self.log_ring();
        self.show();
    }

    fn show(&self) {
        self.counters.in_flight.store(self.in_flight, Relaxed);
        self.counters.held.store(self.held, Relaxed);
    }

    /// Wakes whoever has to be, and says whether the ring has stopped.
    fn is_over(&mut self, stopped: &StoppedRing) -> bool {
        if self.wants_interrupt() {
            stopped.interrupt(self.setup.index);
        }
        if std::mem::take(&mut self.tell_broken) {
            stopped.signal_error(self.setup.index);
        }
        self.may_stop() && !self.only_rests()
    }

    /// Sleeps until there is something to do, and obeys the commands that came.
    fn sleep(&mut self, stopped: &mut StoppedRing) {
        if self.finds_work() {
            return;
        }
        let timeout = self.more.then_some(Duration::ZERO);
        // Only a broken process gets here: the back-end retries what can be retried.
        let woken = self.io.wait(timeout).unwrap_or_else(|error| panic!("cannot wait for I/O: {error}"));
        if woken.wake {
            while let Ok(command) = self.setup.commands.try_recv() {
                self.obey(command, stopped);
                #[cfg(all(test, feature = "model"))]
                if crate::base::sync::interleavings::planted(crate::base::sync::interleavings::Mutant::OneCommandAWake)
                {
                    break;
                }
            }
        }
    }

    /// The ring has stopped: what the next one needs of it.
    fn leave(mut self, mut stopped: StoppedRing) -> StoppedRing {
        stopped.next_available = self.ring.next_available();
        stopped.kept = self.leave_kept();
        self.look();
        self.counters.in_flight.store(0, Relaxed);
        stopped
    }

    /// What the back-end did on the spot is answered in the turn that popped it: the next one may sleep at once.
    fn finish_the_finished(&mut self) {
        let (was_held, was_full) = (self.held, !self.backlog.is_empty());
        while self.reap() {
            self.act();
            self.retry_backlog();
        }
        // What kept the ring from being emptied is gone, and no kick will tell of the rest.
        self.more |= (was_held && !self.held) || (was_full && self.backlog.is_empty());
    }

    fn obey(&mut self, command: Command, stopped: &mut StoppedRing) {
        match command {
            Command::CloseGate(epoch) => self.close_gate(epoch),
            Command::OpenGate => {
                self.engine.unblock_writes();
                self.hold = None;
            }
            Command::Resize(bytes) => self.geometry.size = bytes,
            Command::Look => self.look(),
            Command::Retry => self.retry(),
            Command::SetCall(call, done) => {
                stopped.set_call(self.setup.index, call);
                // Nobody waits any more: the handler ended with its connection.
                let _ = done.send(());
            }
            Command::Rest(told) => self.rest(told),
            Command::GoOn(told) => self.go_on(&told),
            Command::StopMode(how) => self.stop(how),
        }
    }

    fn close_gate(&mut self, epoch: u64) {
        let drained = u64::from(self.engine.writes_in_flight());
        self.hold = Some(HoldTimer { epoch, closed: Instant::now(), drained, drained_at: None });
        #[cfg(all(test, feature = "model"))]
        if crate::base::sync::interleavings::planted(crate::base::sync::interleavings::Mutant::GateStaysOpen) {
            return self.settled(Ok(()));
        }
        self.engine.block_writes();
    }

    /// Takes what has finished to the engine: all of it before any action, so that one sync covers many. Whether there
    /// was anything.
    fn reap(&mut self) -> bool {
        if self.under_way == 0 {
            return false;
        }
        let mut completions = std::mem::take(&mut self.completions);
        self.io.reap(&mut completions);
        let any = !completions.is_empty();
        self.under_way -= completions.len();
        for Completion { id, result, buf } in completions.drain(..) {
            let token = token(id);
            match (token, result) {
                (Token::Sync, Ok(())) => self.dirty -= self.syncing,
                (Token::Sync, Err(errno)) => {
                    self.setup.rings.report(Event::SyncError(errno));
                    if self.setup.rings.backend().sync_failed().is_some() {
                        self.stop_keeping();
                    }
                }
                (Token::Data(head), Err(errno)) if self.may_keep(errno) => {
                    self.take_back(head, buf);
                    self.engine.complete(token, result);
                    continue;
                }
                _ => {}
            }
            self.spares.extend(buf);
            self.engine.complete(token, result);
        }
        self.completions = completions;
        any
    }

    /// Does what the engine says, until it has nothing more to say.
    fn act(&mut self) {
        while let Some(action) = self.engine.next_action() {
            match action {
                Action::Submit { token: Token::Sync, .. } => {
                    add(&self.counters.syncs, 1);
                    self.syncing = self.dirty;
                    self.note_drained();
                    self.push(Op::Sync, SYNC);
                }
                Action::Submit { token: token @ Token::Data(head), durable } => {
                    let slot = self.slots[usize::from(head)].as_mut();
                    let op = slot.and_then(|slot| {
                        slot.kept = false;
                        slot.op.take()
                    });
                    match op.expect("submitted once, while in its slot") {
                        Op::Write { offset, buf, .. } => self.push(Op::Write { offset, buf, durable }, op_id(token)),
                        op => self.push(op, op_id(token)),
                    }
                }
                Action::Done { slot, result } => self.finish(slot, result),
                Action::Keep { slot, errno } => self.keep(slot, errno),
                Action::Quiesced(result) => self.settled(result),
                #[cfg(all(test, feature = "model"))]
                Action::Resumed
                    if crate::base::sync::interleavings::planted(
                        crate::base::sync::interleavings::Mutant::ResumeMissed,
                    ) => {}
                Action::Resumed => self.held = false,
            }
        }
    }

    fn push(&mut self, op: Op, id: OpId) {
        if !self.backlog.is_empty() {
            return self.backlog.push_back((op, id));
        }
        match self.io.push(op, id) {
            Ok(()) => self.under_way += 1,
            Err(op) => self.backlog.push_back((op, id)),
        }
    }

    fn retry_backlog(&mut self) {
        while let Some((op, id)) = self.backlog.pop_front() {
            if let Err(op) = self.io.push(op, id) {
                return self.backlog.push_front((op, id));
            }
            self.under_way += 1;
        }
    }

    /// Takes requests from the ring until it is empty, a write is held, the back-end is full or the ring is broken.
    fn pop(&mut self) {
        self.more = false;
        if self.broken || self.held || (self.stopping.is_some() && self.replay.is_empty()) {
            return;
        }
        self.now = Instant::now();
        let until = self.parser.walked() + MAX_WALKED;
        self.take_replay(until);
        if self.broken || self.held || self.stopping.is_some() || self.more {
            return;
        }
        self.pop_new(until);
    }

    /// `until`: descriptors that the parser may have walked when the next chain is taken.
    fn pop_new(&mut self, until: u64) {
        let mut budget = self.slots.len();
        loop {
            self.ring.disable_kicks();
            while self.backlog.is_empty() && !self.broken {
                if budget == 0 || self.parser.walked() > until {
                    self.more = true;
                    return;
                }
                budget -= 1;
                let head = match self.ring.take() {
                    Ok(Some(head)) => head,
                    Ok(None) => break,
                    Err(why) => return self.break_ring(why),
                };
                if self.take(head) == Admission::Held {
                    self.ring.put_back();
                    self.held = true;
                    break;
                }
            }
            self.unarmed = self.leaves_kicks_off();
            let more = if self.unarmed { self.ring.has_more() } else { self.ring.enable_kicks() };
            if !more || self.held || self.broken || !self.backlog.is_empty() {
                return;
            }
        }
    }

    /// One chain: parse, offer to the engine, keep its slot. `Held`: put it back.
    fn take(&mut self, head: u16) -> Admission {
        if self.slots.get(usize::from(head)).is_none_or(Option::is_some) {
            self.break_ring("a descriptor head was made available twice or lies outside the ring");
            return Admission::Taken;
        }
        let chain = self.ring.chain(&self.setup.memory, head);
        let request = match self.parser.parse(&self.setup.memory, head, chain, &self.geometry) {
            Ok(request) => request,
            Err(malformed) => {
                let what = format!("ring {}: request {head}: {}", self.setup.index, malformed.why);
                self.setup.rings.report(Event::ProtocolError(what));
                self.publish(head, 0);
                return Admission::Taken;
            }
        };
        match self.prepare(&request) {
            Ok(slot) => {
                let offer = self.engine.offer(head, slot.kind);
                if offer == Admission::Taken {
                    self.slots[usize::from(head)] = Some(slot);
                    if let Some(inflight) = &mut self.setup.inflight {
                        inflight.taken(head);
                    }
                    self.in_flight += 1;
                } else if let Some(Op::Write { buf, .. }) = slot.op {
                    self.spares.push(buf);
                }
                offer
            }
            Err(status) => {
                self.answer(head, request.status_at, status, request.writable.saturating_add(1));
                Admission::Taken
            }
        }
    }

    /// The slot of a request that goes to the engine; `Err`: the status of one that is answered at once.
    fn prepare(&mut self, request: &Request) -> Result<PendingRequest, Status> {
        let command = request.command?;
        let (kind, offset, len, op) = match command {
            Ask::GetId => return Err(self.write_serial()),
            Ask::Read { len: 0, .. }
            | Ask::Write { len: 0, .. }
            | Ask::Discard { len: 0, .. }
            | Ask::WriteZeroes { len: 0, .. } => return Err(request::OK),
            Ask::Flush => (Kind::Flush, 0, 0, None),
            Ask::Read { offset, len } => {
                let buf = self.buffer(&command)?;
                (Kind::Read, offset, u64::from(len), Some(Op::Read { offset, buf }))
            }
            Ask::Write { offset, len } => {
                let buf = self.buffer(&command)?;
                (Kind::Write, offset, u64::from(len), Some(Op::Write { offset, buf, durable: false }))
            }
            Ask::Discard { offset, len } => (Kind::Discard, offset, len, Some(Op::Discard { offset, len })),
            Ask::WriteZeroes { offset, len, unmap } => {
                (Kind::WriteZeroes, offset, len, Some(Op::WriteZeroes { offset, len, unmap }))
            }
        };
        let data_in = if kind == Kind::Read { len as u32 } else { 0 };
        Ok(PendingRequest {
            kind,
            op,
            kept: false,
            unmap: matches!(command, Ask::WriteZeroes { unmap: true, .. }),
            status_at: request.status_at,
            written: data_in.saturating_add(1),
            offset,
            len,
            since: self.now,
            writes: self.to_be_logged(&command),
        })
    }

    fn buffer(&mut self, command: &Ask) -> Result<IoBuf, Status> {
        let spare = self.spares.pop();
        self.setup.memory.buffer(self.parser.data(command), spare).map_err(|_| request::IOERR)
    }

    /// GET_ID: twenty bytes, zero-padded (virtio 1.3, 5.2.6). A shorter buffer gets as many of them as it holds, as from
    /// QEMU (virtio_blk_handle_request).
    fn write_serial(&self) -> Status {
        match self.setup.memory.buffer(self.parser.data(&Ask::GetId), None) {
            Ok(buf) => {
                buf.copy_from(0, &self.setup.serial[..ID_BYTES.min(buf.len())]);
                self.log_writes(self.parser.data(&Ask::GetId));
                request::OK
            }
            Err(_) => request::IOERR,
        }
    }

    fn note_drained(&mut self) {
        if let Some(hold) = &mut self.hold
            && hold.drained_at.is_none()
            && self.engine.writes_in_flight() == 0
        {
            hold.drained_at = Some(Instant::now());
        }
    }

    /// The engine is quiet (or its last sync failed): tell the hold.
    fn settled(&mut self, result: Result<(), Errno>) {
        self.note_drained();
        let Some(hold) = &self.hold else { return };
        let drained_at = hold.drained_at.unwrap_or(hold.closed);
        let figures = RingHoldStats {
            drained: hold.drained,
            drain: drained_at - hold.closed,
            sync: drained_at.elapsed(),
            bytes: self.syncing,
            result,
        };
        self.setup.rings.ring_settled(self.setup.index, hold.epoch, figures);
    }
}

fn watch(io: &mut dyn IoQueue, ring: u32, source: Source, fd: BorrowedFd<'_>) {
    io.watch(source, fd).unwrap_or_else(|error| give_up(ring, &error));
}

/// Ends the process: without its wake-ups the ring would hang silently, while a front-end sees that its server is gone.
/// Not a bug but a limit, so no panic.
fn give_up(ring: u32, error: &std::io::Error) -> ! {
    log::error!(
        "ring {ring} cannot be watched: {error}; raise the limit of open files (RLIMIT_NOFILE; ulimit -n, or LimitNOFILE= \
         in the systemd unit: ten for each ring), or allow fewer queues (--num-queues). Ended at once so that no guest \
         hangs silently"
    );
    log::logger().flush();
    std::process::abort()
}
