//! Front-ends that fail one after the other for the same reason, such as a QEMU whose memory is not shared and that
//! reconnects at once: the reason is logged once, and again each minute with a count.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::Level;

use crate::base::rate_limit::FRONT_END_LOG;

/// How long a reason that comes again is counted and not logged.
const REPEAT_PERIOD: Duration = Duration::from_secs(60);

/// The last failure.
#[derive(Default)]
pub(super) struct Failures(Option<Failure>);

struct Failure {
    why: String,
    logged: Instant,
    times: u64,
}

impl Failures {
    /// Takes one in. Returns how often it happened so far, when that is to be logged.
    fn take(&mut self, why: &str, now: Instant) -> Option<u64> {
        let Some(known) = self.0.as_mut().filter(|known| known.why == why) else {
            self.0 = Some(Failure { why: why.to_owned(), logged: now, times: 1 });
            return Some(1);
        };
        known.times += 1;
        if now.saturating_duration_since(known.logged) < REPEAT_PERIOD {
            return None;
        }
        known.logged = now;
        Some(known.times)
    }

    /// Whether front-ends fail again and again at this time.
    pub(super) fn repeat(&self, now: Instant) -> bool {
        let is_recent = |known: &Failure| now.saturating_duration_since(known.logged) < REPEAT_PERIOD;
        self.0.as_ref().is_some_and(|known| known.times > 1 && is_recent(known))
    }
}

/// Logs that a front-end failed, `what` with its name, or counts it. Its thread.
pub(super) fn log(failures: &Mutex<Failures>, level: Level, what: &str, why: &str) {
    let times = failures.lock().expect("no panic while held").take(why, Instant::now());
    match times {
        None => log::debug!("{what}: {why}"),
        Some(1) => FRONT_END_LOG.log(level, format_args!("{what}: {why}")),
        Some(times) => FRONT_END_LOG.log(level, format_args!("{what}: {why} ({times} front-ends so far)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_that_comes_again_is_counted() {
        let (mut failures, start) = (Failures::default(), Instant::now());
        assert_eq!(failures.take("a", start), Some(1));
        assert!(!failures.repeat(start), "one is no repetition");
        assert_eq!((0..5).filter_map(|_| failures.take("a", start)).count(), 0);
        assert!(failures.repeat(start));
        assert_eq!(failures.take("a", start + REPEAT_PERIOD), Some(7));
        assert!(!failures.repeat(start + 2 * REPEAT_PERIOD), "it was long ago");
        assert_eq!(failures.take("b", start + REPEAT_PERIOD), Some(1));
        assert_eq!(failures.take("a", start + REPEAT_PERIOD), Some(1));
    }
}
