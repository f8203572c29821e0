//! Why a front-end's session ended.

use std::fmt;
use std::io;

/// Why [`Device::serve`](crate::virtio::Device::serve) returned. The text is for the log and for events.
#[derive(Debug)]
pub enum SessionEnd {
    /// [`Device::shutdown`](crate::virtio::Device::shutdown) was called: the device serves no front-end any more.
    ShuttingDown,
    /// The front-end closed its connection.
    Left,
    /// The front-end truncated memory that it had shared, or its huge pages ran out.
    MemoryTakenAway,
    /// This process had no room for the descriptors of a message.
    OutOfDescriptors(io::Error),
    /// The front-end sent something that vhost-user does not allow.
    ProtocolViolation(vhost::vhost_user::Error),
    /// Another process continues the session.
    HandedOver,
    /// The session was to be taken over from another process, which keeps it.
    NotTakenOver,
}

impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionEnd::ShuttingDown => f.write_str("the daemon is ending"),
            SessionEnd::Left => f.write_str("the front-end left"),
            SessionEnd::MemoryTakenAway => f.write_str(
                "the front-end took away memory that it had shared (it truncated the memory's file, or huge pages ran \
                 out): its connection was ended",
            ),
            SessionEnd::OutOfDescriptors(error) => write!(
                f,
                "a message's descriptors could not be taken: {error}; raise the limit of open files (RLIMIT_NOFILE; \
                 ulimit -n, or LimitNOFILE= in the systemd unit), or allow fewer queues (--num-queues)"
            ),
            SessionEnd::ProtocolViolation(error) => write!(f, "the front-end broke the protocol: {error}"),
            SessionEnd::HandedOver => f.write_str("another process has taken it over"),
            SessionEnd::NotTakenOver => f.write_str("it stays with the daemon that had it"),
        }
    }
}
