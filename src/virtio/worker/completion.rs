//! From the engine's decision back to the guest: status byte, used ring, counters, and at most one interrupt a turn.

use std::fmt::Display;

use vm_memory::GuestAddress;

use super::Worker;
use crate::disk::add;
use crate::disk::{Event, FailedRequest};
use crate::engine::{Errno, Kind};
use crate::virtio::blk::request;
use crate::virtio::blk::request::Status;
use crate::virtio::virtqueue::guest_memory::Segment;

impl Worker {
    /// Completes a request that the engine is done with.
    pub(super) fn finish(&mut self, head: u16, result: Result<(), Errno>) {
        let request = self.requests.get_mut(head);
        let (kind, offset, len) = (request.kind, request.offset, request.len);
        let (written, status_at) = (request.written, request.status_at);
        let (popped, backend_took) = (request.popped, request.backend_took);
        let writes = std::mem::take(&mut request.writes);
        self.requests.remove(head);
        self.count(kind, if result.is_ok() { len } else { 0 });
        let took = self.clock.now().saturating_sub(popped);
        self.counters.latency.record(kind, took, backend_took);
        self.log_writes(&writes);
        let status = match result {
            Ok(()) => request::OK,
            Err(errno) => {
                let failed = FailedRequest { kind, ring: self.setup.index, offset, len, errno };
                self.setup.rings.report(Event::IoError(failed));
                request::IOERR
            }
        };
        self.complete(head, status_at, status, written);
    }

    fn count(&mut self, kind: Kind, bytes: u64) {
        let counters = &self.counters;
        match kind {
            Kind::Read => {
                add(&counters.reads, 1);
                add(&counters.read_bytes, bytes);
            }
            Kind::Write => {
                add(&counters.writes, 1);
                add(&counters.written_bytes, bytes);
                self.unsynced.written(bytes);
                if !self.acknowledges_durable {
                    add(&counters.acknowledged, bytes);
                }
            }
            Kind::Flush => add(&counters.flushes, 1),
            Kind::Discard => add(&counters.discards, 1),
            Kind::WriteZeroes => add(&counters.write_zeroes, 1),
        }
    }

    /// Writes the status byte, then the used ring. From then on the request belongs to the guest again.
    pub(super) fn complete(&mut self, head: u16, status_at: GuestAddress, status: Status, written: u32) {
        match status {
            request::IOERR => add(&self.counters.errors, 1),
            request::UNSUPP => add(&self.counters.unsupported, 1),
            _ => {}
        }
        if self.setup.memory.store(status_at, status).is_err() {
            return self.publish(head, 0);
        }
        self.log_writes(&[(status_at, 1)]);
        self.publish(head, written);
    }

    /// Puts `head`, which was taken from this virtqueue, into the used ring.
    pub(super) fn publish(&mut self, head: u16, written: u32) {
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.completing(head);
        }
        self.ring.complete(head, written);
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.completed(head, self.ring.next_used());
        }
        self.turn.completed = true;
    }

    /// The guest memory that a request writes, which is logged when the request completes. Empty without a dirty log.
    pub(super) fn segments_to_log(&self, command: &request::BlkCommand) -> Vec<Segment> {
        match (&self.setup.log, command) {
            (Some(_), request::BlkCommand::Read { .. }) => self.parser.data(command).to_vec(),
            _ => Vec::new(),
        }
    }

    /// Marks guest memory that was written in the dirty log, if there is one.
    pub(super) fn log_writes(&self, segments: &[Segment]) {
        if let Some(log) = &self.setup.log {
            segments.iter().for_each(|&(at, len)| log.mark(at, len.into()));
        }
    }

    /// Marks the whole used ring in the dirty log, once a turn: its flags, its index and its event index were written, or
    /// may have been.
    pub(super) fn log_used_ring(&self) {
        if let Some(log) = &self.setup.log {
            let (at, len) = self.ring.used_part();
            log.mark(at, len);
        }
    }

    /// Whether to interrupt the guest for what this turn completed: once for all of it, if the driver wants to be
    /// interrupted (virtio 1.3, 2.7.10).
    pub(super) fn wants_interrupt(&mut self) -> bool {
        let wanted = std::mem::take(&mut self.turn.completed) && self.ring.wants_interrupt();
        if wanted {
            add(&self.counters.interrupts, 1);
        }
        wanted
    }

    /// Stops popping from a virtqueue that the guest broke. What is in flight still completes, and other virtqueues are still served.
    #[cold]
    pub(super) fn break_ring(&mut self, why: impl Display) {
        if !self.broken {
            self.broken = true;
            self.turn.signal_broken = true;
            self.setup.rings.report(Event::ProtocolError(format!("queue {} stopped: {why}", self.setup.index)));
        }
    }
}
