//! The hand-over to another process ([`crate::upgrade`]): whether it may begin, and what is refused while it lasts.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::{Recipient, Service};
use crate::control::protocol::AttendCommand;
use crate::control::protocol::CopyCommand;
use crate::control::protocol::ImageSnapshotCommand;
use crate::control::protocol::{Command, Error};
use crate::control::quiesce::PeerId;
use crate::upgrade::VERSION;

impl Service {
    /// Whether a hand-over lasts.
    pub(super) fn is_upgrading(&self) -> bool {
        self.upgrade.as_ref().is_some_and(|upgrade| upgrade.under_way.load(Ordering::Acquire))
    }

    /// Whether it is about to be decided whose clients those are that come.
    pub(in crate::control) fn is_leaving(&self) -> bool {
        self.upgrade.as_ref().is_some_and(|upgrade| upgrade.leaving.load(Ordering::Acquire))
    }

    /// What would be lost with this process, or would change the disk behind the next one's back.
    pub(super) fn refuse_while_upgrading(&self, command: &Command) -> Result<(), Error> {
        let lasting = matches!(
            command,
            Command::Quiesce(_)
                | Command::Resize { .. }
                | Command::HandOver { .. }
                | Command::Copy(CopyCommand::Prepare { .. } | CopyCommand::Start { .. })
                | Command::ImageSnapshot(ImageSnapshotCommand::Create { .. })
                | Command::Attend(AttendCommand::Attend { .. })
        );
        if lasting && self.is_upgrading() {
            let desc = "another process is taking this disk over: connect again in a second, and repeat this";
            return Err(Error::new("upgrading", desc));
        }
        Ok(())
    }

    /// `hand-over`: after its reply the connection is no client's any more.
    pub(super) fn hand_over(&mut self, peer: PeerId, version: u64) -> Result<Value, Error> {
        let Some(upgrade) = &self.upgrade else {
            return Err(Error::new("no-upgrade", "this daemon cannot be upgraded in place: restart it"));
        };
        if version != VERSION {
            let desc = format!(
                "the new virtioblkd speaks version {version} of the hand-over and this one version {VERSION}: restart \
                 this one instead, the guest waits meanwhile"
            );
            return Err(Error::new("no-upgrade", desc));
        }
        let busy = |desc: &str| Err(Error::new("not-now", desc));
        if !self.coordinator.is_open() || self.coordinator.waiting() > 0 || self.foreign_snapshot.is_some() {
            return busy("the disk is held, or is to be: `virtioblkctl status` says by whom; resume it first");
        }
        let copies = self.disk.copies().map(|copies| copies.status()).unwrap_or_default();
        if copies.iter().any(|copy| matches!(copy.state.as_str(), "prepared" | "running" | "syncing")) {
            return busy("a point-in-time copy is under way: wait for it (`virtioblkctl copies`), or cancel it");
        }
        if self.jobs.is_busy() {
            return busy("a snapshot of the image is being made: try again when it is done");
        }
        if self.disk.status().sync_failed {
            return busy(
                "a sync has failed, so what the guest wrote may be lost, and the next process would not know: stop the \
                 guest, check the storage, and start it again",
            );
        }
        upgrade.under_way.store(true, Ordering::Release);
        self.hands_over_to = Some(peer);
        self.tell(Recipient::Everyone, "UPGRADE", json!({}));
        Ok(json!({}))
    }

    /// The connection that asked for the hand-over and has its answer.
    pub(in crate::control) fn hands_over(&mut self) -> Option<PeerId> {
        self.hands_over_to.take()
    }

    /// Whether a guest's attendant is registered that snapshots must not be taken without, or is missed.
    pub(in crate::control) fn misses_attendant(&self) -> bool {
        self.attendance.is_relied_on()
    }
}
