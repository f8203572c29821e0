//! PURE. Holds the disk for the image's store while another host takes a snapshot of the image.
//!
//! [`StoreQuiesce`] is a state machine: first the attendant must consent, then the coordinator must grant the store's
//! hold, which is a hold like any other. The store gets one reply; a refusal has an error number that librbd's client
//! handles well ([`replies::store_errno`]). The hold ends when the store reports the end of the snapshot, or by its
//! lease, because a store that gave up waiting reports nothing. Each method leaves what the caller must do in
//! [`StoreQuiesce::next_effect`].

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Recipient;
use super::attendance::{Attendance, Consent, Prepare, PrepareOutcome};
use super::pending_replies::NewHold;
use super::replies;
use crate::backend::QuiesceRequest;
use crate::base::rate_limit::{COMMAND_LOG, IMAGE_LOG, log_limited};
use crate::control::creds::Credentials;
use crate::control::protocol::return_types::AttendantStatus;
use crate::control::protocol::{AttendCommand, Error};
use crate::control::quiesce::{ClientIdentity, EndReason, Hold, HoldRequest, PeerId, Refusal, RequestId, STORE};

/// The name of the store as a holder, in status, events and the log.
pub(super) const WHO: &str = "rbd snapshot";
/// How long the store's hold lasts after our consent. librbd releases the disk 10 s after the consent at the latest, so
/// the lease ends the hold only if the store's connection is lost.
const STORE_LEASE: Duration = Duration::from_secs(30);
/// An end that the store reports so late after our consent means that the store released the disk by itself, without
/// waiting for the snapshot: librbd does so after 10 s.
const STORE_RELEASE_TIMEOUT: Duration = Duration::from_millis(9_900);

/// What the service must do.
pub(super) enum StoreEffect {
    /// Send an event.
    Send(Recipient, &'static str, Value),
    /// Ask the coordinator to hold the disk.
    Hold(HoldRequest),
    /// Withdraw this request to hold the disk.
    Cancel(RequestId),
    /// Report that this request is refused, which the coordinator does not have yet.
    Refuse(RequestId, Refusal),
    /// End the hold of this token.
    Resume(String),
}

/// The snapshot that another host takes, and the attendant that must consent to it.
pub(super) struct StoreQuiesce {
    /// How long a quiesce request may wait, before it is refused.
    timeout: Duration,
    attendance: Attendance,
    /// `None`: the store takes no snapshot.
    snapshot: Option<ForeignSnapshot>,
    effects: VecDeque<StoreEffect>,
}

/// The snapshot that another host takes. A store takes one at a time.
struct ForeignSnapshot {
    request: RequestId,
    token: String,
    /// The store's request. `None`: it has its reply.
    quiesce_request: Option<QuiesceRequest>,
    /// When the request is refused, if it is not granted by then.
    until: Instant,
    /// The `PREPARE` that was sent to the attendant, if there is one.
    prepare: Option<Prepare>,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The gate is open, and the attendant has not replied yet.
    Preparing,
    /// The coordinator has the request.
    Settling,
    /// The hold was granted at this time, and the store has our consent.
    Held(Instant),
}

impl StoreQuiesce {
    /// Creates the state machine. `timeout`: see [`super::super::Setup::store_timeout`]; `attended`: see
    /// [`super::super::Setup::attended`].
    pub(super) fn new(timeout: Duration, attended: bool) -> Self {
        let attendance = Attendance::new(attended);
        StoreQuiesce { timeout, attendance, snapshot: None, effects: VecDeque::new() }
    }

    /// Takes the oldest effect that the caller has not carried out.
    pub(super) fn next_effect(&mut self) -> Option<StoreEffect> {
        self.effects.pop_front()
    }

    /// Whether a snapshot of the store is running. The store cannot begin another one until it is over.
    pub(super) fn is_busy(&self) -> bool {
        self.snapshot.is_some()
    }

