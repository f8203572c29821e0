//! The copies of one image: the one that is prepared or runs, those that end, and those that are over.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use super::Tuning;
use super::copy::Copy;
use super::target_handle::Liveness;
use crate::disk::{CopyError, CopyStatus, Events};

/// The most ended copies that the status lists.
const MAX_ENDED: usize = 8;

/// The state that the virtqueues' queues and the copies share.
pub(super) struct Shared {
    /// The number of the copy that delays ops; 0: none.
    pub(super) delaying: AtomicU64,
    pub(super) events: Arc<Events>,
    pub(super) tuning: Tuning,
    pub(super) registry: Mutex<Registry>,
}

#[derive(Default)]
pub(super) struct Registry {
    pub(super) last_number: u64,
    /// The one copy that is prepared or running.
    pub(super) current: Option<Arc<Copy>>,
    /// Copies that can no longer be cancelled because they get their names, and copies that are over but not cleaned up.
    /// They do not keep another copy from being made.
    pub(super) finishing: Vec<Arc<Copy>>,
    /// A copy is being prepared, without the lock.
    pub(super) preparing: bool,
    /// The last copies that are over and cleaned up.
    pub(super) ended: VecDeque<(CopyStatus, Liveness)>,
    /// One counter for each queue: its ops in flight that change the image.
    pub(super) changes: Vec<Weak<AtomicU64>>,
    /// The daemon ends; no new copy is taken.
    pub(super) closed: bool,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().expect("no panic while held")
    }

    /// Adds a new queue's counter of ops in flight that change the image.
    pub(super) fn add_change_counter(&self, changes: &Arc<AtomicU64>) {
        let mut registry = self.lock();
        registry.changes.retain(|counter| counter.strong_count() > 0);
        registry.changes.push(Arc::downgrade(changes));
    }

    /// The current copy, if it has this number.
    pub(super) fn running(&self, number: u64) -> Option<Arc<Copy>> {
        self.lock().current.clone().filter(|copy| copy.number == number)
    }

    /// Moves a copy that is cleaned up to the list of ended ones.
    pub(super) fn record_end(&self, copy: &Copy, status: CopyStatus) {
        let mut registry = self.lock();
        if registry.current.as_ref().is_some_and(|current| current.number == copy.number) {
            registry.current = None;
        }
        registry.finishing.retain(|finishing| finishing.number != copy.number);
        if registry.ended.len() == MAX_ENDED {
            registry.ended.pop_front();
        }
        registry.ended.push_back((status, copy.target.liveness()));
    }
}

impl Registry {
    pub(super) fn find(&self, name: &str) -> Result<&Arc<Copy>, CopyError> {
        let mut known = self.current.iter().chain(&self.finishing);
        known.find(|copy| copy.name == name && !copy.phase().is_over()).ok_or_else(|| {
            let message = match self.ended.iter().find(|(ended, _)| ended.copy == name) {
                Some((ended, _)) => {
                    format!("{name} has already ended ({}); 'virtioblkctl copies' shows how", ended.state)
                }
                None => "there is no copy of this name; 'virtioblkctl copies' lists them".into(),
            };
            CopyError { code: "no-such-copy", message }
        })
    }
}
