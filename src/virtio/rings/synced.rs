//! Which acknowledged bytes are durable. A sync covers what every ring had acknowledged when it began, so the rings know of
//! each other's syncs.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::{Rings, State};
use crate::disk::RingCounters;

/// What a sync covers. A worker reuses one for all its syncs.
#[derive(Default)]
pub(in crate::virtio) struct SyncCover {
    /// The rings, and how many bytes each had acknowledged when the sync began.
    rings: Vec<(Arc<RingCounters>, u64)>,
    /// The value of `Rings::generation` when `rings` was made.
    generation: u64,
    /// When the sync began, in ticks since the disk's start.
    began: u64,
}

impl SyncCover {
    /// A sync begins `now`. Locks nothing unless a ring ran for the first time since the last call.
    pub(in crate::virtio) fn begin(&mut self, rings: &Rings, now: u64) {
        let generation = rings.generation.load(Acquire);
        if self.generation != generation {
            self.rings = all(&rings.lock());
            self.generation = generation;
        }
        for (counters, acknowledged) in &mut self.rings {
            *acknowledged = counters.acknowledged.load(Acquire);
        }
        self.began = now;
    }

    /// The sync that began last has succeeded.
    pub(in crate::virtio) fn succeeded(&self, rings: &Rings) {
        for (counters, acknowledged) in &self.rings {
            // Most syncs find that another ring has nothing new.
            if counters.durable.load(Relaxed) < *acknowledged {
                counters.durable.fetch_max(*acknowledged, Release);
            }
        }
        // One more, because 0 says that there was none.
        rings.synced_at.fetch_max(self.began + 1, Relaxed);
    }
}

/// All rings that ever ran.
fn all(state: &State) -> Vec<(Arc<RingCounters>, u64)> {
    state.counters.values().map(|counters| (counters.clone(), 0)).collect()
}
