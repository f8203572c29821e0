//! Handles the notices of the image's back-end, and carries out the decisions of
//! [`StoreQuiesce`](super::store_quiesce::StoreQuiesce).

use std::time::Instant;

use serde_json::{Value, json};

use super::store_quiesce::{StoreEffect, WHO, store};
use super::{ClientInfo, Recipient, Service};
use crate::backend::QuiesceRequest;
use crate::base::rate_limit::{IMAGE_LOG, log_limited};
use crate::control::image_notices::{ImageNotice, PendingNotices};
use crate::control::protocol::{AttendCommand, Error};
use crate::engine::Errno;

impl Service {
    /// Handles the notices since the last call.
    pub(in crate::control) fn handle_image_notices(&mut self, pending: PendingNotices, now: Instant) {
        if let Some(size) = pending.resized {
            (self.resized)(size);
        }
        for notice in pending.queue {
            match notice {
                ImageNotice::Quiesce(request, arrived_at) => self.begin_store_quiesce(request, arrived_at, now),
                ImageNotice::Unquiesce(arrived_at) => self.store.unquiesce(arrived_at),
                ImageNotice::SnapshotDone(result) => self.job_done(result),
                ImageNotice::Closed => self.store.end(),
            }
            self.carry_out_store(now);
        }
        if pending.state_changed {
            self.image_state();
        }
    }

    fn begin_store_quiesce(&mut self, quiesce_request: QuiesceRequest, arrived_at: Instant, now: Instant) {
        let why = if self.is_upgrading() {
            "another process takes the disk over: take the snapshot again"
        } else if self.store.is_busy() {
            "an earlier one is not over: take one snapshot after the other"
        } else {
            let hold = self.pending.next_hold();
            self.store.quiesce(quiesce_request, hold, arrived_at, now);
            return;
        };
        log_limited!(IMAGE_LOG, Warn, "{WHO}: refused, because {why}");
        quiesce_request.reply(Err(Errno(libc::EBUSY)));
    }

    /// Carries out a command of an attendant.
    pub(super) fn attend(&mut self, client: ClientInfo, command: AttendCommand, now: Instant) -> Result<Value, Error> {
        self.store.attend(client.peer, client.credentials, command, now)?;
        self.carry_out_store(now);
        Ok(json!({}))
    }

    /// Carries out the decisions of the store's state machine, in order.
    pub(super) fn carry_out_store(&mut self, now: Instant) {
        while let Some(effect) = self.store.next_effect() {
            match effect {
                StoreEffect::Send(to, name, data) => self.send(to, name, data),
                StoreEffect::Hold(request) => {
                    self.coordinator.quiesce(request, now);
                    self.carry_out(now);
                    self.refuse_if_stopped(now);
                }
                StoreEffect::Cancel(request) => {
                    self.coordinator.cancel(request, now);
                    self.carry_out(now);
                }
                StoreEffect::Refuse(request, why) => {
                    self.refused(request, &store(), why);
                    self.send_releases();
                }
                StoreEffect::Resume(token) => {
                    if self.coordinator.resume(&token, now).is_err() {
                        let line = "its hold had ended without its knowledge; please report this as a defect";
                        log_limited!(IMAGE_LOG, Error, "{WHO}: {line}");
                    }
                    self.carry_out(now);
                }
            }
        }
    }

    /// Sends `RELEASED` to the attendants whose snapshots are over, once the gate is open, so that they thaw their
    /// guest.
    pub(super) fn send_releases(&mut self) {
        if !self.coordinator.is_open() {
            return;
        }
        for (peer, id) in self.store.take_releases() {
            self.send(Recipient::One(peer), "RELEASED", json!({"id": id}));
        }
    }

    /// Reports the image's state if it has changed.
    fn image_state(&mut self) {
        let state = self.disk.status().image_status;
        if state == self.image_state {
            return;
        }
        match (&state.trouble, &state.trouble_detail) {
            // Something else changed.
            (trouble, _) if *trouble == self.image_state.trouble => {}
            (Some(trouble), detail) => {
                log_limited!(IMAGE_LOG, Error, "the image: {trouble}: {}", detail.as_deref().unwrap_or(""))
            }
            (None, _) => log_limited!(IMAGE_LOG, Info, "the image can be used again as it should"),
        }
        self.event("IMAGE_STATE", json!(state));
        self.image_state = state;
    }
}
