//! The contract of `src/backend/mod.rs`, clause by clause, against every back-end.

mod backend;

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use backend::{Chance, Driver, PATIENCE, dirty_pages, each, each_that_stores, image, open, random_ops, some_buffer};
use rustix::event::{EventfdFlags, eventfd};
use virtioblkd::backend::mem::{Counts, Fault, Keep, MemBackend, MemOp, MemOptions, Order};
use virtioblkd::backend::{Backend, DurableWrite, Errno, IoBuf, IoQueue, Op, OpId, Source, Wakeups};
use virtioblkd::engine::CacheMode;

const EIO: Errno = Errno(libc::EIO);

fn read_op(offset: u64) -> Op {
    Op::Read { offset, buf: IoBuf::owned(4096, 4096, 0) }
}

#[test]
fn clause_1_each_token_comes_back_once() {
    each(|name, backend| {
        let mut driver = Driver::new(backend, 16);
        let mut chance = Chance::new(1);
        let mut out = HashSet::new();
        for _ in 0..50 {
            for turn in 0..16u64 {
                let offset = turn * 16384;
                let id = driver.push(match chance.below(5) {
                    0 => Op::Sync,
                    1 => Op::Discard { offset, len: 8192 },
                    2 => Op::WriteZeroes { offset, len: 4096, unmap: chance.below(2) == 0 },
                    3 => Op::Write { offset, buf: some_buffer(&mut chance, 4096), durable: false },
                    _ => Op::Read { offset, buf: some_buffer(&mut chance, 4096) },
                });
                assert!(out.insert(id));
            }
            while !out.is_empty() {
                for completion in driver.reap() {
                    assert!(out.remove(&completion.id), "{name}: {:?} came back, but was not out", completion.id);
                    assert_eq!(completion.result, Ok(()), "{name}");
                }
            }
        }
        let mut late = Vec::new();
        driver.queue.wait(Some(Duration::from_millis(20))).expect("wait");
        driver.queue.reap(&mut late);
        assert!(late.is_empty(), "{name}: something came back twice");
    });
}

#[test]
fn clause_2_ok_means_every_byte() {
    each_that_stores(|_, backend| {
        for seed in 1..4 {
            random_ops(backend, seed, 500);
        }
    });
}

#[test]
fn clause_2_many_parts_and_long_transfers() {
    each_that_stores(|name, backend| {
        let mut driver = Driver::new(backend, 4);
        let mut chance = Chance::new(7);
        // More parts than one system call takes, aligned and not; more bytes than one bounce buffer has.
        for parts in [vec![512; 6000], vec![4096; 700], [vec![500, 12], vec![512; 3999]].concat()] {
            let len = parts.iter().sum();
            let bytes = chance.bytes(len);
            let buf = IoBuf::owned_parts(&parts, 4096);
            buf.copy_from(0, &bytes);
            assert_eq!(driver.run(Op::Write { offset: 4096, buf, durable: false }), Ok(()), "{name}");
            assert!(driver.read(4096, len) == Ok(bytes.clone()), "{name}");
            let id = driver.push(Op::Read { offset: 4096, buf: IoBuf::owned_parts(&parts, 4096) });
            let completion = driver.finish(id);
            assert_eq!(completion.result, Ok(()), "{name}");
            let mut seen = vec![0; len];
            completion.buf.expect("the buffer").copy_to(0, &mut seen);
            assert!(seen == bytes, "{name}");
        }
    });
}

#[test]
fn clause_3_dropping_a_queue_waits() {
    each_that_stores(|name, backend| {
        for round in 1..20u8 {
            let mut queue = backend.open_queue(32).expect("a queue");
            for turn in 0..32u64 {
                // Odd ones are not aligned and go through a buffer of the queue's own.
                let buf = IoBuf::owned(16384, 4096, turn as usize % 2);
                buf.copy_from(0, &[round; 16384]);
                queue.push(Op::Write { offset: turn * 16384, buf, durable: false }, OpId(turn)).expect("room");
            }
            queue.submit().expect("submit");
            drop(queue);
            let seen = Driver::new(backend, 1).read(0, 32 * 16384).expect("a read");
            assert!(seen.iter().all(|&byte| byte == round), "{name}: a write outlived its queue");
        }
    });
}

