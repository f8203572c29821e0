//! Checks the lock while a guest uses the image. A change of the image's header may mean that its features changed (`rbd
//! feature disable`); librbd then continues without the lock and reports nothing.
//!
//! The watch thread calls these functions. It calls librbd without the lock's mutex, because librbd may wait for the
//! network, and the vhost-user thread needs the mutex to start and stop a guest. The watch thread sees a change some
//! milliseconds after the cluster made it, so a write that is in flight at that moment is still carried out.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use super::attempt::Attempt;
use super::lock::{Lock, State};
use super::{Errno, Shared, image_health};
use crate::base::rate_limit::{IMAGE_LOG, log_limited};

/// How often the lock is checked until it is ours again.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How many checks in a row may find that another client has the lock, because `rbd` commands take it for a moment. A client
/// that has it for longer may have written, which our guest does not know; the lock is then left to that client until our
/// guest restarts.
const MAX_FOREIGN_CHECKS: u32 = 5;

/// How often to retry emptying librbd's cache. It fails (EBUSY) while librbd reads or writes, which is over by then; each try
/// drops the rest of the cache.
const MAX_CACHE_DROPS: u32 = 5;

impl Lock {
    /// Checks that the image has its feature and we have the lock, as far as they are needed, and takes the lock again if
    /// no client has it. Returns when to call again; `None`: at the next change of the header.
    pub(super) fn check(&self, shared: &Arc<Shared>) -> Option<Instant> {
        if !self.wanted || shared.health.is_fenced() {
            return None;
        }
        let again = self.check_now(shared).unwrap_or_else(|(what, errno)| {
            shared.record_result(Err(errno));
            log_limited!(IMAGE_LOG, Warn, "{}: {what} cannot be read: {}", shared.name, super::io_error(errno));
            true
        });
        again.then(|| Instant::now() + CHECK_INTERVAL)
    }

    /// Checks once. Returns whether to check again. The error names what could not be read.
    fn check_now(&self, shared: &Arc<Shared>) -> Result<bool, (&'static str, Errno)> {
        let has = shared.image.can_lock().map_err(|errno| ("its features", errno))?;
        let Some(mut state) = self.state_now() else { return Ok(true) };
        self.note_feature(shared, &mut state, has);
        if !has || !state.active {
            return Ok(false);
        }
        let held = state.held;
        drop(state);
        match shared.image.is_lock_owner() {
            Ok(true) if held => Ok(self.empty_cache(shared)),
            Ok(_) => self.take_again(shared),
            Err(errno) => Err(("whether the lock is held", errno)),
        }
    }

