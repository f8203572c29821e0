//! What one exploration starts from: a cache mode, the features, and the requests of a script.

use super::{CacheMode, Kind};

/// A set of requests of the script, one bit each.
pub type RequestSet = u8;

/// What one exploration starts from.
#[derive(Clone, Debug)]
pub struct Setup {
    pub mode: CacheMode,
    pub durable_writes: bool,
    pub driver_can_flush: bool,
    /// The requests, in the virtqueue's order.
    pub script: Vec<Kind>,
    /// How often writes are blocked, at most.
    pub blocks: u8,
    /// How many completions fail, at most.
    pub errors: u8,
    /// Failed transfers are retained.
    pub retains: bool,
}

impl Setup {
    /// A change is acknowledged when it is durable.
    pub(super) fn is_through(&self) -> bool {
        match self.mode {
            CacheMode::Directsync | CacheMode::Writethrough => true,
            CacheMode::None | CacheMode::Writeback => !self.driver_can_flush,
            CacheMode::Unsafe => false,
        }
    }

    pub(super) fn reads(&self) -> RequestSet {
        self.requests_of(|kind| kind == Kind::Read)
    }

    pub(super) fn flushes(&self) -> RequestSet {
        self.requests_of(|kind| kind == Kind::Flush)
    }

    pub(super) fn changes(&self) -> RequestSet {
        self.requests_of(|kind| !matches!(kind, Kind::Read | Kind::Flush))
    }

    fn requests_of(&self, is: impl Fn(Kind) -> bool) -> RequestSet {
        self.script.iter().enumerate().filter(|(_, kind)| is(**kind)).map(|(request, _)| 1 << request).sum()
    }
}
