//! The memory of stable writes: what waits for it, that it stays within its bound, and that nothing is copied twice.

use std::sync::Arc;
use std::thread;

use kit::backend;
use kit::backend::{Prng, disk_dir, image, options, stable};
use virtioblkd::backend::bounce_pool::{BouncePool, MAX_BUFFER};
use virtioblkd::backend::file::FileOptions;
use virtioblkd::backend::mem::{CompletionOrder, Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::backend::stable::StableWrites;
use virtioblkd::backend::{Backend, Errno, IoBuf, Op, OpId};
use virtioblkd::engine::CacheMode;

use super::mirror::*;

#[test]
fn more_demand_than_memory_waits_and_stays_within_the_bound() {
    const QUEUES: usize = 3;
    const LIMIT: usize = 2 * MAX_BUFFER;
    let depot = BouncePool::new(LIMIT);
    let mem =
        Arc::new(MemBackend::new(MemOptions { order: CompletionOrder::Shuffled(2), ..MemOptions::new(64 << 20) }));
    let (disk, _) = stacked(mem.clone(), StableWrites::Copy, &depot);
    thread::scope(|scope| {
        for ring in 0..QUEUES {
            let disk = disk.clone();
            scope.spawn(move || {
                let mut driver = backend::Driver::new(&*disk, 64);
                // From a block to 5 MiB, 20 MiB in all: ten times what there is.
                let lens = [512, 5 * MIB, 4096, MIB + 512, 3 * MIB, 70_144, 2 * MIB, 8 * MIB - 512];
                let base = ring as u64 * (21 << 20);
                let mut offset = base;
                let mut ids = Vec::new();
                for (turn, &len) in lens.iter().enumerate() {
                    let buf = backend::some_buffer(&mut Prng::new(turn as u64), len);
                    buf.copy_from(0, &vec![1 + turn as u8; len]);
                    ids.push(driver.push(Op::Write { offset, buf, durable: turn % 2 == 0 }));
                    offset += len as u64;
                }
                for (id, len) in ids.into_iter().zip(lens) {
                    let done = driver.finish(id);
                    assert_eq!((done.result, done.buf.map(|buf| buf.len())), (Ok(()), Some(len)));
                }
            });
        }
    });
    let stored = mem.volatile_image();
    for ring in 0..QUEUES {
        let mut at = ring * (21 << 20);
        for (turn, len) in
            [512, 5 * MIB, 4096, MIB + 512, 3 * MIB, 70_144, 2 * MIB, 8 * MIB - 512].into_iter().enumerate()
        {
            assert!(stored[at..at + len].iter().all(|&byte| byte == 1 + turn as u8), "write {turn} of ring {ring}");
            at += len;
        }
    }
    let status = seen(&*disk);
    assert!(status.waited_writes > 0, "there was enough memory");
    assert!(status.most_memory_bytes <= (LIMIT + QUEUES * MAX_BUFFER) as u64, "{status:?}");
    assert_eq!(status.shared_memory_limit, LIMIT as u64);
    assert!(status.memory_bytes <= LIMIT as u64, "what the queues had is freed with them");
}

#[test]
fn reads_and_syncs_pass_writes_that_wait_for_memory() {
    let mem = Arc::new(MemBackend::new(MemOptions { order: CompletionOrder::OnRequest, ..MemOptions::new(16 << 20) }));
    let disk = stable(mem.clone(), StableWrites::Copy, 0);
    let mut driver = backend::Driver::new(&disk, 16);
    let write = |offset: usize| Op::Write { offset: offset as u64, buf: IoBuf::owned(MIB, 512, 0), durable: false };
    let writes: Vec<OpId> = (0..4).map(|turn| driver.push(write(turn * MIB))).collect();
    assert_eq!((mem.waiting(), seen(&disk).waited_writes), (1, 3));
    let read = driver.push(Op::Read { offset: 0, buf: IoBuf::owned(4096, 4096, 0) });
    let sync = driver.push(Op::Sync);
    assert_eq!(mem.waiting(), 3);
    mem.release(3);
    assert_eq!(driver.finish(writes[0]).result, Ok(()));
    assert_eq!((driver.finish(read).result, driver.finish(sync).result), (Ok(()), Ok(())));
    assert_eq!(mem.waiting(), 1, "the next write has the memory now");
    mem.release(3);
    for id in &writes[1..] {
        assert_eq!(driver.finish(*id).result, Ok(()));
    }
}

#[test]
fn a_part_that_fails_fails_its_write_once_and_nothing_else() {
    let enospc = Errno(libc::ENOSPC);
    for (limit, nth) in [
        (0, 1),
        (0, 2),
        (0, 4),
        (BouncePool::DEFAULT_BYTES, 1),
        (BouncePool::DEFAULT_BYTES, 3),
        (BouncePool::DEFAULT_BYTES, 4),
    ] {
        let mem = Arc::new(MemBackend::new(MemOptions {
            order: CompletionOrder::Shuffled(nth),
            ..MemOptions::new(16 << 20)
        }));
        let disk = stable(mem.clone(), StableWrites::Copy, limit);
        let mut driver = backend::Driver::new(&disk, 4);
        mem.fail(Fault { op: MemOp::Write, nth, errno: enospc, transferred: 0 });
        let long = driver.push(Op::Write { offset: 0, buf: IoBuf::owned(4 * MIB, 512, 0), durable: false });
        let done = driver.finish(long);
        assert_eq!((done.result, done.buf.map(|buf| buf.len())), (Err(enospc), Some(4 * MIB)), "{limit} {nth}");
        assert_eq!(driver.write(0, &[7; 3 * MIB]), Ok(()), "{limit} {nth}");
        assert!(driver.read(0, 3 * MIB).unwrap().iter().all(|&byte| byte == 7));
        assert_eq!(seen(&disk).copied_writes, 2);
    }
}

#[test]
fn dropping_a_queue_carries_out_what_waits_for_memory() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 32 << 20);
    let little = FileOptions { memory: BouncePool::new(0), ..options(&path, CacheMode::None) };
    let bounced: Arc<dyn Backend> = Arc::new(backend::opened(&little));
    let mem = MemBackend::new(MemOptions { order: CompletionOrder::Shuffled(1), ..MemOptions::new(32 << 20) });
    let copied = stable(Arc::new(mem), StableWrites::Copy, 0);
    for (round, disk) in [bounced, Arc::new(copied)].into_iter().enumerate() {
        let mut queue = disk.open_queue(16).unwrap();
        for turn in 0..16u64 {
            // Not aligned: O_DIRECT refuses it.
            let buf = IoBuf::owned(2 * MIB, 4096, 1);
            buf.copy_from(0, &vec![1 + turn as u8; 2 * MIB]);
            queue.push(Op::Write { offset: turn << 21, buf, durable: false }, OpId(turn)).expect("room");
        }
        queue.submit().unwrap();
        drop(queue);
        let mut driver = backend::Driver::new(&*disk, 1);
        for turn in 0..16u64 {
            let read = driver.read(turn << 21, 2 * MIB).unwrap();
            assert!(read.iter().all(|&byte| byte == 1 + turn as u8), "round {round}: write {turn} is lost");
        }
    }
    assert!(little.memory.allocated().1 <= MAX_BUFFER, "bounced within the bound: {:?}", little.memory.allocated());
}

/// A copy is aligned and goes to O_DIRECT as it is.
#[test]
fn a_copied_write_is_not_bounced_again() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 8 << 20);
    let bounces = BouncePool::new(BouncePool::DEFAULT_BYTES);
    let file = FileOptions { memory: bounces.clone(), ..options(&path, CacheMode::None) };
    let disk = stable(Arc::new(backend::opened(&file)), StableWrites::Copy, BouncePool::DEFAULT_BYTES);
    let mut driver = backend::Driver::new(&disk, 4);
    let buf = IoBuf::owned(65536, 4096, 1);
    buf.copy_from(0, &[9; 65536]);
    assert_eq!(driver.run(Op::Write { offset: 4096, buf, durable: true }), Ok(()));
    assert_eq!((seen(&disk).copied_bytes, bounces.allocated().1), (65536, 0));
    let read = driver.push(Op::Read { offset: 4096, buf: IoBuf::owned(65536, 4096, 1) });
    assert_eq!(driver.finish(read).result, Ok(()));
    assert_eq!(bounces.allocated().1, 65536, "the read was: the same buffer is one that O_DIRECT refuses");
}
