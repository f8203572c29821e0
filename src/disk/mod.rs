//! The interface between the control socket and a running disk: the [`Disk`] trait, which `control` calls, the [`Events`]
//! queue, through which the disk reports, and the status types. `control` and `virtio` meet only here; neither imports the
//! other.

mod ring_status;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use serde::Serialize;

use crate::base::sync::{Bell, Mutex};
use crate::engine::{Errno, Kind};
pub use ring_status::RingStatus;
pub(crate) use ring_status::{RingCounters, add};

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

    /// Retries the failed requests that are retained, and lets their virtqueues continue. Returns how many there are.
    fn continue_io(&self) -> u64 {
        0
    }

    /// A retained failed request that changes the disk: no hold can succeed before it is done.
    fn stopped_change(&self) -> Option<FailedRequest> {
        None
    }

    /// Adopts the image's current size and notifies the guest. With `grow_to`, first grows the image to that many bytes. A
    /// smaller size than before is an error without `shrink`. Returns the size, or a message for the operator. Waits at
    /// most two seconds for storage that hangs.
    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> Result<u64, String> {
        let _ = (grow_to, shrink);
        Err("this disk's size does not change".into())
    }

    /// The disk's point-in-time copies, if the daemon makes them.
    fn copies(&self) -> Option<&dyn Copies> {
        None
    }

    /// The snapshots of the image's own store, if it makes any.
    fn snapshots(&self) -> Option<std::sync::Arc<dyn ImageSnapshots>> {
        None
    }
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedRequest {
    /// What was requested.
    pub kind: Kind,
    /// The ring of the request.
    pub ring: u32,
    /// The byte offset in the image; 0 for a flush.
    pub offset: u64,
    /// The length in bytes.
    pub len: u64,
    /// The error.
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

/// An event of a disk for its operators.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A front-end connected.
    Connected,
    /// The front-end disconnected, for this reason.
    Disconnected(String),
    /// The hold of this epoch is settled.
    HoldSettled {
        /// The epoch given to [`Disk::close_gate`].
        epoch: u64,
        /// `Err`: the sync failed, or a virtqueue's thread died.
        result: Result<HoldFigures, Errno>,
    },
    /// The hold of this epoch can never settle, because another process uses the image, and this one cannot promise what
    /// the image holds.
    HoldRefused {
        /// The epoch given to [`Disk::close_gate`].
        epoch: u64,
    },
    /// A request failed, and the guest got the error.
    IoError(FailedRequest),
    /// A request failed and is retained; its virtqueue takes no further request that changes the disk. Sent once until
    /// `IoContinued`, and a second time if the first request was a read and then a change fails.
    IoStopped(FailedRequest),
    /// The virtqueue's retained requests are retried, by this process or by the one that serves it next.
    IoContinued {
        /// Index of the virtqueue.
        ring: u32,
    },
    /// Requests are in flight for so long that something must be wrong. Sent once until `IoResumed`.
    IoStalled {
        /// Index of the virtqueue.
        ring: u32,
        /// The number of such requests.
        requests: u64,
        /// How long the oldest of them has been in flight.
        oldest: Duration,
    },
    /// The virtqueue's stalled requests have completed.
    IoResumed {
        /// Index of the virtqueue.
        ring: u32,
    },
    /// A sync failed: a guest's flush, a hold's sync or another one.
    SyncError(Errno),
    /// A point-in-time copy ended: completed, failed or cancelled.
    CopyEnded(CopyStatus),
    /// A virtqueue or the front-end violated the protocol and was stopped, or was set up so that requests cannot complete.
    /// The text says why.
    ProtocolError(String),
    /// The guest changed the buffer of a write while the write was in flight. Only with `--stable-writes detect`.
    BufferChanged {
        /// Byte offset in the image.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The number of such changes before this one without an event: a guest can cause any number.
        suppressed: u64,
    },
    /// The image's state changed.
    ImageState(ImageStatus),
}

/// The queue of events for the control thread. It is bounded, so that a guest that causes errors costs no memory.
/// `HoldSettled`, `HoldRefused` and `CopyEnded`, which operators cause, are never dropped.
pub struct Events {
    state: Mutex<EventsState>,
    ready: Bell,
}

