//! PURE. Orders the jobs that make and remove snapshots in the image's own store, and knows which connection made which
//! snapshot. The jobs themselves run behind [`crate::disk::ImageSnapshots`], one at a time and in a thread of their
//! own, because they may take long.

use std::collections::VecDeque;

use crate::control::protocol::Error;
use crate::control::quiesce::{PeerId, RequestId};

/// A job for the thread that makes and removes snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::control) enum SnapshotJob {
    /// Make a snapshot, and then reply to this request.
    Create { name: String, token: String, peer: PeerId, request: RequestId },
    /// Remove a snapshot, and then reply to this request, if there is one.
    Remove { name: String, request: Option<RequestId> },
}

/// The jobs that run or wait, and the snapshots that clients made. Owned by the control thread.
#[derive(Default)]
pub(in crate::control) struct SnapshotJobs {
    running: Option<SnapshotJob>,
    waiting: VecDeque<SnapshotJob>,
    made: Vec<ClientSnapshot>,
}

/// A snapshot that a client made, while its connection lasts.
struct ClientSnapshot {
    peer: PeerId,
    name: String,
    /// The snapshot outlives the connection.
    kept: bool,
}

impl SnapshotJobs {
    /// Adds a job that makes a snapshot. Fails if another job runs or waits, because this one would have to wait for it
    /// while the disk is held.
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

    /// Adds a job that removes a snapshot. Fails if this connection made no snapshot of this name.
    pub(in crate::control) fn remove(&mut self, name: String, peer: PeerId, request: RequestId) -> Result<(), Error> {
        let at = self.find(&name, peer)?;
        self.made.remove(at);
        self.waiting.push_back(SnapshotJob::Remove { name, request: Some(request) });
        Ok(())
    }

    /// Makes a snapshot outlive its connection. Fails if this connection made no snapshot of this name.
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

    /// Whether a snapshot would be removed if this connection ended.
    pub(in crate::control) fn owns_some(&self, peer: PeerId) -> bool {
        self.made.iter().any(|made| made.peer == peer && !made.kept)
    }

    /// Adds jobs that remove the snapshots of a connection that ended, except those that it kept.
    pub(in crate::control) fn peer_gone(&mut self, peer: PeerId) {
        let (gone, rest) = std::mem::take(&mut self.made).into_iter().partition(|made| made.peer == peer);
        self.made = rest;
        let gone: Vec<ClientSnapshot> = gone;
        let unwanted = gone.into_iter().filter(|made| !made.kept);
        self.waiting.extend(unwanted.map(|made| SnapshotJob::Remove { name: made.name, request: None }));
    }

    /// Takes the next job, if none is running. The caller runs it, and then calls [`SnapshotJobs::done`].
    pub(in crate::control) fn next(&mut self) -> Option<SnapshotJob> {
        if self.running.is_none() {
            self.running = self.waiting.pop_front();
            return self.running.clone();
        }
        None
    }

    /// Ends the running job and returns it.
    pub(in crate::control) fn done(&mut self) -> Option<SnapshotJob> {
        self.running.take()
    }

    /// Records a snapshot that was made while its client waited for it.
    pub(in crate::control) fn made(&mut self, name: String, peer: PeerId) {
        self.made.push(ClientSnapshot { peer, name, kept: false });
    }

    /// Adds a job that removes a snapshot which was made when no client waited for it any more.
    pub(in crate::control) fn unwanted(&mut self, name: String) {
        self.waiting.push_back(SnapshotJob::Remove { name, request: None });
    }

    /// Returns the snapshots that stay when the daemon ends although no client kept them, or their removal was
    /// requested.
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
