//! The coordinator's rules, one at a time.

use super::*;

const S: Duration = Duration::from_secs(1);

fn ask(id: RequestId, owner: PeerId) -> HoldRequest {
    let token = format!("t{id}");
    HoldRequest { id, token, owner, timeout: 10 * S, lease: 30 * S, detached: false, who: ClientIdentity::default() }
}

/// The effects as short text.
fn words(coordinator: &mut Coordinator) -> Vec<String> {
    let word = |effect| match effect {
        HoldEffect::CloseGate(epoch) => format!("close {epoch}"),
        HoldEffect::OpenGate => "open".into(),
        HoldEffect::Granted { request, figures, holders, epoch, hold } => {
            format!("{} granted {request} epoch {epoch} drained {} of {holders}", hold.token, figures.drained)
        }
        HoldEffect::Refused { request, why, .. } => format!("refused {request} {why:?}"),
        HoldEffect::Ended { hold, reason, holders, .. } => format!("{} left {reason:?} {holders}", hold.token),
    };
    coordinator.effects().into_iter().map(word).collect()
}

fn figures() -> Result<HoldFigures, Errno> {
    Ok(HoldFigures { rings: 2, drained: 7, ..HoldFigures::default() })
}

/// A coordinator with request 1 of peer 1 granted.
fn held(now: Instant) -> Coordinator {
    let mut c = Coordinator::default();
    c.quiesce(ask(1, 1), now);
    c.settled(1, figures(), now);
    assert_eq!(words(&mut c), ["close 1", "t1 granted 1 epoch 1 drained 7 of 1"]);
    c
}

#[test]
fn the_last_holder_opens_the_gate() {
    let now = Instant::now();
    let mut c = held(now);
    c.quiesce(ask(2, 2), now);
    assert_eq!(words(&mut c), ["t2 granted 2 epoch 1 drained 0 of 2"], "quiet already: at once");
    assert_eq!(c.resume("t1", now), Ok(1));
    assert_eq!(words(&mut c), ["t1 left Resume 1"]);
    assert_eq!(c.resume("t2", now), Ok(0));
    assert_eq!(words(&mut c), ["open", "t2 left Resume 0"]);
    assert_eq!(c.resume("t2", now), Err(Some(EndReason::Resume)));
    assert_eq!(c.resume("t9", now), Err(None));
    c.quiesce(ask(3, 1), now);
    assert_eq!(words(&mut c), ["close 2"]);
}

#[test]
fn requests_that_join_a_settling_epoch_share_its_answer() {
    let now = Instant::now();
    let mut c = Coordinator::default();
    c.quiesce(ask(1, 1), now);
    c.quiesce(ask(2, 2), now);
    assert_eq!(words(&mut c), ["close 1"]);
    c.settled(1, figures(), now);
    assert_eq!(words(&mut c), ["t1 granted 1 epoch 1 drained 7 of 2", "t2 granted 2 epoch 1 drained 7 of 2"]);
}

#[test]
fn a_late_answer_of_the_disk_does_not_grant_the_next_epoch() {
    let now = Instant::now();
    let mut c = Coordinator::default();
    c.quiesce(ask(1, 1), now);
    c.tick(now + 10 * S - Duration::from_nanos(1));
    assert_eq!(words(&mut c), ["close 1"]);
    c.tick(now + 10 * S);
    assert_eq!(words(&mut c), ["open", "refused 1 Timeout"]);
    c.quiesce(ask(2, 1), now + 10 * S);
    assert_eq!(words(&mut c), ["close 2"]);
    c.settled(1, figures(), now + 11 * S);
    assert_eq!(words(&mut c), [""; 0], "the answer of epoch 1 is nobody's");
    c.settled(2, figures(), now + 12 * S);
    assert_eq!(words(&mut c), ["t2 granted 2 epoch 2 drained 7 of 1"]);
    c.settled(2, Err(Errno(5)), now + 12 * S);
    assert_eq!(words(&mut c), [""; 0], "answered once");
}