#[derive(Default)]
struct EventsState {
    queue: VecDeque<Event>,
    dropped: u64,
}

/// The most events in the queue, apart from those that are never dropped.
const MAX_EVENTS: usize = 256;

impl Events {
    /// Creates an empty queue. Fails when no file descriptor is left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Events { state: Mutex::default(), ready: Bell::new()? })
    }

    /// Adds an event. Any thread may call it; it never blocks on I/O.
    pub fn send(&self, event: Event) {
        self.ready.ring_after(|| self.add(event));
    }

    /// Adds an event unless the queue is full. Returns whether it was added.
    fn add(&self, event: Event) -> bool {
        let mut state = self.state.lock().expect("no panic while held");
        let limit = match event {
            Event::HoldSettled { .. } | Event::HoldRefused { .. } | Event::CopyEnded(_) => usize::MAX,
            // A guest that causes many of these leaves room for the other events.
            Event::ProtocolError(_) | Event::BufferChanged { .. } => MAX_EVENTS / 2,
            _ => MAX_EVENTS,
        };
        if state.queue.len() >= limit {
            state.dropped += 1;
            return false;
        }
        state.queue.push_back(event);
        true
    }

    /// Takes all events. Also returns how many were dropped since the last call. Called by the control thread when
    /// [`Events::as_fd`] is readable.
    pub fn take(&self) -> (Vec<Event>, u64) {
        self.ready.silence_before(|| {
            let mut state = self.state.lock().expect("no panic while held");
            (state.queue.drain(..).collect(), std::mem::take(&mut state.dropped))
        })
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

/// Point-in-time copies of a disk. The instant is fixed while the disk is held; the image of that instant is then copied in
/// the background, and the old data of a block is saved before the block is overwritten. Called by the control thread; no
/// call blocks on I/O of the image or the target for longer than it takes to create a file.
pub trait Copies: Send + Sync {
    /// Prepares a copy, so that `start` is quick: creates the target's partial file and the bookkeeping. Only one copy can
    /// be prepared or running. Returns the copy's name.
    fn prepare(&self, options: &CopyOptions) -> Result<String, CopyError>;

    /// Fixes the instant of a prepared copy. Only called while the disk is held and the hold is settled. Takes no time that
    /// depends on the image's size. Fails if a write is in flight.
    fn start(&self, copy: &str) -> Result<(), CopyError>;

    /// Ends a copy and removes its partial file.
    fn cancel(&self, copy: &str) -> Result<(), CopyError>;

    /// Changes the copy's bandwidth limit, in bytes a second; 0: no limit.
    fn set_bandwidth(&self, copy: &str, bandwidth: u64) -> Result<(), CopyError>;

    /// The number of copies that are over and still have a thread that waits for the image or the target.
    fn ending(&self) -> u64 {
        0
    }

    /// The status of the copy that is prepared or running, and of the last ones that ended (at most eight, newest last).
    fn status(&self) -> Vec<CopyStatus>;
}

/// Snapshots that the image's own store (Ceph RBD) makes. Called by threads that may block.
pub trait ImageSnapshots: Send + Sync {
    /// Makes a snapshot of the image as it is now; the caller holds the disk. Blocks until the snapshot exists. The error's
    /// `code` is `exists`, `busy` or `store`.
    fn create(&self, name: &str) -> Result<(), CopyError>;

    /// Removes a snapshot that [`ImageSnapshots::create`] made, because another part of its instant failed.
    fn remove(&self, name: &str) -> Result<(), CopyError>;

    /// The snapshot's full name in the store: `POOL/IMAGE@NAME`.
    fn full_name(&self, name: &str) -> String;
}

/// The options of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOptions {
    /// The absolute path of a file that does not exist. Until the copy is complete and durable its name is PATH.partial.
    pub target: std::path::PathBuf,
    /// The most bytes a second that the background copy reads; 0: no limit.
    pub bandwidth: u64,
    /// Compute the SHA-256 of the whole copy.
    pub digest: bool,
}

