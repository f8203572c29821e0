//! From the guest's available ring to the engine: pop a head, parse its chain, offer the request.

use super::Worker;
use super::requests::PendingRequest;
use crate::backend::{IoBuf, Op};
use crate::disk::Event;
use crate::engine::{Admission, Engine, Kind};
use crate::virtio::blk::request::{self, BlkCommand, ID_BYTES, Request, Status};

/// How many descriptors the worker reads in one turn, the last chain apart. A ring full of the longest chains takes
/// seconds, in which its worker would obey no command.
const MAX_WALKED: u64 = 1 << 16;

/// A request that the engine may admit.
struct Prepared {
    command: BlkCommand,
    kind: Kind,
    offset: u64,
    len: u64,
    op: Option<Op>,
}

impl Worker {
    /// Pops requests until the virtqueue is empty or broken, a write is blocked, the back-end is full, or the turn has
    /// read enough descriptors.
    pub(super) fn pop(&mut self) {
        self.turn.poll_again = false;
        if self.broken || self.requests.blocked || (!self.is_serving() && self.requests.resubmit.is_empty()) {
            return;
        }
        let walk_limit = self.parser.walked() + MAX_WALKED;
        self.resubmit(walk_limit);
        if self.broken || self.requests.blocked || !self.is_serving() || self.turn.poll_again {
            return;
        }
        if self.limit.is_some() {
            return self.pop_within_limits(walk_limit);
        }
        self.pop_new::<false>(walk_limit);
    }

    /// Pops requests that no server has seen. `walk_limit`: no further chain is taken once the parser has walked more
    /// descriptors than this. `LIMITED`: the disk has limits, which may make the request at the head wait.
    pub(super) fn pop_new<const LIMITED: bool>(&mut self, walk_limit: u64) {
        let mut budget = self.requests.pending.len();
        loop {
            self.ring.disable_kicks();
            while !self.backend.has_backlog() && !self.broken {
                if budget == 0 || self.parser.walked() > walk_limit {
                    self.turn.poll_again = true;
                    return;
                }
                budget -= 1;
                let head = match self.ring.take() {
                    Ok(Some(head)) => head,
                    Ok(None) => break,
                    Err(why) => return self.break_ring(why),
                };
                let admission = if LIMITED { self.take_within_limits(head) } else { self.take(head) };
                if admission == Admission::Blocked {
                    self.ring.put_back();
                    if !LIMITED || !self.is_limited() {
                        self.block();
                    }
                    break;
                }
            }
            self.turn.notifications_disabled = self.will_poll();
            let more = if self.turn.notifications_disabled { self.ring.has_more() } else { self.ring.enable_kicks() };
            let waits = self.requests.blocked || LIMITED && self.is_limited();
            if !more || waits || self.broken || self.backend.has_backlog() {
                return;
            }
        }
    }

    /// Parses the chain at `head` and offers its request to the engine, or completes it at once. `Blocked`: the caller must
    /// put the head back.
    #[inline]
    pub(super) fn take(&mut self, head: u16) -> Admission {
        match self.parse(head) {
            Some(request) => self.carry_out(&request),
            None => Admission::Admitted,
        }
    }

    /// Parses the chain at `head`. `None`: it is malformed and was completed, or the queue broke.
    #[inline(always)]
    pub(super) fn parse(&mut self, head: u16) -> Option<Request> {
        if !self.requests.is_free(head) {
            self.break_ring("a descriptor head was made available twice or lies outside the queue");
            return None;
        }
        let chain = self.ring.chain(&self.setup.memory, head);
        match self.parser.parse(&self.setup.memory, head, chain, &self.geometry) {
            Ok(request) => Some(request),
            Err(malformed) => {
                let what = format!("queue {}: request {head}: {}", self.setup.index, malformed.fault);
                self.setup.rings.report(Event::ProtocolError(what));
                self.publish(head, 0);
                None
            }
        }
    }

    /// Offers the request that was parsed last to the engine, or completes it at once. `Blocked`: the caller must put its
    /// head back.
    #[inline(always)]
    pub(super) fn carry_out(&mut self, request: &Request) -> Admission {
        self.carry_out_by(request, Engine::offer)
    }