#[test]
fn a_timeout_refuses_only_its_own_request() {
    let now = Instant::now();
    let mut c = Coordinator::default();
    c.quiesce(HoldRequest { timeout: S, ..ask(1, 1) }, now);
    c.quiesce(ask(2, 2), now);
    assert_eq!(c.next_deadline(), Some(now + S));
    c.tick(now + S);
    assert_eq!(words(&mut c), ["close 1", "refused 1 Timeout"], "the gate stays closed for request 2");
    c.settled(1, figures(), now + 2 * S);
    assert_eq!(words(&mut c), ["t2 granted 2 epoch 1 drained 7 of 1"]);
}

#[test]
fn a_failed_sync_refuses_every_waiting_request() {
    let now = Instant::now();
    let mut c = Coordinator::default();
    c.quiesce(ask(1, 1), now);
    c.quiesce(ask(2, 2), now);
    c.settled(1, Err(Errno(5)), now);
    assert_eq!(words(&mut c), ["close 1", "open", "refused 1 SyncFailed(Errno(5))", "refused 2 SyncFailed(Errno(5))"]);
    assert_eq!(c.state(), "open");
}

#[test]
fn a_lease_ends_unless_it_is_renewed() {
    let now = Instant::now();
    let mut c = held(now);
    c.tick(now + 29 * S);
    assert_eq!(c.renew("t1", 30 * S, now + 29 * S), Ok(30 * S));
    c.tick(now + 58 * S);
    assert_eq!(words(&mut c), [""; 0]);
    c.tick(now + 59 * S);
    assert_eq!(words(&mut c), ["open", "t1 left LeaseExpired 0"]);
    assert_eq!(c.renew("t1", S, now + 60 * S), Err(Some(EndReason::LeaseExpired)));
    assert_eq!(c.next_deadline(), None);
}

#[test]
fn a_lease_counts_from_the_grant() {
    let now = Instant::now();
    let mut c = Coordinator::default();
    c.quiesce(HoldRequest { lease: S, ..ask(1, 1) }, now);
    c.settled(1, figures(), now + 9 * S);
    assert_eq!(c.next_deadline(), Some(now + 10 * S));
}

#[test]
fn holds_end_with_their_connection_unless_detached() {
    let now = Instant::now();
    let mut c = held(now);
    c.quiesce(HoldRequest { detached: true, ..ask(2, 1) }, now);
    c.quiesce(ask(3, 3), now);
    c.effects();
    c.peer_gone(1, now);
    assert_eq!(words(&mut c), ["t1 left ConnectionClosed 2"]);
    c.peer_gone(3, now);
    assert_eq!(words(&mut c), ["t3 left ConnectionClosed 1"]);
    assert_eq!(c.resume("t2", now), Ok(0));
}

#[test]
fn waiting_requests_end_with_their_connection_even_if_detached() {
    let now = Instant::now();
    let mut c = Coordinator::default();
    c.quiesce(HoldRequest { detached: true, ..ask(1, 1) }, now);
    c.peer_gone(1, now);
    assert_eq!(words(&mut c), ["close 1", "open"], "nobody would ever learn the token");
}

#[test]
fn resuming_all_ends_holds_and_waiting_requests() {
    let now = Instant::now();
    let mut c = held(now);
    c.quiesce(ask(2, 2), now);
    c.effects();
    assert_eq!(c.resume_all(now), 2);
    assert_eq!(words(&mut c), ["open", "t1 left Resume 1", "t2 left Resume 0"]);
    c.quiesce(ask(3, 1), now);
    assert_eq!(c.resume_all(now), 0);
    assert_eq!(words(&mut c), ["close 2", "open", "refused 3 Cancelled"]);
    assert_eq!(c.resume_all(now), 0);
    assert_eq!(words(&mut c), [""; 0]);
}

#[test]
fn a_cancelled_request_is_refused_and_no_other_changes() {
    let now = Instant::now();
    let mut c = Coordinator::default();
    c.quiesce(ask(1, STORE), now);
    c.quiesce(ask(2, 2), now);
    c.cancel(1, now);
    assert_eq!(words(&mut c), ["close 1", "refused 1 Cancelled"], "the gate stays closed for request 2");
    c.cancel(1, now);
    c.settled(1, figures(), now);
    c.cancel(2, now);
    assert_eq!(words(&mut c), ["t2 granted 2 epoch 1 drained 7 of 1"], "granted: not cancelled any more");
    c.shutdown(now);
    c.effects();
    c.quiesce(ask(3, STORE), now);
    c.cancel(3, now);
    assert_eq!(words(&mut c), ["close 2", "open", "refused 3 Cancelled"]);
}

