//! The control thread's part of a hand-over to another process ([`crate::upgrade`]): decides whether it may begin, and
//! refuses commands while it runs.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::Service;
use crate::control::protocol::AttendCommand;
use crate::control::protocol::CopyCommand;
use crate::control::protocol::ExportCommand;
use crate::control::protocol::ImageSnapshotCommand;
use crate::control::protocol::return_types::TookOver;
use crate::control::protocol::{Command, Error};
use crate::control::quiesce::PeerId;
use crate::disk::CopyStatus;
use crate::upgrade::VERSION;

/// The connection between the control thread and the daemon's hand-over.
pub struct Upgrade {
    /// The control thread calls this with the connection that the two processes use from now on, and whether an
    /// attendant is required. It must not block.
    pub begin: Box<dyn Fn(UnixStream, bool) + Send>,
    /// A hand-over is running. The control thread sets the flag right before `begin`; main clears it when the hand-over
    /// has failed.
    pub is_running: Arc<AtomicBool>,
    /// New clients wait, because it is about to be decided which of the two processes serves them. The hand-over's
    /// thread sets the flag shortly before the decision; main clears it when the hand-over has failed.
    pub leaving: Arc<AtomicBool>,
}

/// The state of hand-overs, from the old process and to the next one.
pub(super) struct UpgradeState {
    /// `None`: no process can take over.
    upgrade: Option<Upgrade>,
    /// The connection that asked for the hand-over, until it has its reply.
    requested_by: Option<PeerId>,
    /// The figures of the hand-over through which this process got the disk.
    took_over: Option<TookOver>,
}

impl UpgradeState {
    pub(super) fn new(upgrade: Option<Upgrade>) -> Self {
        UpgradeState { upgrade, requested_by: None, took_over: None }
    }

    /// Returns the figures of the hand-over through which this process got the disk. `None`: there was no hand-over.
    pub(super) fn took_over(&self) -> Option<&TookOver> {
        self.took_over.as_ref()
    }

    fn is_set(&self, flag: impl FnOnce(&Upgrade) -> &AtomicBool) -> bool {
        self.upgrade.as_ref().is_some_and(|upgrade| flag(upgrade).load(Ordering::Acquire))
    }
}

impl Service {
    /// Records that this process has taken the disk over. `figures`: shown by the status; `attendant_missing`: the old
    /// process required an attendant, which is not connected to this one yet.
    pub(in crate::control) fn took_over(&mut self, figures: TookOver, attendant_missing: bool) {
        self.upgrade.took_over = Some(figures);
        if attendant_missing {
            self.store.attendant_missing();
        }
    }

    /// Whether a hand-over is running.
    pub(super) fn is_upgrading(&self) -> bool {
        self.upgrade.is_set(|upgrade| &upgrade.is_running)
    }

    /// Whether new clients must wait; see [`Upgrade::leaving`].
    pub(in crate::control) fn is_leaving(&self) -> bool {
        self.upgrade.is_set(|upgrade| &upgrade.leaving)
    }

    /// Refuses, during a hand-over, a command whose effect would be lost with this process, or that would change the
    /// disk without the next process's knowledge.
    pub(super) fn refuse_while_upgrading(&self, command: &Command) -> Result<(), Error> {
        let lasting = matches!(
            command,
            Command::Quiesce(_)
                | Command::Resize { .. }
                | Command::SetIoThrottle(_)
                | Command::HandOver { .. }
                | Command::Copy(CopyCommand::Prepare { .. } | CopyCommand::Start { .. })
                | Command::Export(ExportCommand::Prepare { .. })
                | Command::ImageSnapshot(ImageSnapshotCommand::Create { .. })
                | Command::Attend(AttendCommand::Attend { .. })
        );
        if lasting && self.is_upgrading() {
            let desc = "another process is taking this disk over: connect again in a second, and repeat this";
            return Err(Error::new("upgrading", desc));
        }
        Ok(())
    }

    /// Carries out `hand-over`. After the reply the connection belongs to the hand-over, no longer to a client.
    pub(super) fn hand_over(&mut self, peer: PeerId, version: u64) -> Result<Value, Error> {
        let Some(upgrade) = &self.upgrade.upgrade else {
            return Err(Error::new("no-upgrade", "this daemon cannot be upgraded in place: restart it"));
        };
        if version != VERSION {
            let desc = format!(
                "the new virtioblkd speaks version {version} of the hand-over and this one version {VERSION}: restart \
                 this one instead; the guest waits meanwhile"
            );
            return Err(Error::new("no-upgrade", desc));
        }
        let busy = |desc: &str| Err(Error::new("not-now", desc));
        if !self.coordinator.is_open() || self.coordinator.waiting() > 0 || self.store.is_busy() {
            return busy("the disk is held, or is to be: `virtioblkctl status` says by whom; resume it first");
        }
        let copies = self.disk.copies().map(|copies| copies.status()).unwrap_or_default();
        let goes_on = |copy: &&CopyStatus| matches!(copy.state.as_str(), "prepared" | "running" | "syncing");
        // An export lasts as long as its slowest client, which cannot be waited for: it ends when the new daemon is ready.
        if copies.iter().filter(goes_on).any(|copy| copy.export.is_none()) {
            return busy("a point-in-time copy is running: wait for it (`virtioblkctl copies`), or cancel it");
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
        upgrade.is_running.store(true, Ordering::Release);
        self.upgrade.requested_by = Some(peer);
        self.event("UPGRADE", json!({}));
        Ok(json!({}))
    }

    /// Returns the connection that sent `hand-over`, once, after its reply was queued.
    pub(in crate::control) fn take_hand_over_request(&mut self) -> Option<PeerId> {
        self.upgrade.requested_by.take()
    }

    /// Passes the connection that sent `hand-over` to the hand-over.
    pub(in crate::control) fn hand_over_connection(&self, stream: UnixStream) {
        if let Some(upgrade) = &self.upgrade.upgrade {
            (upgrade.begin)(stream, self.store.requires_attendant());
        }
    }
}
