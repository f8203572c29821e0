//! PURE. Snapshots that the image's own store makes while the disk is held: what is to be done, in which order. The
//! snapshots themselves are made behind [`crate::disk::ImageSnapshots`], by one thread at a time, because it may take long.

use std::collections::VecDeque;

use crate::control::protocol::Error;
use crate::control::quiesce::{PeerId, RequestId};

/// A job for the thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::control) enum SnapshotJob {
    /// Make a snapshot, and reply to this request.
    Create { name: String, token: String, peer: PeerId, request: RequestId },
    /// Remove a snapshot, and reply to this request, if there is one.
    Remove { name: String, request: Option<RequestId> },
}

/// The jobs that run or wait, and the snapshots that were made.
#[derive(Default)]
pub(in crate::control) struct SnapshotJobs {
    running: Option<SnapshotJob>,
    waiting: VecDeque<SnapshotJob>,
    made: Vec<ClientSnapshot>,
}

/// A snapshot whose connection has not ended.
struct ClientSnapshot {
    peer: PeerId,
    name: String,
    /// The snapshot outlives the connection.
    kept: bool,
}

impl SnapshotJobs {
    /// Adds a job that makes a snapshot. Errors: another job runs or waits, and this one would have to wait for it while
    /// its disk is held.
    pub(in crate::control) fn create(
        &mut self,
        name: String,
        token: String,
        peer: PeerId,
        request: RequestId,
    ) -> Result<(), Error> {
        if self.running.is_some() || !self.waiting.is_empty() {
            return Err(Error::new("busy", "another snapshot of this image is being made or removed: try again"));
        }
        self.waiting.push_back(SnapshotJob::Create { name, token, peer, request });
        Ok(())
    }

    /// Adds a job that removes a snapshot. Errors: this connection made none of this name.
    pub(in crate::control) fn remove(&mut self, name: String, peer: PeerId, request: RequestId) -> Result<(), Error> {
        let at = self.find(&name, peer)?;
        self.made.remove(at);
        self.waiting.push_back(SnapshotJob::Remove { name, request: Some(request) });
        Ok(())
    }

    /// Makes a snapshot outlive its connection. Errors as of [`SnapshotJobs::remove`].
    pub(in crate::control) fn keep(&mut self, name: &str, peer: PeerId) -> Result<(), Error> {
        let at = self.find(name, peer)?;
        self.made[at].kept = true;
        Ok(())
    }

    /// Whether a snapshot is being made or removed, or was made and is not kept yet.
    pub(in crate::control) fn is_busy(&self) -> bool {
        self.running.is_some() || !self.waiting.is_empty() || self.made.iter().any(|made| !made.kept)
    }

    fn find(&self, name: &str, peer: PeerId) -> Result<usize, Error> {
        let at = self.made.iter().position(|made| made.peer == peer && made.name == name);
        at.ok_or_else(|| Error::new("no-such-snapshot", "this connection made no snapshot of this name"))
    }

    /// A connection ended: the snapshots that it made and did not keep are removed.
    pub(in crate::control) fn peer_gone(&mut self, peer: PeerId) {
        let (gone, rest) = std::mem::take(&mut self.made).into_iter().partition(|made| made.peer == peer);
        self.made = rest;
        let gone: Vec<ClientSnapshot> = gone;
        let unwanted = gone.into_iter().filter(|made| !made.kept);
        self.waiting.extend(unwanted.map(|made| SnapshotJob::Remove { name: made.name, request: None }));
    }

    /// The next job, if none is running. The caller runs it, and [`SnapshotJobs::done`] follows.
    pub(in crate::control) fn next(&mut self) -> Option<SnapshotJob> {
        if self.running.is_none() {
            self.running = self.waiting.pop_front();
            return self.running.clone();
        }
        None
    }

    /// The thread has ended; returns its job.
    pub(in crate::control) fn done(&mut self) -> Option<SnapshotJob> {
        self.running.take()
    }

    /// A snapshot was made, and its client still waits for it.
    pub(in crate::control) fn made(&mut self, name: String, peer: PeerId) {
        self.made.push(ClientSnapshot { peer, name, kept: false });
    }

    /// A snapshot was made that no client waits for any more: it is to be removed.
    pub(in crate::control) fn unwanted(&mut self, name: String) {
        self.waiting.push_back(SnapshotJob::Remove { name, request: None });
    }

    /// The snapshots that no client decided to keep, and those that are not removed yet: they stay when the daemon ends.
    pub(in crate::control) fn left(&self) -> Vec<&str> {
        let removed = self.waiting.iter().filter_map(|job| match job {
            SnapshotJob::Remove { name, .. } => Some(name.as_str()),
            SnapshotJob::Create { .. } => None,
        });
        self.made.iter().filter(|made| !made.kept).map(|made| made.name.as_str()).chain(removed).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_run_one_at_a_time_and_snapshots_that_are_not_kept_are_removed() {
        let mut jobs = SnapshotJobs::default();
        jobs.create("a".into(), "t".into(), 1, 7).unwrap();
        let create = SnapshotJob::Create { name: "a".into(), token: "t".into(), peer: 1, request: 7 };
        assert_eq!((jobs.next(), jobs.next()), (Some(create.clone()), None));
        assert_eq!(jobs.create("b".into(), "t".into(), 2, 8).unwrap_err().code, "busy");
        assert_eq!(jobs.done(), Some(create));
        jobs.made("a".into(), 1);
        jobs.made("b".into(), 1);
        jobs.made("c".into(), 1);
        assert_eq!(jobs.keep("a", 2).unwrap_err().code, "no-such-snapshot");
        jobs.keep("a", 1).unwrap();
        jobs.made("d".into(), 1);
        jobs.keep("d", 1).unwrap();
        jobs.remove("b".into(), 1, 9).unwrap();
        assert_eq!(jobs.remove("b".into(), 1, 9).unwrap_err().code, "no-such-snapshot");
        jobs.peer_gone(2);
        jobs.peer_gone(1);
        assert_eq!(jobs.left(), ["b", "c"]);
        assert_eq!(jobs.next(), Some(SnapshotJob::Remove { name: "b".into(), request: Some(9) }));
        assert_eq!(jobs.next(), None, "the thread is busy");
        jobs.done();
        assert_eq!(jobs.next(), Some(SnapshotJob::Remove { name: "c".into(), request: None }));
        jobs.done();
        assert_eq!(jobs.next(), None);
    }
}
