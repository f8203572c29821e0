//! Syncs and writes that fail: who is told, and what is not acknowledged.

use std::time::Instant;

use kit::front_end::*;
use virtioblkd::backend::DurableWrite;
use virtioblkd::backend::mem::{CompletionOrder, Fault, MemOp};
use virtioblkd::disk::{Disk, Event};
use virtioblkd::engine::CacheMode;

use super::crash_load::*;

#[test]
fn a_failed_sync_reaches_the_guest_the_status_and_the_operator() {
    for (mode, durable_write) in [
        (CacheMode::Directsync, DurableWrite::Emulate),
        (CacheMode::Writethrough, DurableWrite::Emulate),
        (CacheMode::None, DurableWrite::Native),
        (CacheMode::Writeback, DurableWrite::Emulate),
    ] {
        let rig = Rig::new(mode, durable_write, CompletionOrder::InOrder);
        let mut guest = rig.connect(ALL);
        assert_eq!(guest.write(0, 0, &[1; BLOCK]), OK);
        let status = rig.status();
        assert!(!status.sync_failed && status.last_errors.is_empty(), "{mode}");
        rig.memory.fail(Fault { op: MemOp::Sync, nth: 1, errno: EIO, transferred: 0 });
        let through = matches!(mode, CacheMode::Directsync | CacheMode::Writethrough);
        // Write through: the write itself is what fails. Write back: the flush.
        assert_eq!(guest.write(0, 1, &[2; BLOCK]), if through { IOERR } else { OK }, "{mode}");
        assert_eq!(guest.flush(1), IOERR, "{mode}");
        assert_eq!(guest.flush(0), IOERR, "{mode}: failed once is failed for good");
        assert_eq!(guest.read(0, 0, BLOCK as u32), (OK, vec![1; BLOCK]), "{mode}: reads go on");
        let status = rig.status();
        assert!(status.sync_failed, "{mode}");
        let errors: Vec<&str> = status.last_errors.iter().map(|error| error.what.as_str()).collect();
        assert!(errors.iter().any(|what| what.starts_with("sync failed")), "{mode}: {errors:?}");
        assert!(errors.iter().any(|what| what.starts_with("flush of 0 bytes")), "{mode}: {errors:?}");
        assert_eq!(rig.hold(1), Err(EIO), "{mode}: no hold without a good sync");
        rig.disk.open_gate();
        assert_eq!(guest.write(0, 3, &[3; BLOCK]), if through { IOERR } else { OK }, "{mode}: it goes on all the same");
        // And without any ring.
        drop(guest);
        rig.disconnected();
        assert_eq!(rig.hold(2), Err(EIO), "{mode}");
        rig.disk.open_gate();
    }
}

#[test]
fn a_durable_write_that_failed_is_not_acknowledged() {
    let rig = Rig::new(CacheMode::Writethrough, DurableWrite::Native, CompletionOrder::InOrder);
    let mut guest = rig.connect(ALL);
    rig.memory.fail(Fault { op: MemOp::Write, nth: 2, errno: EIO, transferred: BLOCK });
    assert_eq!(guest.write(0, 0, &[1; BLOCK]), OK);
    assert_eq!(guest.write(0, 1, &[2; BLOCK]), IOERR);
    assert_eq!(guest.write(1, 2, &[3; BLOCK]), IOERR, "on every ring: the host's cache may have dropped anything");
    assert!(rig.status().sync_failed);
    assert_eq!(rig.hold(1), Err(EIO));
    rig.disk.open_gate();
}

#[test]
fn one_failed_sync_is_reported_once() {
    let rig = Rig::new(CacheMode::Writeback, DurableWrite::Native, CompletionOrder::InOrder);
    let _guest = FrontEnd::connect(&rig.path, 1, 64, ALL);
    rig.memory.fail(Fault { op: MemOp::Sync, nth: 1, errno: EIO, transferred: 0 });
    rig.disk.close_gate(1);
    let end = Instant::now() + WAIT_TIMEOUT;
    let (mut told, mut settled) = (0, false);
    while !settled {
        for event in rig.events.take().events {
            told += usize::from(matches!(event, Event::SyncError(_)));
            settled |= matches!(event, Event::HoldSettled { .. });
        }
        assert!(Instant::now() < end, "the hold did not settle");
    }
    rig.disk.open_gate();
    assert_eq!((told, rig.status().last_errors.len()), (1, 1));
}

