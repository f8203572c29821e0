//! What became of the lock while a guest uses the image. Every change of the image's header may mean that its features
//! changed (`rbd feature disable`), and librbd then goes on without the lock and without a word.
//!
//! The keeper's thread calls. It learns of a change some milliseconds after the cluster made it, so a write that is on
//! its way in that moment is still carried out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::lock::{Lock, State};
use super::{Errno, Shared, image_health};
use crate::base::rate_limit::{IMAGE_LOG, log_limited};

/// How often the lock is asked for, or looked after, until it is ours again.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// So many checks may find that another client has the lock: `rbd` commands take it for a moment. One that keeps it may
/// have written, which our guest does not know, so the lock is then left to it until our guest starts anew.
const MAX_FOREIGN_CHECKS: u32 = 5;

impl Lock {
    /// Checks that the image has its feature and we have the lock, as far as they are needed, and takes the lock again if
    /// no client has it. Returns when to call again; `None`: at the next change of the header.
    pub(super) fn check(&self, shared: &Arc<Shared>) -> Option<Instant> {
        if !self.wanted || shared.trouble.is_fenced() {
            return None;
        }
        let mut state = self.state.lock().expect("no panic while held");
        let again = Some(Instant::now() + CHECK_INTERVAL);
        if let Err(errno) = self.look_at_feature(shared, &mut state) {
            shared.heed(Err(errno));
            log_limited!(IMAGE_LOG, Warn, "{}: its features cannot be read: {}", shared.name, super::io_error(errno));
            return again;
        }
        if !self.feature.load(Ordering::Acquire) || !state.active {
            return None;
        }
        match shared.image.is_lock_owner() {
            Ok(true) if state.held => None,
            Ok(_) => self.take_again(shared, &mut state).then_some(again).flatten(),
            Err(errno) => {
                shared.heed(Err(errno));
                log_limited!(
                    IMAGE_LOG,
                    Warn,
                    "{}: whether the lock is held cannot be read: {}",
                    shared.name,
                    super::io_error(errno)
                );
                again
            }
        }
    }

    /// Notes whether the image has the feature exclusive-lock, and reports a change.
    pub(super) fn look_at_feature(&self, shared: &Shared, state: &mut State) -> Result<(), Errno> {
        if !self.wanted {
            return Ok(());
        }
        let has = shared.image.can_lock()?;
        let had = self.feature.swap(has, Ordering::AcqRel);
        if had == has {
            return Ok(());
        }
        if has {
            log_limited!(IMAGE_LOG, Info, "{}: it has the feature exclusive-lock again", shared.name);
            if !state.active {
                // The lock is taken before the image is used.
                shared.trouble.locked_again(&shared.news);
            }
        } else {
            state.held = false;
            if self.required {
                shared.trouble.unlockable(&shared.name, &shared.news);
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
        image_health::tell(&shared.news);
        Ok(())
    }

    /// The guest runs and we do not have the lock. Returns whether to try again.
    fn take_again(&self, shared: &Arc<Shared>, state: &mut State) -> bool {
        state.held = false;
        if state.lost_to_another >= MAX_FOREIGN_CHECKS {
            return false;
        }
        match shared.image.lock_owner() {
            Ok(Some(owner)) if !matches!(shared.image.is_lock_owner(), Ok(true)) => {
                state.lost_to_another += 1;
                shared.trouble.locked_out(&shared.name, &shared.news);
                if state.lost_to_another == MAX_FOREIGN_CHECKS {
                    log_limited!(
                        IMAGE_LOG,
                        Error,
                        "{}: {owner} has the lock and may have written: this disk's writes fail until its guest is reset \
                         or started again",
                        shared.name
                    );
                }
                true
            }
            Ok(_) => match self.acquire(shared, state) {
                Ok(()) => {
                    log_limited!(IMAGE_LOG, Info, "{}: took the exclusive lock again", shared.name);
                    image_health::tell(&shared.news);
                    false
                }
                Err(error) => {
                    log_limited!(IMAGE_LOG, Warn, "{error}");
                    true
                }
            },
            Err(errno) => {
                shared.heed(Err(errno));
                true
            }
        }
    }
}