#[test]
fn clause_4_a_sync_covers_what_was_reaped_on_any_queue() {
    for seed in 0..50 {
        let order = if seed == 0 { Order::InOrder } else { Order::Shuffled(seed) };
        let disk = MemBackend::new(MemOptions { order, ..MemOptions::new(1 << 20) });
        let mut writer = Driver::new(&disk, 16);
        let mut syncer = Driver::new(&disk, 16);
        writer.write(0, &[1; 8192]).expect("a write");
        let late = writer.push(Op::Write { offset: 65536, buf: IoBuf::owned(512, 512, 0), durable: false });
        assert_eq!(syncer.run(Op::Sync), Ok(()));
        writer.write(0, &[2; 4096]).expect("a write after the sync");
        let left = disk.crash(Keep::Nothing);
        assert!(left[4096..8192].iter().all(|&byte| byte == 1), "a synced write was lost");
        assert!(left[..4096].iter().all(|&byte| byte == 1), "a write that nobody synced survived");
        // Either it was carried out before the power went, or it fails.
        assert!(matches!(writer.finish(late).result, Ok(()) | Err(EIO)));
    }
}

#[test]
fn clause_4_a_sync_leaves_no_dirty_page() {
    let dir = backend::disk_dir();
    let path = image(dir.path(), "disk.img", 8 << 20);
    let disk = open(&path, CacheMode::Writeback);
    let (mut writer, mut syncer) = (Driver::new(&disk, 16), Driver::new(&disk, 16));
    writer.write(0, &[1; 1 << 20]).expect("a write");
    let Some(before) = dirty_pages(&path) else { return };
    assert_ne!(before, 0, "the oracle sees nothing");
    assert_eq!(syncer.run(Op::Sync), Ok(()));
    assert_eq!(dirty_pages(&path), Some(0));

    let buf = IoBuf::owned(1 << 20, 4096, 0);
    assert_eq!(writer.run(Op::Write { offset: 1 << 20, buf, durable: true }), Ok(()));
    assert_eq!(dirty_pages(&path), Some(0), "a durable write is not");

    writer.write(2 << 20, &[1; 1 << 20]).expect("a write");
    assert_ne!(dirty_pages(&path), Some(0));
    disk.sync().expect("a sync");
    assert_eq!(dirty_pages(&path), Some(0));
}

#[test]
fn clause_5_a_sync_that_failed_keeps_failing() {
    let disk = MemBackend::new(MemOptions::new(1 << 20));
    let (mut one, mut other) = (Driver::new(&disk, 4), Driver::new(&disk, 4));
    assert_eq!(one.run(Op::Sync), Ok(()));
    disk.fail(Fault { op: MemOp::Sync, nth: 2, errno: EIO, transferred: 0 });
    assert_eq!(one.run(Op::Sync), Ok(()));
    assert_eq!(disk.sync_failed(), None);
    assert_eq!(one.run(Op::Sync), Err(EIO));
    assert_eq!(one.run(Op::Sync), Err(EIO));
    assert_eq!(other.run(Op::Sync), Err(EIO));
    assert!(disk.sync().is_err());
    let durable = Op::Write { offset: 0, buf: IoBuf::owned(512, 512, 0), durable: true };
    assert_eq!(other.run(durable), Err(EIO));
    assert_eq!(disk.sync_failed(), Some(EIO));
    assert_eq!(other.write(0, &[1; 512]), Ok(()), "only durability is lost");
}

fn event() -> Arc<rustix::fd::OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"))
}

fn kick(fd: &rustix::fd::OwnedFd) {
    assert_eq!(rustix::io::write(fd, &1u64.to_ne_bytes()), Ok(8));
}

