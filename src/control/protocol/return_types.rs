//! The values that commands return, and the data of the events that `virtioblkctl` reads. The daemon serializes these types
//! and `virtioblkctl` deserializes them, so that both name each member once.
//!
//! The two programs may be of different versions: an unknown member is ignored, and a missing one has its default.

use serde::{Deserialize, Serialize};

use crate::disk::{DiskStatus, LatencyStatus, RingStatus, StableWritesStatus, UnsyncedStatus};

/// What `query-status` returns.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Status {
    /// The disk and its image.
    #[serde(flatten)]
    pub disk: DiskStatus,
    /// Who holds the disk.
    pub quiesce: QuiesceStatus,
    /// The image's store makes snapshots (`image-snapshot`).
    pub image_snapshots: bool,
    /// The attendant. `None`: there is none, and snapshots by others do not need one.
    pub attendant: Option<AttendantStatus>,
    /// The daemon itself.
    pub daemon: DaemonStatus,
}

/// Who holds the disk, and for how long.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct QuiesceStatus {
    /// The state of the gate: `open`, `settling` or `quiesced`.
    pub state: String,
    /// For how many milliseconds the gate has been closed. `None`: it is open.
    pub closed_ms: Option<u64>,
    /// For how many milliseconds the holds that followed each other have kept writes waiting.
    pub held_ms: u64,
    /// The limit of `held_ms` (`--max-hold`). `None`: there is no limit.
    pub max_hold_ms: Option<u64>,
    /// The number of requests that wait for a hold.
    pub waiting: usize,
    /// The granted holds.
    pub holders: Vec<HolderStatus>,
}

/// A client of the control socket. All members are `None` for the image's store.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Requester {
    /// The name that the client gave.
    pub who: Option<String>,
    /// The client's process when it connected.
    pub pid: Option<i32>,
    /// The user of that process.
    pub uid: Option<u32>,
}

/// One hold.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct HolderStatus {
    /// The client that asked for the hold.
    #[serde(flatten)]
    pub requester: Requester,
    /// The token of the hold.
    pub token: String,
    /// The hold outlives its client's connection.
    pub detached: bool,
    /// For how many milliseconds the hold has lasted.
    pub held_ms: u64,
    /// The milliseconds until the lease runs out.
    pub lease_left_ms: u64,
}

/// The attendant, which must consent to snapshots that others take of the image.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct AttendantStatus {
    /// The client that registered last.
    #[serde(flatten)]
    pub requester: Requester,
    /// The attendant is connected.
    pub present: bool,
    /// Snapshots are refused without the attendant's consent.
    pub required: bool,
    /// The attendant was asked for its consent and has not replied yet.
    pub preparing: bool,
}

/// The daemon itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct DaemonStatus {
    /// The daemon's version.
    pub version: String,
    /// The git revision that the daemon was built from, if it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The daemon's process.
    pub pid: u32,
    /// How long the daemon has run.
    pub uptime_seconds: u64,
    /// The vhost-user socket, for people: a path, or `fd N`.
    pub vhost_socket: String,
    /// The take-over that gave the daemon its disk. `None`: the daemon opened the image without one.
    pub took_over: Option<TookOver>,
}

/// The figures of a take-over (`crate::upgrade`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct TookOver {
    /// The process of the old daemon.
    pub from_pid: u32,
    /// How long the guest's virtqueues were stopped.
    pub pause_us: u64,
    /// The part of the pause until the requests in flight were completed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drained_us: Option<u64>,
}

/// What `query-stats` returns.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Stats {
    /// The running virtqueues.
    pub rings: Vec<RingStatus>,
    /// The sums of all virtqueues that ever ran.
    pub total: RingStatus,
    /// The counters of `--stable-writes`.
    pub stable_writes: Option<StableWritesStatus>,
    /// The latencies of all virtqueues that ever ran, together.
    pub latency: LatencyStatus,
    /// Acknowledged data that is not durable yet.
    #[serde(flatten)]
    pub unsynced: UnsyncedStatus,
}

/// What `quiesce` returns.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Quiesced {
    /// The token of the hold.
    pub token: String,
    /// The lease as it was granted.
    pub lease_ms: u64,
    /// What the quiesce took.
    #[serde(flatten)]
    pub figures: QuiesceFigures,
}

/// What a quiesce took; also part of the event `QUIESCED`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct QuiesceFigures {
    /// The closing of the gate that this hold shares with others.
    pub epoch: u64,
    /// The number of virtqueues that were running.
    pub rings: u32,
    /// The number of requests that changed the disk and were in flight when the gate closed.
    pub drained: u64,
    /// The time until these requests were done, in microseconds.
    pub drain_us: u64,
    /// The time from then until the data was durable, in microseconds.
    pub sync_us: u64,
    /// The bytes that were acknowledged since the last successful sync.
    pub bytes_synced: u64,
    /// The number of holders, including this one.
    pub holders: usize,
}

/// What `resume` returns.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Resumed {
    /// The number of holds that this command ended. `None` in the reply to another command.
    pub resumed: Option<usize>,
    /// The number of holders that are left.
    pub holders: usize,
}

/// The data of the event `RESUMED`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct HoldEnded {
    /// The client that asked for the hold.
    #[serde(flatten)]
    pub requester: Requester,
    /// The token of the hold.
    pub token: String,
    /// Why the hold ended: `resume`, `lease-expired`, `connection-closed` or `shutdown`.
    pub reason: String,
    /// How long the hold lasted, in milliseconds.
    pub held_ms: u64,
    /// The number of holders that are left. With 0 the writes continue.
    pub holders: usize,
}

/// What `continue` returns.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Continued {
    /// The number of failed requests that are retried.
    pub retried: u64,
}

/// What `resize` returns.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Resized {
    /// The size of the disk that the guest sees, in bytes.
    pub size: u64,
}

/// What `query-command-line` returns: how the daemon was started.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct CommandLine {
    /// The path that the program had when it was started.
    pub program: String,
    /// The arguments, without the program's name and `--take-over`.
    pub arguments: Vec<String>,
    /// The directory to which relative paths refer.
    pub directory: String,
    /// The service manager's socket (sd_notify(3)).
    pub notify_socket: Option<String>,
}
