//! Limits the rate of what a guest, a front-end, a client or another user of the image can cause any number of times.

use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::Level;

/// Admits a burst at once, and then as many in each period. It counts what it does not admit. A pause earns one burst
/// at most.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    burst: u32,
    /// The time between two admissions at the lasting rate.
    interval: Duration,
    /// When the next admission is due at the lasting rate. It may come `burst - 1` intervals earlier.
    schedule: Option<Instant>,
    suppressed: u64,
}

impl RateLimiter {
    /// Admits `burst` at once, and `burst` in each `period` after that.
    pub(crate) const fn new(burst: u32, period: Duration) -> Self {
        let interval = Duration::from_nanos(period.as_nanos() as u64 / burst as u64);
        RateLimiter { burst, interval, schedule: None, suppressed: 0 }
    }

    /// The limiter of one kind of event for the clients of the control socket.
    pub(crate) const fn for_events() -> Self {
        RateLimiter::new(20, Duration::from_secs(1))
    }

    /// Admits one, and returns how many were not admitted since the last admission. Returns `None` when it is not
    /// admitted; it is then counted.
    pub(crate) fn admit(&mut self, now: Instant) -> Option<u64> {
        if !self.has_one(now) {
            self.suppressed += 1;
            return None;
        }
        self.take();
        Some(std::mem::take(&mut self.suppressed))
    }

    /// Counts `more` that were lost before they reached this limiter.
    pub(crate) fn add_suppressed(&mut self, more: u64) {
        self.suppressed += more;
    }

    /// Whether [`RateLimiter::take`] is allowed now.
    pub(crate) fn has_one(&mut self, now: Instant) -> bool {
        self.schedule = Some(self.schedule.map_or(now, |schedule| schedule.max(now)));
        self.ready_at(now) <= now
    }

    /// Takes one admission. Called after [`RateLimiter::has_one`] returned `true`.
    pub(crate) fn take(&mut self) {
        self.schedule = self.schedule.map(|schedule| schedule + self.interval);
    }

    /// When the next one is admitted.
    pub(crate) fn ready_at(&self, now: Instant) -> Instant {
        let early = self.interval * (self.burst - 1);
        self.schedule.and_then(|schedule| schedule.checked_sub(early)).unwrap_or(now)
    }
}

/// Limits the log lines of one cause. Each logged line says how many were left out before it.
pub(crate) struct LogLimit(Mutex<RateLimiter>);

impl LogLimit {
    /// Admits 60 lines at once and one line a second after that: 13 MB a day at most, and every line of what is rare.
    pub(crate) const fn new() -> Self {
        LogLimit::of(60, Duration::from_secs(60))
    }

    /// Admits `burst` lines at once, and `burst` in each `period` after that.
    pub(crate) const fn of(burst: u32, period: Duration) -> Self {
        LogLimit(Mutex::new(RateLimiter::new(burst, period)))
    }

    /// Logs the line, or counts it. Called by any thread.
    pub(crate) fn log(&self, level: Level, line: fmt::Arguments<'_>) {
        if !log::log_enabled!(level) {
            return;
        }
        if let Some(line) = self.admit(line, Instant::now()) {
            log::log!(level, "{line}");
        }
    }

    /// Returns the line to log, with the number of lines that were left out before it; `None` when it is not admitted.
    pub(crate) fn admit(&self, line: fmt::Arguments<'_>, now: Instant) -> Option<String> {
        let admitted = self.0.lock().expect("no panic while held").admit(now)?;
        Some(match admitted {
            0 => line.to_string(),
            more => format!("{line} (left out before it: {more} like it)"),
        })
    }
}

/// Logs through a [`LogLimit`]: `log_limited!(FRONT_END_LOG, Warn, "virtqueue {index} ...")`.
macro_rules! log_limited {
    ($limit:expr, $level:ident, $($line:tt)+) => {
        $limit.log(log::Level::$level, format_args!($($line)+))
    };
}
pub(crate) use log_limited;

/// The limit of lines that front-ends cause by their connections and messages.
pub(crate) static FRONT_END_LOG: LogLimit = LogLimit::new();
/// The limit of lines that any process can cause that reaches the control socket.
pub(crate) static CONTROL_LOG: LogLimit = LogLimit::new();
/// The limit of lines that served clients of the control socket cause: holds, snapshots, upgrades. It is separate, so
/// that refused clients cannot suppress these lines.
pub(crate) static COMMAND_LOG: LogLimit = LogLimit::new();
/// The limit of lines that clients cause by copies.
pub(crate) static COPY_LOG: LogLimit = LogLimit::new();
/// The limit of lines that other users of the image and its store cause.
pub(crate) static IMAGE_LOG: LogLimit = LogLimit::new();
/// The limit of lines that repeated errors of the image's storage cause.
pub(crate) static STORAGE_LOG: LogLimit = LogLimit::new();
/// The limit of lines that other processes of the host cause: signals, systemd's socket.
pub(crate) static HOST_LOG: LogLimit = LogLimit::new();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_beyond_the_rate_are_counted() {
        let mut limiter = RateLimiter::new(20, Duration::from_secs(1));
        let now = Instant::now();
        assert_eq!((0..100).filter(|_| limiter.admit(now).is_some()).count(), 20);
        assert_eq!(limiter.admit(now + Duration::from_secs(1)), Some(80));
        assert_eq!(limiter.admit(now + Duration::from_secs(1)), Some(0));
        limiter.add_suppressed(3);
        assert_eq!(limiter.admit(now + Duration::from_secs(1)), Some(3));
    }

    #[test]
    fn a_line_says_how_many_were_left_out_before_it() {
        let limit = LogLimit::of(2, Duration::from_secs(10));
        let now = Instant::now();
        let lines: Vec<_> = (0..5).filter_map(|n| limit.admit(format_args!("line {n}"), now)).collect();
        assert_eq!(lines, ["line 0", "line 1"]);
        let later = limit.admit(format_args!("line 5"), now + Duration::from_secs(10));
        assert_eq!(later.unwrap(), "line 5 (left out before it: 3 like it)");
    }

    #[test]
    fn a_burst_is_followed_by_the_rate() {
        const PER_SECOND: u32 = 100;
        let start = Instant::now();
        let mut limiter = RateLimiter::new(PER_SECOND, Duration::from_secs(1));
        let mut taken = |now| {
            let mut count = 0;
            while limiter.has_one(now) {
                limiter.take();
                count += 1;
            }
            (count, limiter.ready_at(now))
        };
        let (count, ready) = taken(start);
        assert_eq!(count, PER_SECOND);
        assert!(ready > start);
        assert_eq!(taken(ready).0, 1);
        let minute = ready + Duration::from_secs(60);
        assert_eq!(taken(minute).0, PER_SECOND, "a pause earns no more than a burst");
        assert_eq!(taken(minute + Duration::from_millis(100)).0, PER_SECOND / 10);
    }
}