#[test]
fn clause_6_wait_sees_every_event() {
    each(|name, backend| {
        let (kicked, woken, copied) = (event(), event(), event());
        let mut queue = backend.open_queue(4).expect("a queue");
        // Before it was watched at all.
        kick(&kicked);
        queue.watch(Source::Kick, kicked.as_fd()).expect("watch");
        queue.watch(Source::Wake, woken.as_fd()).expect("watch");
        // One copy in front of an image, not two.
        let is_copied = name.starts_with("point-in-time");
        assert_eq!(queue.watch(Source::Copy, copied.as_fd()).is_err(), is_copied, "{name}");
        let kick_only = Wakeups { kick: true, ..Wakeups::default() };
        let wake_only = Wakeups { wake: true, ..Wakeups::default() };
        let copy_only = Wakeups { copy: true, ..Wakeups::default() };
        assert_eq!(queue.wait(Some(PATIENCE)).expect("wait"), kick_only, "{name}: written before the watch");
        assert_eq!(queue.wait(Some(Duration::from_millis(1))).expect("wait"), Wakeups::default(), "{name}: nothing");
        assert_eq!(queue.wait(Some(Duration::ZERO)).expect("wait"), Wakeups::default(), "{name}: nothing");
        // While nobody waits, also between other calls.
        kick(&woken);
        queue.submit().expect("submit");
        queue.reap(&mut Vec::new());
        assert_eq!(queue.wait(Some(PATIENCE)).expect("wait"), wake_only, "{name}: written meanwhile");
        if !is_copied {
            kick(&copied);
            assert_eq!(queue.wait(Some(PATIENCE)).expect("wait"), copy_only, "{name}: the third source");
        }
        for _ in 0..100 {
            kick(&kicked);
            assert_eq!(queue.wait(Some(PATIENCE)).expect("wait"), kick_only, "{name}: again and again");
        }
        // While it sleeps.
        let later = Arc::clone(&kicked);
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(10));
            kick(&later);
        });
        assert_eq!(queue.wait(None).expect("wait"), kick_only, "{name}: written while asleep");
        thread.join().expect("the thread");
    });
}

/// Waits as a worker does until all of `wanted` was seen; an event lost hangs until the deadline and fails.
fn wait_for(queue: &mut dyn IoQueue, mut tokens: usize, mut kick: bool, name: &str) {
    let mut out = Vec::new();
    while tokens > 0 || kick {
        let start = std::time::Instant::now();
        let wakeups = queue.wait(Some(PATIENCE)).expect("wait");
        assert!(start.elapsed() < PATIENCE, "{name}: an event was lost");
        kick &= !wakeups.kick;
        queue.reap(&mut out);
        tokens -= out.drain(..).count();
    }
}

#[test]
fn clause_6_events_among_completions() {
    each(|name, backend| {
        let kicked = event();
        let mut queue = backend.open_queue(8).expect("a queue");
        queue.watch(Source::Kick, kicked.as_fd()).expect("watch");
        for round in 0..200u64 {
            for turn in 0..8 {
                queue.push(read_op(turn * 4096), OpId(turn)).expect("room");
            }
            if round % 2 == 0 {
                queue.submit().expect("submit");
            }
            kick(&kicked);
            wait_for(&mut *queue, 8, true, name);
        }
    });
}

#[test]
fn clause_7_a_full_queue_hands_the_op_back() {
    each(|name, backend| {
        for depth in [1, 3, 128] {
            let mut queue = backend.open_queue(depth).expect("a queue");
            for turn in 0..depth as u64 {
                assert!(queue.push(read_op(turn * 4096), OpId(turn)).is_ok(), "{name}: room for {depth}");
            }
            let Err(back) = queue.push(read_op(12288), OpId(999)) else { panic!("{name}: no end at {depth}") };
            assert!(matches!(back, Op::Read { offset: 12288, .. }), "{name}: another op came back");
            let mut out = Vec::new();
            while out.is_empty() {
                queue.wait(Some(PATIENCE)).expect("wait");
                queue.reap(&mut out);
            }
            assert!(queue.push(back, OpId(999)).is_ok(), "{name}: room again");
            wait_for(&mut *queue, depth + 1 - out.len(), false, name);
        }
    });
}

