//! Detects I/O that hangs. The status counts the requests and an event reports them, though no completion wakes the worker.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::Worker;
use crate::base::rate_limit::{STORAGE_LOG, log_limited};
use crate::disk::{Event, duration};

impl Worker {
    /// Counts the requests that have been in flight for too long. Called on [`super::WorkerCommand::CheckStalls`], and
    /// when the virtqueue has stopped.
    pub(super) fn check_stalls(&mut self) {
        let limit = self.setup.rings.tuning().stall_after;
        let (mut requests, mut oldest) = (0, Duration::ZERO);
        if self.requests.in_flight > 0 {
            self.clock.forget();
            let now = self.clock.now();
            // A retained request waits for the operator, to whom `IoStopped` was reported.
            for request in self.requests.pending.iter().flatten().filter(|request| !request.retained) {
                let age = duration(now.saturating_sub(request.since));
                if age >= limit {
                    requests += 1;
                    oldest = oldest.max(age);
                }
            }
        }
        self.counters.stalled.store(requests, Relaxed);
        self.counters.oldest_stalled_ms.store(oldest.as_millis() as u64, Relaxed);
        let ring = self.setup.index;
        match (self.requests.stall_reported, requests > 0) {
            (false, true) => self.setup.rings.report(Event::IoStalled { ring, requests, oldest }),
            (true, false) => {
                log_limited!(
                    STORAGE_LOG,
                    Info,
                    "queue {ring}: the requests that waited for the image's storage are completed"
                );
                self.setup.rings.report(Event::IoResumed { ring });
            }
            _ => {}
        }
        self.requests.stall_reported = requests > 0;
    }
}
