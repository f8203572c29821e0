//! What each mode promises, held against a crash of the device in process.

use std::time::Duration;

use kit::front_end::*;
use virtioblkd::backend::DurableWrite;
use virtioblkd::backend::mem::{CompletionOrder, CrashOutcome};
use virtioblkd::disk::Disk;
use virtioblkd::engine::CacheMode;

use super::crash_load::*;

/// Modes, how the back-end writes durably, what the driver acknowledges, and what it may rely on.
fn promises() -> Vec<(CacheMode, DurableWrite, u64, Promise)> {
    use DurableWrite::{Emulate, Native};
    let mut list = Vec::new();
    for durable_write in [Native, Emulate] {
        list.push((CacheMode::Directsync, durable_write, ALL, Promise::Acknowledged));
        list.push((CacheMode::Writethrough, durable_write, ALL, Promise::Acknowledged));
        list.push((CacheMode::None, durable_write, ALL, Promise::Flushed));
        list.push((CacheMode::Writeback, durable_write, ALL, Promise::Flushed));
        // A driver that cannot flush relies on every acknowledgement.
        list.push((CacheMode::None, durable_write, !F_FLUSH, Promise::Acknowledged));
        list.push((CacheMode::Writeback, durable_write, !F_FLUSH, Promise::Acknowledged));
    }
    list
}

/// A crash at a random moment under load.
fn crash(mode: CacheMode, durable_write: DurableWrite, mask: u64, promise: Promise, seed: u64) -> Option<String> {
    let rig = Rig::new(mode, durable_write, CompletionOrder::Shuffled(seed));
    let mut load = Load::new(rig.connect(mask), promise, seed);
    let requests = 20 + load.prng.below(150);
    load.work(requests);
    let keep = if seed.is_multiple_of(2) { CrashOutcome::Nothing } else { CrashOutcome::Some(seed) };
    load.broken(&rig.memory.crash(keep))
}

#[test]
fn a_crash_breaks_no_promise() {
    for (mode, durable_write, mask, promise) in promises() {
        for seed in 0..12 {
            let broken = crash(mode, durable_write, mask, promise, seed);
            assert_eq!(broken, None, "{mode}, {durable_write:?}, driver {mask:#x}, {promise:?}, seed {seed}");
        }
    }
}

/// The tests above can fail: where less is promised, a driver that relies on more is let down.
#[test]
fn a_driver_that_relies_on_more_than_the_mode_promises_loses_data() {
    for (mode, mask, promise) in [
        (CacheMode::Unsafe, ALL, Promise::Flushed),
        (CacheMode::Unsafe, ALL, Promise::Acknowledged),
        (CacheMode::Unsafe, !F_FLUSH, Promise::Acknowledged),
        (CacheMode::None, ALL, Promise::Acknowledged),
        (CacheMode::Writeback, ALL, Promise::Acknowledged),
    ] {
        let broken = (0..12).any(|seed| crash(mode, DurableWrite::Native, mask, promise, seed * 2).is_some());
        assert!(broken, "{mode}, {promise:?}: every crash kept more than was promised");
    }
}

#[test]
fn a_settled_hold_holds_everything_acknowledged_in_every_mode() {
    for mode in CacheMode::ALL {
        for seed in 0..12u64 {
            let durable_write = if seed.is_multiple_of(2) { DurableWrite::Native } else { DurableWrite::Emulate };
            let rig = Rig::new(mode, durable_write, CompletionOrder::Shuffled(seed));
            let promise = if mode == CacheMode::Unsafe { Promise::Held } else { Promise::Flushed };
            let mut load = Load::new(rig.connect(ALL), promise, seed);
            for epoch in 1..4 {
                load.work(20);
                rig.hold(epoch).unwrap();
                load.held();
                assert_eq!(load.broken(&rig.memory.durable_image()), None, "{mode}, seed {seed}, hold {epoch}");
                // What a snapshot reads does not change while it is read, though the rings are full.
                let held = rig.memory.volatile_image();
                for ring in 0..RINGS {
                    while load.sent[ring].len() < 12 {
                        load.send(ring);
                    }
                    load.guest.kick(ring);
                }
                std::thread::sleep(Duration::from_millis(2));
                assert!(rig.memory.volatile_image() == held, "{mode}, seed {seed}: a write passed a closed gate");
                assert!(rig.memory.durable_image() == held, "{mode}, seed {seed}: something was not synced");
                rig.disk.open_gate();
            }
            load.work(20);
            assert_eq!(
                load.broken(&rig.memory.crash(CrashOutcome::Nothing)),
                None,
                "{mode}, seed {seed}: after the holds"
            );
        }
    }
}

#[test]
fn a_ring_that_is_stopped_and_a_front_end_that_leaves_are_synced() {
    for mode in CacheMode::ALL {
        for order in [CompletionOrder::InOrder, CompletionOrder::Shuffled(3)] {
            let rig = Rig::new(mode, DurableWrite::Native, order);
            let synced = mode != CacheMode::Unsafe;
            let kept = |at: usize, byte: u8| rig.memory.durable_image()[at * BLOCK..(at + 1) * BLOCK] == [byte; BLOCK];
            let mut guest = rig.connect(ALL);
            assert_eq!(guest.write(0, 0, &[1; BLOCK]), OK);
            assert_eq!(guest.write(1, 1, &[2; BLOCK]), OK);
            guest.stop_ring(0);
            assert_eq!((kept(0, 1), kept(1, 2)), (synced, synced), "{mode}: GET_VRING_BASE");
            assert_eq!(guest.write(1, 2, &[3; BLOCK]), OK);
            drop(guest);
            rig.disconnected();
            assert_eq!((kept(1, 2), kept(2, 3)), (synced, synced), "{mode}: disconnect");
        }
    }
}

#[test]
fn requests_in_flight_when_the_front_end_dies_are_completed_and_synced() {
    for seed in 0..8 {
        let rig = Rig::new(CacheMode::Writeback, DurableWrite::Native, CompletionOrder::Shuffled(seed));
        let mut load = Load::new(rig.connect(ALL), Promise::Flushed, seed);
        load.work(40);
        drop(load);
        rig.disconnected();
        let status = rig.status();
        assert_eq!((status.total.in_flight, status.connected, status.rings.len()), (0, false, 0));
        assert!(rig.memory.durable_image() == rig.memory.volatile_image(), "seed {seed}");
    }
}