#[test]
fn mem_fails_as_told_and_counts() {
    let disk = MemBackend::new(MemOptions::new(1 << 20));
    let mut driver = Driver::new(&disk, 4);
    let enospc = Errno(libc::ENOSPC);
    disk.fail(Fault { op: MemOp::Write, nth: 2, errno: enospc, transferred: 512 });
    disk.fail(Fault { op: MemOp::Read, nth: 1, errno: EIO, transferred: 0 });
    disk.fail(Fault { op: MemOp::Discard, nth: 1, errno: EIO, transferred: 0 });
    assert_eq!(driver.write(0, &[1; 1024]), Ok(()));
    assert_eq!(driver.write(0, &[2; 1024]), Err(enospc));
    assert_eq!(driver.write(4096, &[3; 512]), Ok(()));
    assert_eq!(driver.read(0, 1024), Err(EIO));
    assert_eq!(driver.read(0, 1024), Ok([vec![2; 512], vec![1; 512]].concat()), "a torn write");
    assert_eq!(driver.run(Op::Discard { offset: 0, len: 512 }), Err(EIO));
    assert_eq!(driver.run(Op::WriteZeroes { offset: 0, len: 1024, unmap: false }), Ok(()));
    let durable = Op::Write { offset: 8192, buf: IoBuf::owned(512, 512, 0), durable: true };
    assert_eq!(driver.run(durable), Ok(()));
    let counts = Counts { reads: 2, writes: 4, durable_writes: 1, syncs: 0, discards: 1, write_zeroes: 1 };
    assert_eq!(disk.counts(), counts);
}

#[test]
fn mem_keeps_what_was_durable_and_some_of_the_rest() {
    let disk = MemBackend::new(MemOptions { durable_write: DurableWrite::Native, ..MemOptions::new(1 << 20) });
    let mut driver = Driver::new(&disk, 4);
    let buf = IoBuf::owned(4096, 512, 0);
    buf.copy_from(0, &[9; 4096]);
    assert_eq!(driver.run(Op::Write { offset: 4096, buf, durable: true }), Ok(()));
    assert_eq!(driver.write(65536, &[1; 65536]), Ok(()));
    let left = disk.crash(Keep::Some(5));
    assert_eq!(left[4096..8192], [9; 4096]);
    let kept = left[65536..131072].chunks(512).filter(|block| block[0] == 1).count();
    assert!((32..96).contains(&kept), "about half of 128 blocks: {kept}");
    assert_eq!(left, disk.volatile_image());
    assert_eq!(left, disk.durable_image());
    assert_eq!(driver.read(4096, 4096), Ok(vec![9; 4096]));
}

#[test]
fn mem_completes_on_request() {
    let disk = MemBackend::new(MemOptions { order: Order::OnRequest, ..MemOptions::new(1 << 20) });
    let mut driver = Driver::new(&disk, 4);
    let ids: Vec<OpId> = (0..3).map(|turn| driver.push(read_op(turn * 4096))).collect();
    assert_eq!(disk.waiting(), 3);
    driver.queue.wait(Some(Duration::from_millis(5))).expect("wait");
    let mut out = Vec::new();
    driver.queue.reap(&mut out);
    assert!(out.is_empty());
    thread::scope(|scope| {
        scope.spawn(|| disk.release(2));
        let first = driver.reap();
        assert_eq!(first[0].id, ids[0]);
    });
    disk.release(1);
    assert_eq!(driver.finish(ids[2]).result, Ok(()));
    assert_eq!(disk.waiting(), 0);
}