/// Nobody is left to tell but the operator.
#[test]
fn a_failed_sync_at_the_end_of_a_ring_or_a_connection_is_reported() {
    for ask in [false, true] {
        let rig = Rig::new(CacheMode::None, DurableWrite::Native, CompletionOrder::InOrder);
        let mut guest = rig.connect(ALL);
        assert_eq!(guest.write(0, 0, &[1; BLOCK]), OK);
        rig.memory.fail(Fault { op: MemOp::Sync, nth: 1, errno: EIO, transferred: 0 });
        if ask {
            guest.stop_ring(0);
        } else {
            drop(guest);
        }
        let errno = rig.event(|event| if let Event::SyncError(errno) = event { Some(errno) } else { None });
        assert_eq!(errno, EIO);
        assert!(rig.status().sync_failed);
    }
}

#[test]
fn a_fault_fails_exactly_the_request_that_met_it() {
    for mode in CacheMode::ALL {
        for (op, kind, nth) in [
            (MemOp::Read, IN, 5),
            (MemOp::Write, OUT, 1),
            (MemOp::Write, OUT, 7),
            (MemOp::Discard, DISCARD, 3),
            (MemOp::WriteZeroes, WRITE_ZEROES, 4),
        ] {
            // By flag a failed write is a failed sync, which fails what comes after it.
            let rig = Rig::new(mode, DurableWrite::Emulate, CompletionOrder::InOrder);
            let mut guest = rig.connect(ALL);
            rig.memory.fail(Fault { op, nth, errno: ENOSPC, transferred: 100 });
            let slots: Vec<u16> = (0..10u64)
                .map(|sector| {
                    let mut range = sector.to_le_bytes().to_vec();
                    range.extend([1, 0, 0, 0, 0, 0, 0, 0]);
                    match kind {
                        IN => guest.add(0, IN, sector, &[], BLOCK as u32),
                        OUT => guest.add(0, OUT, sector, &[sector as u8 + 1; BLOCK], 0),
                        _ => guest.add(0, kind, 0, &range, 0),
                    }
                })
                .collect();
            guest.kick(0);
            let answers: Vec<(u16, u8)> = slots.iter().map(|_| guest.wait(0)).collect();
            for (at, slot) in slots.iter().enumerate() {
                let (_, status) = answers.iter().find(|(answered, _)| answered == slot).expect("each one is answered");
                let expected = if at as u64 + 1 == nth { IOERR } else { OK };
                assert_eq!(*status, expected, "{mode}: {op:?} {at}");
            }
            let status = rig.status();
            assert_eq!((status.total.errors, status.sync_failed), (1, false), "{mode}: {op:?}");
            let what = &status.last_errors[0].what;
            assert!(what.contains("No space left"), "{mode}: {what}");
            assert_eq!(guest.flush(0), OK, "{mode}: {op:?}");
        }
    }
}

/// A fault of the disk does not end an operator's hold: the failed request is the guest's to repeat.
#[test]
fn a_write_that_fails_while_a_hold_drains_does_not_fail_the_hold() {
    let rig = Rig::new(CacheMode::Writeback, DurableWrite::Native, CompletionOrder::OnRequest);
    let mut guest = rig.connect(ALL);
    rig.memory.fail(Fault { op: MemOp::Write, nth: 1, errno: ENOSPC, transferred: 0 });
    let slot = guest.add(0, OUT, 0, &[1; BLOCK], 0);
    guest.kick(0);
    let end = Instant::now() + WAIT_TIMEOUT;
    while rig.memory.waiting() == 0 {
        assert!(Instant::now() < end, "the write does not arrive");
        std::thread::yield_now();
    }
    rig.disk.close_gate(1);
    // The write, and a sync of each ring.
    rig.memory.release(1 + RINGS as u64);
    assert_eq!(guest.wait(0), (slot, IOERR));
    let figures = rig.event(|event| match event {
        Event::HoldSettled { result, .. } => Some(result),
        _ => None,
    });
    let figures = figures.unwrap();
    assert_eq!((figures.rings, figures.drained, figures.bytes_synced), (RINGS as u32, 1, 0));
    rig.disk.open_gate();
}