    /// Locks the state unless another thread has locked it, which then starts or stops a guest, calls librbd itself and may
    /// wait for it.
    fn state_now(&self) -> Option<MutexGuard<'_, State>> {
        self.state.try_lock().ok()
    }

    /// Reads whether the image has the feature exclusive-lock, and reports a change.
    pub(super) fn update_feature(&self, shared: &Shared, state: &mut State) -> Result<(), Errno> {
        if self.wanted {
            self.note_feature(shared, state, shared.image.can_lock()?);
        }
        Ok(())
    }

    /// Records whether the image has the feature exclusive-lock, and reports a change.
    fn note_feature(&self, shared: &Shared, state: &mut State, has: bool) {
        if self.feature.swap(has, Ordering::AcqRel) == has {
            return;
        }
        if has {
            log_limited!(IMAGE_LOG, Info, "{}: it has the feature exclusive-lock again", shared.name);
            if !state.active {
                // The lock is taken before the image is used.
                shared.health.locked_again(&shared.events);
            }
        } else {
            state.held = false;
            if self.required {
                shared.health.unlockable(&shared.name, &shared.events);
            } else {
                log_limited!(
                    IMAGE_LOG,
                    Warn,
                    "{}: its feature exclusive-lock was disabled, so nothing keeps two hosts from writing it at once; \
                     the guest goes on. Enable it again (rbd feature enable), or use --rbd-lock exclusive to stop writes \
                     then",
                    shared.name
                );
            }
        }
        image_health::report_change(&shared.events);
    }

    /// Takes the lock again while the guest runs. Returns whether to check again.
    fn take_again(&self, shared: &Arc<Shared>) -> Result<bool, (&'static str, Errno)> {
        let owner = shared.image.lock_owner().map_err(|errno| ("the lock's owner", errno))?;
        let another = owner.filter(|_| !matches!(shared.image.is_lock_owner(), Ok(true)));
        let Some(mut state) = self.state_now() else { return Ok(true) };
        // A guest that has stopped meanwhile needs no lock.
        if !state.active {
            return Ok(false);
        }
        state.held = false;
        if state.foreign_checks >= MAX_FOREIGN_CHECKS {
            return Ok(false);
        }
        if let Some(owner) = another {
            self.note_another(shared, &mut state, &owner);
            return Ok(true);
        }
        let attempt = match state.attempt.clone().map_or_else(|| Attempt::start(shared), Ok) {
            Ok(attempt) => attempt,
            Err(error) => {
                log_limited!(IMAGE_LOG, Warn, "{}: no thread to take its lock: {error}", shared.name);
                return Ok(true);
            }
        };
        state.attempt = Some(Arc::clone(&attempt));
        drop(state);
        Ok(self.await_attempt(shared, &attempt))
    }

    /// Records that another client has the lock while our guest runs.
    fn note_another(&self, shared: &Shared, state: &mut State, owner: &str) {
        state.foreign_checks += 1;
        shared.health.locked_out(&shared.name, &shared.events);
        if state.foreign_checks == MAX_FOREIGN_CHECKS {
            log_limited!(
                IMAGE_LOG,
                Error,
                "{}: {owner} has the lock and may have written: this disk's writes fail until its guest is reset or \
                 started again",
                shared.name
            );
        }
    }

    /// Waits for an attempt to take the lock, and claims the lock if it was taken. Returns whether to check again.
    fn await_attempt(&self, shared: &Arc<Shared>, attempt: &Attempt) -> bool {
        if !attempt.wait() {
            return true;
        }
        let Some(mut state) = self.state_now() else { return true };
        // The attempt releases the lock if it is not claimed.
        if !state.active {
            return false;
        }
        if let Err(error) = self.claim(shared, &mut state) {
            log_limited!(IMAGE_LOG, Warn, "{error}");
            return true;
        }
        state.cache_drops_left = MAX_CACHE_DROPS;
        drop(state);
        self.write_owner(shared);
        log_limited!(IMAGE_LOG, Info, "{}: took the exclusive lock again", shared.name);
        image_health::report_change(&shared.events);
        self.empty_cache(shared)
    }

    /// Empties librbd's cache after we were without the lock: the client that had it may have written, and our cache may hold
    /// older data that we read meanwhile. librbd empties the cache when it releases the lock
    /// (`PreReleaseRequest::send_invalidate_cache`), but not when it takes the lock (`PostAcquireRequest`), and reads in
    /// between fill it, because they need no lock. Dirty data is flushed first, not dropped
    /// (`ObjectCacherObjectDispatch::invalidate_cache`). Returns whether to check again.
    fn empty_cache(&self, shared: &Shared) -> bool {
        let Some(state) = self.state_now() else { return true };
        if state.cache_drops_left == 0 {
            return false;
        }
        drop(state);
        let emptied = shared.image.invalidate_cache();
        let Some(mut state) = self.state_now() else { return true };
        state.cache_drops_left = if emptied.is_ok() { 0 } else { state.cache_drops_left.saturating_sub(1) };
        if let Err(errno) = emptied
            && (errno.0 != libc::EBUSY || state.cache_drops_left == 0)
        {
            shared.record_result(Err(errno));
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: librbd's cache cannot be emptied after the lock was lost: {}",
                shared.name,
                super::io_error(errno)
            );
        }
        state.cache_drops_left > 0
    }
}
