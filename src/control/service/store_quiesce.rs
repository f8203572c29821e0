//! What the image's own store asks: to hold the disk still while somebody elsewhere takes a snapshot of the image.
//!
//! Its hold is one among others in the coordinator. It is answered once, with a number that its client takes well
//! ([`replies::store_errno`]), and ends when the store says so or by our lease: a store that gave up waiting says nothing.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::attendance::{First, Outcome, Prepare};
use super::replies;
use super::{Recipient, Service};
use crate::backend::QuiesceAsk;
use crate::base::rate_limit::{COMMAND_LOG, IMAGE_LOG, log_limited};
use crate::control::creds::Credentials;
use crate::control::image_notices::{Note, Notes};
use crate::control::protocol::AttendCommand;
use crate::control::protocol::Error;
use crate::control::quiesce::{Ask, Hold, PeerId, Reason, Refusal, RequestId, STORE, Who};
use crate::engine::Errno;

/// As status, events and the log name it.
const WHO: &str = "rbd snapshot";
/// From our answer on. librbd lets the disk go 10 s after it at the latest, so this is for a store that is lost.
const LEASE: Duration = Duration::from_secs(30);
/// The store has let the disk go by itself, without waiting for the snapshot, when its word comes so late after our
/// answer: librbd does after 10 s.
const SELF_RELEASE: Duration = Duration::from_millis(9_900);

/// The snapshot that somebody elsewhere takes. A store asks for one at a time.
pub(super) struct ForeignSnapshot {
    request: RequestId,
    token: String,
    /// Until it is answered.
    ask: Option<QuiesceAsk>,
    /// It is refused then.
    until: Instant,
    /// The attendant was asked so.
    prepare: Option<Prepare>,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The gate is open, and the attendant is asked.
    Preparing,
    /// The coordinator has the request.
    Settling,
    /// Granted and answered, when.
    Held(Instant),
}

impl Service {
    /// What the image's back-end had to say since the last call.
    pub(in crate::control) fn image_notes(&mut self, notes: Notes, now: Instant) {
        if let Some(size) = notes.resized {
            (self.resized)(size);
        }
        for note in notes.notes {
            match note {
                Note::Quiesce(ask, came) => self.store_asks(ask, came, now),
                Note::Unquiesce(came) => self.store_is_done(came, now),
                Note::JobDone(result) => self.job_done(result),
                Note::Closed => self.store_ends(now),
            }
        }
        if notes.state_changed {
            self.image_state();
        }
    }

