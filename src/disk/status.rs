//! The status of a disk, as clients of the control socket get it in JSON. `virtioblkctl` reads it by the same types, also
//! from a daemon of another version: an unknown member is ignored, and a missing one has its default.

use serde::{Deserialize, Serialize};

use super::{FailedRequest, RingStatus, ThrottleStatus};

/// The status of a disk, to which `query-status` adds the holders.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
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
    /// The limits of the disk's rates. Absent: it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle: Option<ThrottleStatus>,
    /// The last errors, newest last; at most eight.
    pub last_errors: Vec<LastError>,
    /// A sync failed for good: writes are no longer made durable.
    pub sync_failed: bool,
    /// The number of copies that are over and still have a thread that waits for the image or the target.
    pub copies_ending: u64,
    /// The format that the image has by its header or footer, as `qemu-img` calls it, although it is served as raw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detected_format: Option<String>,
    /// The status of the image.
    #[serde(flatten)]
    pub image_status: ImageStatus,
}

/// Acknowledged data that is not durable yet, as far as this daemon knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct UnsyncedStatus {
    /// Bytes of writes that were acknowledged before they were durable, and that no sync has covered since. The kernel or the
    /// cluster may have made some of them durable by itself.
    pub unsynced_bytes: u64,
    /// Milliseconds since the begin of the last sync that succeeded: what was acknowledged before it is durable. `None`: this
    /// daemon made none yet.
    pub last_sync_ms: Option<u64>,
}

/// A disk that is stopped because a request failed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
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
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct LastError {
    /// What failed.
    pub what: String,
    /// When it last happened, in seconds since the epoch.
    pub when: u64,
    /// How often the guest or the front-end caused it; 1 for other errors.
    pub times: u64,
}

/// The status of an image beyond its geometry.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RbdQuiesceStatus {
    /// The cluster sends this daemon a quiesce request before a snapshot is taken.
    pub watching: bool,
    /// The number of quiesce requests from the cluster.
    pub asked: u64,
    /// The number of requests that the daemon refused.
    pub refused: u64,
    /// How often the cluster released the disk before the snapshot was taken, because another disk of a group took too
    /// long.
    pub expired: u64,
}

/// What the daemon does about writes whose buffers a guest may change in flight, and its counters over all virtqueues.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct StableWritesStatus {
    /// The configured value of `--stable-writes`: `auto`, `copy`, `detect` or `off`.
    pub asked: String,
    /// The value in effect: `copy`, `detect` or `off`.
    pub in_effect: String,
    /// Why that value is in effect: what the medium does with the buffer of a write, and how that is known.
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ChangedWrite {
    /// Byte offset in the image.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// When the change was detected, in seconds since the epoch.
    pub when: u64,
}
