//! Snapshots that another client takes: librbd sends a quiesce request, the daemon holds the disk and consents, and librbd
//! reports when the snapshot was taken.
//!
//! Seen with librbd 1.16 and read in 1.18: the snapshot waits 50 s for the consent. While we hold the image's lock, some
//! error numbers make the client that takes the snapshot retry without end: ETIMEDOUT and ERESTART. EOPNOTSUPP counts as
//! consent. After a consent librbd ends the quiesce itself if it hears nothing for 10 s, and it also reports the end after
//! a refusal. Removing a watch hangs while a reply is due.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::super::{Errno, Notices, QuiesceRequest};
use super::Shared;
use super::callbacks::Watch;
use super::watch_event::WatchEvent;
use crate::base::rate_limit::{IMAGE_LOG, log_limited};
use crate::disk::RbdQuiesceStatus;

/// How much later our deadline is than that of the daemon's hold. It is still before librbd's 50 s.
const CONSENT_MARGIN: Duration = Duration::from_secs(2);

/// A quiesce that librbd ends after this time was ended by its timeout of 10 s.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(9900);

/// Receives the quiesce requests of an image, and replies to them.
pub(super) struct QuiesceWatch {
    shared: Arc<Shared>,
    timeout: Duration,
    state: Mutex<State>,
    /// Apart from `state`, whose lock is held during calls of librbd.
    history: Mutex<History>,
}

#[derive(Default)]
struct State {
    watch: Option<Arc<Watch>>,
    notices: Option<Arc<dyn Notices>>,
    /// The requests without a reply: their numbers and deadlines.
    open: Vec<(u64, Instant)>,
    /// The number of requests so far.
    asked: u64,
    stopping: bool,
}

#[derive(Default)]
struct History {
    /// When the last consent was given, until librbd reports that the snapshot was taken.
    held_since: Option<Instant>,
    status: RbdQuiesceStatus,
}

impl QuiesceWatch {
    /// Creates the receiver; [`QuiesceWatch::start`] begins to watch. `timeout`: how long the daemon may take to hold
    /// the disk.
    pub(super) fn new(shared: Arc<Shared>, timeout: Duration) -> Self {
        QuiesceWatch { shared, timeout: timeout + CONSENT_MARGIN, state: Mutex::default(), history: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().expect("no panic while held")
    }

    /// Returns the counters for the image's status.
    pub(super) fn status(&self) -> RbdQuiesceStatus {
        self.history().status.clone()
    }

    /// Starts the watch for quiesce requests.
    pub(super) fn start(self: &Arc<Self>, notices: Arc<dyn Notices>) {
        // Locked meanwhile: an early callback waits until there is a watch through which to reply.
        let mut state = self.lock();
        let (asked, done) = (Arc::downgrade(self), Arc::downgrade(self));
        let watch = Watch::quiesces(
            Arc::clone(&self.shared),
            Box::new(move || asked.upgrade().into_iter().for_each(|quiesces| quiesces.receive_request())),
            Box::new(move || done.upgrade().into_iter().for_each(|quiesces| quiesces.quiesce_ended())),
        );
        state.notices = Some(notices);
        match watch {
            Ok(watch) => {
                state.watch = Some(Arc::new(watch));
                self.history().status.watching = true;
            }
            Err(errno) => log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: no quiesce watch ({}): snapshots that other clients take do not wait until this disk is held",
                self.shared.name,
                super::io_error(errno)
            ),
        }
    }

