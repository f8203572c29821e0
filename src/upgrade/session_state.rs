//! The state of a front-end's connection as plain data: the part of the hand-over that a device takes over.
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
    /// The size of the disk that the front-end knows.
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
    pub(crate) guest_addr: u64,
    pub(crate) user_addr: u64,
    pub(crate) size: u64,
    pub(crate) offset: u64,
    pub(crate) file: usize,
}

/// Memory that the front-end shares for its bookkeeping.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RegionState {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) file: usize,
}

/// The region in which requests in flight are tracked.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct InflightState {
    pub(crate) memory: RegionState,
    pub(crate) rings: u16,
    pub(crate) entries: u16,
}

/// A virtqueue.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RingState {
    pub(crate) size: u16,
    /// The guest addresses of descriptor table, available ring and used ring; `None`: the front-end has not set them.
    pub(crate) at: Option<[u64; 3]>,
    pub(crate) next_avail: u16,
    pub(crate) enabled: bool,
    pub(crate) kick: Option<usize>,
    pub(crate) call: Option<usize>,
    pub(crate) err: Option<usize>,
    /// The heads of the failed requests that are retained.
    pub(crate) kept: Vec<u16>,
}