#[test]
fn holders_are_bounded() {
    let now = Instant::now();
    let mut c = Coordinator::default();
    for request in 0..=MAX_HOLDERS as u64 {
        c.quiesce(ask(request, 1), now);
    }
    assert_eq!(words(&mut c), ["close 1", "refused 64 TooMany"]);
    c.shutdown(now);
    assert_eq!(words(&mut c).len(), 1 + MAX_HOLDERS, "open, and an answer for each");
}

#[test]
fn a_stopped_disk_refuses_waiting_requests_and_keeps_holds() {
    let now = Instant::now();
    let mut c = held(now);
    c.stopped(Errno(28), now);
    assert_eq!(words(&mut c), [""; 0], "it is still already");
    c.shutdown(now);
    c.effects();
    c.stopped(Errno(28), now);
    assert_eq!(words(&mut c), [""; 0]);
    c.quiesce(ask(3, 1), now);
    c.quiesce(ask(4, 2), now);
    c.stopped(Errno(28), now);
    assert_eq!(words(&mut c), ["close 2", "open", "refused 3 Stopped(Errno(28))", "refused 4 Stopped(Errno(28))"]);
    c.settled(2, figures(), now);
    assert_eq!(words(&mut c), [""; 0], "its answer comes too late");
}

#[test]
fn all_holds_together_end_at_the_bound() {
    let now = Instant::now();
    let mut c = Coordinator::new(Some(10 * S));
    c.quiesce(HoldRequest { lease: 8 * S, ..ask(1, 1) }, now);
    c.settled(1, figures(), now);
    assert_eq!(c.holds()[0].until, now + 8 * S, "the lease fits");
    // A second holder just before the first one's end: what is left is his.
    c.quiesce(ask(2, 2), now + 7 * S);
    assert_eq!(c.holds()[1].until, now + 10 * S);
    assert_eq!(c.renew("t2", 30 * S, now + 9 * S), Ok(S), "no renewal goes beyond it");
    c.effects();
    c.tick(now + 8 * S);
    assert_eq!(words(&mut c), ["t1 left LeaseExpired 1"]);
    assert_eq!(c.held_time(now + 9 * S), 9 * S, "the sum, not one holder's");
    c.tick(now + 10 * S);
    assert_eq!(words(&mut c), ["open", "t2 left LeaseExpired 0"]);
    // At once again: no write has flowed.
    c.quiesce(ask(3, 1), now + 10 * S);
    assert_eq!(words(&mut c), ["refused 3 MaxHold"]);
    c.quiesce(ask(4, 1), now + 11 * S);
    c.settled(2, figures(), now + 11 * S);
    assert_eq!(words(&mut c), ["close 2", "t4 granted 4 epoch 2 drained 7 of 1"]);
    assert_eq!(c.holds()[0].until, now + 21 * S);
}

#[test]
fn holds_that_follow_each_other_closely_count_together() {
    let now = Instant::now();
    let mut c = Coordinator::new(Some(10 * S));
    c.quiesce(ask(1, 1), now);
    c.settled(1, figures(), now);
    assert_eq!(c.resume("t1", now + 6 * S), Ok(0));
    let soon = now + 6 * S + Duration::from_millis(1);
    c.quiesce(ask(2, 2), soon);
    // While it settles, too.
    assert_eq!(c.next_deadline(), Some(now + 10 * S));
    c.tick(now + 10 * S);
    c.quiesce(ask(3, 3), now + 10 * S);
    let all = words(&mut c);
    assert_eq!(all[4..], ["close 2", "open", "refused 2 Timeout", "refused 3 MaxHold"]);
    // Without a bound there is a sum all the same.
    let mut c = Coordinator::default();
    c.quiesce(ask(1, 1), now);
    assert_eq!((c.held_time(now + S), c.max_hold()), (S, None));
    c.cancel(1, now + S);
    assert_eq!(c.held_time(now + 2 * S), Duration::ZERO, "writes flow");
}
