//! The way back: from the engine's verdict to the guest. Status byte, used ring, counters, at most one interrupt a turn.

use std::sync::atomic::Ordering::Relaxed;

use vhost_user_backend::VringState;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::super::counters::add;
use super::super::request::{self, Segment, Status};
use super::{Slot, Worker};
use crate::disk::Event;
use crate::engine::{Errno, Kind};
use crate::sys;

impl Worker {
    /// The engine is done with a request.
    pub(super) fn finish(&mut self, ring: &mut VringState, head: u16, result: Result<(), Errno>) {
        let slot = self.slots[usize::from(head)].take().expect("done once, while in its slot");
        self.in_flight -= 1;
        self.count(&slot, result.is_ok());
        self.log_writes(&slot.writes);
        let status = match result {
            Ok(()) => request::OK,
            Err(errno) => {
                let (operation, ring, offset, len) = (slot.kind.name(), self.setup.index, slot.offset, slot.len);
                self.setup.rings.report(Event::IoError { operation, ring, offset, len, errno });
                request::IOERR
            }
        };
        self.answer(ring, head, slot.status_at, status, slot.written);
    }

    fn count(&mut self, slot: &Slot, ok: bool) {
        let counters = &self.counters;
        let bytes = if ok { slot.len } else { 0 };
        match slot.kind {
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
    pub(super) fn answer(
        &mut self,
        ring: &mut VringState,
        head: u16,
        status_at: GuestAddress,
        status: Status,
        written: u32,
    ) {
        match status {
            request::IOERR => add(&self.counters.errors, 1),
            request::UNSUPP => add(&self.counters.unsupported, 1),
            _ => {}
        }
        if self.setup.memory.write_obj(status, status_at).is_err() {
            return self.publish(ring, head, 0);
        }
        self.log_writes(&[(status_at, 1)]);
        self.publish(ring, head, written);
    }

    pub(super) fn publish(&mut self, ring: &mut VringState, head: u16, written: u32) {
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.answering(head);
        }
        match ring.get_queue_mut().add_used(&*self.setup.memory, head, written) {
            Ok(()) => {
                if let Some(inflight) = &mut self.setup.inflight {
                    inflight.answered(head, ring.get_queue().next_used());
                }
            }
            Err(error) => self.break_ring(&error.to_string()),
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
    pub(super) fn log_ring(&self, ring: &VringState) {
        if let Some(log) = &self.setup.log {
            let queue = ring.get_queue();
            log.mark(GuestAddress(queue.used_ring()), 6 + 8 * u64::from(queue.size()));
        }
    }

    /// One interrupt for all that was answered, if the driver wants one (virtio 1.3, 2.7.10).
    pub(super) fn interrupt(&mut self, ring: &mut VringState) {
        if !std::mem::take(&mut self.answered) {
            return;
        }
        let memory = &*self.setup.memory;
        let queue = ring.get_queue_mut();
        let wanted = if queue.event_idx_enabled() {
            queue.needs_notification(memory)
        } else {
            // virtio-queue leaves this flag to us. The fence: the used index is visible before the flag is read.
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            memory
                .load::<u16>(GuestAddress(queue.avail_ring()), Relaxed)
                .map(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
                .map_err(virtio_queue::Error::GuestMemory)
        };
        match wanted {
            Ok(true) => {
                add(&self.counters.interrupts, 1);
                if let Some(call) = ring.get_call()
                    && let Err(error) = sys::signal(call)
                {
                    log::debug!("ring {}: the call descriptor does not take a signal: {error}", self.setup.index);
                }
            }
            Ok(false) => {}
            Err(error) => self.break_ring(&error.to_string()),
        }
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
