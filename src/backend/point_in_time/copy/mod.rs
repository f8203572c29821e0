//! One copy from `prepare` to its end: the state that the virtqueues' threads, its own threads and the control thread
//! share.
//!
//! A cluster is *saved* when its old data is in memory or known to be zero. From the instant on, a virtqueue's thread
//! passes on a change of a cluster only if the cluster's bit is set. A cluster whose bit is clear therefore still holds
//! what it held at the instant.

mod ending;
mod phase;
mod status;
mod wait_clock;

use std::collections::{TryReserveError, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use super::bitmap::Bitmap;
use super::instant::ExportCounters;
use super::scratch_thread::ScratchReply;
use super::target_handle::TargetHandle;
use super::waiters::{DelayTicket, Waiters};
use super::{Mutant, Shared};
use crate::backend::IoBuf;
use crate::backend::mailbox::Mailbox;
use crate::disk::CopyOptions;
pub(super) use phase::Phase;
use wait_clock::WaitClock;

/// The smallest cluster, in bytes.
const MIN_CLUSTER: u64 = 64 << 10;

/// The most clusters that an image is divided into, so that a copy's bitmap takes 64 MiB at most.
const MAX_CLUSTERS: u64 = 1 << 29;

/// The cluster size for an image of `size` bytes: 64 KiB up to 32 TiB; beyond that it grows with the image.
fn cluster_of(size: u64) -> u64 {
    size.div_ceil(MAX_CLUSTERS).next_power_of_two().max(MIN_CLUSTER)
}

/// One copy of the image.
pub(super) struct Copy {
    /// Never 0, and never the number of an earlier copy.
    pub(super) number: u64,
    pub(super) name: String,
    pub(super) size: u64,
    /// Bytes of a cluster, a power of two.
    pub(super) cluster: u64,
    pub(super) target: TargetHandle,
    pub(super) shared: Arc<Shared>,
    pub(super) saved: Bitmap,
    /// The bandwidth limit in bytes a second; 0: no limit.
    pub(super) bandwidth: AtomicU64,
    /// Clusters that are written to the target or need not be, because they hold only zeroes.
    pub(super) done: AtomicU64,
    /// Bytes that were saved because an op waited for them.
    pub(super) saved_before_write: AtomicU64,
    /// Bytes written to the target; blocks of zeroes are not.
    pub(super) stored: AtomicU64,
    /// Bytes in the scratch.
    pub(super) scratch: AtomicU64,
    /// The eventfd on which the copier sleeps.
    wake: OwnedFd,
    /// Buffers that the target's thread has written, for the copier to reuse.
    returned: Mutex<Vec<IoBuf>>,
    /// Replies of the scratch's thread that the copier has not taken.
    scratch_replies: Mutex<Vec<ScratchReply>>,
    state: Mutex<State>,
    /// What others read of the instant; `None`: it is copied.
    pub(super) export: Option<Arc<ExportCounters>>,
}

struct State {
    phase: Phase,
    /// The delayed ops of all virtqueues.
    waiters: Waiters,
    wait_clock: WaitClock,
    /// Clusters that delayed ops wait for and that the copier has not taken.
    urgent: VecDeque<Range<u64>>,
    /// The instant that the copy is of.
    instant: Option<SystemTime>,
    /// The instant by the monotonic clock.
    started: Option<Instant>,
    /// The time from the instant to the copy's end.
    took: Option<Duration>,
    error: Option<String>,
    sha256: Option<String>,
    /// A thread cleans up after the copy, or has done so.
    cleaned_up: bool,
}

impl State {
    /// Updates the waiting time; called after each change of `waiters`.
    fn measure_waiting(&mut self) {
        self.wait_clock.set_waiting(!self.waiters.is_empty());
    }
}

impl Copy {
    /// Creates the bitmap for an image of `size` bytes. Fails when there is no memory for it.
    pub(super) fn bitmap(size: u64) -> Result<Bitmap, TryReserveError> {
        Bitmap::new(size.div_ceil(cluster_of(size)))
    }

    /// Creates a copy in phase [`Phase::Prepared`]. `wake` is an eventfd for the copier to sleep on, `saved` the bitmap of
    /// [`Copy::bitmap`].
    pub(super) fn new(
        number: u64,
        size: u64,
        options: &CopyOptions,
        target: TargetHandle,
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
            scratch_replies: Mutex::default(),
            state: Mutex::new(State {
                phase: Phase::Prepared,
                waiters: Waiters::new(number),
                wait_clock: WaitClock::default(),
                urgent: VecDeque::new(),
                instant: None,
                started: None,
                took: None,
                error: None,
                sha256: None,
                cleaned_up: false,
            }),
            export: None,
        }
    }

    /// Ends a copy that no operator knows of, without an event.
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
        // An error does not matter: a counter that is full is readable too.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Fixes the instant, unless a write is in flight; then it returns `false`. The lock is held meanwhile: a virtqueue's
    /// thread that sees the copy and asks whether it runs waits until that is decided.
    pub(super) fn begin(&self, writes_in_flight: impl FnOnce() -> u64) -> bool {
        let mut state = self.lock();
        // Before the counters are read: a virtqueue's thread counts its write before it loads `delaying`, so one of the
        // two sees the other.
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

    /// Checks whether an op that changes these bytes must wait. `Some`: until this ticket is posted to `mailbox`. `None`:
    /// it may continue. Called by the virtqueue's thread.
    pub(super) fn must_wait(&self, bytes: Range<u64>, mailbox: &Arc<Mailbox<DelayTicket>>) -> Option<DelayTicket> {
        // Bytes by which the image has grown since are not part of the copy.
        let clusters = bytes.start / self.cluster..bytes.end.div_ceil(self.cluster).min(self.saved.len());
        if self.shared.tuning.mutant == Some(Mutant::SavesNothing) || self.saved.first_clear(clusters.clone()).is_none()
        {
            return None;
        }
        let mut state = self.lock();
        // Checked again under the lock: the copier sets bits before it takes the lock to find waiters.
        let first = self.saved.first_clear(clusters.clone()).filter(|_| state.phase == Phase::Running)?;
        let missing = first..clusters.end;
        let ticket = state.waiters.add(missing.clone(), &self.saved, mailbox)?;
        state.urgent.push_back(missing);
        state.measure_waiting();
        drop(state);
        self.wake_copier();
        Some(ticket)
    }

    /// Removes the waiting op with this ticket.
    pub(super) fn forget(&self, ticket: DelayTicket) {
        let mut state = self.lock();
        state.waiters.remove(ticket);
        state.measure_waiting();
    }

    /// Marks clusters as saved and wakes the ops that waited for them. Returns how many were not saved before. Called by
    /// the copier.
    pub(super) fn mark_saved(&self, clusters: Range<u64>) -> u64 {
        let fresh = self.saved.set(clusters.clone());
        let mut state = self.lock();
        state.waiters.release_saved(clusters, &self.saved);
        state.measure_waiting();
        fresh
    }

    /// Takes the clusters that delayed ops wait for; `None` when the copy is not running. Called by the copier.
    pub(super) fn take_urgent(&self) -> Option<VecDeque<Range<u64>>> {
        let mut state = self.lock();
        (state.phase == Phase::Running).then(|| std::mem::take(&mut state.urgent))
    }

    /// Every cluster is saved: the virtqueues need not check their ops any more. Called by the copier.
    pub(super) fn all_saved(&self) {
        self.stop_delaying();
    }

    /// Returns a buffer whose data is written to the target, for the copier to reuse.
    pub(super) fn return_buffer(&self, buf: IoBuf) {
        self.returned.lock().expect("no panic while held").push(buf);
        self.wake_copier();
    }

    /// Takes the buffers of [`Copy::return_buffer`]. Called by the copier.
    pub(super) fn take_returned(&self) -> Vec<IoBuf> {
        std::mem::take(&mut self.returned.lock().expect("no panic while held"))
    }

    /// Adds a reply of the scratch's thread, for the copier.
    pub(super) fn add_scratch_reply(&self, reply: ScratchReply) {
        self.scratch_replies.lock().expect("no panic while held").push(reply);
        self.wake_copier();
    }

    /// Takes the replies of [`Copy::add_scratch_reply`]. Called by the copier.
    pub(super) fn take_scratch_replies(&self) -> Vec<ScratchReply> {
        std::mem::take(&mut self.scratch_replies.lock().expect("no panic while held"))
    }

    /// Whether the copier still has clusters to read.
    pub(super) fn needs_image(&self) -> bool {
        self.shared.delaying.load(Ordering::SeqCst) == self.number
    }

    fn stop_delaying(&self) {
        // Only this copy's number is cleared, not another copy's.
        let _ = self.shared.delaying.compare_exchange(self.number, 0, Ordering::SeqCst, Ordering::SeqCst);
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
