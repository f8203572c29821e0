//! The options of a device.

use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::engine::throttle::Limits;
use crate::engine::{CacheMode, OnError};

/// The options of a device that every user should know.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// The cache mode.
    pub mode: CacheMode,
    /// How many rings a front-end may use, 1 to 256.
    pub num_queues: u16,
    /// The largest ring that a front-end may set up, in descriptors; a power of two.
    pub queue_size: u16,
    /// The serial that GET_ID returns. It is cut to 20 bytes.
    pub serial: String,
}

/// The options of a device that most users leave at their defaults.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// A request that is in flight for longer than this is reported as stalled.
    pub stall_after: Duration,
    /// Which failed requests are retained until an operator has fixed the cause.
    pub on_error: OnError,
    /// How long a worker polls for work before it sleeps, at most. Zero: it sleeps at once.
    pub poll_max: Duration,
    /// The granularity of discards that the guest sees, in bytes. `None`: the back-end's. Discards that do not fill it are
    /// served like any other.
    pub discard_granularity: Option<u32>,
    /// The limits of the disk's rates at the start.
    pub limits: Limits,
    /// The protocol features that may be offered. Tests leave out INFLIGHT_SHMFD, to show that they would notice.
    pub protocol_features: VhostUserProtocolFeatures,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            stall_after: Duration::from_secs(10),
            on_error: OnError::Report,
            poll_max: Duration::ZERO,
            discard_granularity: None,
            limits: Limits::default(),
            protocol_features: VhostUserProtocolFeatures::all(),
        }
    }
}
