//! PURE. The attendant: a client that must consent before the disk is held for another host's snapshot, so that it can
//! freeze the guest while the guest's disks still take writes.
//!
//! The daemon sends `PREPARE` before it closes the gate, and waits for `prepared`. With one attendant for all disks of
//! a guest no freeze ever waits for a disk that is held. Each `PREPARE` is followed by exactly one `RELEASED`, when the
//! gate is open again, unless the connection ends first.

use std::time::{Duration, Instant};

use super::replies;
use crate::base::rate_limit::{COMMAND_LOG, log_limited};
use crate::control::protocol::Error;
use crate::control::protocol::return_types::AttendantStatus;
use crate::control::quiesce::{ClientIdentity, PeerId};

/// A `PREPARE` that was sent to an attendant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::control) struct Prepare {
    pub(in crate::control) peer: PeerId,
    pub(in crate::control) id: u64,
    /// How long the attendant may take to reply.
    pub(in crate::control) timeout: Duration,
}

/// Whether the attendant consents to a snapshot.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::control) enum Consent {
    /// The snapshot needs no consent.
    NotNeeded,
    /// The snapshot waits for the reply to this `PREPARE`.
    Pending(Prepare),
    /// The snapshot is refused for this reason: an attendant must consent, and none is connected.
    Denied(&'static str),
}

/// How a `PREPARE` ended.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::control) struct PrepareOutcome {
    /// The level that the attendant reached (`None`: it named none), or its error.
    pub(in crate::control) result: Result<Option<String>, String>,
    /// An error refuses the snapshot.
    pub(in crate::control) required: bool,
}

struct Attendant {
    peer: PeerId,
    who: ClientIdentity,
    required: bool,
    timeout: Duration,
}

struct PendingPrepare {
    prepare: Prepare,
    until: Instant,
    required: bool,
}

/// The attendant and its pending `PREPARE`. Owned by the control thread.
#[derive(Default)]
pub(in crate::control) struct Attendance {
    /// Snapshots are refused without an attendant, even if none has ever registered.
    needed: bool,
    attendant: Option<Attendant>,
    /// The last required attendant, if its connection was lost. Snapshots are refused until an attendant registers,
    /// because the operator relies on it.
    lost: Option<ClientIdentity>,
    pending: Option<PendingPrepare>,
    last_id: u64,
    /// The connections that get `RELEASED`, with this id, once the gate is open.
    awaiting_release: Vec<(PeerId, u64)>,
}

impl Attendance {
    /// Creates the state without an attendant. `needed`: every snapshot needs one.
    pub(in crate::control) fn new(needed: bool) -> Self {
        Attendance { needed, ..Attendance::default() }
    }

    /// Registers a connection as the attendant, or changes its options. There is one attendant at a time.
    pub(in crate::control) fn attend(
        &mut self,
        peer: PeerId,
        who: ClientIdentity,
        required: bool,
        timeout: Duration,
    ) -> Result<(), Error> {
        if let Some(other) = self.attendant.as_ref().filter(|other| other.peer != peer) {
            let desc = format!("{} attends already: end that attendant first", replies::describe_holder(&other.who));
            return Err(Error::new("attended", desc));
        }
        self.attendant = Some(Attendant { peer, who, required, timeout });
        self.lost = None;
        Ok(())
    }

    /// Whether a connection is the attendant, or waits for `RELEASED`.
    pub(in crate::control) fn has(&self, peer: PeerId) -> bool {
        self.attendant.as_ref().is_some_and(|attendant| attendant.peer == peer)
            || self.awaiting_release.iter().any(|(waiting, _)| *waiting == peer)
    }

    /// Ends the registration of a connection. Its pending `PREPARE` fails.
    pub(in crate::control) fn unattend(&mut self, peer: PeerId) -> Result<Option<PrepareOutcome>, Error> {
        match self.attendant.take_if(|attendant| attendant.peer == peer) {
            Some(_) => Ok(self.end_prepare(peer, "the attendant ended before it had answered")),
            None => Err(not_attending()),
        }
    }

    /// Ends the registration of a connection that ended. Its pending `PREPARE` fails.
    pub(in crate::control) fn peer_gone(&mut self, peer: PeerId) -> Option<PrepareOutcome> {
        self.awaiting_release.retain(|(waiting, _)| *waiting != peer);
        let attendant = self.attendant.take_if(|attendant| attendant.peer == peer)?;
        if attendant.required {
            log_limited!(
                COMMAND_LOG,
                Warn,
                "the attendant {} is lost: until one is back, snapshots of the image by others are refused (start \
                 'virtioblkctl attend' again; ending it in order lifts this)",
                replies::describe_holder(&attendant.who)
            );
            self.lost = Some(attendant.who);
        }
        self.end_prepare(peer, "the attendant's connection ended")
    }

