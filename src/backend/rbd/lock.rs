//! The image's exclusive lock: taken when a guest begins to use the image, let go when it has stopped, so that a live
//! migration hands it over.

use std::io;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use super::takeover::StateFile;
use super::{Errno, Shared, queue};

/// How long another client that has the lock for good is given to let it go before the caller hears of it: a migration's
/// source has stopped its rings when the target's start, but is not done. Callers try again, and a front-end that sends
/// something meanwhile waits.
const HAND_OVER: Duration = Duration::from_secs(1);
/// How often it is asked for meanwhile.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Whether we use the lock, and have it.
pub(super) struct Lock {
    /// It is taken while a guest uses the image.
    wanted: bool,
    file: Option<StateFile>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    active: bool,
    held: bool,
    /// Who had the lock at the last try.
    waits_for: Option<String>,
}

impl Lock {
    pub(super) fn new(wanted: bool, file: Option<StateFile>) -> Self {
        Lock { wanted, file, state: Mutex::default() }
    }

    /// One word for the status.
    pub(super) fn status(&self) -> &'static str {
        // Not for long: it is only held while the lock is asked for. The status must not wait for that.
        match self.state.try_lock() {
            _ if !self.wanted => "none",
            Ok(state) if state.held => "held",
            Ok(_) => "released",
            Err(_) => "waiting",
        }
    }

    /// A guest begins. Takes the lock, and forgets what was read before: whoever had it may have written.
    pub(super) fn activate(&self, shared: &Shared) -> io::Result<()> {
        let mut state = self.state.lock().expect("no panic while held");
        if state.active {
            return Ok(());
        }
        shared.check_usable().map_err(|_| refused(shared, "this client was fenced"))?;
        if self.wanted && !state.held {
            self.break_dead_owner(shared);
            take(shared, &mut state.waits_for)?;
            state.held = true;
            self.sign(shared);
            shared.trouble.is_writable_again(&shared.news);
        }
        if let Err(errno) = shared.image.invalidate_cache() {
            shared.heed(Err(errno));
            return Err(refused(shared, &format!("its cache cannot be emptied: {}", super::io_error(errno))));
        }
        state.active = true;
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
            log::error!(
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
                    log::error!("{}: the lock cannot be released: {}", shared.name, super::io_error(errno));
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
            Ok(()) => log::info!("{}: took the lock of {dead}, a virtioblkd of this host that died", shared.name),
            Err(errno) => log::warn!(
                "{}: the lock of {dead}, a virtioblkd of this host that died, cannot be broken ({}): waiting for it",
                shared.name,
                super::io_error(errno)
            ),
        }
    }

    /// Tells the successor who we are.
    fn sign(&self, shared: &Shared) {
        let Some(file) = &self.file else { return };
        match shared.image.lock_owner() {
            Ok(owner) => file.write(owner.as_deref()),
            Err(errno) => log::warn!(
                "{}: the lock's owner cannot be read ({}): a restart after a crash will wait for the lock",
                shared.name,
                super::io_error(errno)
            ),
        }
    }
}

/// Takes the lock, waiting a moment for another client's. `waits_for`: who had it when this was tried before.
fn take(shared: &Shared, waits_for: &mut Option<String>) -> io::Result<()> {
    let start = Instant::now();
    // Only for people; whether the lock can be had is found out below.
    if let Ok(Some(owner)) = shared.image.lock_owner()
        && waits_for.as_ref() != Some(&owner)
    {
        log::info!(
            "{}: the lock is {owner}'s: waiting for it. If that client was killed, the cluster waits half a minute \
             before it gives its lock away; with --rbd-state-file a restart need not",
            shared.name
        );
        *waits_for = Some(owner);
    }
    loop {
        match shared.image.lock() {
            Ok(()) => {
                if let Some(owner) = waits_for.take() {
                    log::info!("{}: has the lock now, after {owner}", shared.name);
                }
                return Ok(());
            }
            Err(queue::LOCKED_OUT) if start.elapsed() < HAND_OVER => thread::sleep(ASK_EVERY),
            Err(queue::LOCKED_OUT) => {
                let owner = waits_for.as_deref().unwrap_or("another client");
                return Err(refused(
                    shared,
                    &format!(
                        "{owner} has its exclusive lock: end that client, or break its lock (rbd lock ls, rbd lock rm) \
                         if it is dead"
                    ),
                ));
            }
            Err(errno) => {
                shared.heed(Err(errno));
                return Err(refused(shared, &format!("its lock cannot be taken: {}", super::io_error(errno))));
            }
        }
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
