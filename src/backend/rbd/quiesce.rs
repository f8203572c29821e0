//! Snapshots that somebody else takes: librbd asks, whoever listens holds the disk still and answers, and librbd says
//! when it was taken.
//!
//! Seen with librbd 1.16 and read in 1.18: the snapshot waits 50 s for the answer. Where we hold the image's lock, some
//! error numbers make whoever takes the snapshot try again without end: ETIMEDOUT and ERESTART; EOPNOTSUPP counts as
//! consent. After a consent librbd lets go by itself if it hears nothing for 10 s, and after a refusal it says so too.
//! A watch that is removed while an answer is due hangs.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::super::{Errno, Notices, QuiesceAsk};
use super::Shared;
use super::callbacks::Watch;
use super::news::KeeperEvent;
use crate::base::rate_limit::{IMAGE_LOG, log_limited};
use crate::disk::RbdQuiesceStatus;

/// Whoever listens has a deadline too; ours comes after it, and before librbd's 50 s.
const CONSENT_MARGIN: Duration = Duration::from_secs(2);
/// librbd lets go after 10 s.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(9900);

/// The quiesces of an image.
pub(super) struct Quiesces {
    shared: Arc<Shared>,
    timeout: Duration,
    state: Mutex<State>,
    /// Apart from `state`, which is held while librbd is called.
    history: Mutex<History>,
}

#[derive(Default)]
struct State {
    watch: Option<Arc<Watch>>,
    notices: Option<Arc<dyn Notices>>,
    /// Asked and not answered: number and deadline.
    open: Vec<(u64, Instant)>,
    asked: u64,
    stopping: bool,
}

#[derive(Default)]
struct History {
    /// When the last consent was given, until librbd says that the snapshot was taken.
    held_since: Option<Instant>,
    status: RbdQuiesceStatus,
}

impl Quiesces {
    pub(super) fn new(shared: Arc<Shared>, timeout: Duration) -> Self {
        Quiesces { shared, timeout: timeout + CONSENT_MARGIN, state: Mutex::default(), history: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().expect("no panic while held")
    }

    pub(super) fn status(&self) -> RbdQuiesceStatus {
        self.history().status.clone()
    }

    /// Begins to listen.
    pub(super) fn start(self: &Arc<Self>, notices: Arc<dyn Notices>) {
        // Held meanwhile: a callback that comes early waits until there is a watch to answer with.
        let mut state = self.lock();
        let (asked, done) = (Arc::downgrade(self), Arc::downgrade(self));
        let watch = Watch::quiesces(
            Arc::clone(&self.shared),
            Box::new(move || asked.upgrade().into_iter().for_each(|quiesces| quiesces.ask())),
            Box::new(move || done.upgrade().into_iter().for_each(|quiesces| quiesces.unquiesced())),
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
                "{}: no quiesce watch ({}): snapshots taken by others do not wait for this disk to be held still",
                self.shared.name,
                super::io_error(errno)
            ),
        }
    }

    /// Every question is answered, and no other comes.
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
        // A callback that comes now is answered by `ask`.
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

    /// librbd asks. A thread of its own.
    fn ask(self: &Arc<Self>) {
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
        // The keeper lives until after `stop`.
        let _ = self.shared.news.send(KeeperEvent::Quiesce);
        let quiesces = Arc::downgrade(self);
        notices.quiesce(QuiesceAsk::new(move |result| {
            // Without it all was answered by `stop`.
            if let Some(quiesces) = quiesces.upgrade() {
                quiesces.answer(number, result);
            }
        }));
    }

    /// The answer to a question, unless it has one.
    fn answer(&self, number: u64, result: Result<(), Errno>) {
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
        watch.complete(result.map_or_else(|errno| -safe(errno), |()| 0));
    }

    /// The snapshot was taken or given up, or librbd waited too long. A thread of its own.
    fn unquiesced(&self) {
        let mut history = self.history();
        let held = history.held_since.take().map(|since| since.elapsed());
        if let Some(held) = held.filter(|held| *held >= RELEASE_TIMEOUT) {
            history.status.expired += 1;
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: librbd let the disk go {:.1} s after it was held still, before the snapshot was taken or while it \
                 was: a group snapshot may not be of one instant. Another disk of the group took too long",
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

    /// Refuses what waited too long for an answer. The next deadline. The keeper.
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
                "{}: a snapshot was refused: the disk was not held still within {} s",
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

/// An error number that makes whoever takes the snapshot give up, and nothing worse.
fn safe(errno: Errno) -> i32 {
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
    fn no_answer_makes_the_asker_try_for_ever_or_go_on_regardless() {
        for errno in 1..200 {
            let told = safe(Errno(errno));
            assert!([libc::EBUSY, libc::EIO, libc::EAGAIN, libc::ECANCELED, libc::ENOSPC].contains(&told), "{errno}");
        }
        assert_eq!(safe(Errno(libc::ETIMEDOUT)), libc::EAGAIN);
        assert_eq!(safe(Errno(libc::EBUSY)), libc::EBUSY);
        assert_eq!(safe(Errno(libc::EOPNOTSUPP)), libc::EIO);
    }
}
