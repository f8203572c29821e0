//! The interface between the control socket and a running disk: the [`Disk`] trait, which `control` calls, the [`Events`]
//! queue, through which the disk reports, and the status types. `control` and `virtio` meet only here; neither imports the
//! other.

mod copies;
mod events;
mod latency;
mod ring_status;
mod status;
mod throttle_status;

use std::os::unix::net::UnixListener;
use std::time::Duration;

use crate::engine::throttle::Limits;
use crate::engine::{Errno, Kind};
pub use copies::{Copies, CopyError, CopyOptions, CopyStatus, ExportOptions, ExportStatus, ImageSnapshots};
pub use events::{Event, EventBatch, Events};
pub use latency::{LatencyByKind, LatencyHistogram, LatencyStatus};
pub(crate) use latency::{LatencyCounters, duration, ticks};
pub use ring_status::RingStatus;
pub(crate) use ring_status::{RingCounters, add};
pub use status::{
    ChangedWrite, DiskStatus, ImageStatus, LastError, RbdQuiesceStatus, RbdStatus, StableWritesStatus, StoppedStatus,
    UnsyncedStatus,
};
pub use throttle_status::ThrottleStatus;

/// A disk that can be held. Implemented by `virtio::rings::Rings` and called by the control thread. No call blocks on I/O.
pub trait Disk: Send + Sync {
    /// Closes the write gate of every virtqueue, running now or started later. [`Event::HoldSettled`] with this `epoch`
    /// follows once nothing that changes the disk is in flight and everything acknowledged is durable, or cannot be made
    /// so; or [`Event::HoldRefused`] follows. An `epoch` is never reused. Not called again before `open_gate`.
    fn close_gate(&self, epoch: u64);

    /// Opens the gate. If the hold has not settled yet, its event does not come, or comes with the old epoch.
    fn open_gate(&self);

    /// Returns the disk's state, from counters of the virtqueues; they may lag by one batch of requests.
    fn status(&self) -> DiskStatus;

    /// Returns the latencies of all virtqueues that ever ran, together.
    fn latency(&self) -> LatencyStatus {
        LatencyStatus::default()
    }

    /// Returns which acknowledged data is not durable yet.
    fn unsynced(&self) -> UnsyncedStatus {
        UnsyncedStatus::default()
    }

    /// Retries the failed requests that are retained, and lets their virtqueues continue. Returns the number of these
    /// requests.
    fn continue_io(&self) -> u64 {
        0
    }

    /// Returns a retained failed request that changes the disk, if there is one. No hold can succeed before it is done.
    fn stopped_change(&self) -> Option<FailedRequest> {
        None
    }

    /// The limits of the disk's rates; all zero: there are none.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Replaces the limits, which were checked. Requests that wait go on by the new ones at once.
    fn set_limits(&self, limits: Limits) {
        let _ = limits;
    }

    /// Adopts the image's current size and notifies the guest. With `grow_to`, first grows the image to that many bytes. A
    /// smaller size than before is an error without `shrink`. Returns the size, or a message for the operator. Waits at
    /// most two seconds for storage that hangs.
    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> Result<u64, String> {
        let _ = (grow_to, shrink);
        Err("this disk's size does not change".into())
    }

    /// Returns the disk's point-in-time copies. `None`: the daemon makes none.
    fn copies(&self) -> Option<&dyn Copies> {
        None
    }

    /// Prepares an export of the next instant, which [`Copies::start`] fixes, to the clients of `listener`. It is one of
    /// [`Disk::copies`] from then on. Returns its name.
    fn prepare_export(&self, listener: UnixListener, options: &ExportOptions) -> Result<String, CopyError> {
        drop(listener);
        let _ = options;
        Err(CopyError { code: "no-copies", message: "this disk's daemon exports nothing".into() })
    }

    /// Returns the snapshots of the image's own store. `None`: the store makes none.
    fn snapshots(&self) -> Option<std::sync::Arc<dyn ImageSnapshots>> {
        None
    }
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedRequest {
    /// The kind of the request.
    pub kind: Kind,
    /// The index of the request's virtqueue.
    pub ring: u32,
    /// The byte offset in the image; 0 for a flush.
    pub offset: u64,
    /// The length in bytes.
    pub len: u64,
    /// The error with which the request failed.
    pub errno: Errno,
}

impl FailedRequest {
    /// Whether the request changes the disk. It may have done so in part.
    pub fn is_change(&self) -> bool {
        self.kind != Kind::Read
    }
}

/// The measurements of a settled hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldFigures {
    /// The number of virtqueues that were running.
    pub rings: u32,
    /// The number of requests that change the disk and were in flight when the gate closed.
    pub drained: u64,
    /// The time from closing the gate until the last of these requests was done.
    pub drain: Duration,
    /// The time from then until the data was durable.
    pub sync: Duration,
    /// Bytes acknowledged since the last successful sync, as counted by the virtqueues. No more than this was written back.
    pub bytes_synced: u64,
}
