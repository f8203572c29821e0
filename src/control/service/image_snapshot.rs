//! Carries out the commands for snapshots that the image's own store makes while a client holds the disk.

use serde_json::{Value, json};

use super::Service;
use super::commands::CommandReply;
use super::snapshot_jobs::SnapshotJob;
use crate::base::rate_limit::{COMMAND_LOG, log_limited};
use crate::control::image_notices::ImageNotice;
use crate::control::protocol::Error;
use crate::control::protocol::ImageSnapshotCommand;
use crate::control::quiesce::{PeerId, RequestId};
use crate::disk::CopyError;

impl Service {
    /// Carries a command out. `id`: the `id` that its request has.
    pub(super) fn image_snapshot(
        &mut self,
        peer: PeerId,
        id: Option<&Value>,
        command: ImageSnapshotCommand,
    ) -> CommandReply {
        if self.disk.snapshots().is_none() {
            let desc = "the store of this disk's image makes no snapshots: take the snapshot another way";
            return CommandReply::Now(Err(Error::new("no-image-snapshots", desc)));
        }
        let request = self.pending.next_id();
        let taken = match command {
            ImageSnapshotCommand::Create { name, token } => {
                if !self.is_held(&token) {
                    return CommandReply::Now(Err(self.not_held(&token)));
                }
                self.jobs.create(name, token, peer, request)
            }
            ImageSnapshotCommand::Remove { name } => self.jobs.remove(name, peer, request),
            ImageSnapshotCommand::Keep { name } => {
                return CommandReply::Now(self.jobs.keep(&name, peer).map(|()| json!({})));
            }
        };
        if let Err(error) = taken {
            return CommandReply::Now(Err(error));
        }
        self.pending.add(request, peer, id.cloned());
        self.next_job();
        CommandReply::Later
    }

    /// Starts a thread for the next job, if none is running.
    pub(super) fn next_job(&mut self) {
        while let Some(job) = self.jobs.next() {
            let (Some(snapshots), inbox) = (self.disk.snapshots(), self.inbox.clone()) else { return };
            let work = move || {
                let result = match &job {
                    SnapshotJob::Create { name, .. } => snapshots.create(name).map(|()| snapshots.full_name(name)),
                    SnapshotJob::Remove { name, .. } => snapshots.remove(name).map(|()| snapshots.full_name(name)),
                };
                inbox.put(ImageNotice::SnapshotDone(result));
            };
            match std::thread::Builder::new().name("image-snapshot".into()).spawn(work) {
                Ok(_) => return,
                Err(error) => {
                    let message = format!("no thread for a snapshot of the image: {error}; raise the limit of tasks");
                    self.job_is_done(Err(CopyError { code: "resources", message }));
                }
            }
        }
    }

    /// Handles the result of a job's thread, and starts the next job.
    pub(super) fn job_done(&mut self, result: Result<String, CopyError>) {
        self.job_is_done(result);
        self.next_job();
    }

    fn job_is_done(&mut self, result: Result<String, CopyError>) {
        let result = result.map_err(|error| Error::new(error.code, error.message));
        match self.jobs.done() {
            Some(SnapshotJob::Create { name, token, peer, request }) => {
                self.created(name, &token, peer, request, result)
            }
            Some(SnapshotJob::Remove { name, request }) => {
                match &result {
                    Ok(full) => {
                        log_limited!(COMMAND_LOG, Info, "the snapshot {full} is removed: it was not wanted after all")
                    }
                    Err(error) => log_limited!(
                        COMMAND_LOG,
                        Error,
                        "'{name}' is no snapshot to rely on, and stays: {}",
                        error.desc
                    ),
                }
                if let Some(request) = request {
                    self.reply_later(request, result.map(|_| json!({})));
                }
            }
            None => log_limited!(
                COMMAND_LOG,
                Error,
                "a snapshot was made that no client requested; please report this as a defect"
            ),
        }
    }

    fn created(&mut self, name: String, token: &str, peer: PeerId, request: RequestId, result: Result<String, Error>) {
        let result = result.and_then(|full| {
            // The snapshot is of one instant only if the disk was held until now. If the client no longer waits, the
            // snapshot is removed.
            if self.is_held(token) && self.pending.contains(request) {
                log_limited!(COMMAND_LOG, Info, "made the snapshot {full}");
                self.jobs.made(name, peer);
                return Ok(json!({"snapshot": full}));
            }
            self.jobs.unwanted(name);
            Err(self.not_held(token))
        });
        self.reply_later(request, result);
    }

    /// Logs the snapshots that no client decided to keep. Called when the daemon ends.
    pub(super) fn report_left_snapshots(&self) {
        for name in self.jobs.left() {
            log_limited!(
                COMMAND_LOG,
                Warn,
                "the snapshot '{name}' was made for a client that did not keep it, and stays: remove it"
            );
        }
    }

    fn is_held(&self, token: &str) -> bool {
        self.coordinator.holds().iter().any(|hold| hold.token == token)
    }

    fn not_held(&self, token: &str) -> Error {
        self.no_such_hold(self.coordinator.end_reason(token))
    }
}