    /// Begins a snapshot of the store. `arrived_at`: when its request arrived. [`StoreQuiesce::is_busy`] must be
    /// `false`.
    pub(super) fn quiesce(
        &mut self,
        quiesce_request: QuiesceRequest,
        NewHold { request, token }: NewHold,
        arrived_at: Instant,
        now: Instant,
    ) {
        let until = arrived_at + self.timeout;
        let consent = self.attendance.begin(self.timeout * 2 / 3, now);
        let prepare = if let Consent::Pending(prepare) = consent { Some(prepare) } else { None };
        self.snapshot = Some(ForeignSnapshot {
            request,
            token,
            quiesce_request: Some(quiesce_request),
            until,
            prepare,
            phase: Phase::Preparing,
        });
        match consent {
            Consent::NotNeeded => self.hold(now),
            Consent::Pending(Prepare { peer, id, timeout }) => {
                let data = json!({"id": id, "timeout-ms": timeout.as_millis() as u64, "who": WHO});
                self.effects.push_back(StoreEffect::Send(Recipient::One(peer), "PREPARE", data));
            }
            Consent::Denied(why) => self.prepared(PrepareOutcome { result: Err(why.to_owned()), required: true }, now),
        }
    }

    /// Has the coordinator hold the disk.
    fn hold(&mut self, now: Instant) {
        let Some(snapshot) = &mut self.snapshot else { return };
        snapshot.phase = Phase::Settling;
        self.effects.push_back(StoreEffect::Hold(HoldRequest {
            id: snapshot.request,
            token: snapshot.token.clone(),
            owner: STORE,
            timeout: snapshot.until.saturating_duration_since(now),
            lease: STORE_LEASE,
            detached: true,
            who: store(),
        }));
    }

    /// Carries out a command of an attendant.
    pub(super) fn attend(
        &mut self,
        peer: PeerId,
        from: Credentials,
        command: AttendCommand,
        now: Instant,
    ) -> Result<(), Error> {
        let outcome = match command {
            AttendCommand::Attend { required, timeout, who } => {
                let who = ClientIdentity { text: who, client: Some(from) };
                let required_words = if required { ", and is required" } else { "" };
                log_limited!(COMMAND_LOG, Info, "{} attends{required_words}", replies::describe_holder(&who));
                self.attendance.attend(peer, who, required, timeout)?;
                None
            }
            AttendCommand::Prepared { id, result } => Some(self.attendance.prepared(peer, id, result)?),
            AttendCommand::Unattend => {
                let outcome = self.attendance.unattend(peer)?;
                log_limited!(COMMAND_LOG, Info, "the attendant ends: {}", self.attendance.unattended_policy());
                outcome
            }
        };
        if let Some(outcome) = outcome {
            self.prepared(outcome, now);
        }
        Ok(())
    }

    /// Ends the registration of an attendant whose connection ended.
    pub(super) fn peer_gone(&mut self, peer: PeerId, now: Instant) {
        if let Some(outcome) = self.attendance.peer_gone(peer) {
            self.prepared(outcome, now);
        }
    }

    /// Whether a connection takes part in the snapshots of others.
    pub(super) fn has(&self, peer: PeerId) -> bool {
        self.attendance.has(peer)
    }

    /// Ends the wait for the attendant's reply, if its time has run out.
    pub(super) fn tick(&mut self, now: Instant) {
        if let Some(outcome) = self.attendance.tick(now) {
            self.prepared(outcome, now);
        }
    }

    /// Returns when [`StoreQuiesce::tick`] is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.attendance.next_deadline()
    }

    /// Continues or refuses the snapshot after the attendant's reply, or when no reply will come.
    fn prepared(&mut self, PrepareOutcome { result, required }: PrepareOutcome, now: Instant) {
        let preparing = self.snapshot.as_ref().filter(|snapshot| snapshot.phase == Phase::Preparing);
        let Some(request) = preparing.map(|snapshot| snapshot.request) else { return };
        match result {
            Ok(level) => {
                let shown = level.as_deref().unwrap_or("the attendant names no level");
                log_limited!(IMAGE_LOG, Info, "{WHO}: prepared: {shown}");
                self.event("PREPARED", json!({"level": level}));
                self.hold(now);
            }
            Err(why) => {
                self.event("PREPARE_FAILED", json!({"message": why, "required": required}));
                if required {
                    log_limited!(IMAGE_LOG, Warn, "{WHO}: not prepared: {why:?}");
                    self.effects.push_back(StoreEffect::Refuse(request, Refusal::NotPrepared));
                } else {
                    let line = "is as after a power cut, because the guest was not prepared";
                    log_limited!(IMAGE_LOG, Warn, "{WHO}: {line}: {why:?}");
                    self.hold(now);
                }
            }
        }
    }

