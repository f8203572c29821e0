//! I/O of the RBD back-end over a librbd that does on request what a cluster cannot be made to do: errors of every kind at
//! every call, ops that hang, short reads. What a real cluster does is in the tests of `ceph`.

use std::thread;
use std::time::Duration;

use kit::backend::{Driver, random_ops};
use kit::rbd_stub::Stub;
use virtioblkd::backend::rbd::RbdBackend;
use virtioblkd::backend::{Backend, Errno, IoBuf, Op, OpId};
use virtioblkd::engine::CacheMode;

use super::rbd_listener::*;

#[test]
fn several_open_images_do_not_affect_each_other() {
    let stubs = [Stub::new(CacheMode::None), Stub::new(CacheMode::Writeback)];
    let disks = stubs.each_ref().map(Stub::open);
    thread::scope(|scope| {
        for (disk, seed) in disks.iter().zip(1..) {
            scope.spawn(move || random_ops(disk, seed, 300));
        }
    });
    assert_eq!(disks[0].geometry().size, 8 << 20);
    assert!(disks[0].describe().contains("with no cache") && disks[1].describe().contains("with its cache"));
}

#[test]
fn a_short_read_is_an_error() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let mut driver = Driver::new(&disk, 4);
    stub.tell("short 512");
    assert_eq!(driver.read(0, 4096), Err(EIO));
    assert_eq!(driver.read(0, 4096), Ok(vec![0; 4096]));
}

#[test]
fn an_error_fails_only_its_op_and_keeps_its_number() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let mut driver = Driver::new(&disk, 4);
    for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::ETIMEDOUT, libc::EINVAL] {
        for (what, op) in [
            ("write", write_op(0)),
            ("read", Op::Read { offset: 0, buf: IoBuf::owned(512, 512, 0) }),
            ("flush", Op::Sync),
            ("discard", Op::Discard { offset: 0, len: 65536 }),
            ("zeroes", Op::WriteZeroes { offset: 0, len: 512, unmap: true }),
            ("submit", write_op(4096)),
        ] {
            stub.tell(&format!("fail {what} {errno} 1"));
            let id = driver.push(op);
            let completion = driver.finish(id);
            assert_eq!(completion.result, Err(Errno(errno)), "{what}");
            assert_eq!(completion.buf.is_some(), matches!(what, "write" | "read" | "submit"), "{what}");
            assert_eq!(driver.write(0, &[1; 512]), Ok(()), "{what}");
            assert_eq!(trouble(&disk), None);
        }
    }
}

#[test]
fn an_op_outside_the_image_never_reaches_librbd() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let mut driver = Driver::new(&disk, 4);
    let end = disk.geometry().size;
    for offset in [end - 512, end, u64::MAX - 511] {
        assert_eq!(driver.run(write_op(offset)), Err(EIO));
        assert_eq!(driver.run(Op::Discard { offset, len: 1024 }), Err(EIO));
        assert_eq!(driver.run(Op::WriteZeroes { offset, len: u64::MAX, unmap: true }), Err(EIO));
        assert_eq!(driver.read(offset, 1024), Err(EIO));
    }
    assert_eq!(stub.tell("counts").split(" thick").next(), Some("reads=0 writes=0 flushes=0 discards=0 zeroes=0"));
    assert_eq!(driver.run(write_op(end - 4096)), Ok(()));
}

#[test]
fn write_zeroes_keeps_space_unless_it_may_go() {
    let mut stub = Stub::new(CacheMode::None);
    let thick = |stub: &Stub, unmap| {
        let disk = stub.open();
        let op = Op::WriteZeroes { offset: 512, len: 1024, unmap };
        assert_eq!(Driver::new(&disk, 1).run(op), Ok(()));
        stub.count("thick") == 1
    };
    assert!(thick(&stub, false));
    assert!(!thick(&stub, true));
    stub.options.discard_unmap = false;
    assert!(thick(&stub, true), "--discard ignore");
    let geometry = stub.open().geometry();
    assert!(geometry.discard.is_none() && !geometry.zeroes_may_unmap && geometry.write_zeroes.is_some());
}

#[test]
fn the_geometry_is_that_of_the_image() {
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_size", "1049088").set("rbd_discard_granularity_bytes", "131072");
    stub.options.logical_block_size = 4096;
    let geometry = stub.open().geometry();
    assert_eq!(geometry.size, 1 << 20, "whole blocks");
    assert_eq!((geometry.logical_block, geometry.physical_block, geometry.opt_io), (4096, 4096, 4 << 20));
    assert_eq!(geometry.discard.expect("discard").granularity, 131072);
    assert_eq!(Driver::new(&stub.open(), 1).read(0, 4096), Ok(vec![0; 4096]));
}

#[test]
fn a_queue_that_is_dropped_waits_for_ops_that_hang() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let mut queue = disk.open_queue(8).unwrap();
    stub.tell("hang");
    for turn in 0..8 {
        queue.push(write_op(turn * 4096), OpId(turn)).unwrap();
    }
    assert_eq!(stub.count("in-flight"), 8);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            stub.tell("go");
        });
        drop(queue);
        assert_eq!(stub.count("in-flight"), 0, "an op outlived its queue");
    });
}

