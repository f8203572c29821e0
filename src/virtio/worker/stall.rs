//! I/O that hangs is seen: status counts it and an event tells of it, though nothing ever wakes the worker.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::Worker;
use crate::base::rate_limit::{STORAGE_LOG, log_limited};
use crate::disk::Event;

impl Worker {
    /// Counts the requests that are in flight for too long. On [`super::Command::Look`], and when the ring has stopped.
    pub(super) fn look(&mut self) {
        let limit = self.setup.rings.tuning().stall_after;
        let (mut requests, mut oldest) = (0, Duration::ZERO);
        if self.in_flight > 0 {
            // What is kept waits for the operator, who was told.
            for slot in self.slots.iter().flatten().filter(|slot| !slot.kept) {
                let age = slot.since.elapsed();
                if age >= limit {
                    requests += 1;
                    oldest = oldest.max(age);
                }
            }
        }
        self.counters.stalled.store(requests, Relaxed);
        self.counters.oldest_stalled_ms.store(oldest.as_millis() as u64, Relaxed);
        let ring = self.setup.index;
        match (self.stalled, requests > 0) {
            (false, true) => self.setup.rings.report(Event::IoStalled { ring, requests, oldest }),
            (true, false) => {
                log_limited!(
                    STORAGE_LOG,
                    Info,
                    "ring {ring}: the requests that waited for the image's storage are answered"
                );
                self.setup.rings.report(Event::IoResumed { ring });
            }
            _ => {}
        }
        self.stalled = requests > 0;
    }
}
