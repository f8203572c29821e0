//! What the control socket may ask of a running disk, and what the disk tells it: the [`Disk`] trait, the status
//! types and the [`Events`] queue. The one seam between `control` and `virtio`; neither imports the other.

mod ring_status;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use serde::Serialize;

use crate::base::sync::{Bell, Mutex};
use crate::engine::{Errno, Kind};
pub use ring_status::RingStatus;
pub(crate) use ring_status::{RingCounters, add};

/// A disk that can be held still. Implemented by `virtio::rings::Rings`; called by the control thread. No call blocks
/// on I/O.
pub trait Disk: Send + Sync {
    /// Closes the write gate of every ring, running now or started later. Once nothing that changes the disk is in
    /// flight and everything acknowledged is durable (or that failed), [`Event::HoldSettled`] with this `epoch`
    /// follows, or [`Event::HoldRefused`]. `epoch` is never reused. Not called again before `open_gate`.
    fn close_gate(&self, epoch: u64);

    /// Opens the gate. A settlement of the closing that is still under way is dropped or carries the old epoch.
    fn open_gate(&self);

    /// A snapshot of the disk's state, from counters that the rings keep; may lag by one batch.
    fn status(&self) -> DiskStatus;

    /// Tries again the requests that failed and are kept, and lets their rings go on. Returns how many there are.
    fn continue_io(&self) -> u64 {
        0
    }

    /// A request that changes the disk, failed and is kept: no hold can succeed before it is done.
    fn stopped_change(&self) -> Option<FailedRequest> {
        None
    }

    /// Takes the image's size as it is now, grown to `grow_to` bytes first if that is given, and tells the guest. One that
    /// is smaller than before is an error without `shrink`. Returns the size, or a message for the operator. Waits two
    /// seconds at most for storage that hangs.
    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> Result<u64, String> {
        let _ = (grow_to, shrink);
        Err("this disk's size does not change".into())
    }

    /// Its point-in-time copies, where the daemon makes them.
    fn copies(&self) -> Option<&dyn Copies> {
        None
    }

    /// Snapshots made by the image's own store, where it can.
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

/// What a settled hold measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldFigures {
    /// Rings that were running.
    pub rings: u32,
    /// Requests that change the disk and were in flight when the gate closed.
    pub drained: u64,
    /// From closing the gate until the last of them had finished.
    pub drain: Duration,
    /// From then until the data was durable.
    pub sync: Duration,
    /// Bytes acknowledged since the last good sync, as the rings counted them: at most this was written back.
    pub bytes_synced: u64,
}

/// Something happened that operators want to hear of.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A front-end connected.
    Connected,
    /// The front-end left; why.
    Disconnected(String),
    /// The hold of this epoch is settled.
    HoldSettled {
        /// As given to [`Disk::close_gate`].
        epoch: u64,
        /// `Err`: the sync failed (or a ring died).
        result: Result<HoldFigures, Errno>,
    },
    /// The hold of this epoch can never settle: the image is somebody else's, and what is in it is not ours to promise.
    HoldRefused {
        /// As given to [`Disk::close_gate`].
        epoch: u64,
    },
    /// A request failed, and the guest got the error.
    IoError(FailedRequest),
    /// A request failed and is kept from the guest; its ring takes nothing more that changes the disk. Once, until
    /// `IoContinued`, and a second time if the first one was a read.
    IoStopped(FailedRequest),
    /// What the ring kept is tried again, here or by whoever serves it next.
    IoContinued {
        /// Which ring.
        ring: u32,
    },
    /// Requests are in flight for so long that something must be wrong. Once, until `IoResumed`.
    IoStalled {
        /// Which ring.
        ring: u32,
        /// How many.
        requests: u64,
        /// How long the oldest of them has been in flight.
        oldest: Duration,
    },
    /// The ring's requests that were stalled are answered.
    IoResumed {
        /// Which ring.
        ring: u32,
    },
    /// A sync failed, whoever asked for it.
    SyncError(Errno),
    /// A point-in-time copy ended: completed, failed or cancelled.
    CopyEnded(CopyStatus),
    /// A ring or the front-end broke the protocol and was stopped, or is set up so that requests cannot complete; why.
    ProtocolError(String),
    /// The guest changed the buffer of a write while it was under way. Only with `--stable-writes detect`.
    BufferChanged {
        /// Byte offset in the image.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Changes before it that were not told: a guest can provoke any number.
        suppressed: u64,
    },
    /// The image's state changed.
    ImageState(ImageStatus),
}

/// Events on their way to the control thread: bounded, so that a guest that provokes errors costs no memory.
/// `HoldSettled`, `HoldRefused` and `CopyEnded`, which operators provoke, are never dropped.
pub struct Events {
    state: Mutex<EventsState>,
    ready: Bell,
}

#[derive(Default)]
struct EventsState {
    queue: VecDeque<Event>,
    dropped: u64,
}

/// Errors kept at most until the control thread takes them.
const MAX_EVENTS: usize = 256;

