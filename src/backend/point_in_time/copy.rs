//! One copy from `prepare` to its end: what the rings, its threads and the control thread share.
//!
//! A cluster is *saved* when the old data is in memory or known to be zero. From the instant on, a ring lets a change
//! of a cluster pass only if its bit is set; so a cluster whose bit is clear still holds what it held at the instant.

use std::collections::{TryReserveError, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::bitmap::Bitmap;
use super::order::TargetOrder;
use super::scratch_thread::Answer;
use super::{Mutant, Shared};
use crate::backend::IoBuf;
use crate::backend::mailbox::Mailbox;
use crate::base::rate_limit::{COPY_LOG, log_limited};
use crate::disk::{CopyOptions, CopyStatus, Event};

/// Bytes of a cluster at least, and how many clusters an image has at most: a copy's bitmap takes 64 MiB at most.
const MIN_CLUSTER: u64 = 64 << 10;
const MAX_CLUSTERS: u64 = 1 << 29;

/// Bytes of the units in which an image of this size is saved: 64 KiB up to 32 TiB, then they grow with the image.
fn cluster_of(size: u64) -> u64 {
    size.div_ceil(MAX_CLUSTERS).next_power_of_two().max(MIN_CLUSTER)
}

/// Where in its life a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Prepared,
    Running,
    Syncing,
    /// It gets its name.
    Publishing,
    Completed,
    Failed,
    Cancelled,
}

impl Phase {
    pub(super) fn is_over(self) -> bool {
        matches!(self, Phase::Completed | Phase::Failed | Phase::Cancelled)
    }

    fn word(self) -> &'static str {
        match self {
            Phase::Prepared => "prepared",
            Phase::Running => "running",
            Phase::Syncing | Phase::Publishing => "syncing",
            Phase::Completed => "completed",
            Phase::Failed => "failed",
            Phase::Cancelled => "cancelled",
        }
    }
}

/// A copy.
pub(super) struct Copy {
    /// Never 0, never used before.
    pub(super) number: u64,
    pub(super) name: String,
    pub(super) size: u64,
    /// Bytes of a cluster, a power of two.
    pub(super) cluster: u64,
    /// The target's thread.
    pub(super) target: TargetOrder,
    pub(super) shared: Arc<Shared>,
    pub(super) saved: Bitmap,
    /// Bytes a second; 0: no limit.
    pub(super) bandwidth: AtomicU64,
    /// Clusters dealt with, and bytes.
    pub(super) done: AtomicU64,
    pub(super) saved_before_write: AtomicU64,
    pub(super) stored: AtomicU64,
    /// Bytes in the scratch.
    pub(super) scratch: AtomicU64,
    /// The copier sleeps on it.
    wake: OwnedFd,
    /// Buffers that the writer is done with.
    returned: Mutex<Vec<IoBuf>>,
    /// The scratch's, for the copier.
    scratch_answers: Mutex<Vec<Answer>>,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// Delayed ops, of all rings.
    waiters: Vec<Waiter>,
    /// Since when one of them waits.
    waiting_since: Option<Instant>,
    /// How long one of them waited, until then.
    waited: Duration,
    /// The next warning about that.
    warn_at: Duration,
    /// Clusters that they wait for and the copier has not heard of.
    urgent: VecDeque<Range<u64>>,
    instant: Option<SystemTime>,
    started: Option<Instant>,
    took: Option<Duration>,
    error: Option<String>,
    sha256: Option<String>,
    /// A thread clears up after it.
    cleared: bool,
}

/// The guest's writes waited this long for a copy, over all: the first warning. Each further one comes at twice the time.
const FIRST_WARNING: Duration = Duration::from_secs(10);

impl State {
    /// After each change of `waiters`.
    fn measure_waiting(&mut self) {
        match (self.waiters.is_empty(), self.waiting_since) {
            (false, None) => self.waiting_since = Some(Instant::now()),
            (true, Some(since)) => {
                self.waited += since.elapsed();
                self.waiting_since = None;
            }
            _ => {}
        }
    }