    fn store_asks(&mut self, ask: QuiesceAsk, came: Instant, now: Instant) {
        if self.is_upgrading() {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{WHO}: refused, because another process takes the disk over: take the snapshot again"
            );
            ask.answer(Err(Errno(libc::EBUSY)));
            return;
        }
        if self.foreign_snapshot.is_some() {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{WHO}: refused, because an earlier one is not over: take one snapshot after the other"
            );
            ask.answer(Err(Errno(libc::EBUSY)));
            return;
        }
        let (request, token) = self.next_hold();
        let until = came + self.store_timeout;
        let first = self.attendance.begin(self.store_timeout * 2 / 3, now);
        let prepare = if let First::Wait(prepare) = first { Some(prepare) } else { None };
        self.foreign_snapshot =
            Some(ForeignSnapshot { request, token, ask: Some(ask), until, prepare, phase: Phase::Preparing });
        match first {
            First::Nothing => self.hold_for_store(now),
            First::Wait(Prepare { peer, id, timeout }) => {
                let data = json!({"id": id, "timeout-ms": timeout.as_millis() as u64, "who": WHO});
                self.tell(Recipient::Only(peer), "PREPARE", data);
            }
            First::GiveUp(why) => self.prepared(Outcome { result: Err(why.to_owned()), required: true }, now),
        }
    }

    fn hold_for_store(&mut self, now: Instant) {
        let Some(foreign_snapshot) = &mut self.foreign_snapshot else { return };
        foreign_snapshot.phase = Phase::Settling;
        let hold = Ask {
            request: foreign_snapshot.request,
            token: foreign_snapshot.token.clone(),
            owner: STORE,
            timeout: foreign_snapshot.until.saturating_duration_since(now),
            lease: LEASE,
            detached: true,
            who: who(),
        };
        self.coordinator.quiesce(hold, now);
        self.carry_out(now);
        self.refuse_if_stopped(now);
    }

    /// What the attendant says.
    pub(super) fn attend(
        &mut self,
        peer: PeerId,
        from: Credentials,
        command: AttendCommand,
        now: Instant,
    ) -> Result<Value, Error> {
        let outcome = match command {
            AttendCommand::Attend { required, timeout, who } => {
                let who = Who { text: who, client: Some(from) };
                log_limited!(
                    COMMAND_LOG,
                    Info,
                    "{} attends{}",
                    replies::shown(&who),
                    if required { ", and is required" } else { "" }
                );
                self.attendance.attend(peer, who, required, timeout)?;
                None
            }
            AttendCommand::Prepared { id, result } => Some(self.attendance.prepared(peer, id, result)?),
            AttendCommand::Unattend => {
                let outcome = self.attendance.unattend(peer)?;
                log_limited!(COMMAND_LOG, Info, "the attendant ends: {}", self.attendance.without());
                outcome
            }
        };
        if let Some(outcome) = outcome {
            self.prepared(outcome, now);
        }
        Ok(json!({}))
    }

    /// The attendant answered, or nothing will come of it.
    pub(super) fn prepared(&mut self, Outcome { result, required }: Outcome, now: Instant) {
        let Some(request) =
            self.foreign_snapshot.as_ref().filter(|it| it.phase == Phase::Preparing).map(|it| it.request)
        else {
            return;
        };
        match result {
            Ok(level) => {
                log_limited!(IMAGE_LOG, Info, "{WHO}: prepared: {}", level.as_deref().unwrap_or("no level is told"));
                self.event("PREPARED", json!({"level": level}));
                self.hold_for_store(now);
            }
            Err(why) => {
                self.event("PREPARE_FAILED", json!({"message": why, "required": required}));
                if required {
                    log_limited!(IMAGE_LOG, Warn, "{WHO}: not prepared: {why:?}");
                    self.refused(request, &who(), Refusal::NotPrepared);
                    self.tell_released();
                } else {
                    log_limited!(
                        IMAGE_LOG,
                        Warn,
                        "{WHO}: goes on as after a power cut, for it was not prepared: {why:?}"
                    );
                    self.hold_for_store(now);
                }
            }
        }
    }

    /// Once the gate is open a guest can be thawed.
    pub(super) fn tell_released(&mut self) {
        if !self.coordinator.is_open() {
            return;
        }
        for (peer, id) in self.attendance.released() {
            self.tell(Recipient::Only(peer), "RELEASED", json!({"id": id}));
        }
    }

    /// Refuses what is not granted yet.
    pub(super) fn store_ends(&mut self, now: Instant) {
        let Some(ForeignSnapshot { request, phase, .. }) = &self.foreign_snapshot else { return };
        let request = *request;
        match phase {
            Phase::Preparing => {
                self.refused(request, &who(), Refusal::Cancelled);
                self.tell_released();
            }
            Phase::Settling => {
                self.coordinator.cancel(request, now);
                self.carry_out(now);
            }
            Phase::Held(_) => {}
        }
    }

    /// The snapshot is taken or given up. Says nothing of one that was refused, or that ended before.
    fn store_is_done(&mut self, came: Instant, now: Instant) {
        let Some(ForeignSnapshot { token, phase, .. }) = &self.foreign_snapshot else { return };
        let token = token.clone();
        let Phase::Held(answered) = *phase else {
            self.store_ends(now);
            return;
        };
        let since = came.saturating_duration_since(answered);
        if since >= SELF_RELEASE {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{WHO}: its store let the disk go by itself {} ms after it was held still. If the snapshot is of several \
                 images, one of them may have been quiesced too late and the snapshot may not be of one instant: take \
                 it again",
                since.as_millis()
            );
            self.event("QUIESCE_EXPIRED", json!({"who": WHO, "held-ms": since.as_millis() as u64}));
        }
        if self.coordinator.resume(&token, now).is_err() {
            log_limited!(IMAGE_LOG, Error, "{WHO}: its hold had ended unnoticed; please report this as a defect");
        }
        self.carry_out(now);
    }

    /// Whether a granted request is the store's; then it is answered.
    pub(super) fn store_granted(&mut self, request: RequestId, hold: &Hold) -> bool {
        let Some(foreign_snapshot) =
            self.foreign_snapshot.as_mut().filter(|foreign_snapshot| foreign_snapshot.request == request)
        else {
            return false;
        };
        foreign_snapshot.phase = Phase::Held(hold.since);
        if let Some(ask) = foreign_snapshot.ask.take() {
            ask.answer(Ok(()));
        }
        true
    }

    /// Whether a refused request is the store's; then it is answered and over.
    pub(super) fn store_refused(&mut self, request: RequestId, why: Refusal) -> bool {
        let Some(foreign_snapshot) =
            self.foreign_snapshot.take_if(|foreign_snapshot| foreign_snapshot.request == request)
        else {
            return false;
        };
        if let Some(ask) = foreign_snapshot.ask {
            ask.answer(Err(replies::store_errno(why)));
        }
        if let Some(prepare) = foreign_snapshot.prepare {
            self.attendance.over(prepare);
        }
        true
    }

    /// A hold ended. If it is the store's the snapshot is over for us, however it ended.
    pub(super) fn store_left(&mut self, hold: &Hold, reason: Reason) {
        let Some(foreign_snapshot) =
            self.foreign_snapshot.take_if(|foreign_snapshot| foreign_snapshot.token == hold.token)
        else {
            return;
        };
        if let Some(prepare) = foreign_snapshot.prepare {
            self.attendance.over(prepare);
        }
        if reason == Reason::LeaseExpired {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{WHO}: its store never said that it is over; if it was taken after now, it was not held still"
            );
        }
    }

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
            (None, _) => log_limited!(IMAGE_LOG, Info, "the image is well again"),
        }
        self.event("IMAGE_STATE", json!(state));
        self.image_state = state;
    }
}

fn who() -> Who {
    Who { text: Some(WHO.into()), client: None }
}
