//! PURE. Measures how long the guest's writes have waited for holds, and bounds that time (`--max-hold`).

use std::time::{Duration, Instant};

/// How long the gate must be open until writes count as having flowed: by then the rings have taken the waiting writes.
/// A hold that begins sooner counts together with the holds before it.
const MIN_FLOW_TIME: Duration = Duration::from_millis(100);

/// Measures the time during which the gate was closed, or open too shortly to count.
#[derive(Default)]
pub(super) struct HeldTime {
    /// The bound, if there is one.
    max: Option<Duration>,
    /// When the gate closed for the first of the holds that count together.
    since: Option<Instant>,
    /// When the gate opened after the last of these holds. `None`: the gate is closed, or was never closed.
    opened: Option<Instant>,
}

impl HeldTime {
    pub(super) fn new(max: Option<Duration>) -> Self {
        HeldTime { max, ..HeldTime::default() }
    }

    /// Returns the bound, if there is one.
    pub(super) fn max(&self) -> Option<Duration> {
        self.max
    }

    pub(super) fn close(&mut self, now: Instant) {
        if self.since(now).is_none() {
            self.since = Some(now);
        }
        self.opened = None;
    }

    pub(super) fn open(&mut self, now: Instant) {
        self.opened = Some(now);
    }

    /// Returns since when writes have not flowed. `None`: they flow.
    fn since(&self, now: Instant) -> Option<Instant> {
        let flowed = self.opened.is_some_and(|opened| now.saturating_duration_since(opened) >= MIN_FLOW_TIME);
        self.since.filter(|_| !flowed)
    }

    /// Returns how long writes have not flowed. Zero: they flow.
    pub(super) fn sum(&self, now: Instant) -> Duration {
        self.since(now).map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Returns when a hold that is granted or requested now must end. `None`: there is no bound.
    pub(super) fn end(&self, now: Instant) -> Option<Instant> {
        self.max.map(|max| self.since(now).unwrap_or(now) + max)
    }

    /// Whether the bound is reached. Then there must be no new hold until writes have flowed.
    pub(super) fn is_spent(&self, now: Instant) -> bool {
        self.end(now).is_some_and(|end| end <= now)
    }
}