    fn waited(&self) -> Duration {
        self.waited + self.waiting_since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// A delayed op: the clusters that it still waits for, and whom to tell.
struct Waiter {
    missing: Range<u64>,
    ticket: u64,
    mailbox: Arc<Mailbox<u64>>,
}

impl Copy {
    /// The bitmap for an image of this size. Errors: no memory.
    pub(super) fn bitmap(size: u64) -> Result<Bitmap, TryReserveError> {
        Bitmap::new(size.div_ceil(cluster_of(size)))
    }

    /// `wake`: an eventfd for the copier to sleep on; `saved`: the bitmap for this size.
    pub(super) fn new(
        number: u64,
        size: u64,
        options: &CopyOptions,
        target: TargetOrder,
        wake: OwnedFd,
        shared: Arc<Shared>,
        saved: Bitmap,
    ) -> Self {
        Copy {
            number,
            name: format!("copy-{number}"),
            size,
            target,
            shared,
            cluster: cluster_of(size),
            saved,
            bandwidth: AtomicU64::new(options.bandwidth),
            done: AtomicU64::new(0),
            saved_before_write: AtomicU64::new(0),
            stored: AtomicU64::new(0),
            scratch: AtomicU64::new(0),
            wake,
            returned: Mutex::default(),
            scratch_answers: Mutex::default(),
            state: Mutex::new(State {
                phase: Phase::Prepared,
                waiters: Vec::new(),
                waiting_since: None,
                waited: Duration::ZERO,
                warn_at: FIRST_WARNING,
                urgent: VecDeque::new(),
                instant: None,
                started: None,
                took: None,
                error: None,
                sha256: None,
                cleared: false,
            }),
        }
    }

    /// Nobody has heard of it and nobody will.
    pub(super) fn abandon(&self) {
        self.end(Phase::Cancelled, None);
        self.target.remove();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    pub(super) fn phase(&self) -> Phase {
        self.lock().phase
    }

    pub(super) fn wake_copier(&self) {
        // A full counter is readable too.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Fixes the instant, unless `writes_in_flight` finds some. False: it did. The lock is held meanwhile: a ring that
    /// sees the copy and wants to know whether it runs waits until that is decided.
    pub(super) fn begin(&self, writes_in_flight: impl FnOnce() -> u64) -> bool {
        let mut state = self.lock();
        // Before the counters are read: a ring counts its write before it looks here, so one of the two sees the other.
        self.shared.delaying.store(self.number, Ordering::SeqCst);
        if writes_in_flight() > 0 {
            self.shared.delaying.store(0, Ordering::SeqCst);
            return false;
        }
        state.phase = Phase::Running;
        state.instant = Some(SystemTime::now());
        state.started = Some(Instant::now());
        drop(state);
        self.wake_copier();
        true
    }

    /// A ring has an op that changes these bytes. True: it must wait for its ticket to come to `mailbox`; false: it may
    /// go. Each ring's thread.
    pub(super) fn must_wait(&self, bytes: Range<u64>, ticket: u64, mailbox: &Arc<Mailbox<u64>>) -> bool {
        // What the image grew by since is no part of the copy.
        let clusters = bytes.start / self.cluster..bytes.end.div_ceil(self.cluster).min(self.saved.len());
        if self.shared.tuning.mutant == Some(Mutant::SavesNothing) || self.saved.first_clear(clusters.clone()).is_none()
        {
            return false;
        }
        let mut state = self.lock();
        // Again: the copier sets bits before it takes the lock to look for waiters.
        let Some(first) = self.saved.first_clear(clusters.clone()).filter(|_| state.phase == Phase::Running) else {
            return false;
        };
        let missing = first..clusters.end;
        state.urgent.push_back(missing.clone());
        state.waiters.push(Waiter { missing, ticket, mailbox: Arc::clone(mailbox) });
        state.measure_waiting();
        drop(state);
        self.wake_copier();
        true
    }

    /// The op of this ticket of this mailbox waits no more.
    pub(super) fn forget(&self, ticket: u64, mailbox: &Arc<Mailbox<u64>>) {
        let mut state = self.lock();
        state.waiters.retain(|waiter| waiter.ticket != ticket || !Arc::ptr_eq(&waiter.mailbox, mailbox));
        state.measure_waiting();
    }

    /// Clusters are saved: whoever waited for them goes on. Returns how many are new. The copier.
    pub(super) fn mark_saved(&self, clusters: Range<u64>) -> u64 {
        let fresh = self.saved.set(clusters);
        let mut state = self.lock();
        state.waiters.retain_mut(|waiter| match self.saved.first_clear(waiter.missing.clone()) {
            Some(first) => {
                waiter.missing.start = first;
                true
            }
            None => {
                waiter.mailbox.post(waiter.ticket);
                false
            }
        });
        state.measure_waiting();
        fresh
    }

    /// What delayed ops wait for and was not taken yet; None: the copy does not run (any more). The copier.
    pub(super) fn take_urgent(&self) -> Option<VecDeque<Range<u64>>> {
        let mut state = self.lock();
        (state.phase == Phase::Running).then(|| std::mem::take(&mut state.urgent))
    }

    /// Every cluster is saved: the rings need not look any more. The copier.
    pub(super) fn all_saved(&self) {
        self.stop_delaying();
    }

    /// A buffer is free again. The writer.
    pub(super) fn give_back(&self, buf: IoBuf) {
        self.returned.lock().expect("no panic while held").push(buf);
        self.wake_copier();
    }

    pub(super) fn take_returned(&self) -> Vec<IoBuf> {
        std::mem::take(&mut self.returned.lock().expect("no panic while held"))
    }

    /// The scratch's thread answered.
    pub(super) fn scratch_answered(&self, answer: Answer) {
        self.scratch_answers.lock().expect("no panic while held").push(answer);
        self.wake_copier();
    }

    pub(super) fn take_scratch_answers(&self) -> Vec<Answer> {
        std::mem::take(&mut self.scratch_answers.lock().expect("no panic while held"))
    }

    /// The writer has everything and makes it durable. False: the copy is over.
    pub(super) fn begin_sync(&self) -> bool {
        let mut state = self.lock();
        let runs = state.phase == Phase::Running;
        if runs {
            state.phase = Phase::Syncing;
        }
        runs
    }

    /// The file is durable and gets its name now: too late to cancel. False: the copy is over.
    pub(super) fn begin_publish(&self, sha256: Option<String>) -> bool {
        let mut state = self.lock();
        let syncs = state.phase == Phase::Syncing;
        if syncs {
            state.phase = Phase::Publishing;
            state.sha256 = sha256;
        }
        syncs
    }

    /// Ends the copy and lets every delayed op go on. False: it is over already, or it is too late to cancel.
    pub(super) fn end(&self, phase: Phase, error: Option<String>) -> bool {
        let mut state = self.lock();
        if state.phase.is_over() || (state.phase == Phase::Publishing && phase == Phase::Cancelled) {
            return false;
        }
        state.phase = phase;
        state.took = state.started.map(|started| started.elapsed());
        state.error = error;
        self.stop_delaying();
        state.urgent.clear();
        for waiter in state.waiters.drain(..) {
            waiter.mailbox.post(waiter.ticket);
        }
        state.measure_waiting();
        drop(state);
        self.target.copy_is_over();
        self.wake_copier();
        true
    }

    /// Warns if the guest's writes have waited long for this copy. Not more often than makes sense.
    pub(super) fn warn_if_slow(&self) {
        let mut state = self.lock();
        let (waited, took) = (state.waited(), state.started.map(|started| started.elapsed()).unwrap_or_default());
        if waited < state.warn_at {
            return;
        }
        state.warn_at = waited * 2;
        drop(state);
        log_limited!(
            COPY_LOG,
            Warn,
            "{} to {}: the guest has been slowed for {:.0} s of {:.0} s by the copy, its writes waited for old data to be \
             saved; use a faster target, give old data a faster disk to go to first (--scratch, --scratch-size), or leave \
             more of the target to the guest's writes (virtioblkctl copies limit)",
            self.name,
            self.target.path.display(),
            waited.as_secs_f64(),
            took.as_secs_f64()
        );
    }

    /// Ends the copy as failed.
    pub(super) fn fail(&self, why: String) {
        let line = format!("{} to {} failed: {why}", self.name, self.target.path.display());
        if self.end(Phase::Failed, Some(why)) {
            log_limited!(COPY_LOG, Error, "{line}");
        }
    }

    /// Clears up after the end; the first caller does it: the partial file goes, operators are told. Waits two seconds
    /// at most for the target's filesystem; rings do not call it.
    pub(super) fn clear_up(&self) {
        let mut state = self.lock();
        if !state.phase.is_over() || std::mem::replace(&mut state.cleared, true) {
            return;
        }
        let completed = state.phase == Phase::Completed;
        drop(state);
        if completed {
            self.target.finish();
        } else {
            self.target.remove();
        }
        let status = self.status();
        log_limited!(COPY_LOG, Info, "{} to {}: {}", self.name, status.target, status.state);
        self.shared.ended(self, status.clone());
        self.shared.events.send(Event::CopyEnded(status));
    }

    /// Clusters of it are to be read yet.
    pub(super) fn needs_image(&self) -> bool {
        self.shared.delaying.load(Ordering::SeqCst) == self.number
    }

    fn stop_delaying(&self) {
        // Another copy's number stays.
        let _ = self.shared.delaying.compare_exchange(self.number, 0, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// For operators.
    pub(super) fn status(&self) -> CopyStatus {
        let state = self.lock();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let took = state.took.or_else(|| state.started.map(|started| started.elapsed()));
        CopyStatus {
            copy: self.name.clone(),
            target: self.target.path.display().to_string(),
            state: state.phase.word().into(),
            total_bytes: self.size,
            done_bytes: load(&self.done).saturating_mul(self.cluster).min(self.size),
            saved_before_write_bytes: load(&self.saved_before_write),
            stored_bytes: load(&self.stored),
            scratch_bytes: if state.phase.is_over() { 0 } else { load(&self.scratch) },
            instant: state.instant.map(|instant| instant.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()),
            seconds: took.unwrap_or_default().as_secs_f64(),
            slowed_seconds: state.waited().as_secs_f64(),
            sha256: state.sha256.clone(),
            error: state.error.clone(),
            ending: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_grow_with_the_image() {
        for (size, cluster) in [
            (0, 64 << 10),
            (1 << 30, 64 << 10),
            (32 << 40, 64 << 10),
            ((32 << 40) + 1, 128 << 10),
            (1 << 50, 2 << 20),
            (4 << 60, 8 << 30),
            (u64::MAX >> 1, 16 << 30),
        ] {
            assert_eq!(cluster_of(size), cluster, "{size}");
            assert!(size.div_ceil(cluster) <= MAX_CLUSTERS);
        }
    }
}