    /// Whether snapshots are refused without the consent of an attendant that is or was connected.
    pub(in crate::control) fn requires_attendant(&self) -> bool {
        self.lost.is_some() || self.attendant.as_ref().is_some_and(|attendant| attendant.required)
    }

    /// Refuses snapshots until an attendant registers, because the process from which we took the disk over required
    /// one.
    pub(in crate::control) fn attendant_missing(&mut self) {
        if self.attendant.is_none() {
            self.lost = Some(ClientIdentity::default());
        }
    }

    /// Determines whether the attendant must consent to a snapshot that another host begins. The attendant may take
    /// `limit` at most.
    pub(in crate::control) fn begin(&mut self, limit: Duration, now: Instant) -> Consent {
        let Some(Attendant { peer, required, timeout, .. }) = &self.attendant else {
            return match (&self.lost, self.needed) {
                (Some(_), _) => Consent::Denied("the attendant that must consent is lost"),
                (None, true) => {
                    Consent::Denied("nobody attends, and --rbd-quiesce attended asks for somebody who does")
                }
                (None, false) => Consent::NotNeeded,
            };
        };
        self.last_id += 1;
        let prepare = Prepare { peer: *peer, id: self.last_id, timeout: (*timeout).min(limit) };
        self.pending = Some(PendingPrepare { prepare, until: now + prepare.timeout, required: *required });
        Consent::Pending(prepare)
    }

    /// Takes the reply of an attendant. Fails if it got no `PREPARE` with this id, or replies too late.
    pub(in crate::control) fn prepared(
        &mut self,
        peer: PeerId,
        id: u64,
        result: Result<Option<String>, String>,
    ) -> Result<PrepareOutcome, Error> {
        let is_it = |pending: &mut PendingPrepare| (pending.prepare.peer, pending.prepare.id) == (peer, id);
        match self.pending.take_if(is_it) {
            Some(PendingPrepare { required, .. }) => Ok(PrepareOutcome { result, required }),
            None => {
                Err(Error::new("not-asked", "no PREPARE of this id waits for an answer: it is over, or came too late"))
            }
        }
    }

    /// Fails the pending `PREPARE` if its time has run out.
    pub(in crate::control) fn tick(&mut self, now: Instant) -> Option<PrepareOutcome> {
        let PendingPrepare { prepare, required, .. } = self.pending.take_if(|pending| pending.until <= now)?;
        let text = format!("the attendant did not answer within {} ms", prepare.timeout.as_millis());
        Some(PrepareOutcome { result: Err(text), required })
    }

    /// Returns when [`Attendance::tick`] is due.
    pub(in crate::control) fn next_deadline(&self) -> Option<Instant> {
        self.pending.as_ref().map(|pending| pending.until)
    }

    /// Ends the snapshot for which `prepare` was sent, whatever its result.
    pub(in crate::control) fn end_snapshot(&mut self, prepare: Prepare) {
        self.pending.take_if(|pending| pending.prepare == prepare);
        self.awaiting_release.push((prepare.peer, prepare.id));
    }

    /// Takes the connections that must get `RELEASED`, with its id. The gate must be open.
    pub(in crate::control) fn take_releases(&mut self) -> Vec<(PeerId, u64)> {
        std::mem::take(&mut self.awaiting_release)
    }

    /// Describes for the log what happens to snapshots of other hosts while no attendant is registered.
    pub(in crate::control) fn unattended_policy(&self) -> &'static str {
        match self.needed {
            true => "snapshots of the image by others are refused until one is back",
            false => "snapshots of the image by others are as after a power cut again",
        }
    }

    /// Returns the attendant's status. `None`: there is none, and none is needed.
    pub(in crate::control) fn status(&self) -> Option<AttendantStatus> {
        let (who, present, required) = match (&self.attendant, &self.lost) {
            (Some(attendant), _) => (&attendant.who, true, attendant.required),
            (None, Some(who)) => (who, false, true),
            (None, None) if self.needed => (&ClientIdentity::default(), false, true),
            (None, None) => return None,
        };
        Some(AttendantStatus {
            requester: replies::requester(who),
            present,
            required,
            preparing: self.pending.is_some(),
        })
    }

    fn end_prepare(&mut self, peer: PeerId, why: &str) -> Option<PrepareOutcome> {
        let pending = self.pending.take_if(|pending| pending.prepare.peer == peer)?;
        Some(PrepareOutcome { result: Err(why.to_owned()), required: pending.required })
    }
}

