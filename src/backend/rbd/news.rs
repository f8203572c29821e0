//! What the image's thread hears.

/// What the keeper hears.
pub(super) enum KeeperEvent {
    /// The image's header changed.
    Updated,
    /// The image's trouble began or ended.
    StateChanged,
    /// A quiesce was asked for: there is a deadline.
    Quiesce,
    /// The end.
    Stop,
}
