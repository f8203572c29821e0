//! The way back: from the engine's verdict to the guest. Status byte, used ring, counters, at most one interrupt a turn.

use vm_memory::GuestAddress;

use super::Worker;
use crate::disk::Event;
use crate::engine::{Errno, Kind};
use crate::virtio::blk::request;
use crate::virtio::blk::request::Status;
use crate::virtio::rings::counters::add;
use crate::virtio::virtqueue::guest_memory::Segment;

impl Worker {
    /// The engine is done with a request.
    pub(super) fn finish(&mut self, head: u16, result: Result<(), Errno>) {
        let place = &mut self.slots[usize::from(head)];
        let slot = place.as_mut().expect("done once, while in its slot");
        let (kind, offset, len, written, status_at) = (slot.kind, slot.offset, slot.len, slot.written, slot.status_at);
        let writes = std::mem::take(&mut slot.writes);
        *place = None;
        self.in_flight -= 1;
        self.count(kind, if result.is_ok() { len } else { 0 });
        self.log_writes(&writes);
        let status = match result {
            Ok(()) => request::OK,
            Err(errno) => {
                let (operation, ring) = (kind.name(), self.setup.index);
                self.setup.rings.report(Event::IoError { operation, ring, offset, len, errno });
                request::IOERR
            }
        };
        self.answer(head, status_at, status, written);
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
                self.dirty += bytes;
            }
            Kind::Flush => add(&counters.flushes, 1),
            Kind::Discard => add(&counters.discards, 1),
            Kind::WriteZeroes => add(&counters.write_zeroes, 1),
        }
    }

    /// Status byte, then used ring: from here on the request is the guest's again.
    pub(super) fn answer(&mut self, head: u16, status_at: GuestAddress, status: Status, written: u32) {
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

    /// Into the used ring. The head was taken from this ring, so it is one of its.
    pub(super) fn publish(&mut self, head: u16, written: u32) {
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.answering(head);
        }
        self.ring.answer(head, written);
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.answered(head, self.ring.next_used());
        }
        self.answered = true;
    }

    /// What a request writes, kept until it is done if there is a log.
    pub(super) fn to_be_logged(&self, command: &request::Command) -> Vec<Segment> {
        match (&self.setup.log, command) {
            (Some(_), request::Command::Read { .. }) => self.parser.data(command).to_vec(),
            _ => Vec::new(),
        }
    }

    /// Guest memory was written: to the log, if there is one.
    pub(super) fn log_writes(&self, segments: &[Segment]) {
        if let Some(log) = &self.setup.log {
            segments.iter().for_each(|&(at, len)| log.mark(at, len.into()));
        }
    }

    /// The used ring with its flags, index and event was written, or may have been: all of it to the log, once a turn.
    pub(super) fn log_ring(&self) {
        if let Some(log) = &self.setup.log {
            let (at, len) = self.ring.used_part();
            log.mark(at, len);
        }
    }

    /// One interrupt for all that was answered, if the driver wants one (virtio 1.3, 2.7.10).
    pub(super) fn wants_interrupt(&mut self) -> bool {
        let wanted = std::mem::take(&mut self.answered) && self.ring.wants_interrupt();
        if wanted {
            add(&self.counters.interrupts, 1);
        }
        wanted
    }

    /// The guest's ring makes no sense: serve it no more. What is in flight still finishes; other rings go on.
    pub(super) fn break_ring(&mut self, why: &str) {
        if !self.broken {
            self.broken = true;
            self.tell_broken = true;
            self.setup.rings.report(Event::ProtocolError(format!("ring {} stopped: {why}", self.setup.index)));
        }
    }
}
