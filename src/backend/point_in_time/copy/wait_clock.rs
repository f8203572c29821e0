//! For how long a copy has made the guest's writes wait.

use std::time::{Duration, Instant};

/// How long the guest's writes wait for a copy, in total, before the first warning. Each further warning comes at twice
/// the time of the one before.
const FIRST_WARNING: Duration = Duration::from_secs(10);

/// Measures the time in which at least one op was delayed.
pub(super) struct WaitClock {
    /// Since when ops have been delayed; `None`: none is.
    waiting_since: Option<Instant>,
    /// For how long ops were delayed before `waiting_since`.
    waited: Duration,
    /// The total at which to log the next warning.
    warn_at: Duration,
}

impl Default for WaitClock {
    fn default() -> Self {
        WaitClock { waiting_since: None, waited: Duration::ZERO, warn_at: FIRST_WARNING }
    }
}

impl WaitClock {
    /// Records whether ops are delayed from now on.
    pub(super) fn set_waiting(&mut self, waiting: bool) {
        match (waiting, self.waiting_since) {
            (true, None) => self.waiting_since = Some(Instant::now()),
            (false, Some(since)) => {
                self.waited += since.elapsed();
                self.waiting_since = None;
            }
            _ => {}
        }
    }

    /// For how long at least one op has been delayed, in total.
    pub(super) fn total(&self) -> Duration {
        self.waited + self.waiting_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Returns the total if a warning is due.
    pub(super) fn take_warning(&mut self) -> Option<Duration> {
        let total = self.total();
        (total >= self.warn_at).then(|| {
            self.warn_at = total * 2;
            total
        })
    }
}
