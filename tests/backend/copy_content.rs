//! What a complete copy is: as sparse as its image, of any size, durable, with its digest, within its bandwidth.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kit::backend;
use kit::backend::{Driver, disk_dir, eventually, image, opened, options};
use virtioblkd::backend::mem::CompletionOrder;
use virtioblkd::backend::point_in_time::Tuning;
use virtioblkd::disk::{Copies, CopyOptions};
use virtioblkd::engine::CacheMode;

use super::copy_world::*;

/// Holes are not read, zeroes are not stored; the digest is the whole image's.
#[test]
fn the_copy_of_a_sparse_image_is_sparse() {
    const SIZE: u64 = (64 << 30) + 4096;
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", SIZE);
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("the image");
    file.write_all_at(&[5; 4096], 40 << 30).expect("data");
    file.write_all_at(&[6; 4096], SIZE - 4096).expect("data at the end");
    // Written, and zero.
    file.write_all_at(&[0; 1 << 20], 20 << 30).expect("zeroes");
    let world = World::new(Arc::new(opened(&options(&path, CacheMode::Writeback))), Tuning::default());
    let target = dir.path().join("copy.img");
    let copy =
        world.disk.prepare(&CopyOptions { target: target.clone(), bandwidth: 0, digest: false }).expect("prepared");
    world.disk.start(&copy).expect("started");
    let mut guest = Driver::new(&*world.disk, 4);
    assert_eq!(guest.write(10 << 30, &[9; 4096]), Ok(()), "into a hole");
    let status = world.wait_ended(&copy);
    assert_eq!((status.state.as_str(), status.total_bytes, status.done_bytes), ("completed", SIZE, SIZE));
    assert_eq!(status.stored_bytes, 2 * 4096);
    let copy = std::fs::File::open(&target).expect("the copy");
    assert_eq!(copy.metadata().expect("its size").len(), SIZE);
    assert!(copy.metadata().expect("its blocks").blocks() * 512 <= CLUSTER);
    let mut seen = [0; 4096];
    for (at, wanted) in [(40 << 30, 5), (SIZE - 4096, 6), (20 << 30, 0), (10 << 30, 0)] {
        copy.read_exact_at(&mut seen, at).expect("a read");
        assert_eq!(seen, [wanted; 4096], "at {at}");
    }
}

/// A block of data in each cluster, and one with zeroes: a copy by clusters would take sixteen times the room.
#[test]
fn the_copy_of_a_thin_image_is_as_thin_block_by_block() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 64 << 20);
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("the image");
    let clusters = (64 << 20) / CLUSTER;
    for cluster in 0..clusters {
        file.write_all_at(&[1 + (cluster % 255) as u8; 4096], cluster * CLUSTER + 8192).expect("data");
        file.write_all_at(&[0; 4096], cluster * CLUSTER + 16384).expect("zeroes");
    }
    file.sync_all().expect("synced");
    let data = file.metadata().expect("its blocks").blocks() * 512;
    for mode in [CacheMode::None, CacheMode::Writeback] {
        let world = World::new(Arc::new(opened(&options(&path, mode))), Tuning::default());
        let target = dir.path().join(format!("{mode}.img"));
        let options = CopyOptions { target: target.clone(), bandwidth: 0, digest: false };
        let copy = world.disk.prepare(&options).expect("prepared");
        world.disk.start(&copy).expect("started");
        let status = world.wait_ended(&copy);
        assert_eq!((status.state.as_str(), status.done_bytes), ("completed", 64 << 20));
        assert_eq!(status.stored_bytes, clusters * 4096);
        let blocks = std::fs::metadata(&target).expect("the copy").blocks() * 512;
        assert!(blocks <= data, "{mode}: {blocks} bytes instead of {data}");
        let image = std::fs::read(&path).expect("the image");
        same("the copy", &std::fs::read(&target).expect("the copy"), &image).unwrap_or_else(|what| panic!("{what}"));
    }
}