/// Why an operation on a copy or snapshot failed: a code for programs and a message for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyError {
    /// For copies `busy`, `no-such-copy`, `target` or `resources`; `control::protocol` explains the codes.
    pub code: &'static str,
    /// What failed, why and how to fix it.
    pub message: String,
}

/// The status of a copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CopyStatus {
    /// The copy's name.
    pub copy: String,
    /// The path of the complete copy.
    pub target: String,
    /// `prepared`, `running`, `syncing`, `completed`, `failed` or `cancelled`.
    pub state: String,
    /// Size of the image in bytes.
    pub total_bytes: u64,
    /// Bytes that are done, including holes.
    pub done_bytes: u64,
    /// Bytes that were saved because the guest was about to overwrite them.
    pub saved_before_write_bytes: u64,
    /// Bytes that the target stores; the others are holes.
    pub stored_bytes: u64,
    /// Bytes of old data that wait in the scratch for the target.
    pub scratch_bytes: u64,
    /// The instant that the copy is of, in seconds since the epoch.
    pub instant: Option<f64>,
    /// Seconds since the instant, or from the instant to the copy's end.
    pub seconds: f64,
    /// Seconds during which a change of the guest waited for old data to be saved.
    pub slowed_seconds: f64,
    /// The SHA-256 of the complete copy in hexadecimal, if it was asked for.
    pub sha256: Option<String>,
    /// Why the copy failed.
    pub error: Option<String>,
    /// The copy is over, and one of its threads still waits for the target: a call has not returned, or a file is not
    /// removed yet.
    pub ending: bool,
}

/// A disk that is stopped because a request failed.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StoppedStatus {
    /// The request that stopped the first such virtqueue: `read`, `write`, `discard` or `write-zeroes`.
    pub operation: String,
    /// Index of that virtqueue.
    pub ring: u32,
    /// Byte offset in the image.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// The error with which the request failed.
    pub errno: i32,
    /// The system's text for `errno`.
    pub message: String,
    /// The number of retained requests of all virtqueues.
    pub requests: u64,
}

impl StoppedStatus {
    /// Creates the status from the first retained request and the number of all retained requests.
    pub fn new(first: &FailedRequest, requests: u64) -> Self {
        StoppedStatus {
            operation: first.kind.name().to_owned(),
            ring: first.ring,
            offset: first.offset,
            length: first.len,
            errno: first.errno.0,
            message: std::io::Error::from_raw_os_error(first.errno.0).to_string(),
            requests,
        }
    }
}

/// One of the last errors.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LastError {
    /// What failed.
    pub what: String,
    /// When it last happened, in seconds since the epoch.
    pub when: u64,
    /// How often the guest or the front-end caused it; 1 for other errors.
    pub times: u64,
}

/// The status of an image beyond its geometry.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageStatus {
    /// Why the image cannot be used as it should, in one word for programs (`fenced`, ...). `None`: it can.
    pub trouble: Option<String>,
    /// The cause of `trouble` and how to fix it, for people.
    pub trouble_detail: Option<String>,
    /// What the daemon does about guests that change a buffer while its write is in flight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable_writes: Option<StableWritesStatus>,
    /// The status of a Ceph RBD image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rbd: Option<RbdStatus>,
}

/// The status that only a Ceph RBD image has.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RbdStatus {
    /// `POOL[/NAMESPACE]/IMAGE[@SNAP]`.
    pub image: String,
    /// The exclusive lock: `held`, `released` (no guest uses the image), `waiting` for another client, or `none` (the lock is
    /// not used, or the image does not have the feature exclusive-lock).
    pub lock: String,
    /// Snapshots that other clients take; absent if this disk does not quiesce for them.
    pub quiesce: Option<RbdQuiesceStatus>,
}

/// The quiesce requests for snapshots that other clients took of a Ceph RBD image, since the daemon started.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RbdQuiesceStatus {
    /// The cluster asks this daemon before a snapshot is taken.
    pub watching: bool,
    /// How often the cluster asked.
    pub asked: u64,
    /// How often the daemon refused.
    pub refused: u64,
    /// How often the cluster released the disk before the snapshot was taken, because another disk of a group took too
    /// long.
    pub expired: u64,
}

