//! The phases of a copy.

/// The phase of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend::point_in_time) enum Phase {
    Prepared,
    Running,
    Syncing,
    /// The target gets its final name; the copy can no longer be cancelled.
    Publishing,
    Completed,
    Failed,
    Cancelled,
}

impl Phase {
    pub(in crate::backend::point_in_time) fn is_over(self) -> bool {
        matches!(self, Phase::Completed | Phase::Failed | Phase::Cancelled)
    }

    /// The phase as the status reports it.
    pub(super) fn name(self) -> &'static str {
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