/// Its bitmap would take 2 GiB, or more than there is.
#[test]
fn an_image_of_any_size_is_copied() {
    for size in [1 << 50, 4 << 60] {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let path = image(dir.path(), "disk.img", size);
        let file = std::fs::OpenOptions::new().write(true).open(&path).expect("the image");
        let at = [0, size / 2 + 4096, size - 4096];
        at.iter().for_each(|&at| file.write_all_at(&[5; 4096], at).expect("data"));
        let world = World::new(Arc::new(opened(&options(&path, CacheMode::Writeback))), Tuning::default());
        let copy = world.prepare(1);
        world.disk.start(&copy).expect("started");
        let mut guest = Driver::new(&*world.disk, 4);
        assert_eq!(guest.write(size / 2 + 4096, &[9; 4096]), Ok(()), "saved first");
        world.disk.set_bandwidth(&copy, 0).expect("no limit");
        let status = world.wait_ended(&copy);
        assert_eq!((status.state.as_str(), status.done_bytes), ("completed", size), "{status:?}");
        let copy = std::fs::File::open(world.target()).expect("the copy");
        for at in at {
            let mut seen = [0; 4096];
            copy.read_exact_at(&mut seen, at).expect("a read");
            assert_eq!(seen, [5; 4096], "at {at} of {size}");
        }
        assert_eq!(status.stored_bytes, 3 * 4096);
    }
}

/// That its name is durable, too: `tests/guest/power_cut.rs`.
#[test]
fn a_complete_copy_is_durable() {
    let (world, mem) = World::mem(CompletionOrder::InOrder, Tuning::default());
    let world = World { dir: disk_dir(), ..world };
    fill(&mem);
    let copy = started(&world, 0);
    assert_eq!(world.wait_ended(&copy).state, "completed");
    if let Some(dirty) = backend::dirty_pages(&world.target()) {
        assert_eq!(dirty, 0, "pages of the copy that the medium has not");
    }
}

#[test]
fn the_digest_is_that_of_the_whole_image() {
    let (world, mem) = World::mem(CompletionOrder::InOrder, Tuning::default());
    let mut driver = Driver::new(&*mem, 1);
    driver.write(CLUSTER * 3 + 512, &[1; 300_000]).expect("a write");
    let copy =
        world.disk.prepare(&CopyOptions { target: world.target(), bandwidth: 0, digest: true }).expect("prepared");
    world.disk.start(&copy).expect("started");
    driver.read(0, 512).expect("a read");
    let status = world.wait_ended(&copy);
    let sum = Command::new("sha256sum").arg(world.target()).output().expect("sha256sum").stdout;
    assert_eq!(String::from_utf8(sum).expect("text").split(' ').next(), status.sha256.as_deref());
}

/// Hashing the hole takes half an hour.
#[test]
fn a_copy_that_is_cancelled_while_it_is_hashed_ends_soon() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 40);
    let world = World::new(Arc::new(opened(&options(&path, CacheMode::Writeback))), Tuning::default());
    let target = dir.path().join("copy.img");
    let copy = world.disk.prepare(&CopyOptions { target, bandwidth: 0, digest: true }).expect("prepared");
    world.disk.start(&copy).expect("started");
    eventually("the digest", || world.status(&copy).state == "syncing");
    thread::sleep(Duration::from_millis(100));
    world.disk.cancel(&copy).expect("cancelled");
    assert_eq!(world.wait_ended(&copy).state, "cancelled");
    eventually("the end of its threads", || !world.status(&copy).ending && world.disk.ending() == 0);
}

#[test]
fn the_bandwidth_is_limited_and_progress_grows() {
    let (world, mem) = World::mem(CompletionOrder::InOrder, Tuning::default());
    fill(&mem);
    let copy = started(&world, 1 << 20);
    let mut last = 0;
    let mut steps = 0;
    eventually("its end", || {
        let status = world.status(&copy);
        assert!(status.done_bytes >= last, "backwards");
        steps += u32::from(status.done_bytes > last);
        last = status.done_bytes;
        status.state == "completed"
    });
    assert!(steps > 3, "all at once: {steps} steps");
    assert!(world.status(&copy).seconds > 0.3, "{:?}", world.status(&copy));
}
