//! Errors that are worth showing: what the status keeps of them, and what the log gets.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::disk::{Event, FailedRequest, LastError};

/// The errors of one disk.
#[derive(Default)]
pub(in crate::virtio) struct Errors {
    /// And whether the guest or the front-end provoked it.
    last_errors: VecDeque<(bool, LastError)>,
    /// Of the disk's own errors, and of those that the guest or the front-end provokes.
    log_budgets: [LogBudget; 2],
}

/// Errors are logged this often at most, for a guest can provoke them; the counters have them all.
#[derive(Default)]
struct LogBudget {
    window: Option<Instant>,
    used: u32,
    suppressed: u64,
}

/// What [`LogBudget::admit`] decided.
pub(in crate::virtio) struct LogLine {
    admitted: bool,
    /// Lines left out before this one.
    suppressed: u64,
}

/// Errors shown in status.
const LAST_ERRORS: usize = 8;
/// Lines about errors in one [`LOG_WINDOW`].
const LOG_LINES: u32 = 10;
const LOG_WINDOW: Duration = Duration::from_secs(10);

/// An event in words, if it is an error.
pub(in crate::virtio) fn text(event: &Event) -> Option<String> {
    Some(match event {
        Event::IoError { operation, ring, offset, len, errno } => {
            let why = std::io::Error::from_raw_os_error(errno.0);
            format!("{operation} of {len} bytes at {offset} (ring {ring}) failed: {why}")
        }
        Event::SyncError(errno) => {
            format!("sync failed: {}: acknowledged writes may be lost", std::io::Error::from_raw_os_error(errno.0))
        }
        Event::ProtocolError(what) => what.clone(),
        Event::IoStalled { ring, requests, oldest } => format!(
            "ring {ring}: {requests} requests wait for the image's storage, the oldest for {} s: see the host's \
                 kernel log, and the storage",
            oldest.as_secs()
        ),
        Event::IoStopped(FailedRequest { operation, ring, offset, len, errno }) => format!(
            "ring {ring} stopped: {operation} of {len} bytes at {offset} failed: {}. It is kept from the guest: mend the \
             cause, then 'virtioblkctl continue'",
            std::io::Error::from_raw_os_error(errno.0)
        ),
        _ => return None,
    })
}

impl Errors {
    /// Takes one in. `by_guest`: the guest or the front-end provoked it. The line is to be logged without the lock.
    pub(in crate::virtio) fn take(&mut self, by_guest: bool, what: String) -> LogLine {
        let when = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.remember(by_guest, LastError { what, when });
        self.log_budgets[usize::from(by_guest)].admit()
    }

    /// For the status, newest last.
    pub(in crate::virtio) fn last(&self) -> Vec<LastError> {
        self.last_errors.iter().map(|(_, error)| error.clone()).collect()
    }

    /// Keeps an error for the status. What a guest provokes pushes out its own like, so that it cannot hide the rest.
    fn remember(&mut self, by_guest: bool, error: LastError) {
        if self.last_errors.len() == LAST_ERRORS {
            let guests = self.last_errors.iter().position(|(by_guest, _)| *by_guest);
            self.last_errors.remove(guests.unwrap_or(0));
        }
        self.last_errors.push_back((by_guest, error));
    }
}

impl LogBudget {
    fn admit(&mut self) -> LogLine {
        let mut suppressed = 0;
        if self.window.is_none_or(|start| start.elapsed() > LOG_WINDOW) {
            suppressed = self.suppressed;
            *self = LogBudget { window: Some(Instant::now()), used: 0, suppressed: 0 };
        }
        let admitted = self.used < LOG_LINES;
        self.used += u32::from(admitted);
        self.suppressed += u64::from(!admitted);
        LogLine { admitted, suppressed }
    }
}

impl LogLine {
    pub(in crate::virtio) fn log(&self, text: &str) {
        if self.suppressed > 0 {
            log::warn!("{} more errors were not logged", self.suppressed);
        }
        if self.admitted {
            log::error!("{text}");
        }
    }
}
