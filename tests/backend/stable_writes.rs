//! Guests that change a buffer while its write is under way, over an image that reads the buffer twice, as a mirror
//! does: two different blocks without stable writes, none with `copy`, the exact count with `detect`.

use std::sync::Arc;

use kit::backend;
use kit::backend::{Prng, disk_dir, eventually, stable};
use kit::driver;
use kit::driver::ALL;
use kit::rig::Rig;
use virtioblkd::backend::bounce_pool::BouncePool;
use virtioblkd::backend::mem::{CompletionOrder, Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::backend::null::NullBackend;
use virtioblkd::backend::point_in_time::PointInTime;
use virtioblkd::backend::stable::StableWrites;
use virtioblkd::backend::{Backend, Errno, IoBuf, Op, OpId};
use virtioblkd::disk::{Copies, CopyOptions, Event, Events, StableWritesStatus};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;

use super::mirror::*;

const BATCH: usize = 16;

const BATCHES: usize = 64;

/// A front-end that changes some of its buffers after the device has the writes and before they are carried out.
/// Returns how many it changed, the image's halves, and the disk.
fn mutating_guest(how: StableWrites) -> (usize, Arc<Mirror>, Arc<PointInTime>, Arc<Events>) {
    let mirror = Mirror::new(BATCH * BATCHES * WRITE, CompletionOrder::OnRequest);
    let (disk, events) = stacked(mirror.clone(), how, &BouncePool::new(BouncePool::DEFAULT_BYTES));
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 1, queue_size: 64, serial: String::new() };
    let rig = Rig::on(disk.clone(), &options);
    let mut guest = driver::Driver::connect_soon(&rig.path, 1, 64, BATCH * WRITE, ALL);
    let mut prng = Prng::new(11);
    let mut changed = 0;
    for batch in 0..BATCHES {
        for turn in 0..BATCH {
            guest.fill(turn * WRITE, &[1 + turn as u8; WRITE]);
            guest.write(0, ((batch * BATCH + turn) * WRITE) as u64, turn * WRITE, WRITE, turn as u64);
        }
        guest.kick(0);
        eventually("all writes are with the image", || mirror.second.waiting() == BATCH);
        for turn in 0..BATCH {
            if prng.below(3) == 0 {
                // One byte is enough, wherever it is.
                guest.fill(turn * WRITE + prng.below(WRITE as u64) as usize, &[0xee]);
                changed += 1;
            }
        }
        mirror.second.release(BATCH as u64);
        let mut done = 0;
        while done < BATCH {
            let completed = guest.wait(0);
            assert!(completed.iter().all(|&(_, result)| result == 0));
            done += completed.len();
        }
    }
    drop(guest);
    drop(rig);
    (changed, mirror, disk, events)
}

#[test]
fn without_stable_writes_the_halves_differ() {
    let (changed, mirror, disk, _) = mutating_guest(StableWrites::Off);
    assert!(changed > 100);
    assert_eq!(mirror.differences(WRITE), changed);
    let status = seen(&*disk);
    assert_eq!((&*status.asked, &*status.in_effect, status.copied_writes), ("off", "off", 0));
    assert!(status.why.contains("each half of the mirror"), "{}", status.why);
}

#[test]
fn copied_writes_are_equal_on_both_halves_of_a_mirror() {
    // `auto` knows that this image reads twice.
    for how in [StableWrites::Copy, StableWrites::Auto] {
        let (changed, mirror, disk, _) = mutating_guest(how);
        assert!(changed > 100);
        assert_eq!(mirror.differences(WRITE), 0);
        let stored = mirror.second.volatile_image();
        let expected = |at: usize| 1 + (at % BATCH) as u8;
        assert!(stored.chunks(WRITE).enumerate().all(|(at, block)| block.iter().all(|&byte| byte == expected(at))));
        let status = seen(&*disk);
        assert_eq!((&*status.asked, &*status.in_effect), (how.name(), "copy"));
        assert_eq!(status.copied_writes, (BATCH * BATCHES) as u64);
        assert_eq!(status.copied_bytes, (BATCH * BATCHES * WRITE) as u64);
        assert!(status.most_memory_bytes <= (BATCH * WRITE) as u64, "no more than is in flight");
    }
}

