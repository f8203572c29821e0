//! The errors of a disk: those that the status shows, and those that the log gets.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::base::rate_limit::RateLimiter;
use crate::disk::{Event, FailedRequest, LastError};

/// The errors of one disk.
pub(in crate::virtio) struct ErrorLog {
    last_errors: VecDeque<StoredError>,
    /// Limits the lines of the disk's own errors, and of those that the guest or the front-end causes.
    log_limits: [RateLimiter; 2],
}

/// An error that status shows.
struct StoredError {
    /// The guest or the front-end caused the error.
    by_guest: bool,
    error: LastError,
    /// When the error was last logged.
    logged: Instant,
}

/// Whether an error is logged, and how.
pub(in crate::virtio) struct LogLine {
    admitted: bool,
    /// How many lines were left out before this one.
    suppressed: u64,
    /// How often the error has happened.
    times: u64,
}

/// How many errors the status shows.
const MAX_LAST_ERRORS: usize = 8;
/// How many errors are logged at once, and in each [`LOG_PERIOD`] after that. The counters count all of them.
const LOG_BURST: u32 = 10;
const LOG_PERIOD: Duration = Duration::from_secs(10);
/// How long repetitions of an error that the guest or the front-end caused are counted and not logged.
const REPEAT_WINDOW: Duration = Duration::from_secs(60);

/// The text of an event that is an error; `None` for other events.
pub(in crate::virtio) fn text(event: &Event) -> Option<String> {
    Some(match event {
        Event::IoError(FailedRequest { kind, ring, offset, len, errno }) => {
            let why = std::io::Error::from_raw_os_error(errno.0);
            format!("{} of {len} bytes at {offset} (queue {ring}) failed: {why}", kind.name())
        }
        Event::SyncError(errno) => {
            format!("sync failed: {}: acknowledged writes may be lost", std::io::Error::from_raw_os_error(errno.0))
        }
        Event::ProtocolError(what) => what.clone(),
        Event::IoStalled { ring, requests, oldest } => format!(
            "queue {ring}: {requests} requests wait for the image's storage, the oldest for {} s: see the host's \
                 kernel log, and the storage",
            oldest.as_secs()
        ),
        Event::IoStopped(FailedRequest { kind, ring, offset, len, errno }) => format!(
            "queue {ring} stopped: {} of {len} bytes at {offset} failed: {}. It is retained and not reported to the guest: fix \
             the cause, then 'virtioblkctl continue'",
            kind.name(),
            std::io::Error::from_raw_os_error(errno.0)
        ),
        _ => return None,
    })
}

impl ErrorLog {
    /// Adds an error, which the guest or the front-end caused if `by_guest`. The caller logs the line without the lock.
    pub(in crate::virtio) fn add(&mut self, by_guest: bool, what: String) -> LogLine {
        let when = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if by_guest && let Some(line) = self.repeat(&what, when) {
            return line;
        }
        self.store(by_guest, LastError { what, when, times: 1 });
        LogLine::admitted(&mut self.log_limits[usize::from(by_guest)])
    }

    /// Counts a repetition of an error that status shows. Returns `None` when status does not show it.
    fn repeat(&mut self, what: &str, when: u64) -> Option<LogLine> {
        let at = self.last_errors.iter().position(|known| known.by_guest && known.error.what == what)?;
        let mut known = self.last_errors.remove(at)?;
        known.error.when = when;
        known.error.times += 1;
        let times = known.error.times;
        let mut line = LogLine { admitted: false, suppressed: 0, times };
        if known.logged.elapsed() > REPEAT_WINDOW {
            known.logged = Instant::now();
            line = LogLine { times, ..LogLine::admitted(&mut self.log_limits[1]) };
        }
        self.last_errors.push_back(known);
        Some(line)
    }

    /// The errors that the status shows, newest last.
    pub(in crate::virtio) fn last(&self) -> Vec<LastError> {
        self.last_errors.iter().map(|known| known.error.clone()).collect()
    }

    /// Stores an error for the status. An error that the guest caused evicts only another such error, so a guest cannot flush
    /// the host's errors from the list.
    fn store(&mut self, by_guest: bool, error: LastError) {
        if self.last_errors.len() == MAX_LAST_ERRORS {
            let caused_by_guest = self.last_errors.iter().position(|known| known.by_guest);
            self.last_errors.remove(caused_by_guest.unwrap_or(0));
        }
        self.last_errors.push_back(StoredError { by_guest, error, logged: Instant::now() });
    }
}

impl Default for ErrorLog {
    fn default() -> Self {
        let limit = || RateLimiter::new(LOG_BURST, LOG_PERIOD);
        ErrorLog { last_errors: VecDeque::new(), log_limits: [limit(), limit()] }
    }
}

impl LogLine {
    fn admitted(limit: &mut RateLimiter) -> LogLine {
        let admitted = limit.admit(Instant::now());
        LogLine { admitted: admitted.is_some(), suppressed: admitted.unwrap_or(0), times: 1 }
    }

    pub(in crate::virtio) fn log(&self, text: &str) {
        if !self.admitted {
            return;
        }
        let times = if self.times > 1 { format!(" ({} times so far)", self.times) } else { String::new() };
        let suppressed = match self.suppressed {
            0 => String::new(),
            more => format!(" (left out before it: {more} other errors)"),
        };
        log::error!("{text}{times}{suppressed}");
    }
}