impl Events {
    /// An empty queue. Errors: no file descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Events { state: Mutex::default(), ready: Bell::new()? })
    }

    /// Adds an event; any thread, never blocks on I/O.
    pub fn send(&self, event: Event) {
        self.ready.ring_after(|| self.queue(event));
    }

    /// Whether there was room for it.
    fn queue(&self, event: Event) -> bool {
        let mut state = self.state.lock().expect("no panic while held");
        let most = match event {
            Event::HoldSettled { .. } | Event::HoldRefused { .. } | Event::CopyEnded(_) => usize::MAX,
            // A guest that provokes them leaves room for what an operator must hear of.
            Event::ProtocolError(_) | Event::BufferChanged { .. } => MAX_EVENTS / 2,
            _ => MAX_EVENTS,
        };
        if state.queue.len() >= most {
            state.dropped += 1;
            return false;
        }
        state.queue.push_back(event);
        true
    }

    /// Takes all that is queued, and how many were dropped since the last call. The control thread, after
    /// [`Events::as_fd`] became readable.
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

/// Point-in-time copies of a disk: the instant is fixed while the disk is held, and the image of that instant is then
/// copied in the background; a block about to be overwritten is saved first. Called by the control thread; no call
/// blocks on the image's or the target's I/O for longer than it takes to create a file.
pub trait Copies: Send + Sync {
    /// Makes everything ready for `start`: the target's partial file, the bookkeeping. One copy at a time. Returns the
    /// copy's name. Errors carry a message for the operator.
    fn prepare(&self, options: &CopyOptions) -> Result<String, CopyError>;

    /// Fixes the instant. Only while the disk is held and the hold is settled; takes no time that depends on the
    /// image's size. An error if a write is in flight all the same.
    fn start(&self, copy: &str) -> Result<(), CopyError>;

    /// Ends a copy and removes its partial file.
    fn cancel(&self, copy: &str) -> Result<(), CopyError>;

    /// Changes the limit, in bytes a second; 0: none.
    fn set_bandwidth(&self, copy: &str, bandwidth: u64) -> Result<(), CopyError>;

    /// How many copies are over and wait for the image or their target all the same.
    fn ending(&self) -> u64 {
        0
    }

    /// The copy that is prepared or running, and those that ended last (at most eight, newest last).
    fn status(&self) -> Vec<CopyStatus>;
}

/// Snapshots that the store of an image makes and keeps by itself (Ceph RBD). Called by threads that may block.
pub trait ImageSnapshots: Send + Sync {
    /// Makes a snapshot of the image as it is now; the caller holds the disk still. Blocks until it exists. Errors
    /// carry a message for the operator; `code` is `exists`, `busy` or `store`.
    fn create(&self, name: &str) -> Result<(), CopyError>;

    /// Removes one that [`ImageSnapshots::create`] made, because the instant it was made for failed elsewhere.
    fn remove(&self, name: &str) -> Result<(), CopyError>;

    /// How the snapshot is named outside: `POOL/IMAGE@NAME`.
    fn full_name(&self, name: &str) -> String;
}

/// What to copy to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOptions {
    /// An absolute path where nothing is yet. Until the copy is complete and durable it is called PATH.partial.
    pub target: std::path::PathBuf,
    /// Bytes a second that the background copy may read; 0: no limit.
    pub bandwidth: u64,
    /// Compute the SHA-256 of the whole copy.
    pub digest: bool,
}

/// Why a copy was refused: a code for programs, a message for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyError {
    /// `busy`, `no-such-copy`, `target` or `resources`; they are explained at the head of `control::proto`.
    pub code: &'static str,
    /// Names the thing, the cause and the mend.
    pub message: String,
}

/// How far a copy is.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CopyStatus {
    /// Its name.
    pub copy: String,
    /// Where it will be when complete.
    pub target: String,
    /// `prepared`, `running`, `syncing`, `completed`, `failed` or `cancelled`.
    pub state: String,
    /// Bytes of the image.
    pub total_bytes: u64,
    /// Bytes dealt with so far, holes included.
    pub done_bytes: u64,
    /// Bytes that were saved because the guest was about to overwrite them.
    pub saved_before_write_bytes: u64,
    /// Bytes that the target holds; the rest is holes.
    pub stored_bytes: u64,
    /// Bytes of old data that wait in the scratch for the target.
    pub scratch_bytes: u64,
    /// Seconds since the epoch when the instant was fixed.
    pub instant: Option<f64>,
    /// Seconds since then, or until its end.
    pub seconds: f64,
    /// Seconds during which a change of the guest's waited for old data to be saved.
    pub slowed_seconds: f64,
    /// SHA-256 in hexadecimal, if asked for and complete.
    pub sha256: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// It is over, and a thread of it still waits for the target: a call that does not return, a file not removed yet.
    pub ending: bool,
}

/// A disk that stands still because a request failed.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StoppedStatus {
    /// `read`, `write`, `discard` or `write-zeroes`: the request that stopped the first such ring.
    pub operation: String,
    /// Which ring.
    pub ring: u32,
    /// Byte offset in the image.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Why, as a number,
    pub errno: i32,
    /// and in the system's words.
    pub message: String,
    /// Requests that are kept, over all rings.
    pub requests: u64,
}

