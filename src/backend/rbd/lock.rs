//! The image's exclusive lock: taken when a guest begins to use the image, let go when it has stopped, so that a live
//! migration hands it over.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::attempt::{Attempt, Progress};
use super::takeover::StateFile;
use super::{Errno, RbdLock, Shared, queue};
use crate::base::rate_limit::{IMAGE_LOG, log_limited};

/// Whether we use the lock, and have it.
pub(super) struct Lock {
    /// It is taken while a guest uses the image and the image has the feature.
    pub(super) wanted: bool,
    /// A guest's writes need it.
    pub(super) required: bool,
    /// The image had the feature exclusive-lock when it was looked at last.
    pub(super) feature: AtomicBool,
    file: Option<StateFile>,
    pub(super) state: Mutex<State>,
}

/// librbd tells all who have the image open that it took the lock, waits so long for their answers, and releases the lock
/// only then. One that is just closing the image, such as the process that the guest came from, may not answer: seen with
/// librbd 1.16 where a release followed within that time.
const NOTIFY_TIMEOUT: Duration = Duration::from_millis(5200);

#[derive(Default)]
pub(super) struct State {
    /// A guest, a hold or a copy uses the image.
    pub(super) active: bool,
    pub(super) held: bool,
    /// How many checks in a row found that another client has the lock, while we are active.
    pub(super) lost_to_another: u32,
    /// When it was taken.
    since: Option<Instant>,
    /// Who had the lock at the last try.
    waits_for: Option<String>,
    pub(super) attempt: Option<Arc<Attempt>>,
    /// How often librbd's cache is still tried to be emptied since the lock was taken again.
    pub(super) emptyings_left: u32,
}

impl Lock {
    pub(super) fn new(wanted: bool, choice: RbdLock, file: Option<StateFile>) -> Self {
        let required = wanted && choice == RbdLock::Exclusive;
        Lock { wanted, required, feature: AtomicBool::new(wanted), file, state: Mutex::default() }
    }

    /// The image has the feature, and the lock is taken while the image is used.
    fn can_be_held(&self) -> bool {
        self.wanted && self.feature.load(Ordering::Acquire)
    }

    /// Returns when the lock can be released without a wait.
    pub(super) fn settle(&self) {
        let since = self.state.lock().expect("no panic while held").since;
        if let Some(rest) = since.and_then(|since| NOTIFY_TIMEOUT.checked_sub(since.elapsed())) {
            thread::sleep(rest);
        }
    }

    /// Another process goes on with the image, after `deactivate`.
    pub(super) fn hand_over(&self) {
        if let Some(file) = &self.file {
            file.unlock();
        }
    }

