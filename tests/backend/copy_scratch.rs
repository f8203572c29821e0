//! The scratch of a copy: it takes what a slow target does not, and a scratch that is full, missing or hangs costs the
//! guest nothing.

use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use kit::backend;
use kit::backend::eventually;
use virtioblkd::backend::mem::CompletionOrder;
use virtioblkd::backend::point_in_time::{CopyStep, ScratchOptions, Tuning};
use virtioblkd::disk::Copies;

use super::copy_world::*;

/// The target hangs, and the memory is full: what the guest overwrites goes into the scratch, all of it.
#[test]
fn a_scratch_takes_what_a_hanging_target_does_not() {
    let (release, hook) = hanging_target();
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let scratch = Some(ScratchOptions { directory: dir.path().into(), size: 1 << 30 });
    let timeout = Duration::from_secs(60);
    let tuning = Tuning { memory: 4 * CLUSTER as usize, hook: Some(hook), scratch, timeout, ..Tuning::default() };
    let (world, mem) = World::mem(CompletionOrder::InOrder, tuning);
    fill(&mem);
    // No faster: else one large read, for which nothing waits, would fill so little memory.
    let copy = started(&world, 1);
    write_everywhere(&world.disk);
    let status = world.status(&copy);
    assert!(status.scratch_bytes > 1 << 20, "{status:?}");
    world.disk.set_bandwidth(&copy, 0).expect("no limit");
    drop(release);
    let status = world.wait_ended(&copy);
    assert_eq!((status.state.as_str(), status.scratch_bytes), ("completed", 0), "{status:?}");
    assert!(std::fs::read(world.target()).expect("the copy") == vec![1; 2 << 20]);
}

/// A scratch that hangs costs its copy, and two such threads are enough: the next copies do without it.
#[test]
fn a_scratch_that_hangs_does_not_hang_the_guest() {
    let (release, hangs) = mpsc::channel::<()>();
    let hangs = Mutex::new(hangs);
    let hook = move |step| {
        match step {
            // Until the test lets go.
            CopyStep::Store => drop(hangs.lock().expect("some wait").recv()),
            CopyStep::Write => thread::sleep(Duration::from_millis(5)),
            _ => {}
        }
        Ok(())
    };
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let tuning = Tuning {
        memory: 4 * CLUSTER as usize,
        hook: Some(Arc::new(hook)),
        scratch: Some(ScratchOptions { directory: dir.path().into(), size: 1 << 30 }),
        ..Tuning::default()
    };
    let (world, mem) = World::mem(CompletionOrder::InOrder, tuning);
    fill(&mem);
    for _ in 0..2 {
        let copy = started(&world, 0);
        write_everywhere(&world.disk);
        eventually("all but what hangs is saved", || {
            let status = world.status(&copy);
            status.scratch_bytes > 0 && status.done_bytes + status.scratch_bytes == status.total_bytes
        });
        world.disk.cancel(&copy).expect("cancelled");
    }
    world.events.take();
    let copy = started(&world, 0);
    write_everywhere(&world.disk);
    assert_eq!(world.wait_ended(&copy).state, "completed");
    drop(release);
}

/// A full scratch, and one that is not there: the target is waited for, as without one.
#[test]
fn a_full_or_missing_scratch_does_not_fail_the_copy() {
    let dir = tempfile::tempdir().expect("a directory");
    let mount = |args: &[&str]| {
        let status = Command::new(args[0]).args(&args[1..]).arg(dir.path()).status();
        status.is_ok_and(|status| status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs"]) {
        backend::skip::<()>("no tmpfs can be mounted");
        return;
    }
    let ended = [dir.path().to_path_buf(), dir.path().join("missing")].map(|directory| {
        let (tuning, _dir) = with_scratch(0, 0, &Arc::default());
        let scratch = Some(ScratchOptions { directory, size: 1 << 30 });
        let (world, mem) = World::mem(CompletionOrder::InOrder, Tuning { scratch, ..tuning });
        fill(&mem);
        let copy = started(&world, 0);
        write_everywhere(&world.disk);
        let status = world.wait_ended(&copy);
        (status.state, std::fs::read(world.target()).ok())
    });
    eventually("the file is let go, and the mount not busy", || mount(&["umount"]));
    for (state, copy) in ended {
        assert_eq!(state, "completed");
        assert!(copy.expect("the copy") == vec![1; 2 << 20]);
    }
}
