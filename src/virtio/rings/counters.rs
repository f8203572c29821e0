//! What a ring counts. One thread writes, anybody reads; no locked instruction on the request path.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::disk::RingStatus;

/// The counters of one ring, written by its worker alone, read by anybody.
#[derive(Default)]
pub(in crate::virtio) struct Counters {
    pub size: AtomicU64,
    pub running: AtomicBool,
    pub untracked: AtomicBool,
    pub in_flight: AtomicU64,
    pub stalled: AtomicU64,
    pub oldest_stalled_ms: AtomicU64,
    pub held: AtomicBool,
    pub kept: AtomicU64,
    pub reads: AtomicU64,
    pub read_bytes: AtomicU64,
    pub writes: AtomicU64,
    pub written_bytes: AtomicU64,
    pub flushes: AtomicU64,
    pub syncs: AtomicU64,
    pub discards: AtomicU64,
    pub write_zeroes: AtomicU64,
    pub errors: AtomicU64,
    pub unsupported: AtomicU64,
    pub interrupts: AtomicU64,
    pub polled: AtomicU64,
}

/// Adds to a counter that only this thread writes: no locked instruction needed.
pub(in crate::virtio) fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

impl Counters {
    /// Goes on from what another process counted for this ring, which does not run.
    pub fn go_on_from(&self, before: &RingStatus) {
        for (counter, counted) in [
            (&self.reads, before.reads),
            (&self.read_bytes, before.read_bytes),
            (&self.writes, before.writes),
            (&self.written_bytes, before.written_bytes),
            (&self.flushes, before.flushes),
            (&self.syncs, before.syncs),
            (&self.discards, before.discards),
            (&self.write_zeroes, before.write_zeroes),
            (&self.errors, before.errors),
            (&self.unsupported, before.unsupported),
            (&self.interrupts, before.interrupts),
            (&self.polled, before.polled),
        ] {
            add(counter, counted);
        }
    }

    pub fn status(&self, index: u32) -> RingStatus {
        RingStatus {
            index,
            size: self.size.load(Relaxed) as u16,
            untracked: self.untracked.load(Relaxed),
            in_flight: self.in_flight.load(Relaxed),
            stalled: self.stalled.load(Relaxed),
            oldest_stalled_ms: self.oldest_stalled_ms.load(Relaxed),
            held: self.held.load(Relaxed),
            kept: self.kept.load(Relaxed),
            reads: self.reads.load(Relaxed),
            read_bytes: self.read_bytes.load(Relaxed),
            writes: self.writes.load(Relaxed),
            written_bytes: self.written_bytes.load(Relaxed),
            flushes: self.flushes.load(Relaxed),
            syncs: self.syncs.load(Relaxed),
            discards: self.discards.load(Relaxed),
            write_zeroes: self.write_zeroes.load(Relaxed),
            errors: self.errors.load(Relaxed),
            unsupported: self.unsupported.load(Relaxed),
            interrupts: self.interrupts.load(Relaxed),
            polled: self.polled.load(Relaxed),
        }
    }
}

/// Adds one ring to a sum.
pub(in crate::virtio) fn accumulate(total: &mut RingStatus, ring: &RingStatus) {
    total.untracked |= ring.untracked;
    total.in_flight += ring.in_flight;
    total.stalled += ring.stalled;
    total.oldest_stalled_ms = total.oldest_stalled_ms.max(ring.oldest_stalled_ms);
    total.held |= ring.held;
    total.kept += ring.kept;
    total.reads += ring.reads;
    total.read_bytes += ring.read_bytes;
    total.writes += ring.writes;
    total.written_bytes += ring.written_bytes;
    total.flushes += ring.flushes;
    total.syncs += ring.syncs;
    total.discards += ring.discards;
    total.write_zeroes += ring.write_zeroes;
    total.errors += ring.errors;
    total.unsupported += ring.unsupported;
    total.interrupts += ring.interrupts;
    total.polled += ring.polled;
}
