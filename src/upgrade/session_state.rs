//! What the front-end said on one connection, in numbers and descriptors: the part of the hand-over that a device takes over.
//! Plain data. `virtio/vhost_user/save_restore.rs` fills it in and reads it.

use serde::{Deserialize, Serialize};

/// Everything but the connection itself. Numbers of descriptors are places in a list.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct SessionState {
    /// SET_FEATURES.
    pub(crate) features: Option<u64>,
    /// SET_PROTOCOL_FEATURES.
    pub(crate) protocol_features: u64,
    /// SET_MEM_TABLE and its kin.
    pub(crate) memory: Vec<Region>,
    /// SET_INFLIGHT_FD.
    pub(crate) inflight: Option<Inflight>,
    /// SET_LOG_BASE.
    pub(crate) log: Option<RegionState>,
    /// SET_BACKEND_REQ_FD.
    pub(crate) channel: Option<usize>,
    /// The size that the front-end knows.
    pub(crate) knows: Option<u64>,
    pub(crate) rings: Vec<Ring>,
}

impl SessionState {
    /// SET_FEATURES and SET_PROTOCOL_FEATURES, of which the message layer knows, too.
    pub(crate) fn negotiated(&self) -> (Option<u64>, u64) {
        (self.features, self.protocol_features)
    }
}

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

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Inflight {
    pub(crate) memory: RegionState,
    pub(crate) rings: u16,
    pub(crate) entries: u16,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ring {
    pub(crate) size: u16,
    /// Guest addresses of descriptors, available and used ring; `None`: never told.
    pub(crate) at: Option<[u64; 3]>,
    pub(crate) next_avail: u16,
    pub(crate) enabled: bool,
    pub(crate) kick: Option<usize>,
    pub(crate) call: Option<usize>,
    pub(crate) err: Option<usize>,
    /// Heads that failed and are kept.
    pub(crate) kept: Vec<u16>,
}
