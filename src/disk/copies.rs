//! Point-in-time copies and snapshots of a disk: the traits that the control thread calls, and their data.

use serde::{Deserialize, Serialize};

/// Point-in-time copies of a disk. `start` fixes the instant while the disk is held; the image of that instant is then
/// copied in the background, and the old data of a block is saved before the guest overwrites it. The control thread
/// calls the methods; none blocks on I/O of the image or the target for longer than it takes to create a file.
pub trait Copies: Send + Sync {
    /// Prepares a copy, so that `start` is quick: creates the target's partial file and the bookkeeping. Only one copy can
    /// be prepared or running. Returns the copy's name.
    fn prepare(&self, options: &CopyOptions) -> Result<String, CopyError>;

    /// Fixes the instant of a prepared copy. Called only while the disk is held and quiet. The time that this takes
    /// does not depend on the image's size. Fails if a write is in flight.
    fn start(&self, copy: &str) -> Result<(), CopyError>;

    /// Ends a copy and removes its partial file.
    fn cancel(&self, copy: &str) -> Result<(), CopyError>;

    /// Changes the copy's bandwidth limit, in bytes a second; 0: no limit.
    fn set_bandwidth(&self, copy: &str, bandwidth: u64) -> Result<(), CopyError>;

    /// Ends every export with this error, for the operator: the daemon cannot serve it any longer.
    fn end_exports(&self, why: &str) {
        let _ = why;
    }

    /// Returns the number of copies that are over and still have a thread that waits for the image or the target.
    fn ending(&self) -> u64 {
        0
    }

    /// Returns the status of the copies that ended last (at most eight, newest last), and of the one that is prepared
    /// or running.
    fn status(&self) -> Vec<CopyStatus>;
}

/// Snapshots that the image's own store (Ceph RBD) makes. Called by threads that may block.
pub trait ImageSnapshots: Send + Sync {
    /// Makes a snapshot of the image as it is now; the caller holds the disk. Blocks until the snapshot exists. The error's
    /// `code` is `exists`, `busy` or `store`.
    fn create(&self, name: &str) -> Result<(), CopyError>;

    /// Removes a snapshot that [`ImageSnapshots::create`] made, because another part of its instant failed.
    fn remove(&self, name: &str) -> Result<(), CopyError>;

    /// Returns the snapshot's full name in the store: `POOL/IMAGE@NAME`.
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

/// The options of an export: an instant that clients read while the guest goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportOptions {
    /// The export's name in NBD.
    pub name: String,
    /// The socket's path, for messages.
    pub target: std::path::PathBuf,
    /// The most bytes of old data in the scratch; `None`: `--scratch-size`, or half of what the filesystem has free.
    pub scratch_size: Option<u64>,
    /// The most bytes a second that clients read from the image; 0: no limit.
    pub bandwidth: u64,
    /// The export ends when no client has been connected for this long.
    pub idle: std::time::Duration,
}

/// What the status of a copy says in addition if it is an export.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ExportStatus {
    /// The export's name in NBD.
    pub name: String,
    /// The connected clients.
    pub clients: u64,
    /// Bytes that clients have read.
    pub read_bytes: u64,
}

/// Why an operation on a copy or snapshot failed: a code for programs and a message for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyError {
    /// For copies `busy`, `no-such-copy`, `target` or `resources`; docs/control-protocol.md explains the codes.
    pub code: &'static str,
    /// What failed, why and how to fix it.
    pub message: String,
}

/// The status of a copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
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
    /// The SHA-256 of the complete copy in hexadecimal, if it was requested.
    pub sha256: Option<String>,
    /// Why the copy failed.
    pub error: Option<String>,
    /// The copy is over, and one of its threads still waits for the target: a call has not returned, or a file is not
    /// removed yet.
    pub ending: bool,
    /// This is no copy but an export, and what clients do with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export: Option<ExportStatus>,
}
