//! The image's exclusive lock. It is taken when a guest starts to use the image and released when the guest has stopped, so
//! that a live migration hands it over.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::attempt::{Attempt, AttemptProgress};
use super::state_file::StateFile;
use super::{Errno, RbdLock, Shared, queue};
use crate::base::rate_limit::{IMAGE_LOG, log_limited};

/// The lock and its state.
pub(super) struct Lock {
    /// Take the lock while a guest uses the image, if the image has the feature.
    pub(super) wanted: bool,
    /// Refuse a guest's writes without the lock (`--rbd-lock exclusive`).
    pub(super) required: bool,
    /// The image had the feature exclusive-lock at the last check.
    pub(super) feature: AtomicBool,
    file: Option<StateFile>,
    pub(super) state: Mutex<State>,
}

/// How long a release of the lock may wait after the lock was taken. librbd notifies all clients that have the image open
/// and waits this long for their replies before it releases the lock. A client that is just closing the image, such as the
/// process that the guest came from, may not reply: seen with librbd 1.16.
const NOTIFY_TIMEOUT: Duration = Duration::from_millis(5200);

#[derive(Default)]
pub(super) struct State {
    /// A guest, a hold or a copy uses the image.
    pub(super) active: bool,
    /// This client has the lock.
    pub(super) held: bool,
    /// How many checks in a row found that another client has the lock, while we are active.
    pub(super) foreign_checks: u32,
    /// When the lock was taken.
    taken_at: Option<Instant>,
    /// The client that had the lock at the last try.
    waits_for: Option<String>,
    pub(super) attempt: Option<Arc<Attempt>>,
    /// How often to retry emptying librbd's cache, after the lock was taken again.
    pub(super) cache_drops_left: u32,
}

impl Lock {
    pub(super) fn new(wanted: bool, choice: RbdLock, file: Option<StateFile>) -> Self {
        let required = wanted && choice == RbdLock::Exclusive;
        Lock { wanted, required, feature: AtomicBool::new(wanted), file, state: Mutex::default() }
    }

    /// Whether to take the lock while the image is used: the option requires it and the image has the feature.
    fn can_be_held(&self) -> bool {
        self.wanted && self.feature.load(Ordering::Acquire)
    }

    /// Waits until the lock can be released without a wait.
    pub(super) fn wait_until_releasable(&self) {
        let since = self.state.lock().expect("no panic while held").taken_at;
        if let Some(left) = since.and_then(|since| NOTIFY_TIMEOUT.checked_sub(since.elapsed())) {
            thread::sleep(left);
        }
    }

    /// Hands the state file over to another process, after `deactivate`.
    pub(super) fn hand_over(&self) {
        if let Some(file) = &self.file {
            file.unlock();
        }
    }

    /// Takes over the state file that another process handed over, or takes it back after a hand-over that failed.
    pub(super) fn take_over(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), StateFile::lock).map_err(io::Error::other)
    }

    /// Whether the lock is taken while the image is used, so that another client may have the image after that.
    pub(super) fn is_used(&self) -> bool {
        self.can_be_held()
    }

    /// The lock's state in one word for the status.
    pub(super) fn status(&self) -> &'static str {
        // The status must not wait for a thread that is just taking the lock.
        match self.state.try_lock() {
            _ if !self.can_be_held() => "none",
            Ok(state) if state.held => "held",
            Ok(state) if state.attempt.is_some() || state.active => "waiting",
            Ok(_) => "released",
            Err(_) => "waiting",
        }
    }

    /// Takes the lock for a guest that starts to use the image, and empties librbd's cache, because the client that had
    /// the lock before may have written. Called by the vhost-user thread.
    pub(super) fn activate(&self, shared: &Arc<Shared>) -> io::Result<()> {
        let mut state = self.state.lock().expect("no panic while held");
        if state.active {
            return Ok(());
        }
        shared.check_usable().map_err(|_| refused(shared, "this client was fenced"))?;
        state.foreign_checks = 0;
        self.update_feature(shared, &mut state)
            .map_err(|errno| refused(shared, &format!("its features cannot be read: {}", super::io_error(errno))))?;
        if self.required && !self.can_be_held() {
            return Err(refused(
                shared,
                "its feature exclusive-lock was disabled, which --rbd-lock exclusive needs: enable it again (rbd \
                 feature enable)",
            ));
        }
        if self.can_be_held() && !state.held {
            if state.attempt.is_none() {
                self.break_dead_owner(shared);
            }
            self.acquire(shared, &mut state)?;
        }
        state.cache_drops_left = 0;
        if let Err(errno) = shared.image.invalidate_cache() {
            shared.record_result(Err(errno));
            return Err(refused(shared, &format!("its cache cannot be emptied: {}", super::io_error(errno))));
        }
        state.active = true;
        Ok(())
    }

    /// Takes the lock and records us as its owner. The error says why the lock is not taken yet.
    fn acquire(&self, shared: &Arc<Shared>, state: &mut State) -> io::Result<()> {
        self.claim(shared, state)?;
        self.write_owner(shared);
        Ok(())
    }

    /// Takes the lock. The error says why it is not taken yet. While an attempt runs, this waits at most for that, and not
    /// for librbd.
    pub(super) fn claim(&self, shared: &Arc<Shared>, state: &mut State) -> io::Result<()> {
        take(shared, state)?;
        state.held = true;
        state.foreign_checks = 0;
        state.taken_at = Some(Instant::now());
        shared.health.locked_again(&shared.events);
        Ok(())
    }

    /// Releases the lock when the guest has stopped. First flushes librbd's cache, in every mode, because the next
    /// client may read the image.
    pub(super) fn deactivate(&self, shared: &Shared) {
        let mut state = self.state.lock().expect("no panic while held");
        if !state.active {
            return;
        }
        state.active = false;
        if shared.health.is_fenced() {
            // The cluster has released the lock, and the status and the log show that.
            state.held = false;
            return;
        }
        if let Err(errno) = shared.sync() {
            // If the lock were released, another client would read stale data without notice.
            log_limited!(
                IMAGE_LOG,
                Error,
                "{}: the guest's writes could not be flushed ({}){}",
                shared.name,
                super::io_error(errno),
                if state.held { ": the lock is not released. End virtioblkd to release it" } else { "" }
            );
            return;
        }
        if state.held {
            match shared.image.unlock() {
                Ok(()) => {
                    state.held = false;
                    if let Some(file) = &self.file {
                        file.write(None);
                    }
                }
                Err(errno) => {
                    shared.record_result(Err(errno));
                    log_limited!(
                        IMAGE_LOG,
                        Error,
                        "{}: the lock cannot be released: {}",
                        shared.name,
                        super::io_error(errno)
                    );
                }
            }
        }
    }

    /// Breaks the lock if the state file proves that its owner is dead.
    fn break_dead_owner(&self, shared: &Shared) {
        let Some(dead) = self.file.as_ref().and_then(StateFile::dead_owner) else { return };
        match shared.image.lock_owner() {
            Ok(Some(owner)) if owner == dead => {}
            // Another client has the lock, or no client.
            _ => return,
        }
        match shared.image.break_lock(&dead) {
            Ok(()) => log_limited!(
                IMAGE_LOG,
                Info,
                "{}: took the lock of {dead}, a virtioblkd of this host that died",
                shared.name
            ),
            Err(errno) => log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: the lock of {dead}, a virtioblkd of this host that died, cannot be broken ({}): waiting for it",
                shared.name,
                super::io_error(errno)
            ),
        }
    }

    /// Writes our name as owner into the state file, for a successor.
    pub(super) fn write_owner(&self, shared: &Shared) {
        let Some(file) = &self.file else { return };
        match shared.image.lock_owner() {
            Ok(owner) => file.write(owner.as_deref()),
            Err(errno) => log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: the lock's owner cannot be read ({}): a restart after a crash will wait for the lock",
                shared.name,
                super::io_error(errno)
            ),
        }
    }
}

