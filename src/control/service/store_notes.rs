//! What the image's back-end reports to the control thread, and what [`StoreQuiesce`](super::store_quiesce) decides on it.

use std::time::Instant;

use serde_json::{Value, json};

use super::store_quiesce::{Effect, WHO, store};
use super::{Client, Recipient, Service};
use crate::backend::QuiesceAsk;
use crate::base::rate_limit::{IMAGE_LOG, log_limited};
use crate::control::image_notices::{Note, Notes};
use crate::control::protocol::{AttendCommand, Error};
use crate::engine::Errno;

impl Service {
    /// Takes what the image's back-end has reported since the last call.
    pub(in crate::control) fn image_notes(&mut self, notes: Notes, now: Instant) {
        if let Some(size) = notes.resized {
            (self.resized)(size);
        }
        for note in notes.notes {
            match note {
                Note::Quiesce(ask, arrived_at) => self.store_asks(ask, arrived_at, now),
                Note::Unquiesce(arrived_at) => self.store.unquiesce(arrived_at),
                Note::JobDone(result) => self.job_done(result),
                Note::Closed => self.store.end(),
            }
            self.carry_out_store(now);
        }
        if notes.state_changed {
            self.image_state();
        }
    }

    fn store_asks(&mut self, ask: QuiesceAsk, arrived_at: Instant, now: Instant) {
        let why = if self.is_upgrading() {
            "another process takes the disk over: take the snapshot again"
        } else if self.store.is_busy() {
            "an earlier one is not over: take one snapshot after the other"
        } else {
            let (request, token) = self.pending.next_hold();
            self.store.quiesce(ask, (request, token), arrived_at, now);
            return;
        };
        log_limited!(IMAGE_LOG, Warn, "{WHO}: refused, because {why}");
        ask.answer(Err(Errno(libc::EBUSY)));
    }

    /// Carries out a command of an attendant.
    pub(super) fn attend(&mut self, client: Client, command: AttendCommand, now: Instant) -> Result<Value, Error> {
        self.store.attend(client.peer, client.credentials, command, now)?;
        self.carry_out_store(now);
        Ok(json!({}))
    }

    /// Carries out what the store's state machine decided, in order.
    pub(super) fn carry_out_store(&mut self, now: Instant) {
        while let Some(effect) = self.store.next_effect() {
            match effect {
                Effect::Send(to, name, data) => self.send(to, name, data),
                Effect::Hold(ask) => {
                    self.coordinator.quiesce(ask, now);
                    self.carry_out(now);
                    self.refuse_if_stopped(now);
                }
                Effect::Cancel(request) => {
                    self.coordinator.cancel(request, now);
                    self.carry_out(now);
                }
                Effect::Refuse(request, why) => {
                    self.refused(request, &store(), why);
                    self.send_released();
                }
                Effect::Resume(token) => {
                    if self.coordinator.resume(&token, now).is_err() {
                        let line = "its hold had ended without its knowledge; please report this as a defect";
                        log_limited!(IMAGE_LOG, Error, "{WHO}: {line}");
                    }
                    self.carry_out(now);
                }
            }
        }
    }

    /// Tells the attendants whose snapshots are over that they can thaw their guest: not before the gate is open.
    pub(super) fn send_released(&mut self) {
        if !self.coordinator.is_open() {
            return;
        }
        for (peer, id) in self.store.released() {
            self.send(Recipient::Only(peer), "RELEASED", json!({"id": id}));
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
