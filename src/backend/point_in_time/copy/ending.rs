//! How a copy ends: its last phases, success, failure, and the cleaning up.

use super::{Copy, Phase};
use crate::base::rate_limit::{COPY_LOG, log_limited};
use crate::disk::Event;

impl Copy {
    /// The target's thread has written everything and makes it durable. Returns `false` when the copy is over.
    pub(in crate::backend::point_in_time) fn begin_sync(&self) -> bool {
        let mut state = self.lock();
        let is_running = state.phase == Phase::Running;
        if is_running {
            state.phase = Phase::Syncing;
        }
        is_running
    }

    /// The file is durable and may get its final name; from now on the copy cannot be cancelled. Returns `false` when the
    /// copy is over.
    pub(in crate::backend::point_in_time) fn begin_publish(&self, sha256: Option<String>) -> bool {
        let mut state = self.lock();
        let is_syncing = state.phase == Phase::Syncing;
        if is_syncing {
            state.phase = Phase::Publishing;
            state.sha256 = sha256;
        }
        is_syncing
    }

    /// Ends the copy and lets every delayed op continue. Returns `false` when it is already over, or too late to cancel.
    pub(in crate::backend::point_in_time) fn end(&self, phase: Phase, error: Option<String>) -> bool {
        let mut state = self.lock();
        if state.phase.is_over() || (state.phase == Phase::Publishing && phase == Phase::Cancelled) {
            return false;
        }
        state.phase = phase;
        state.took = state.started.map(|started| started.elapsed());
        state.error = error;
        self.stop_delaying();
        state.urgent.clear();
        state.waiters.release_all();
        state.measure_waiting();
        drop(state);
        self.target.copy_is_over();
        self.wake_copier();
        true
    }

    /// Logs a warning if the guest's writes have waited long for this copy.
    pub(in crate::backend::point_in_time) fn warn_if_slow(&self) {
        let mut state = self.lock();
        let Some(waited) = state.wait_clock.take_warning() else { return };
        let took = state.started.map(|started| started.elapsed()).unwrap_or_default();
        drop(state);
        log_limited!(
            COPY_LOG,
            Warn,
            "{} to {}: the guest has been slowed for {:.0} s of {:.0} s by the copy, because its writes waited until old \
             data was saved; use a faster target, give the daemon a faster disk for old data (--scratch, --scratch-size), \
             or leave more of the target's bandwidth to the guest's writes (virtioblkctl copies limit)",
            self.name,
            self.target.path.display(),
            waited.as_secs_f64(),
            took.as_secs_f64()
        );
    }

    /// Ends the copy as failed.
    pub(in crate::backend::point_in_time) fn fail(&self, why: String) {
        let line = format!("{} to {} failed: {why}", self.name, self.target.path.display());
        if self.end(Phase::Failed, Some(why)) {
            log_limited!(COPY_LOG, Error, "{line}");
        }
    }

    /// Removes the partial file and sends the event of the copy's end. Only the first call after the end does so. Waits
    /// for the target's filesystem, two seconds at most; not called by a virtqueue's thread.
    pub(in crate::backend::point_in_time) fn clean_up(&self) {
        let mut state = self.lock();
        if !state.phase.is_over() || std::mem::replace(&mut state.cleaned_up, true) {
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
        self.shared.record_end(self, status.clone());
        self.shared.events.send(Event::CopyEnded(status));
    }
}
