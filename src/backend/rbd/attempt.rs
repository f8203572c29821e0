//! Takes the lock in a thread of its own. The cluster waits half a minute for a client that died, and a front-end whose
//! request waited that long would stall with all its devices.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::{Errno, Shared, queue};

/// How long to wait for another client that has the lock permanently. When the virtqueues start at a migration's target,
/// they are stopped at its source, but the source may not have released the lock yet.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);

/// How often to retry the lock meanwhile.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// How long a lock that was taken may be unclaimed before it is released, because the guest has left meanwhile.
const UNCLAIMED_TIMEOUT: Duration = Duration::from_secs(5);

/// An attempt to take the lock.
pub(super) struct Attempt {
    state: Mutex<AttemptState>,
    changed: Condvar,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum AttemptState {
    /// The attempt runs.
    Running,
    /// The lock was taken, or could not be taken. No caller has claimed the result.
    Done(Result<(), Errno>),
    /// A caller has claimed the result.
    Claimed,
    /// The lock was released, because no caller claimed it.
    Released,
}

/// The progress of an attempt.
pub(super) enum AttemptProgress {
    /// The lock now belongs to the caller, or could not be taken.
    Ended(Result<(), Errno>),
    /// The attempt still runs; claim it again later.
    Running,
}

impl Attempt {
    /// Starts an attempt. Fails when no thread can be created.
    pub(super) fn start(shared: &Arc<Shared>) -> io::Result<Arc<Attempt>> {
        let attempt = Arc::new(Attempt { state: Mutex::new(AttemptState::Running), changed: Condvar::new() });
        let (thread_attempt, shared) = (Arc::clone(&attempt), Arc::clone(shared));
        thread::Builder::new().name("rbd-lock".into()).spawn(move || thread_attempt.run(&shared))?;
        Ok(attempt)
    }

    fn state(&self) -> MutexGuard<'_, AttemptState> {
        self.state.lock().expect("no panic while held")
    }

    /// The thread's main function: takes the lock, and releases it if no caller claims it.
    fn run(&self, shared: &Shared) {
        let start = Instant::now();
        let result = loop {
            match shared.image.lock() {
                Err(queue::LOCKED_OUT) if start.elapsed() < HAND_OVER_TIMEOUT => thread::sleep(RETRY_INTERVAL),
                result => break result,
            }
        };
        let mut state = self.state();
        *state = AttemptState::Done(result);
        self.changed.notify_all();
        if result.is_err() {
            return;
        }
        let is_unclaimed = |state: &mut AttemptState| *state == AttemptState::Done(result);
        let (mut state, _) =
            self.changed.wait_timeout_while(state, UNCLAIMED_TIMEOUT, is_unclaimed).expect("no panic while held");
        if *state == AttemptState::Done(result) {
            // Under the mutex, so that an attempt that starts now takes the lock after this release.
            *state = AttemptState::Released;
            if let Err(errno) = shared.image.unlock() {
                log::error!("{}: the lock cannot be released: {}", shared.name, super::io_error(errno));
            }
        }
    }

    /// Waits a moment for the outcome without claiming it. Returns whether there is one.
    pub(super) fn wait(&self) -> bool {
        *self.wait_while_running() != AttemptState::Running
    }

    fn wait_while_running(&self) -> MutexGuard<'_, AttemptState> {
        let is_running = |state: &mut AttemptState| *state == AttemptState::Running;
        // A little longer than a hand-over may take, so that its outcome is known.
        let timeout = HAND_OVER_TIMEOUT + RETRY_INTERVAL;
        self.changed.wait_timeout_while(self.state(), timeout, is_running).expect("no panic while held").0
    }

    /// Waits a moment for the outcome and claims it. Returns `None` when the lock was released; the caller then starts another
    /// attempt.
    pub(super) fn claim(&self) -> Option<AttemptProgress> {
        let mut state = self.wait_while_running();
        match *state {
            AttemptState::Running => Some(AttemptProgress::Running),
            AttemptState::Done(result) => {
                *state = AttemptState::Claimed;
                self.changed.notify_all();
                Some(AttemptProgress::Ended(result))
            }
            AttemptState::Claimed | AttemptState::Released => None,
        }
    }
}
