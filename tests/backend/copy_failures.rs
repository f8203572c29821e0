//! A target or a source that fails, hangs or is full fails its copy alone.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use kit::backend;
use kit::backend::{Driver, eventually, opened, options};
use virtioblkd::backend::mem::{CompletionOrder, Fault, MemOp};
use virtioblkd::backend::point_in_time::{CopyStep, Tuning};
use virtioblkd::backend::{Backend, Errno, IoBuf, Op};
use virtioblkd::disk::{Copies, CopyOptions};
use virtioblkd::engine::CacheMode;

use super::copy_world::*;

#[test]
fn a_failure_of_the_target_fails_the_copy_alone() {
    for (step, nth, errno, words) in [
        (CopyStep::Write, 1, libc::ENOSPC, "make room"),
        (CopyStep::Write, 3, libc::EIO, "medium"),
        (CopyStep::Sync, 1, libc::EIO, "cannot be synced"),
        (CopyStep::Publish, 1, libc::EROFS, "cannot be named"),
    ] {
        let (world, mem) = World::mem(CompletionOrder::InOrder, failing_at(step, nth, errno));
        fill(&mem);
        let copy = started(&world, 0);
        write_everywhere(&world.disk);
        let status = world.wait_ended(&copy);
        let why = status.error.expect("why it failed");
        assert_eq!(status.state, "failed");
        assert!(why.contains(words) && why.contains("copy.img.partial"), "{step:?}: {why}");
        assert!(world.files().is_empty(), "{step:?}: {:?}", world.files());
        // And the next one is a copy like any other.
        let instant = contents(&*mem);
        let copy = started(&world, 0);
        assert_eq!(world.wait_ended(&copy).state, "completed");
        assert!(std::fs::read(world.target()).expect("the copy") == instant);
    }
}