#[test]
fn changed_writes_are_detected_counted_and_reported() {
    let (changed, mirror, disk, events) = mutating_guest(StableWrites::Detect);
    assert_eq!(mirror.differences(WRITE), changed, "detect changes nothing");
    let status = seen(&*disk);
    assert_eq!((&*status.in_effect, status.checked_writes), ("detect", (BATCH * BATCHES) as u64));
    assert_eq!(status.changed_writes, changed as u64);
    let first = mirror.first.lock().unwrap();
    let second = mirror.second.volatile_image();
    let differing: Vec<u64> = (0..first.len())
        .step_by(WRITE)
        .filter(|&at| first[at..at + WRITE] != second[at..at + WRITE])
        .map(|at| at as u64)
        .collect();
    let last: Vec<u64> = status.last_changed.iter().map(|write| write.offset).collect();
    assert_eq!(last, differing[differing.len() - 8..], "the last ones, newest last");
    assert!(status.last_changed.iter().all(|write| write.length == WRITE as u64 && write.when > 1_600_000_000));
    let (mut told, mut suppressed) = (Vec::new(), 0);
    for event in events.take().events {
        if let Event::BufferChanged { offset, len, suppressed: before } = event {
            assert_eq!(len, WRITE as u64);
            told.push(offset);
            suppressed += before as usize;
        }
    }
    assert!(!told.is_empty() && told.len() + suppressed <= changed);
    assert_eq!(told[..20.min(told.len())], differing[..20.min(told.len())], "the first ones of a second");
}

/// Writes of random lengths from memory that is scribbled on all the time, each to a place of its own.
fn scribbled_writes(how: StableWrites, limit: usize) -> (Arc<Mirror>, StableWritesStatus, Vec<(usize, usize)>) {
    const SIZE: usize = 48 * MIB;
    let mirror = Mirror::new(SIZE, CompletionOrder::Shuffled(3));
    let disk = stable(mirror.clone(), how, limit);
    let memory = Scribbled::new(4 * MIB);
    let mut driver = backend::Driver::new(&disk, 16);
    let mut prng = Prng::new(5);
    let (mut offset, mut out, mut places) = (0, 0, Vec::new());
    loop {
        let len = if prng.below(40) == 0 { 3 * MIB + 512 } else { 512 * (1 + prng.below(128) as usize) };
        if offset + len > SIZE {
            break;
        }
        driver.push(Op::Write { offset: offset as u64, buf: memory.buf(0, len), durable: false });
        places.push((offset, len));
        (offset, out) = (offset + len, out + 1);
        while out == 16 {
            out -= driver.reap().len();
        }
    }
    while out > 0 {
        out -= driver.reap().len();
    }
    (mirror, seen(&disk), places)
}

#[test]
fn copy_and_detect_withstand_constant_changes() {
    let (mirror, _, places) = scribbled_writes(StableWrites::Off, 0);
    assert!(torn(&mirror, &places) > 0, "the test's guest is not nasty enough");
    for limit in [0, BouncePool::DEFAULT_BYTES] {
        let (mirror, status, places) = scribbled_writes(StableWrites::Copy, limit);
        assert_eq!(torn(&mirror, &places), 0);
        assert_eq!(status.copied_writes, places.len() as u64);
        assert_eq!(status.copied_bytes, places.iter().map(|&(_, len)| len as u64).sum::<u64>(), "copied once");
    }
    let (mirror, status, places) = scribbled_writes(StableWrites::Detect, 0);
    assert_eq!(status.checked_writes, places.len() as u64);
    assert!(status.changed_writes >= torn(&mirror, &places) as u64, "what differs had changed");
}