fn not_attending() -> Error {
    Error::new("not-attending", "this connection does not attend: send attend first")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::control::access::Access;
    use crate::control::protocol::parse;
    use crate::control::protocol::{AttendCommand, Command};

    const S: Duration = Duration::from_secs(1);

    fn who() -> ClientIdentity {
        ClientIdentity { text: Some("attend".into()), client: None }
    }

    fn attended(required: bool) -> Attendance {
        let mut attendance = Attendance::default();
        attendance.attend(1, who(), required, 8 * S).unwrap();
        attendance
    }

    fn prepare(attendance: &mut Attendance, now: Instant) -> Prepare {
        match attendance.begin(5 * S, now) {
            Consent::Pending(prepare) => prepare,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_answer_counts_once_and_only_from_the_connection_that_was_asked() {
        let now = Instant::now();
        let mut a = attended(true);
        let asked = prepare(&mut a, now);
        assert_eq!(asked, Prepare { peer: 1, id: 1, timeout: 5 * S });
        assert_eq!(a.next_deadline(), Some(now + 5 * S));
        assert_eq!(a.prepared(2, 1, Ok(None)).unwrap_err().code, "not-asked");
        assert_eq!(a.prepared(1, 2, Ok(None)).unwrap_err().code, "not-asked");
        assert_eq!(a.tick(now + 4 * S), None);
        let outcome = PrepareOutcome { result: Ok(Some("filesystem".into())), required: true };
        assert_eq!(a.prepared(1, 1, Ok(Some("filesystem".into()))), Ok(outcome));
        assert_eq!(a.prepared(1, 1, Ok(None)).unwrap_err().code, "not-asked");
        a.end_snapshot(asked);
        assert_eq!((a.take_releases(), a.take_releases()), (vec![(1, 1)], vec![]));
    }

    #[test]
    fn a_timeout_and_a_lost_connection_fail_a_prepare() {
        let now = Instant::now();
        for required in [true, false] {
            let mut a = attended(required);
            let asked = prepare(&mut a, now);
            let late = a.tick(now + 5 * S).unwrap();
            assert!(late.required == required && late.result.unwrap_err().contains("5000 ms"));
            a.end_snapshot(asked);
            assert_eq!(a.next_deadline(), None);
            prepare(&mut a, now);
            let dead = a.peer_gone(1).unwrap();
            assert!(dead.required == required && dead.result.is_err());
            assert_eq!(a.take_releases(), [], "the connection has ended");
            assert_eq!(matches!(a.begin(S, now), Consent::Denied(_)), required);
            assert_eq!(a.status().map(|status| status.present), required.then_some(false));
        }
    }

    #[test]
    fn a_lost_required_attendant_blocks_snapshots_until_one_registers_or_unattends() {
        let now = Instant::now();
        let mut a = attended(true);
        assert_eq!(a.attend(2, who(), false, S).unwrap_err().code, "attended");
        assert_eq!(a.unattend(2).unwrap_err().code, "not-attending");
        assert_eq!((a.peer_gone(2), a.peer_gone(1)), (None, None));
        assert!(matches!(a.begin(S, now), Consent::Denied(why) if why.contains("lost")));
        a.attend(2, who(), true, S).unwrap();
        prepare(&mut a, now);
        assert!(a.unattend(2).unwrap().is_some_and(|outcome| outcome.result.is_err()));
        assert_eq!(a.begin(S, now), Consent::NotNeeded);
    }

    #[test]
    fn a_needed_attendant_blocks_snapshots_from_the_start_and_after_every_end() {
        let now = Instant::now();
        let mut a = Attendance::new(true);
        let is_missed = |a: &mut Attendance| matches!(a.begin(S, now), Consent::Denied(why) if why.contains("nobody"));
        assert!(is_missed(&mut a));
        let status = a.status().unwrap();
        assert_eq!((status.present, status.required, status.requester.who), (false, true, None));
        a.attend(1, who(), false, S).unwrap();
        prepare(&mut a, now);
        a.unattend(1).unwrap();
        assert!(is_missed(&mut a));
        a.attend(2, who(), false, S).unwrap();
        a.peer_gone(2);
        assert!(is_missed(&mut a));
    }

    #[test]
    fn wrong_arguments_say_what_is_wrong() {
        for (command, arguments, words) in [
            ("attend", json!({"required": 1}), "required"),
            ("attend", json!({"timeout-ms": 0}), "timeout-ms"),
            ("prepared", json!({}), "'id'"),
            ("prepared", json!({"id": "x"}), "a string"),
            ("prepared", json!({"id": -1}), "-1"),
            ("prepared", json!({"id": 1, "level": "crash", "error": "x"}), "not both"),
            ("unattend", json!({"id": 1}), "unattend"),
        ] {
            let request = json!({"execute": command, "arguments": arguments});
            let error = parse(request, true, Access::All).command.unwrap_err();
            assert!(error.code == "bad-argument" && error.desc.contains(words), "{command} {arguments}: {error:?}");
        }
        let attend = AttendCommand::Attend { required: true, timeout: 10 * S, who: None };
        assert_eq!(parse(json!({"execute": "attend"}), true, Access::All).command, Ok(Command::Attend(attend)));
    }
}
