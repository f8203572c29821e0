//! What each mode promises, held against a crash: the device in process over a RAM disk with a volatile cache that
//! completes in any order, and a driver that remembers what it was promised.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kit::front_end::*;
use kit::rig;
use kit::rig::Prng;
use virtioblkd::backend::mem::{CompletionOrder, CrashOutcome, Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::backend::{DurableWrite, Errno};
use virtioblkd::disk::{Disk, Event};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;

const OK: u8 = 0;
const IOERR: u8 = 1;
const BLOCKS: usize = 64;
const BLOCK: usize = 512;
const RINGS: usize = 2;
const EIO: Errno = Errno(5);
const ENOSPC: Errno = Errno(28);

/// A served RAM disk.
struct Rig {
    memory: Arc<MemBackend>,
    rig: rig::Rig,
}

impl Rig {
    fn new(mode: CacheMode, durable_write: DurableWrite, order: CompletionOrder) -> Rig {
        let options = MemOptions { order, durable_write, ..MemOptions::new((BLOCKS * BLOCK) as u64) };
        let memory = Arc::new(MemBackend::new(options));
        let options = DeviceOptions { mode, num_queues: 4, queue_size: 256, serial: String::new() };
        Rig { rig: rig::Rig::on(memory.clone(), &options), memory }
    }

    fn connect(&self, mask: u64) -> FrontEnd {
        FrontEnd::connect(&self.path, RINGS, 256, mask)
    }
}

impl std::ops::Deref for Rig {
    type Target = rig::Rig;

    fn deref(&self) -> &rig::Rig {
        &self.rig
    }
}

/// When the driver takes a write for durable.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Promise {
    /// As soon as it is acknowledged.
    Acknowledged,
    /// When a flush that was sent after its acknowledgement is acknowledged.
    Flushed,
    /// When an operator's hold has settled since.
    Held,
}

/// What a block may hold.
#[derive(Clone, Default)]
struct Block {
    /// Every change sent, oldest first: its number and what it leaves in each eight bytes of the block.
    changes: Vec<(u64, u64)>,
    acknowledged: u64,
    /// The newest change that was promised to be durable.
    promised: u64,
    busy: bool,
}

/// A request in a ring.
enum Sent {
    /// Changes these blocks.
    Change { number: u64, blocks: std::ops::Range<usize> },
    /// A flush, and what had been acknowledged when it was sent.
    Flush(Vec<u64>),
}

/// A driver that keeps both rings full of writes, write-zeroes, discards and flushes, never two changes of one block
/// at once, and remembers what it may rely on.
struct Load {
    guest: FrontEnd,
    promise: Promise,
    prng: Prng,
    blocks: Vec<Block>,
    sent: [Vec<(u16, Sent)>; RINGS],
    last: u64,
    answered: u64,
}

impl Load {
    fn new(guest: FrontEnd, promise: Promise, seed: u64) -> Load {
        let blocks = vec![Block { changes: vec![(0, 0)], ..Block::default() }; BLOCKS];
        Load { guest, promise, prng: Prng::new(seed), blocks, sent: [vec![], vec![]], last: 0, answered: 0 }
    }

    fn send(&mut self, ring: usize) {
        if self.prng.below(8) == 0 {
            let covered = self.blocks.iter().map(|block| block.acknowledged).collect();
            let slot = self.guest.add(ring, FLUSH, 0, &[], 0);
            self.sent[ring].push((slot, Sent::Flush(covered)));
            return;
        }
        let start = self.prng.below(BLOCKS as u64) as usize;
        let end = (start + 1 + self.prng.below(4) as usize).min(BLOCKS);
        if self.blocks[start..end].iter().any(|block| block.busy) {
            return;
        }
        self.last += 1;
        let number = self.last;
        let mut range = (start as u64).to_le_bytes().to_vec();
        range.extend(((end - start) as u32).to_le_bytes());
        range.extend(0u32.to_le_bytes());
        let (slot, content) = match self.prng.below(8) {
            0 => (self.guest.add(ring, WRITE_ZEROES, 0, &range, 0), 0),
            1 => (self.guest.add(ring, DISCARD, 0, &range, 0), u64::from_le_bytes([0xdb; 8])),
            _ => {
                let data = number.to_le_bytes().repeat((end - start) * BLOCK / 8);
                (self.guest.add(ring, OUT, start as u64, &data, 0), number)
            }
        };
        for block in &mut self.blocks[start..end] {
            block.changes.push((number, content));
            block.busy = true;
        }
        self.sent[ring].push((slot, Sent::Change { number, blocks: start..end }));
    }

    fn take_answers(&mut self) {
        for ring in 0..RINGS {
            while let Some((head, _)) = self.guest.used(ring) {
                let slot = (head / 4) as u16;
                assert_eq!(self.guest.status(ring, slot), OK);
                self.guest.give_back(ring, slot);
                let at = self.sent[ring].iter().position(|(sent, _)| *sent == slot).expect("answered once");
                let (_, sent) = self.sent[ring].swap_remove(at);
                self.answered += 1;
                self.answer(sent);
            }
        }
    }

    fn answer(&mut self, sent: Sent) {
        match sent {
            Sent::Change { number, blocks } => {
                for block in &mut self.blocks[blocks] {
                    block.acknowledged = number;
                    block.busy = false;
                    if self.promise == Promise::Acknowledged {
                        block.promised = number;
                    }
                }
            }
            Sent::Flush(_) if self.promise == Promise::Held => {}
            Sent::Flush(covered) => {
                for (block, covered) in self.blocks.iter_mut().zip(covered) {
                    block.promised = block.promised.max(covered);
                }
            }
        }
    }

    /// Works until so many more requests were answered.
    fn work(&mut self, requests: u64) {
        let goal = self.answered + requests;
        let end = Instant::now() + WAIT_TIMEOUT;
        while self.answered < goal {
            for ring in 0..RINGS {
                while self.sent[ring].len() < 12 && self.prng.below(4) > 0 {
                    self.send(ring);
                }
                self.guest.kick(ring);
            }
            self.take_answers();
            assert!(Instant::now() < end, "the rings stand still at {} of {goal}", self.answered);
            std::thread::yield_now();
        }
    }

    /// A hold has settled: whatever was acknowledged is promised.
    fn held(&mut self) {
        self.take_answers();
        for block in &mut self.blocks {
            block.promised = block.acknowledged;
        }
    }

    /// The first broken promise in what a crash left, if there is one.
    fn broken(&self, image: &[u8]) -> Option<String> {
        for (at, block) in self.blocks.iter().enumerate() {
            let words: Vec<u64> = image[at * BLOCK..(at + 1) * BLOCK]
                .chunks(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
                .collect();
            if words.iter().any(|word| *word != words[0]) {
                return Some(format!("block {at} is torn"));
            }
            let fits = |&&(number, content): &&(u64, u64)| number >= block.promised && content == words[0];
            if block.changes.iter().find(fits).is_none() {
                return Some(format!("block {at} holds {:#x}, promised was change {}", words[0], block.promised));
            }
        }
        None
    }
}

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
fn what_is_in_flight_when_the_front_end_dies_is_finished_and_synced() {
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
        for event in rig.events.take().0 {
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
fn a_failed_sync_at_the_end_of_a_ring_or_a_connection_is_shown() {
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
