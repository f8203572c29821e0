//! The state of a front-end's connection as plain data, which the old daemon sends to the new one.
//! `virtio/vhost_user/save_restore.rs` writes and reads it.

use serde::{Deserialize, Serialize};

/// Everything that the front-end set up, apart from the connection itself. A descriptor is an index in the list that comes
/// with the message.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct SessionState {
    /// The features of SET_FEATURES.
    pub(crate) features: Option<u64>,
    /// The features of SET_PROTOCOL_FEATURES.
    pub(crate) protocol_features: u64,
    /// The guest memory of SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG.
    pub(crate) memory: Vec<Region>,
    /// The region of SET_INFLIGHT_FD.
    pub(crate) inflight: Option<InflightState>,
    /// The dirty log of SET_LOG_BASE.
    pub(crate) log: Option<RegionState>,
    /// The descriptor of SET_BACKEND_REQ_FD.
    pub(crate) channel: Option<usize>,
    /// The size of the disk in bytes, as the front-end knows it.
    pub(crate) knows: Option<u64>,
    /// The virtqueues, by index.
    pub(crate) rings: Vec<RingState>,
}

impl SessionState {
    /// The features of SET_FEATURES and SET_PROTOCOL_FEATURES, which the message layer needs, too.
    pub(crate) fn negotiated(&self) -> (Option<u64>, u64) {
        (self.features, self.protocol_features)
    }
}

/// A region of guest memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Region {
    /// The start of the region in guest memory.
    pub(crate) guest_addr: u64,
    /// The start of the region in the front-end's address space.
    pub(crate) user_addr: u64,
    /// The size in bytes.
    pub(crate) size: u64,
    /// The start of the region in the file, in bytes.
    pub(crate) offset: u64,
    /// The file's descriptor, by its index.
    pub(crate) file: usize,
}

/// Memory that the front-end shares for its bookkeeping.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RegionState {
    /// The start of the memory in the file, in bytes.
    pub(crate) offset: u64,
    /// The length in bytes.
    pub(crate) len: u64,
    /// The file's descriptor, by its index.
    pub(crate) file: usize,
}

/// The region in which requests in flight are tracked.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct InflightState {
    /// The region's memory.
    pub(crate) memory: RegionState,
    /// The number of virtqueues for which the region has room.
    pub(crate) rings: u16,
    /// The number of descriptors for each virtqueue.
    pub(crate) entries: u16,
}

/// The state of a virtqueue.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RingState {
    /// The number of descriptors.
    pub(crate) size: u16,
    /// The guest addresses of descriptor table, available ring and used ring; `None`: the front-end has not set them.
    pub(crate) at: Option<[u64; 3]>,
    /// The next entry of the available ring to take.
    pub(crate) next_avail: u16,
    /// The front-end has enabled the virtqueue (SET_VRING_ENABLE).
    pub(crate) enabled: bool,
    /// The eventfd by which the guest notifies us, by its index.
    pub(crate) kick: Option<usize>,
    /// The eventfd by which we notify the guest, by its index.
    pub(crate) call: Option<usize>,
    /// The eventfd for errors, by its index.
    pub(crate) err: Option<usize>,
    /// The heads of the failed requests that are retained.
    pub(crate) kept: Vec<u16>,
}
