//! Which host may have an image that is being copied.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kit::backend;
use kit::backend::{disk_dir, eventually, image, opened, options};
use virtioblkd::backend::Backend;
use virtioblkd::backend::file::{FileBackend, FileOptions, Locking};
use virtioblkd::backend::point_in_time::Tuning;
use virtioblkd::disk::{Copies, Event};
use virtioblkd::engine::CacheMode;

use super::copy_world::*;

#[test]
fn dropping_the_disk_cancels_its_copy_and_releases_the_image() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 2 << 20);
    let world = World::new(Arc::new(backend::open(&path, CacheMode::None)), Tuning::default());
    let copy = started(&world, 1);
    let World { disk, events, dir } = world;
    drop(disk);
    assert!(std::fs::read_dir(dir.path()).expect("the directory").next().is_none());
    let ended = |event| matches!(event, Event::CopyEnded(status) if status.copy == copy && status.state == "cancelled");
    assert!(events.take().events.into_iter().any(ended));
    // Its locks are free: nothing of the copy has it open.
    backend::open(&path, CacheMode::None);
}

/// The image of this world and the same one as another host has it, each while its guest runs.
fn shared_with_another_host(timeout: Duration) -> (World, FileBackend, tempfile::TempDir) {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 2 << 20);
    // No hole, which would take no time.
    std::fs::write(&path, vec![1; 2 << 20]).expect("room");
    let file = || opened(&FileOptions { locking: Locking::InUse, ..options(&path, CacheMode::Writeback) });
    let world = World::new(Arc::new(file()), Tuning { timeout, ..Tuning::default() });
    (world, file(), dir)
}

#[test]
fn a_copy_fails_when_its_guest_stays_away_and_survives_one_that_returns() {
    let (world, other, _dir) = shared_with_another_host(Duration::from_secs(4));
    world.disk.claim().activate().expect("free");
    let copy = started(&world, 1);
    // Reset.
    for _ in 0..5 {
        world.disk.claim().deactivate();
        assert!(other.claim().activate().is_err(), "another host may write what is being copied");
        world.disk.claim().activate().expect("still ours");
    }
    thread::sleep(Duration::from_millis(4200));
    assert_eq!(world.status(&copy).state, "running");
    assert!(other.claim().activate().is_err());
    // Gone.
    world.disk.claim().deactivate();
    let status = world.wait_ended(&copy);
    assert_eq!(status.state, "failed");
    assert!(status.error.as_ref().is_some_and(|why| why.contains("the guest has left")), "{status:?}");
    eventually("the other host has it", || other.claim().activate().is_ok());
    assert!(world.disk.claim().activate().is_err());
    other.claim().deactivate();
    // Without a copy it is given free at once.
    world.disk.claim().activate().expect("free");
    world.disk.claim().deactivate();
    other.claim().activate().expect("free");
}

#[test]
fn a_copy_of_a_disk_without_a_guest_keeps_the_image_to_its_end() {
    let (world, other, _dir) = shared_with_another_host(Duration::from_millis(10));
    assert_eq!(world.disk.claim().activate_for_hold().ok(), Some(true));
    let copy = started(&world, 1);
    world.disk.claim().deactivate();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(world.status(&copy).state, "running");
    assert!(other.claim().activate().is_err());
    world.disk.set_bandwidth(&copy, 0).expect("it runs");
    assert_eq!(world.wait_ended(&copy).state, "completed");
    eventually("the other host has it", || other.claim().activate().is_ok());
}
