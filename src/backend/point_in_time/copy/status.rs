//! A copy's state for operators.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use super::Copy;
use crate::disk::CopyStatus;

impl Copy {
    /// The copy's state for operators.
    pub(in crate::backend::point_in_time) fn status(&self) -> CopyStatus {
        let state = self.lock();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let took = state.took.or_else(|| state.started.map(|started| started.elapsed()));
        CopyStatus {
            copy: self.name.clone(),
            target: self.target.path.display().to_string(),
            state: state.phase.name().into(),
            total_bytes: self.size,
            done_bytes: load(&self.done).saturating_mul(self.cluster).min(self.size),
            saved_before_write_bytes: load(&self.saved_before_write),
            stored_bytes: load(&self.stored),
            scratch_bytes: if state.phase.is_over() { 0 } else { load(&self.scratch) },
            instant: state.instant.map(|instant| instant.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()),
            seconds: took.unwrap_or_default().as_secs_f64(),
            slowed_seconds: state.wait_clock.total().as_secs_f64(),
            sha256: state.sha256.clone(),
            error: state.error.clone(),
            ending: false,
            export: self.export.as_ref().map(|export| export.status()),
        }
    }
}