    /// Does the same for a request that was popped before, and that must not wait for a retained one.
    pub(super) fn carry_out_taken(&mut self, request: &Request) -> Admission {
        self.carry_out_by(request, Engine::offer_taken)
    }

    #[inline(always)]
    fn carry_out_by(
        &mut self,
        request: &Request,
        offer: impl FnOnce(&mut Engine, u16, Kind) -> Admission,
    ) -> Admission {
        match self.prepare(request) {
            Ok(prepared) => self.offer(request, prepared, offer),
            Err(status) => {
                self.complete(request.head, request.status_at, status, request.writable.saturating_add(1));
                Admission::Admitted
            }
        }
    }

    /// Offers a request to the engine, and keeps it if it is admitted. It is built where it stays: it is large, and a copy
    /// costs as much as the rest of this.
    #[inline]
    fn offer(
        &mut self,
        request: &Request,
        Prepared { command, kind, offset, len, op }: Prepared,
        offer: impl FnOnce(&mut Engine, u16, Kind) -> Admission,
    ) -> Admission {
        let admission = offer(&mut self.engine, request.head, kind);
        if admission == Admission::Blocked {
            if let Some(Op::Write { buf, .. }) = op {
                self.backend.spare_buffers.push(buf);
            }
            return admission;
        }
        let data_in = if kind == Kind::Read { len as u32 } else { 0 };
        let now = self.clock.now();
        let pending = PendingRequest {
            kind,
            op,
            retained: false,
            unmap: matches!(command, BlkCommand::WriteZeroes { unmap: true, .. }),
            status_at: request.status_at,
            written: data_in.saturating_add(1),
            offset,
            len,
            popped: now,
            since: now,
            backend_took: None,
            writes: self.segments_to_log(&command),
        };
        self.requests.insert(request.head, pending);
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.taken(request.head);
        }
        admission
    }

    /// What the engine gets. `Err`: the status of a request that is completed at once.
    #[inline]
    fn prepare(&mut self, request: &Request) -> Result<Prepared, Status> {
        let command = request.command?;
        let (kind, offset, len, op) = match command {
            BlkCommand::GetId => return Err(self.write_serial()),
            BlkCommand::Read { len: 0, .. }
            | BlkCommand::Write { len: 0, .. }
            | BlkCommand::Discard { len: 0, .. }
            | BlkCommand::WriteZeroes { len: 0, .. } => return Err(request::OK),
            BlkCommand::Flush => (Kind::Flush, 0, 0, None),
            BlkCommand::Read { offset, len } => {
                let buf = self.buffer(&command)?;
                (Kind::Read, offset, u64::from(len), Some(Op::Read { offset, buf }))
            }
            BlkCommand::Write { offset, len } => {
                let buf = self.buffer(&command)?;
                (Kind::Write, offset, u64::from(len), Some(Op::Write { offset, buf, durable: false }))
            }
            BlkCommand::Discard { offset, len } => (Kind::Discard, offset, len, Some(Op::Discard { offset, len })),
            BlkCommand::WriteZeroes { offset, len, unmap } => {
                (Kind::WriteZeroes, offset, len, Some(Op::WriteZeroes { offset, len, unmap }))
            }
        };
        Ok(Prepared { command, kind, offset, len, op })
    }

    fn buffer(&mut self, command: &BlkCommand) -> Result<IoBuf, Status> {
        let spare = self.backend.spare_buffers.pop();
        self.setup.memory.buffer(self.parser.data(command), spare).map_err(|_| request::IOERR)
    }

    /// Carries out GET_ID: writes twenty bytes, padded with zeroes (virtio 1.3, 5.2.6). A shorter buffer gets as many as
    /// it holds, as from QEMU (virtio_blk_handle_request).
    fn write_serial(&self) -> Status {
        match self.setup.memory.buffer(self.parser.data(&BlkCommand::GetId), None) {
            Ok(buf) => {
                buf.copy_from(0, &self.setup.serial[..ID_BYTES.min(buf.len())]);
                self.log_writes(self.parser.data(&BlkCommand::GetId));
                request::OK
            }
            Err(_) => request::IOERR,
        }
    }
}