impl StoppedStatus {
    /// Of the first request that was kept, and how many are kept.
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

/// An error worth showing until the next one.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LastError {
    /// What failed.
    pub what: String,
    /// When it happened last, in seconds since the epoch.
    pub when: u64,
    /// How often the guest or the front-end caused it; 1 for other errors.
    pub times: u64,
}

/// What a back-end says of its image beyond its shape.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageStatus {
    /// Why the image cannot be used as it should (`fenced`, ...), one word for programs. `None`: all is well.
    pub trouble: Option<String>,
    /// The same for people: the cause and the mend.
    pub trouble_detail: Option<String>,
    /// What is done about guests that change a buffer while its write is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable_writes: Option<StableWritesStatus>,
    /// Of a Ceph RBD image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rbd: Option<RbdStatus>,
}

/// What only a Ceph RBD image has.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RbdStatus {
    /// `POOL[/NAMESPACE]/IMAGE[@SNAP]`.
    pub image: String,
    /// The exclusive lock: `held`, `released` (no guest uses the image), `waiting` for another client, or `none` (it is not
    /// wanted, or the image has no feature exclusive-lock).
    pub lock: String,
    /// Snapshots taken by others; absent where this disk does not wait for them.
    pub quiesce: Option<RbdQuiesceStatus>,
}

/// Snapshots of a Ceph RBD image that others took, since the daemon started.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RbdQuiesceStatus {
    /// The cluster asks us before a snapshot is taken.
    pub watching: bool,
    /// How often it asked.
    pub asked: u64,
    /// How often the answer was no.
    pub refused: u64,
    /// How often it let the disk go before the snapshot was taken, since another disk of a group took too long.
    pub expired: u64,
}

/// Writes whose buffers a guest may change under way: what is done about it, and what was seen. Sums over all rings.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StableWritesStatus {
    /// As configured: `auto`, `copy`, `detect` or `off`.
    pub asked: String,
    /// What is done: `copy`, `detect` or `off`.
    pub in_effect: String,
    /// Why: what the medium does with the buffer of a write, and how that is known.
    pub why: String,
    /// Writes that were copied and have completed.
    pub copied_writes: u64,
    /// Bytes copied.
    pub copied_bytes: u64,
    /// Writes that had to wait for memory.
    pub waited_writes: u64,
    /// Bytes allocated for copies now, in use or kept for reuse.
    pub memory_bytes: u64,
    /// Bytes allocated for copies at most so far.
    pub most_memory_bytes: u64,
    /// What all rings may have together, beyond the largest piece (1 MiB) that each of them may always have.
    pub shared_memory_limit: u64,
    /// Writes whose buffer was compared before and after.
    pub checked_writes: u64,
    /// Writes whose buffer had changed.
    pub changed_writes: u64,
    /// The last of them, newest last; at most eight.
    pub last_changed: Vec<ChangedWrite>,
}

/// A write whose buffer the guest changed while it was under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangedWrite {
    /// Byte offset in the image.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Seconds since the epoch.
    pub when: u64,
}

/// What a disk says of itself; `query-status` adds the holders.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskStatus {
    /// The back-end in one line (`Backend::describe`).
    pub image: String,
    /// The file or block device behind it, if there is one; absolute.
    pub image_path: Option<String>,
    /// The bytes of `image_path` in base64, if they are no UTF-8; it is altered then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_path_b64: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub logical_block_size: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The configured mode, as libvirt spells it.
    pub cache_mode: String,
    /// When a write is acknowledged now, in words ("when durable", ...), the driver's missing FLUSH included.
    pub write_acknowledged: String,
    /// What happens to a guest's flush: `synced` or `ignored`.
    pub guest_flush: String,
    /// `write back` or `write through`: what the features offered make the guest believe.
    pub guest_sees: String,
    /// A front-end is connected.
    pub connected: bool,
    /// The driver negotiated its features.
    pub driver_ready: bool,
    /// The feature bits that the driver acknowledged.
    pub acked_features: u64,
    /// Rings that are running.
    pub rings: Vec<RingStatus>,
    /// Sums over all rings that ever ran (index and size 0).
    pub total: RingStatus,
    /// Failed requests are kept from the guest until `continue`.
    pub stopped: Option<StoppedStatus>,
    /// Which failures are: `enospc`, `report` (none) or `stop` (all).
    pub on_error: String,
    /// Newest last; at most eight.
    pub last_errors: Vec<LastError>,
    /// A sync failed for good: writes are no longer made durable.
    pub sync_failed: bool,
    /// Copies that are over, and of which a thread still waits for the image or its target.
    pub copies_ending: u64,
    /// What the back-end adds.
    #[serde(flatten)]
    pub image_status: ImageStatus,
}

#[cfg(all(test, feature = "model"))]
mod interleavings {
    use std::sync::Arc;

    use super::*;
    use crate::base::sync::interleavings::{Mutant, holds};
    use crate::base::sync::{thread, yield_until_readable};

    /// Whoever polls until the bell rings and then takes what there is gets everything.
    #[test]
    fn no_event_is_slept_over() {
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
