//! What an operator chooses about a device.

use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::engine::{CacheMode, OnError};

/// What an operator chooses about the device.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// The cache mode.
    pub mode: CacheMode,
    /// The most rings that a front-end may use, 1 to 256.
    pub num_queues: u16,
    /// The largest ring that it may set up; a power of two.
    pub queue_size: u16,
    /// What GET_ID returns; cut to 20 bytes.
    pub serial: String,
}

/// What most leave as it is.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// A request that is in flight for longer is told of.
    pub stall_after: Duration,
    /// Which failed requests are kept from the guest until somebody mended the cause.
    pub on_error: OnError,
    /// How long a ring's thread looks for work before it sleeps, at most; zero: it sleeps at once.
    pub poll_max: Duration,
    /// The protocol features that are offered at most: without INFLIGHT_SHMFD, tests show that they would notice.
    pub protocol_features: VhostUserProtocolFeatures,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            stall_after: Duration::from_secs(10),
            on_error: OnError::Report,
            poll_max: Duration::ZERO,
            protocol_features: VhostUserProtocolFeatures::all(),
        }
    }
}