/// A guest that keeps to the rules: each buffer gets new data as soon as its write is over, and not before.
#[test]
fn no_false_positive_in_millions_of_writes() {
    const WRITES: u64 = 3_000_000;
    let disk = stable(Arc::new(NullBackend::new(1 << 30, 512)), StableWrites::Detect, 0);
    let mut queue = disk.open_queue(64).unwrap();
    let mut bufs: Vec<IoBuf> = (1..=64).map(|turn| IoBuf::owned(512 * (1 + turn % 3), 512, turn % 2)).collect();
    let mut out = Vec::new();
    let (mut count, mut prng) = (0, Prng::new(1));
    while count < WRITES {
        for (turn, buf) in bufs.drain(..).enumerate() {
            buf.copy_from(prng.below(buf.len() as u64 - 8) as usize, &count.to_ne_bytes());
            let offset = turn as u64 * 4096;
            // Reads change their buffers, and are not looked at.
            let op = if turn % 8 == 7 { Op::Read { offset, buf } } else { Op::Write { offset, buf, durable: false } };
            count += u64::from(matches!(op, Op::Write { .. }));
            queue.push(op, OpId(turn as u64)).expect("room");
        }
        queue.reap(&mut out);
        bufs.extend(out.drain(..).filter_map(|done| done.buf));
    }
    let status = seen(&disk);
    assert_eq!((status.checked_writes, status.changed_writes, status.last_changed.len()), (count, 0, 0));
}

/// The same through the whole device, over an image that reorders, with failing writes in between.
#[test]
fn no_false_positive_in_a_device() {
    let mem = Arc::new(MemBackend::new(MemOptions { order: CompletionOrder::Shuffled(9), ..MemOptions::new(1 << 20) }));
    let (disk, _) = stacked(mem.clone(), StableWrites::Detect, &BouncePool::new(0));
    let options = DeviceOptions { mode: CacheMode::Directsync, num_queues: 1, queue_size: 64, serial: String::new() };
    let rig = Rig::on(disk.clone(), &options);
    let mut guest = driver::Driver::connect_soon(&rig.path, 1, 64, 16 * WRITE, ALL);
    let (mut failed, mut count) = (0, 0u64);
    while count < 100_000 {
        if count % 1600 == 0 {
            mem.fail(Fault { op: MemOp::Write, nth: 5, errno: Errno(libc::ENOSPC), transferred: 512 });
        }
        for turn in 0..16 {
            count += 1;
            guest.fill(turn * WRITE, &count.to_ne_bytes());
            guest.write(0, (turn * WRITE) as u64, turn * WRITE, 2048, turn as u64);
        }
        guest.kick(0);
        let mut out = 16;
        while out > 0 {
            let completed = guest.wait(0);
            out -= completed.len();
            for (turn, result) in completed {
                failed += u64::from(result != 0);
                guest.fill(turn as usize * WRITE, &[turn as u8; 64]);
            }
        }
    }
    let status = seen(&*disk);
    assert!(failed > 50 && status.checked_writes == count);
    assert_eq!(status.changed_writes, 0);
}

/// A copy of an instant delays writes; what is delayed is stable, too, and the copy is the instant's.
#[test]
fn delayed_writes_are_stable_and_the_copy_holds_the_instant() {
    const SIZE: usize = 8 * MIB;
    let dir = disk_dir();
    let mirror = Mirror::new(SIZE, CompletionOrder::Shuffled(4));
    let (disk, _) = stacked(mirror.clone(), StableWrites::Copy, &BouncePool::new(0));
    let target = dir.path().join("copy.img");
    let copy = disk.prepare(&CopyOptions { target: target.clone(), bandwidth: 1, digest: false }).unwrap();
    disk.start(&copy).unwrap();
    let memory = Scribbled::new(MIB);
    let mut driver = backend::Driver::new(&*disk, 16);
    let mut places = Vec::new();
    let mut out = 0;
    for turn in 0..SIZE / (16 << 10) {
        let (at, len) = (turn * (16 << 10), 512 * (1 + turn % 32));
        driver.push(Op::Write { offset: at as u64, buf: memory.buf(0, len), durable: false });
        places.push((at, len));
        out += 1;
        while out == 16 {
            out -= driver.reap().len();
        }
    }
    while out > 0 {
        out -= driver.reap().len();
    }
    assert_eq!(torn(&mirror, &places), 0);
    disk.set_bandwidth(&copy, 0).unwrap();
    eventually("the copy ends", || disk.status().last().is_some_and(|copy| copy.state == "completed"));
    assert!(disk.status()[0].saved_before_write_bytes > 0, "no write was delayed");
    assert!(std::fs::read(&target).unwrap().iter().all(|&byte| byte == 0), "the instant was before all writes");
}