/// What the daemon does about writes whose buffers a guest may change in flight, and its counters over all virtqueues.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StableWritesStatus {
    /// The configured value: `auto`, `copy`, `detect` or `off`.
    pub asked: String,
    /// The value in effect: `copy`, `detect` or `off`.
    pub in_effect: String,
    /// Why it is in effect: what the medium does with the buffer of a write, and how that is known.
    pub why: String,
    /// Writes that were copied and have completed.
    pub copied_writes: u64,
    /// Bytes that were copied.
    pub copied_bytes: u64,
    /// Writes that waited for memory.
    pub waited_writes: u64,
    /// Bytes now allocated for copies, in use or free for reuse.
    pub memory_bytes: u64,
    /// The most bytes that were allocated for copies so far.
    pub most_memory_bytes: u64,
    /// The bytes that all virtqueues together may have, beyond the largest buffer (1 MiB) that each of them may always have.
    pub shared_memory_limit: u64,
    /// Writes whose buffer was compared before and after the write.
    pub checked_writes: u64,
    /// Writes whose buffer had changed.
    pub changed_writes: u64,
    /// The last writes whose buffer had changed, newest last; at most eight.
    pub last_changed: Vec<ChangedWrite>,
}

/// A write whose buffer the guest changed while the write was in flight.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangedWrite {
    /// Byte offset in the image.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// When the change was detected, in seconds since the epoch.
    pub when: u64,
}

/// The status of a disk, to which `query-status` adds the holders.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskStatus {
    /// The back-end in one line (`Backend::describe`).
    pub image: String,
    /// The absolute path of the image's file or block device, if it has one.
    pub image_path: Option<String>,
    /// The bytes of the path in base64, if they are not UTF-8; `image_path` is then altered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_path_b64: Option<String>,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Size of a logical block in bytes.
    pub logical_block_size: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The configured cache mode, as libvirt spells it.
    pub cache_mode: String,
    /// When a write is acknowledged now, in words ("when durable", ...). A driver without FLUSH changes it.
    pub write_acknowledged: String,
    /// What happens to a guest's flush: `synced` or `ignored`.
    pub guest_flush: String,
    /// The cache that the offered features show to the guest: `write back` or `write through`.
    pub guest_sees: String,
    /// A front-end is connected.
    pub connected: bool,
    /// The driver has negotiated its features.
    pub driver_ready: bool,
    /// The feature bits that the driver acknowledged.
    pub acked_features: u64,
    /// The virtqueues that are running.
    pub rings: Vec<RingStatus>,
    /// The sums of all virtqueues that ever ran (index and size are 0).
    pub total: RingStatus,
    /// The disk is stopped: failed requests are retained until `continue`.
    pub stopped: Option<StoppedStatus>,
    /// Which failed requests are retained: `enospc`, `report` (none) or `stop` (all).
    pub on_error: String,
    /// The last errors, newest last; at most eight.
    pub last_errors: Vec<LastError>,
    /// A sync failed for good: writes are no longer made durable.
    pub sync_failed: bool,
    /// The number of copies that are over and still have a thread that waits for the image or the target.
    pub copies_ending: u64,
    /// The status of the image.
    #[serde(flatten)]
    pub image_status: ImageStatus,
}

#[cfg(all(test, feature = "model"))]
mod interleavings {
    use std::sync::Arc;

    use super::*;
    use crate::base::sync::interleavings::{Mutant, holds};
    use crate::base::sync::{thread, yield_until_readable};

    /// A thread that polls until the bell rings, and then takes all events, gets every event.
    #[test]
    fn a_polling_thread_misses_no_event() {
        let model = || {
            let events = Arc::new(Events::new().unwrap());
            let sender = |epoch| {
                let events = events.clone();
                thread::spawn(move || events.send(Event::HoldSettled { epoch, result: Err(Errno(5)) }))
            };
            let senders = [sender(0), sender(1)];
            let mut taken = 0;
            while taken < senders.len() {
                yield_until_readable(&[events.as_fd()], None);
                taken += events.take().0.len();
            }
            senders.into_iter().for_each(|sender| sender.join().unwrap());
        };
        holds(model, &[Mutant::RingsFirst, Mutant::SilencesLast]);
    }
}
