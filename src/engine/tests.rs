//! Sequences of events whose actions are known by hand. `explore` walks all short ones.

use super::*;

fn engine(mode: CacheMode, durable_writes: bool) -> Engine {
    let mut engine = Engine::new(CachePolicy::from(mode), durable_writes);
    engine.set_driver_can_flush(true);
    engine
}

fn drain(engine: &mut Engine) -> Vec<Action> {
    std::iter::from_fn(|| engine.next_action()).collect()
}

fn data(id: RequestId, durable: bool) -> Action {
    Action::Submit { token: Token::Data(id), durable }
}

fn done(id: RequestId) -> Action {
    Action::Done { id, result: Ok(()) }
}

const SYNC: Action = Action::Submit { token: Token::Sync, durable: false };

#[test]
fn a_batch_of_write_through_writes_shares_one_sync() {
    let mut engine = engine(CacheMode::Writethrough, false);
    (0..64).for_each(|id| assert_eq!(engine.offer(id, Kind::Write), Admission::Admitted));
    assert_eq!(drain(&mut engine), (0..64).map(|id| data(id, false)).collect::<Vec<_>>());
    (0..64).for_each(|id| engine.complete(Token::Data(id), Ok(())));
    assert_eq!(drain(&mut engine), [SYNC]);
    assert_eq!(engine.writes_in_flight(), 64);
    engine.complete(Token::Sync, Ok(()));
    assert_eq!(drain(&mut engine), (0..64).map(done).collect::<Vec<_>>());
    assert!(engine.is_idle());
}

#[test]
fn a_native_durable_write_needs_no_sync_but_a_discard_does() {
    let mut engine = engine(CacheMode::Directsync, true);
    engine.offer(0, Kind::Write);
    engine.offer(1, Kind::Discard);
    assert_eq!(drain(&mut engine), [data(0, true), data(1, false)]);
    engine.complete(Token::Data(0), Ok(()));
    engine.complete(Token::Data(1), Ok(()));
    assert_eq!(drain(&mut engine), [done(0), SYNC]);
}

#[test]
fn unsafe_syncs_for_the_operator_and_never_for_the_guest() {
    let mut engine = engine(CacheMode::Unsafe, true);
    engine.set_driver_can_flush(false);
    engine.offer(0, Kind::Write);
    engine.offer(1, Kind::Flush);
    assert_eq!(drain(&mut engine), [data(0, false), done(1)]);
    engine.complete(Token::Data(0), Ok(()));
    assert_eq!(drain(&mut engine), [done(0)]);
    engine.block_writes();
    assert_eq!(drain(&mut engine), [SYNC]);
    engine.complete(Token::Sync, Ok(()));
    assert_eq!(drain(&mut engine), [Action::Quiesced(Ok(()))]);
}

#[test]
fn is_syncing_from_the_first_waiter_to_the_end_of_the_sync() {
    let mut engine = engine(CacheMode::None, false);
    engine.offer(0, Kind::Write);
    assert!(!engine.is_syncing());
    engine.offer(1, Kind::Flush);
    assert!(engine.is_syncing(), "due");
    assert_eq!(drain(&mut engine), [data(0, false), SYNC]);
    assert!(engine.is_syncing(), "running");
    engine.complete(Token::Sync, Ok(()));
    assert!(!engine.is_syncing());
}

#[test]
fn a_result_not_taken_before_the_resume_does_not_end_the_next_quiesce() {
    let mut engine = engine(CacheMode::None, false);
    engine.block_writes();
    assert_eq!(drain(&mut engine), [SYNC]);
    engine.complete(Token::Sync, Ok(()));
    engine.unblock_writes();
    assert_eq!(engine.offer(0, Kind::Write), Admission::Admitted);
    engine.block_writes();
    assert_eq!(drain(&mut engine), [data(0, false)], "neither Quiesced nor Resumed");
}

#[test]
fn a_driver_with_unknown_features_is_served_write_through() {
    let mut engine = Engine::new(CachePolicy::from(CacheMode::None), true);
    engine.offer(0, Kind::Write);
    assert_eq!(drain(&mut engine), [data(0, true)]);
}

#[test]
fn steady_state_allocates_nothing() {
    let mut engine = engine(CacheMode::Writethrough, false);
    let mut round = || {
        (0..32).for_each(|id| assert_eq!(engine.offer(id, Kind::Write), Admission::Admitted));
        while engine.next_action().is_some() {}
        (0..32).for_each(|id| engine.complete(Token::Data(id), Ok(())));
        while engine.next_action().is_some() {}
        engine.complete(Token::Sync, Ok(()));
        while engine.next_action().is_some() {}
        (engine.actions.capacity(), engine.stages.capacity())
    };
    let first = round();
    (0..10).for_each(|_| assert_eq!(round(), first));
}

#[test]
fn the_highest_number_names_a_request() {
    let mut engine = engine(CacheMode::None, false);
    assert_eq!(engine.offer(RequestId::MAX, Kind::Read), Admission::Admitted);
    assert_eq!(drain(&mut engine), [data(RequestId::MAX, false)]);
    engine.complete(Token::Data(RequestId::MAX), Err(Errno(5)));
    assert_eq!(drain(&mut engine), [Action::Done { id: RequestId::MAX, result: Err(Errno(5)) }]);
}

/// Bugs of a caller; a hostile guest cannot cause one.
const CALLERS_BUGS: [fn(&mut Engine); 5] = [
    |engine| assert_eq!(engine.offer(0, Kind::Flush), Admission::Blocked),
    |engine| engine.complete(Token::Data(1), Ok(())),
    |engine| engine.complete(Token::Data(RequestId::MAX), Err(Errno(5))),
    |engine| engine.complete(Token::Sync, Ok(())),
    |engine| engine.unblock_writes(),
];

#[test]
fn a_callers_bug_panics_in_debug_builds_and_changes_nothing_in_release_builds() {
    for (number, bug) in CALLERS_BUGS.into_iter().enumerate() {
        let mut engine = engine(CacheMode::None, false);
        engine.offer(0, Kind::Write);
        assert_eq!(drain(&mut engine), [data(0, false)]);
        let before = engine.clone();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| bug(&mut engine)));
        assert_eq!(caught.is_err(), cfg!(debug_assertions), "bug {number}");
        assert_eq!(engine, before, "bug {number} changed the engine");
        engine.complete(Token::Data(0), Ok(()));
        assert_eq!(drain(&mut engine), [done(0)]);
        assert!(engine.is_idle());
    }
}