    /// The process before us gave it up by `hand_over`, or the one after us did not come.
    pub(super) fn take_over(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), StateFile::lock).map_err(io::Error::other)
    }

    /// It is taken while the image is used.
    pub(super) fn is_used(&self) -> bool {
        self.can_be_held()
    }

    /// One word for the status.
    pub(super) fn status(&self) -> &'static str {
        // Not for long: it is only held while the lock is asked for. The status must not wait for that.
        match self.state.try_lock() {
            _ if !self.can_be_held() => "none",
            Ok(state) if state.held => "held",
            Ok(state) if state.attempt.is_some() || state.active => "waiting",
            Ok(_) => "released",
            Err(_) => "waiting",
        }
    }

    /// A guest begins. Takes the lock, and forgets what was read before: whoever had it may have written.
    pub(super) fn activate(&self, shared: &Arc<Shared>) -> io::Result<()> {
        let mut state = self.state.lock().expect("no panic while held");
        if state.active {
            return Ok(());
        }
        shared.check_usable().map_err(|_| refused(shared, "this client was fenced"))?;
        state.lost_to_another = 0;
        self.look_at_feature(shared, &mut state)
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
        state.emptyings_left = 0;
        if let Err(errno) = shared.image.invalidate_cache() {
            shared.heed(Err(errno));
            return Err(refused(shared, &format!("its cache cannot be emptied: {}", super::io_error(errno))));
        }
        state.active = true;
        Ok(())
    }

    /// Takes the lock, or says why not yet.
    fn acquire(&self, shared: &Arc<Shared>, state: &mut State) -> io::Result<()> {
        self.claim(shared, state)?;
        self.sign(shared);
        Ok(())
    }

    /// Takes the lock, or says why not yet. While an attempt to take it is under way, this waits for that at most, and not
    /// for librbd.
    pub(super) fn claim(&self, shared: &Arc<Shared>, state: &mut State) -> io::Result<()> {
        take(shared, state)?;
        state.held = true;
        state.lost_to_another = 0;
        state.since = Some(Instant::now());
        shared.trouble.locked_again(&shared.news);
        Ok(())
    }

    /// The guest has stopped. What it wrote leaves librbd's cache in every mode: the next to read it is another client.
    pub(super) fn deactivate(&self, shared: &Shared) {
        let mut state = self.state.lock().expect("no panic while held");
        if !state.active {
            return;
        }
        state.active = false;
        if shared.trouble.is_fenced() {
            // The cluster gave the lock away, and was said to have done so.
            state.held = false;
            return;
        }
        if let Err(errno) = shared.sync() {
            // With the lock gone another client would read what is stale, and nobody would know.
            log_limited!(
                IMAGE_LOG,
                Error,
                "{}: what the guest wrote could not be flushed ({}){}",
                shared.name,
                super::io_error(errno),
                if state.held { ": the lock is kept. End virtioblkd to let it go" } else { "" }
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
                    shared.heed(Err(errno));
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

    /// The cluster gives the lock away at once if its owner is known to be dead.
    fn break_dead_owner(&self, shared: &Shared) {
        let Some(dead) = self.file.as_ref().and_then(StateFile::dead_owner) else { return };
        match shared.image.lock_owner() {
            Ok(Some(owner)) if owner == dead => {}
            // Another client has it, or nobody.
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

    /// Tells the successor who we are.
    pub(super) fn sign(&self, shared: &Shared) {
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

/// Takes the lock, or says why not yet. `state`: what is known from earlier tries.
fn take(shared: &Arc<Shared>, state: &mut State) -> io::Result<()> {
    say_whom_we_wait_for(shared, state);
    let no_thread = |error: io::Error| refused(shared, &format!("no thread to take its lock: {error}"));
    let progress = loop {
        let attempt = match state.attempt.take() {
            Some(attempt) => attempt,
            None => Attempt::start(shared).map_err(no_thread)?,
        };
        match attempt.come_for() {
            Some(Progress::Running) => {
                state.attempt = Some(attempt);
                break Progress::Running;
            }
            Some(ended) => break ended,
            None => {}
        }
    };
    let owner = state.waits_for.as_deref().unwrap_or("another client");
    match progress {
        Progress::Ended(Ok(())) => {
            if let Some(owner) = state.waits_for.take() {
                log_limited!(IMAGE_LOG, Info, "{}: has the lock now, after {owner}", shared.name);
            }
            Ok(())
        }
        Progress::Running => {
            Err(refused(shared, &format!("its exclusive lock is {owner}'s, which may be dead: waiting")))
        }
        Progress::Ended(Err(queue::LOCKED_OUT)) => Err(refused(
            shared,
            &format!(
                "{owner} has its exclusive lock: end that client, or break its lock (rbd lock ls, rbd lock rm) if it is \
                 dead"
            ),
        )),
        Progress::Ended(Err(errno)) => {
            shared.heed(Err(errno));
            Err(refused(shared, &format!("its lock cannot be taken: {}", super::io_error(errno))))
        }
    }
}

/// Once for each owner, however often it is tried. Only for people: whether the lock can be had is found out otherwise.
fn say_whom_we_wait_for(shared: &Shared, state: &mut State) {
    if state.attempt.is_some() {
        return;
    }
    let Ok(Some(owner)) = shared.image.lock_owner() else { return };
    if state.waits_for.as_ref() != Some(&owner) {
        log_limited!(
            IMAGE_LOG,
            Info,
            "{}: the lock is {owner}'s: waiting for it. If that client was killed, the cluster waits half a minute \
             before it gives its lock away; with --rbd-state-file a restart need not",
            shared.name
        );
        state.waits_for = Some(owner);
    }
}

fn refused(shared: &Shared, why: &str) -> io::Error {
    io::Error::other(format!("{}: {why}", shared.name))
}

/// Whether the lock is to be taken, for an image that has the feature or not. `Err`: it must be and cannot.
pub(super) fn is_wanted(choice: super::RbdLock, can_lock: bool, read_only: bool) -> Result<bool, Errno> {
    use super::RbdLock::{Auto, Exclusive, None};
    match choice {
        None => Ok(false),
        _ if read_only => Ok(false),
        Exclusive if !can_lock => Err(Errno(libc::ENOTSUP)),
        Auto | Exclusive => Ok(can_lock),
    }
}
