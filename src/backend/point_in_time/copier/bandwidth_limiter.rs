//! The bandwidth limit of a copy.

use std::time::{Duration, Instant};

use super::MAX_READ;

/// The bandwidth limit: each read delays the next one by the time that its bytes take at the limit.
#[derive(Default)]
pub(in crate::backend::point_in_time) struct BandwidthLimiter {
    /// Bytes a second; 0: no limit.
    limit: u64,
    /// When the next read may start.
    next: Option<Instant>,
}

impl BandwidthLimiter {
    /// Sets the limit; called before each use of the limiter.
    pub(in crate::backend::point_in_time) fn set_limit(&mut self, limit: u64, now: Instant) {
        if limit != self.limit {
            (self.limit, self.next) = (limit, None);
        }
        // Unused time is lost, so that there is no burst after a pause.
        self.next = Some(self.next.map_or(now, |next| next.max(now)));
    }

    /// Returns how long the next read must wait; `None`: it may start now.
    pub(in crate::backend::point_in_time) fn delay(&self, now: Instant) -> Option<Duration> {
        let delay = self.next?.saturating_duration_since(now);
        (self.limit > 0 && delay > Duration::ZERO).then_some(delay)
    }

    /// Counts the bytes of a read that starts.
    pub(in crate::backend::point_in_time) fn charge(&mut self, bytes: u64) {
        if self.limit > 0 {
            let time = Duration::from_secs_f64((bytes as f64 / self.limit as f64).min(3600.0));
            self.next = self.next.map(|next| next + time);
        }
    }

    /// The most bytes of one run: those of about an eighth of a second.
    pub(in crate::backend::point_in_time) fn max_read(&self) -> u64 {
        if self.limit == 0 { MAX_READ } else { (self.limit / 8).min(MAX_READ) }
    }
}
