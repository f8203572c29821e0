//! The figures of a ring. The macro `ring_figures` lists each figure once, for the worker that counts it, the status
//! that shows it, and the sum over all rings.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::LatencyCounters;

/// Expands to the atomic type that holds a figure of this type.
macro_rules! atomic {
    (u16) => {
        AtomicU16
    };
    (u64) => {
        AtomicU64
    };
    (bool) => {
        AtomicBool
    };
}

/// Adds a ring's figure to the sum over all rings, by the figure's rule.
macro_rules! accumulate {
    (each, $total:expr, $ring:expr) => {};
    (any, $total:expr, $ring:expr) => {
        $total |= $ring
    };
    (max, $total:expr, $ring:expr) => {
        $total = $total.max($ring)
    };
    (sum, $total:expr, $ring:expr) => {
        $total += $ring
    };
    (count, $total:expr, $ring:expr) => {
        $total += $ring
    };
}

/// Adds the count of another process to a counter, if the figure's rule is `count`.
macro_rules! resume {
    (count, $counter:expr, $before:expr) => {
        $counter.fetch_add($before, Relaxed)
    };
    ($rule:ident, $counter:expr, $before:expr) => {};
}

/// Declares [`RingStatus`] and [`RingCounters`]. Each figure has its type, and how it enters the sum over all rings:
/// `each` not at all, `any`, `max` or `sum` as of now, `count` over the disk's life.
macro_rules! ring_figures {
    ($($(#[$doc:meta])* $figure:ident: $type:ident, $rule:ident;)*) => {
        /// The figures of one ring, as status and stats show them. An upgrade takes the counts along.
        #[derive(Clone, Debug, Default, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case", default)]
        pub struct RingStatus {
            /// The number of the virtqueue.
            pub index: u32,
            $($(#[$doc])* pub $figure: $type,)*
        }

        impl RingStatus {
            /// Adds a ring to this sum.
            pub(crate) fn accumulate(&mut self, ring: &RingStatus) {
                $(accumulate!($rule, self.$figure, ring.$figure);)*
            }
        }

        /// The figures of one ring. Its worker alone writes them, and any thread reads them.
        #[derive(Default)]
        pub(crate) struct RingCounters {
            /// A worker serves the ring. The status shows no other rings.
            pub(crate) running: AtomicBool,
            /// The ring was kicked and has shown no request since its start.
            pub(crate) kicked_empty: AtomicBool,
            /// Bytes of writes that were acknowledged and not durable then. It only grows.
            pub(crate) acknowledged: AtomicU64,
            /// How many of `acknowledged` a sync has covered. Every ring's worker raises it.
            pub(crate) durable: AtomicU64,
            pub(crate) latency: LatencyCounters,
            $($(#[$doc])* pub(crate) $figure: atomic!($type),)*
        }

        impl RingCounters {
            /// Returns the present figures, for the status of the ring with this index.
            pub(crate) fn status(&self, index: u32) -> RingStatus {
                RingStatus { index, $($figure: self.$figure.load(Relaxed),)* }
            }

            /// Adds the counts of another process for this ring. Called before a worker serves the ring.
            pub(crate) fn resume_counts(&self, before: &RingStatus) {
                $(resume!($rule, self.$figure, before.$figure);)*
            }
        }
    };
}

ring_figures! {
    /// The number of descriptors in the ring.
    size: u16, each;
    /// Requests in flight are not tracked for the next server: the front-end cannot do that (INFLIGHT_SHMFD), or its
    /// region is for smaller rings.
    untracked: bool, any;
    /// Requests taken and not yet completed.
    in_flight: u64, sum;
    /// Requests that have been in flight for more than 10 s, which means that something is wrong. Checked every 2.5 s.
    stalled: u64, sum;
    /// How many milliseconds the oldest stalled request has been in flight.
    oldest_stalled_ms: u64, max;
    /// Whether a request waits in the ring because writes are blocked.
    held: bool, any;
    /// Whether a request waits in the ring because of the disk's limits (`--throttle`).
    limited: bool, any;
    /// Failed requests that are retained until `continue`, instead of reported to the guest.
    kept: u64, sum;
    /// Reads completed since the first daemon of the disk started. This and the following counts continue over reconnects
    /// and upgrades.
    reads: u64, count;
    /// Bytes read.
    read_bytes: u64, count;
    /// Writes completed.
    writes: u64, count;
    /// Bytes written.
    written_bytes: u64, count;
    /// Flushes completed.
    flushes: u64, count;
    /// Syncs given to the back-end: those of flushes and those of the cache policy.
    syncs: u64, count;
    /// Discards completed.
    discards: u64, count;
    /// Write-zeroes completed.
    write_zeroes: u64, count;
    /// Requests completed with VIRTIO_BLK_S_IOERR.
    errors: u64, count;
    /// Requests completed with VIRTIO_BLK_S_UNSUPP.
    unsupported: u64, count;
    /// Interrupts sent.
    interrupts: u64, count;
    /// Sleeps that busy polling saved (`--poll-max-ns`).
    polled: u64, count;
}

/// Adds to a counter that only this thread writes, without a locked instruction.
#[inline]
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}