/// Takes the lock. The error says why it is not taken yet. `state` holds the results of earlier tries.
fn take(shared: &Arc<Shared>, state: &mut State) -> io::Result<()> {
    log_owner(shared, state);
    let no_thread = |error: io::Error| refused(shared, &format!("no thread to take its lock: {error}"));
    let progress = loop {
        let attempt = match state.attempt.take() {
            Some(attempt) => attempt,
            None => Attempt::start(shared).map_err(no_thread)?,
        };
        match attempt.claim() {
            Some(AttemptProgress::Running) => {
                state.attempt = Some(attempt);
                break AttemptProgress::Running;
            }
            Some(ended) => break ended,
            None => {}
        }
    };
    let owner = state.waits_for.as_deref().unwrap_or("another client");
    match progress {
        AttemptProgress::Ended(Ok(())) => {
            if let Some(owner) = state.waits_for.take() {
                log_limited!(IMAGE_LOG, Info, "{}: has the lock now, after {owner}", shared.name);
            }
            Ok(())
        }
        AttemptProgress::Running => {
            Err(refused(shared, &format!("its exclusive lock is {owner}'s, which may be dead: waiting")))
        }
        AttemptProgress::Ended(Err(queue::LOCKED_OUT)) => Err(refused(
            shared,
            &format!(
                "{owner} has its exclusive lock: end that client, or break its lock (rbd lock ls, rbd lock rm) if it is \
                 dead"
            ),
        )),
        AttemptProgress::Ended(Err(errno)) => {
            shared.record_result(Err(errno));
            Err(refused(shared, &format!("its lock cannot be taken: {}", super::io_error(errno))))
        }
    }
}

/// Logs for whose lock we wait, once for each owner. This is only for people; the attempt finds out whether the lock can be
/// taken.
fn log_owner(shared: &Shared, state: &mut State) {
    if state.attempt.is_some() {
        return;
    }
    let Ok(Some(owner)) = shared.image.lock_owner() else { return };
    if state.waits_for.as_ref() != Some(&owner) {
        log_limited!(
            IMAGE_LOG,
            Info,
            "{}: waiting for the lock of {owner}. If that client was killed, the cluster releases its lock after half a \
             minute; with --rbd-state-file a restart need not wait",
            shared.name
        );
        state.waits_for = Some(owner);
    }
}

fn refused(shared: &Shared, why: &str) -> io::Error {
    io::Error::other(format!("{}: {why}", shared.name))
}

/// Whether to take the lock. Fails if the option requires it and the image does not have the feature.
pub(super) fn is_wanted(choice: super::RbdLock, can_lock: bool, read_only: bool) -> Result<bool, Errno> {
    use super::RbdLock::{Auto, Exclusive, None};
    match choice {
        None => Ok(false),
        _ if read_only => Ok(false),
        Exclusive if !can_lock => Err(Errno(libc::ENOTSUP)),
        Auto | Exclusive => Ok(can_lock),
    }
}
