//! A connection that may replace a front-end that has sent nothing yet.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

pub(super) use crate::virtio::device::FirstBytes;

/// The maximum number of candidates. A new one replaces the oldest.
pub(super) const MAX_CANDIDATES: usize = 8;
/// How long a candidate may send nothing. QEMU sends its first message as soon as it wants the disk.
const CANDIDATE_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection that may replace the current front-end; see this module's head.
pub(super) struct Candidate {
    pub(super) connection: UnixStream,
    /// The connected process, for the log.
    pub(super) peer: String,
    /// When the candidate is turned away if it has sent nothing.
    pub(super) deadline: Instant,
}

impl Candidate {
    pub(super) fn new(connection: UnixStream, peer: String) -> Self {
        Candidate { connection, peer, deadline: Instant::now() + CANDIDATE_TIMEOUT }
    }

    /// Classifies what the candidate has sent so far. Never blocks.
    pub(super) fn first_bytes(&self) -> FirstBytes {
        FirstBytes::of(&self.connection)
    }
}

impl AsFd for Candidate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}
