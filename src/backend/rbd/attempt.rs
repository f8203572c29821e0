//! Taking the lock in a thread of its own: of a client that died the cluster waits for half a minute, and a front-end
//! whose thread waited that long would stand still with all its devices.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::{Errno, Shared, queue};

/// How long another client that has the lock for good is given to let it go: a migration's source has stopped its rings
/// when the target's start, but is not done.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);
/// How often it is asked for meanwhile.
const ASK_INTERVAL: Duration = Duration::from_millis(100);
/// A lock that was had and that nobody came for in this time goes back: the guest has left meanwhile.
const UNCLAIMED_TIMEOUT: Duration = Duration::from_secs(5);

/// An attempt to take the lock.
pub(super) struct Attempt {
    outcome: Mutex<Outcome>,
    changed: Condvar,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Running,
    /// We have it, or not.
    Done(Result<(), Errno>),
    /// Somebody came for it.
    Taken,
    /// Nobody did.
    GivenBack,
}

/// What is known of an attempt after a moment.
pub(super) enum Progress {
    /// The lock is the caller's, or cannot be had.
    Ended(Result<(), Errno>),
    /// Ask again.
    Running,
}

impl Attempt {
    /// Starts one. Errors: no thread.
    pub(super) fn start(shared: &Arc<Shared>) -> io::Result<Arc<Attempt>> {
        let attempt = Arc::new(Attempt { outcome: Mutex::new(Outcome::Running), changed: Condvar::new() });
        let (ours, shared) = (Arc::clone(&attempt), Arc::clone(shared));
        thread::Builder::new().name("rbd-lock".into()).spawn(move || ours.run(&shared))?;
        Ok(attempt)
    }

    fn outcome(&self) -> MutexGuard<'_, Outcome> {
        self.outcome.lock().expect("no panic while held")
    }

    fn run(&self, shared: &Shared) {
        let start = Instant::now();
        let result = loop {
            match shared.image.lock() {
                Err(queue::LOCKED_OUT) if start.elapsed() < HAND_OVER_TIMEOUT => thread::sleep(ASK_INTERVAL),
                result => break result,
            }
        };
        let mut outcome = self.outcome();
        *outcome = Outcome::Done(result);
        self.changed.notify_all();
        if result.is_err() {
            return;
        }
        let is_kept = |outcome: &mut Outcome| *outcome == Outcome::Done(result);
        let (mut outcome, _) =
            self.changed.wait_timeout_while(outcome, UNCLAIMED_TIMEOUT, is_kept).expect("no panic while held");
        if *outcome == Outcome::Done(result) {
            // Under the mutex: an attempt that starts now comes after it.
            *outcome = Outcome::GivenBack;
            if let Err(errno) = shared.image.unlock() {
                log::error!("{}: the lock cannot be released: {}", shared.name, super::io_error(errno));
            }
        }
    }

    /// Waits for the outcome a moment, and leaves it there. Returns whether there is one.
    pub(super) fn wait(&self) -> bool {
        *self.wait_while_running() != Outcome::Running
    }

    fn wait_while_running(&self) -> MutexGuard<'_, Outcome> {
        let is_running = |outcome: &mut Outcome| *outcome == Outcome::Running;
        // A little longer than a hand-over, so that its outcome is known.
        let timeout = HAND_OVER_TIMEOUT + ASK_INTERVAL;
        self.changed.wait_timeout_while(self.outcome(), timeout, is_running).expect("no panic while held").0
    }

    /// Comes for the lock; waits for it a moment. `None`: it was given back, so start anew.
    pub(super) fn come_for(&self) -> Option<Progress> {
        let mut outcome = self.wait_while_running();
        match *outcome {
            Outcome::Running => Some(Progress::Running),
            Outcome::Done(result) => {
                *outcome = Outcome::Taken;
                self.changed.notify_all();
                Some(Progress::Ended(result))
            }
            Outcome::Taken | Outcome::GivenBack => None,
        }
    }
}