#[test]
fn a_full_filesystem_fails_the_copy_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let mount = |args: &[&str]| {
        let status = Command::new(args[0]).args(&args[1..]).arg(dir.path()).status();
        status.is_ok_and(|status| status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs"]) {
        backend::skip::<()>("no tmpfs can be mounted");
        return;
    }
    let (world, mem) = World::mem(CompletionOrder::InOrder, Tuning::default());
    fill(&mem);
    let options = CopyOptions { target: dir.path().join("copy.img"), bandwidth: 0, digest: false };
    let copy = world.disk.prepare(&options).expect("holes need no room");
    world.disk.start(&copy).expect("started");
    write_everywhere(&world.disk);
    let status = world.wait_ended(&copy);
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("the directory").collect();
    drop(world);
    // A program that another test starts has a copy of every descriptor until its exec.
    eventually("the file is let go, and the mount not busy", || mount(&["umount"]));
    assert_eq!(status.state, "failed");
    assert!(status.error.as_ref().is_some_and(|why| why.contains("make room")), "{status:?}");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_source_that_cannot_be_read_fails_the_copy_alone() {
    for nth in [1, 2, 3] {
        let (world, mem) = World::mem(CompletionOrder::InOrder, Tuning::default());
        fill(&mem);
        mem.fail(Fault { op: MemOp::Read, nth, errno: Errno(libc::EIO), transferred: 512 });
        let copy = started(&world, 0);
        let status = world.wait_ended(&copy);
        assert_eq!(status.state, "failed");
        assert!(status.error.as_ref().is_some_and(|why| why.contains("image cannot be read")), "{status:?}");
        write_everywhere(&world.disk);
        assert!(world.files().is_empty());
    }
}

/// What is cut off an image looks like a hole, and a copy must not store zeroes for what the guest had written there. The
/// daemon may not know the new size yet.
#[test]
fn an_image_that_is_truncated_during_the_copy_fails_it() {
    const SIZE: u64 = 8 << 20;
    for (mode, is_resized) in [(CacheMode::Writeback, false), (CacheMode::Writeback, true), (CacheMode::None, false)] {
        let dir = backend::disk_dir();
        let path = backend::image(dir.path(), "disk.img", SIZE);
        std::fs::write(&path, vec![7; SIZE as usize]).expect("data");
        let world = World::new(Arc::new(opened(&options(&path, mode))), Tuning::default());
        // It cannot reach the second half before the half is cut off.
        let copy = started(&world, 1 << 20);
        std::fs::File::options().write(true).open(&path).and_then(|file| file.set_len(SIZE / 2)).expect("truncated");
        if is_resized {
            world.disk.resize(None, true).expect("resized");
        }
        let status = world.wait_ended(&copy);
        let why = status.error.expect("why it failed");
        assert_eq!(status.state, "failed");
        assert!(why.contains("truncated") || why.contains("shrunk") || why.contains("cannot be read"), "{why}");
        assert!(world.files().is_empty(), "{:?}", world.files());
    }
}

/// A target that hangs, and no memory left: writes wait, but not for ever.
#[test]
fn a_target_that_hangs_does_not_hang_the_guest() {
    let (release, hook) = hanging_target();
    let tuning = Tuning {
        timeout: Duration::from_millis(300),
        memory: 4 * CLUSTER as usize,
        hook: Some(hook),
        ..Tuning::default()
    };
    let (world, mem) = World::mem(CompletionOrder::InOrder, tuning);
    fill(&mem);
    let copy = started(&world, 0);
    write_everywhere(&world.disk);
    let status = world.wait_ended(&copy);
    assert_eq!(status.state, "failed");
    assert!(status.error.as_ref().is_some_and(|why| why.contains("too slow")), "{status:?}");
    assert!(world.files().is_empty(), "{:?}", world.files());
    // Another one, cancelled while it hangs: at once.
    let copy = started(&world, 0);
    world.disk.cancel(&copy).expect("cancelled");
    assert!(world.files().is_empty());
    drop(release);
}

/// A discard is advice: it waits only so long, and then it is left undone and the copy goes on.
#[test]
fn a_discard_that_would_wait_too_long_is_left_undone() {
    let (release, hook) = hanging_target();
    let tuning = Tuning { memory: 4 * CLUSTER as usize, hook: Some(hook), ..Tuning::default() };
    let (world, mem) = World::mem(CompletionOrder::InOrder, tuning);
    fill(&mem);
    let copy = started(&world, 1);
    let mut guest = Driver::new(&*world.disk, 4);
    assert_eq!(guest.run(Op::Discard { offset: 0, len: 2 << 20 }), Ok(()));
    assert_eq!(mem.counts().discards, 0);
    assert_eq!(world.status(&copy).state, "running");
    world.disk.set_bandwidth(&copy, 0).expect("no limit");
    drop(release);
    assert_eq!(world.wait_ended(&copy).state, "completed");
    assert!(std::fs::read(world.target()).expect("the copy") == vec![1; 2 << 20]);
}

/// Ops that do not overlap what is saved now, reads, and syncs go on while a write waits.
#[test]
fn only_writes_that_overlap_the_saved_cluster_wait() {
    let (world, mem) = World::mem(CompletionOrder::OnRequest, Tuning::default());
    let mut guest = Driver::new(&*world.disk, 8);
    started(&world, 1);
    // The copier's first read, in the background, is in flight and not released: cluster 0 is being saved.
    eventually("the copier reads", || mem.waiting() == 1);
    let write = |offset| Op::Write { offset, buf: IoBuf::owned(4096, 4096, 0), durable: true };
    let waits = guest.push(write(4096));
    let read = guest.push(Op::Read { offset: 4096, buf: IoBuf::owned(4096, 4096, 0) });
    let sync = guest.push(Op::Sync);
    assert_eq!(mem.waiting(), 3, "the write is not with the image");
    mem.release(3);
    for id in [read, sync, waits] {
        mem.release(1);
        assert_eq!(guest.finish(id).result, Ok(()));
    }
    assert_eq!(mem.counts().durable_writes, 1, "it stayed durable");
}
