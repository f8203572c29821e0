//! The contract of `src/backend/mod.rs`, clause by clause, against every back-end that needs nothing but this machine.

use std::thread;
use std::time::Duration;

use kit::backend;
use kit::backend::{Driver, dirty_pages, each, each_that_stores, image, open};
use kit::backend_contract::read_op;
use virtioblkd::backend::mem::{CompletionOrder, Counts, CrashOutcome, Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::backend::{Backend, DurableWrite, Errno, IoBuf, Op, OpId};
use virtioblkd::engine::CacheMode;

const EIO: Errno = Errno(libc::EIO);

kit::backend_contract!(each, each_that_stores);

#[test]
fn clause_4_a_sync_covers_what_was_reaped_on_any_queue() {
    for seed in 0..50 {
        let order = if seed == 0 { CompletionOrder::InOrder } else { CompletionOrder::Shuffled(seed) };
        let disk = MemBackend::new(MemOptions { order, ..MemOptions::new(1 << 20) });
        let mut writer = Driver::new(&disk, 16);
        let mut syncer = Driver::new(&disk, 16);
        writer.write(0, &[1; 8192]).expect("a write");
        let late = writer.push(Op::Write { offset: 65536, buf: IoBuf::owned(512, 512, 0), durable: false });
        assert_eq!(syncer.run(Op::Sync), Ok(()));
        writer.write(0, &[2; 4096]).expect("a write after the sync");
        let left = disk.crash(CrashOutcome::Nothing);
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

    // However often there was something to sync before, and whoever asks.
    let syncs: [&mut dyn FnMut(); 2] =
        [&mut || assert_eq!(syncer.run(Op::Sync), Ok(())), &mut || disk.sync().expect("a sync")];
    for sync in syncs {
        writer.write(2 << 20, &[1; 1 << 20]).expect("a write");
        assert_ne!(dirty_pages(&path), Some(0));
        sync();
        assert_eq!(dirty_pages(&path), Some(0));
    }
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
    let left = disk.crash(CrashOutcome::Some(5));
    assert_eq!(left[4096..8192], [9; 4096]);
    let kept = left[65536..131072].chunks(512).filter(|block| block[0] == 1).count();
    assert!((32..96).contains(&kept), "about half of 128 blocks: {kept}");
    assert_eq!(left, disk.volatile_image());
    assert_eq!(left, disk.durable_image());
    assert_eq!(driver.read(4096, 4096), Ok(vec![9; 4096]));
}

#[test]
fn mem_completes_on_request() {
    let disk = MemBackend::new(MemOptions { order: CompletionOrder::OnRequest, ..MemOptions::new(1 << 20) });
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