    /// Refuses the snapshot, unless its hold is granted already.
    pub(super) fn end(&mut self) {
        let Some(ForeignSnapshot { request, phase, .. }) = &self.snapshot else { return };
        match phase {
            Phase::Preparing => self.effects.push_back(StoreEffect::Refuse(*request, Refusal::Cancelled)),
            Phase::Settling => self.effects.push_back(StoreEffect::Cancel(*request)),
            Phase::Held(_) => {}
        }
    }

    /// Ends the hold, because the store has taken the snapshot or given it up. Does nothing if the snapshot was
    /// refused, or ended before.
    pub(super) fn unquiesce(&mut self, arrived_at: Instant) {
        let Some(ForeignSnapshot { token, phase, .. }) = &self.snapshot else { return };
        let token = token.clone();
        let Phase::Held(answered) = *phase else {
            self.end();
            return;
        };
        let since = arrived_at.saturating_duration_since(answered);
        if since >= STORE_RELEASE_TIMEOUT {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{WHO}: its store released the disk by itself {} ms after the disk was held still. If the snapshot is of \
                 several images, one of them may have been quiesced too late and the snapshot may not be of one instant: \
                 take it again",
                since.as_millis()
            );
            self.event("QUIESCE_EXPIRED", json!({"who": WHO, "held-ms": since.as_millis() as u64}));
        }
        self.effects.push_back(StoreEffect::Resume(token));
    }

    /// Consents to the snapshot, if the request that the coordinator granted is the store's. Returns whether it is.
    pub(super) fn granted(&mut self, request: RequestId, hold: &Hold) -> bool {
        let Some(snapshot) = self.snapshot.as_mut().filter(|snapshot| snapshot.request == request) else {
            return false;
        };
        snapshot.phase = Phase::Held(hold.since);
        if let Some(request) = snapshot.quiesce_request.take() {
            request.reply(Ok(()));
        }
        true
    }

    /// Refuses the snapshot and ends it, if the request that was refused is the store's. Returns whether it is.
    pub(super) fn refused(&mut self, request: RequestId, why: Refusal) -> bool {
        let Some(snapshot) = self.snapshot.take_if(|snapshot| snapshot.request == request) else { return false };
        if let Some(request) = snapshot.quiesce_request {
            request.reply(Err(replies::store_errno(why)));
        }
        if let Some(prepare) = snapshot.prepare {
            self.attendance.end_snapshot(prepare);
        }
        true
    }

    /// Ends the snapshot, if the hold that ended was the store's, whatever ended it.
    pub(super) fn hold_ended(&mut self, hold: &Hold, reason: EndReason) {
        let Some(snapshot) = self.snapshot.take_if(|snapshot| snapshot.token == hold.token) else { return };
        if let Some(prepare) = snapshot.prepare {
            self.attendance.end_snapshot(prepare);
        }
        if reason == EndReason::LeaseExpired {
            let line = "its store never reported the end; a snapshot taken from now on was not held still";
            log_limited!(IMAGE_LOG, Warn, "{WHO}: {line}");
        }
    }

    /// Takes the attendants that must get `RELEASED`, with the id of their `PREPARE`. The gate must be open.
    pub(super) fn take_releases(&mut self) -> Vec<(PeerId, u64)> {
        self.attendance.take_releases()
    }

    /// Returns the attendant's status.
    pub(super) fn attendant_status(&self) -> Option<AttendantStatus> {
        self.attendance.status()
    }

    /// Whether snapshots are refused while the attendant is not connected.
    pub(super) fn requires_attendant(&self) -> bool {
        self.attendance.requires_attendant()
    }

    /// Refuses snapshots until an attendant registers, because the process from which we took the disk over required
    /// one.
    pub(super) fn attendant_missing(&mut self) {
        self.attendance.attendant_missing();
    }

    fn event(&mut self, name: &'static str, data: Value) {
        self.effects.push_back(StoreEffect::Send(Recipient::All, name, data));
    }
}

/// Returns the store as a client.
pub(super) fn store() -> ClientIdentity {
    ClientIdentity { text: Some(WHO.into()), client: None }
}