    /// Stops the watch and refuses every request that has no reply.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.stopping = true;
        let Some(watch) = state.watch.clone() else {
            state.notices = None;
            return;
        };
        for _ in state.open.drain(..) {
            watch.complete(-libc::ECANCELED);
        }
        drop(state);
        // `receive_request` refuses a request that comes now.
        if let Err(errno) = watch.stop() {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: the quiesce watch cannot be removed: {}",
                self.shared.name,
                super::io_error(errno)
            );
        }
        let mut state = self.lock();
        (state.watch, state.notices) = (None, None);
        drop(state);
        self.history().status.watching = false;
    }

    /// Handles a quiesce request. Called by a thread of librbd.
    fn receive_request(self: &Arc<Self>) {
        let mut state = self.lock();
        let (Some(watch), Some(notices)) = (state.watch.clone(), state.notices.clone()) else { return };
        self.history().status.asked += 1;
        if state.stopping {
            return watch.complete(-libc::ECANCELED);
        }
        state.asked += 1;
        let number = state.asked;
        state.open.push((number, Instant::now() + self.timeout));
        drop(state);
        // The watch thread runs until after `stop`.
        let _ = self.shared.events.send(WatchEvent::Quiesce);
        let quiesces = Arc::downgrade(self);
        notices.quiesce(QuiesceRequest::new(move |result| {
            // If it is gone, `stop` has replied.
            if let Some(quiesces) = quiesces.upgrade() {
                quiesces.reply(number, result);
            }
        }));
    }

    /// Replies to a request, unless it has a reply.
    fn reply(&self, number: u64, result: Result<(), Errno>) {
        let mut state = self.lock();
        let Some(at) = state.open.iter().position(|(open, _)| *open == number) else { return };
        state.open.swap_remove(at);
        let Some(watch) = &state.watch else { return };
        let mut history = self.history();
        if result.is_ok() {
            history.held_since = Some(Instant::now());
        } else {
            history.status.refused += 1;
        }
        drop(history);
        watch.complete(result.map_or_else(|errno| -refusal(errno), |()| 0));
    }

    /// Handles the end of a quiesce: the snapshot was taken or given up, or librbd waited too long. Called by a thread of
    /// librbd.
    fn quiesce_ended(&self) {
        let mut history = self.history();
        let held = history.held_since.take().map(|since| since.elapsed());
        if let Some(held) = held.filter(|held| *held >= RELEASE_TIMEOUT) {
            history.status.expired += 1;
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: librbd ended the quiesce {:.1} s after the disk was held, before the snapshot was complete: a group \
                 snapshot may not be of one instant, because another disk of the group took too long",
                self.shared.name,
                held.as_secs_f32()
            );
        }
        drop(history);
        let notices = self.lock().notices.clone();
        if let Some(notices) = notices {
            notices.unquiesce();
        }
    }

    /// Refuses the requests whose deadline has passed. Returns the next deadline. Called by the watch thread.
    pub(super) fn expire(&self) -> Option<Instant> {
        let mut state = self.lock();
        let now = Instant::now();
        let before = state.open.len();
        state.open.retain(|(_, deadline)| *deadline > now);
        let late = before - state.open.len();
        for _ in 0..late {
            let Some(watch) = &state.watch else { break };
            watch.complete(-libc::EAGAIN);
        }
        let next = state.open.iter().map(|(_, deadline)| *deadline).min();
        let notices = state.notices.clone();
        drop(state);
        if late > 0 {
            self.history().status.refused += late as u64;
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: a snapshot was refused: the disk could not be held within {} s",
                self.shared.name,
                (self.timeout - CONSENT_MARGIN).as_secs()
            );
            if let Some(notices) = notices {
                notices.unquiesce();
            }
        }
        next
    }
}

/// Returns an error number with which the client that takes the snapshot gives up, and does not retry or proceed.
fn refusal(errno: Errno) -> i32 {
    match errno.0 {
        libc::EBUSY | libc::EIO | libc::EAGAIN | libc::ECANCELED | libc::ENOSPC => errno.0,
        libc::ETIMEDOUT => libc::EAGAIN,
        _ => libc::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_refusal_makes_the_client_retry_for_ever_or_proceed() {
        for errno in 1..200 {
            let sent = refusal(Errno(errno));
            assert!([libc::EBUSY, libc::EIO, libc::EAGAIN, libc::ECANCELED, libc::ENOSPC].contains(&sent), "{errno}");
        }
        assert_eq!(refusal(Errno(libc::ETIMEDOUT)), libc::EAGAIN);
        assert_eq!(refusal(Errno(libc::EBUSY)), libc::EBUSY);
        assert_eq!(refusal(Errno(libc::EOPNOTSUPP)), libc::EIO);
    }
}
