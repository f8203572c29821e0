//! A connection that may take the place of a front-end that has said nothing yet.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

pub(super) use crate::virtio::device::FirstBytes;

/// Candidates at most; the oldest gives way to a new one.
pub(super) const MAX_CANDIDATES: usize = 8;
/// How long a candidate may say nothing. QEMU sends its first message as soon as it wants the disk.
const CANDIDATE_TIMEOUT: Duration = Duration::from_secs(2);

/// See this module's head.
pub(super) struct Candidate {
    pub(super) connection: UnixStream,
    /// Whose it is.
    pub(super) peer: String,
    /// When it is turned away if it has said nothing.
    pub(super) until: Instant,
}

impl Candidate {
    pub(super) fn new(connection: UnixStream, peer: String) -> Self {
        Candidate { connection, peer, until: Instant::now() + CANDIDATE_TIMEOUT }
    }

    /// What it has sent. Never blocks.
    pub(super) fn first_bytes(&self) -> FirstBytes {
        FirstBytes::of(&self.connection)
    }
}

impl AsFd for Candidate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}
