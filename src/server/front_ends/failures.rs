//! Limits the log of front-ends that fail one after the other for the same reason, such as a QEMU whose memory is not
//! shared and that reconnects at once. The reason is logged once, and then each minute with a count.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::Level;

use crate::base::rate_limit::FRONT_END_LOG;

/// For how long repetitions of a logged reason are counted and not logged.
const REPEAT_PERIOD: Duration = Duration::from_secs(60);

/// The last failure, if there was one.
#[derive(Default)]
pub(super) struct FrontEndFailures(Option<RepeatedFailure>);

/// A reason for which front-ends failed, and how often.
struct RepeatedFailure {
    reason: String,
    logged_at: Instant,
    count: u64,
}

impl FrontEndFailures {
    /// Counts a failure. Returns the count of this reason so far if it is to be logged now.
    fn record(&mut self, reason: &str, now: Instant) -> Option<u64> {
        let Some(last) = self.0.as_mut().filter(|last| last.reason == reason) else {
            self.0 = Some(RepeatedFailure { reason: reason.to_owned(), logged_at: now, count: 1 });
            return Some(1);
        };
        last.count += 1;
        if now.saturating_duration_since(last.logged_at) < REPEAT_PERIOD {
            return None;
        }
        last.logged_at = now;
        Some(last.count)
    }

    /// Whether front-ends fail repeatedly for one reason at this time.
    pub(super) fn are_repeating(&self, now: Instant) -> bool {
        let is_recent = |last: &RepeatedFailure| now.saturating_duration_since(last.logged_at) < REPEAT_PERIOD;
        self.0.as_ref().is_some_and(|last| last.count > 1 && is_recent(last))
    }
}

/// Logs or counts that a front-end failed. `what` contains the front-end's name. Called by the front-end's thread.
pub(super) fn log(failures: &Mutex<FrontEndFailures>, level: Level, what: &str, reason: &str) {
    let count = failures.lock().expect("no panic while held").record(reason, Instant::now());
    match count {
        None => log::debug!("{what}: {reason}"),
        Some(1) => FRONT_END_LOG.log(level, format_args!("{what}: {reason}")),
        Some(count) => FRONT_END_LOG.log(level, format_args!("{what}: {reason} ({count} front-ends so far)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_reason_is_counted_and_logged_once_a_minute() {
        let (mut failures, start) = (FrontEndFailures::default(), Instant::now());
        assert_eq!(failures.record("a", start), Some(1));
        assert!(!failures.are_repeating(start), "one failure is no repetition");
        assert_eq!((0..5).filter_map(|_| failures.record("a", start)).count(), 0);
        assert!(failures.are_repeating(start));
        assert_eq!(failures.record("a", start + REPEAT_PERIOD), Some(7));
        assert!(!failures.are_repeating(start + 2 * REPEAT_PERIOD), "the last failure is old");
        assert_eq!(failures.record("b", start + REPEAT_PERIOD), Some(1));
        assert_eq!(failures.record("a", start + REPEAT_PERIOD), Some(1));
    }
}