#[test]
fn a_sync_flushes_nothing_before_the_guests_first_flush() {
    let stub = Stub::new(CacheMode::Writeback);
    let disk = stub.open();
    let mut driver = Driver::new(&disk, 4);
    disk.sync().unwrap();
    driver.write(0, &[1; 512]).unwrap();
    disk.sync().unwrap();
    assert_eq!(stub.count("flushes"), 0, "until then a write is acknowledged when the cluster has it");
    assert_eq!(driver.run(Op::Sync), Ok(()));
    assert_eq!(stub.count("flushes"), 1);
    driver.write(0, &[2; 512]).unwrap();
    disk.sync().unwrap();
    assert_eq!(stub.count("flushes"), 2);
    disk.sync().unwrap();
    assert_eq!(stub.count("flushes"), 2, "nothing was written since");
    driver.read(0, 512).unwrap();
    driver.write(0, &[3; 512]).unwrap();
    disk.sync().unwrap();
    assert_eq!(stub.count("flushes"), 3);
}

#[test]
fn a_sync_flushes_where_librbd_may_hold_writes_back() {
    let mut cautious = Stub::new(CacheMode::Writeback);
    cautious.set("rbd_cache_writethrough_until_flush", "false").options.allow_override = true;
    let others = [CacheMode::None, CacheMode::Directsync, CacheMode::Unsafe].map(Stub::new);
    for stub in others.into_iter().chain([cautious]) {
        let disk = stub.open();
        let mut driver = Driver::new(&disk, 4);
        disk.sync().unwrap();
        assert_eq!(stub.count("flushes"), 0, "nothing was written");
        for op in [write_op(0), Op::Discard { offset: 0, len: 65536 }] {
            let before = stub.count("flushes");
            driver.run(op).unwrap();
            disk.sync().unwrap();
            assert_eq!(stub.count("flushes"), before + 1, "{}", stub.options.mode);
        }
    }
}

#[test]
fn a_flush_that_failed_is_final_with_a_cache() {
    let stub = Stub::new(CacheMode::Writeback);
    let disk = stub.open();
    let (mut one, mut other) = (Driver::new(&disk, 4), Driver::new(&disk, 4));
    one.write(0, &[1; 512]).unwrap();
    stub.tell("fail flush 5 1");
    assert_eq!(one.run(Op::Sync), Err(EIO));
    assert_eq!(one.run(Op::Sync), Err(EIO));
    assert_eq!(other.run(Op::Sync), Err(EIO));
    assert!(disk.sync().is_err());
    assert_eq!(disk.sync_failed(), Some(EIO));
    assert_eq!(other.write(0, &[1; 512]), Ok(()), "only durability is lost");
    assert_eq!(stub.count("flushes"), 1);
}

#[test]
fn a_flush_that_failed_without_a_cache_lost_nothing() {
    for mode in [CacheMode::None, CacheMode::Directsync] {
        let stub = Stub::new(mode);
        let disk = stub.open();
        let mut driver = Driver::new(&disk, 4);
        driver.write(0, &[1; 512]).unwrap();
        stub.tell("fail flush 5 2");
        assert_eq!(driver.run(Op::Sync), Err(EIO));
        assert!(disk.sync().is_err());
        assert_eq!(disk.sync_failed(), None);
        disk.sync().unwrap();
        assert_eq!(driver.run(Op::Sync), Ok(()));
    }
}

#[test]
fn a_failed_sync_is_retried() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    Driver::new(&disk, 4).write(0, &[1; 512]).unwrap();
    stub.tell("fail flush 5 1");
    assert!(disk.sync().is_err());
    disk.sync().unwrap();
    assert_eq!(stub.count("flushes"), 1);
}

#[test]
fn a_fenced_client_never_recovers() {
    let stub = Stub::new(CacheMode::Writeback);
    let disk = stub.open();
    let (listener, said) = Listener::start(&disk);
    let mut driver = Driver::new(&disk, 4);
    disk.claim().activate().unwrap();
    assert_eq!(trouble(&disk), None);
    // The cluster forgets it after an hour: only one op is refused by it.
    stub.tell("fail write 108 1");
    assert_eq!(driver.write(0, &[1; 512]), Err(ESHUTDOWN));
    hears(&said, Said::StateChanged);
    assert_eq!(trouble(&disk).as_deref(), Some("fenced"));
    let before = stub.tell("counts");
    assert_eq!(driver.read(0, 512), Err(ESHUTDOWN));
    assert_eq!(driver.run(Op::Sync), Err(ESHUTDOWN));
    assert_eq!(driver.run(write_op(0)), Err(ESHUTDOWN));
    assert_eq!(disk.sync().unwrap_err().raw_os_error(), Some(libc::ESHUTDOWN));
    disk.claim().deactivate();
    assert!(disk.claim().activate().unwrap_err().to_string().contains("fenced"));
    assert_eq!(stub.tell("counts"), before, "librbd was asked");
    hears_nothing_more(&said);
    drop(listener);
}

#[test]
fn a_fence_is_learned_from_every_call_that_reports_it() {
    for (order, act) in [
        ("read", (|disk| drop(Driver::new(disk, 1).read(0, 512))) as fn(&RbdBackend)),
        ("flush", |disk| assert_eq!(Driver::new(disk, 1).run(Op::Sync), Err(ESHUTDOWN))),
        ("submit", |disk| drop(Driver::new(disk, 1).read(0, 512))),
        ("lock", |disk| drop(disk.claim().activate())),
        ("invalidate", |disk| drop(disk.claim().activate())),
        ("snap", |disk| drop(disk.store().snapshots().unwrap().create("s"))),
    ] {
        let stub = Stub::new(CacheMode::None);
        let disk = stub.open();
        stub.tell(&format!("fail {order} 108 1"));
        act(&disk);
        assert_eq!(trouble(&disk).as_deref(), Some("fenced"), "{order}");
    }
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let (_listener, said) = Listener::start(&disk);
    stub.tell("fail size 108 1");
    stub.tell("resize 4194304");
    hears(&said, Said::StateChanged);
    assert_eq!(trouble(&disk).as_deref(), Some("fenced"));
}
