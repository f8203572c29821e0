//! The events that the watch thread handles.

/// An event for the watch thread.
pub(super) enum WatchEvent {
    /// The image's header changed.
    Updated,
    /// The image's health changed.
    StateChanged,
    /// There is a new quiesce request, which has a deadline.
    Quiesce,
    /// The thread must end.
    Stop,
}
