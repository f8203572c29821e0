//! The back-end's contract on images of a real Ceph cluster, several open in one process.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use kit::backend::{Driver, WAIT_TIMEOUT, eventually, random_ops};
use kit::ceph::{Cluster, Image, NAMESPACE, POOL};
use rustix::event::{EventfdFlags, eventfd};
use virtioblkd::backend::notices::{Notices, QuiesceRequest};
use virtioblkd::backend::rbd::{RbdBackend, RbdOptions};
use virtioblkd::backend::{Backend, Errno, IoBuf, Op, Source};
use virtioblkd::engine::CacheMode;

const MIB: u64 = 1 << 20;

fn open(image: &Image, mode: CacheMode) -> RbdBackend {
    let name = image.spec.parse().unwrap_or_else(|error| panic!("{}: {error}", image.spec));
    let options = RbdOptions { conf: Some(image.cluster.conf()), ..RbdOptions::new(name, mode) };
    RbdBackend::open(&options).unwrap_or_else(|error| panic!("{error}"))
}

/// Objects of 1 MiB, so that many requests touch two.
fn small_objects(place: &str) -> Image<'static> {
    Cluster::shared().image_in(place, 4 * MIB, &["--object-size", "1M"])
}

fn each(check: &dyn Fn(&str, &dyn Backend)) {
    each_that_stores(check);
}

fn each_that_stores(check: &dyn Fn(&str, &dyn Backend)) {
    for (mode, place) in [
        (CacheMode::None, POOL.to_string()),
        (CacheMode::Writethrough, format!("{POOL}/{NAMESPACE}")),
        (CacheMode::Unsafe, POOL.to_string()),
    ] {
        let image = small_objects(&place);
        let disk = open(&image, mode);
        disk.claim().activate().expect("nobody else has the image");
        check(&format!("RBD, {mode}"), &disk);
        disk.claim().deactivate();
    }
}

kit::backend_contract!(each, each_that_stores);

#[test]
fn clause_4_a_sync_covers_what_was_reaped_on_any_queue() {
    for mode in CacheMode::ALL {
        let image = small_objects(POOL);
        let disk = open(&image, mode);
        disk.claim().activate().expect("nobody else has the image");
        let (mut writer, mut syncer) = (Driver::new(&disk, 16), Driver::new(&disk, 16));
        // The first flush lifts what librbd does for guests that never flush.
        assert_eq!(syncer.run(Op::Sync), Ok(()));
        for round in 1..=8u8 {
            let at = u64::from(round) * 300 * 1024;
            writer.write(at, &[round; 64 << 10]).expect("a write");
            if round % 2 == 0 {
                assert_eq!(syncer.run(Op::Sync), Ok(()), "{mode}");
            } else {
                disk.sync().expect("a sync");
            }
            let at = at as usize;
            let seen = image.content();
            assert!(seen[at..at + (64 << 10)] == [round; 64 << 10], "{mode}: the cluster lacks a synced write");
        }
    }
}

#[test]
fn random_ops_leave_what_an_export_sees() {
    let image = small_objects(POOL);
    let disk = open(&image, CacheMode::Writeback);
    disk.claim().activate().expect("nobody else has the image");
    random_ops(&disk, 11, 400);
    disk.sync().expect("a sync");
    let mut driver = Driver::new(&disk, 4);
    let through_us: Vec<u8> = (0..4).flat_map(|mib| driver.read(mib * MIB, MIB as usize).expect("a read")).collect();
    assert!(through_us == image.content());
}

/// What may hold data, as a copy asks for it.
fn data(disk: &RbdBackend) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = disk.next_data(at).expect("a range") {
        ranges.push((start, end));
        at = end;
    }
    ranges
}

/// Everything outside of the ranges is zero, as the image is read; `most` bytes are in them.
fn lists_all_but_holes(image: &Image, disk: &RbdBackend, most: u64) {
    let content = image.content();
    let ranges = data(disk);
    let mut at = 0;
    for (start, end) in ranges.iter().copied().chain([(content.len() as u64, content.len() as u64)]) {
        assert!(content[at as usize..start as usize].iter().all(|byte| *byte == 0), "data was missed: {ranges:?}");
        at = end;
    }
    let listed: u64 = ranges.iter().map(|(start, end)| end - start).sum();
    assert!(listed <= most, "holes count as data: {ranges:?}");
}

#[test]
fn holes_are_listed_of_clones_snapshots_and_what_only_the_cache_has() {
    let cluster = Cluster::shared();
    let parent = cluster.image(64 * MIB);
    {
        let disk = open(&parent, CacheMode::Writeback);
        disk.claim().activate().expect("nobody else has the image");
        let mut driver = Driver::new(&disk, 4);
        // The first flush lifts librbd's caution: what follows is in its cache alone.
        driver.write(20 * MIB, &[1; 4096]).expect("a write");
        assert_eq!(driver.run(Op::Sync), Ok(()));
        driver.write(41 * MIB, &[2; 4096]).expect("a write");
        let ranges = data(&disk);
        for offset in [20 * MIB, 41 * MIB] {
            assert!(ranges.iter().any(|(start, end)| *start <= offset && offset + 4096 <= *end), "missed: {ranges:?}");
        }
        lists_all_but_holes(&parent, &disk, 8 * MIB);
        disk.sync().expect("a sync");
        disk.claim().deactivate();
    }
    cluster.rbd(&["snap", "create", "--no-progress", &parent.at("base")]);
    cluster.rbd(&["snap", "protect", &parent.at("base")]);
    let clone = Image { cluster, spec: format!("{}-clone", parent.spec) };
    cluster.rbd(&["clone", &parent.at("base"), &clone.spec]);
    let disk = open(&clone, CacheMode::None);
    disk.claim().activate().expect("nobody else has the image");
    lists_all_but_holes(&clone, &disk, 8 * MIB);
    let mut driver = Driver::new(&disk, 4);
    driver.write(60 * MIB, &[3; 512]).expect("a write");
    // A parent's object that is copied up, and one that is hidden.
    driver.write(20 * MIB + 8192, &[4; 512]).expect("a write");
    assert_eq!(driver.run(Op::WriteZeroes { offset: 40 * MIB, len: 4 * MIB, unmap: true }), Ok(()));
    assert_eq!(driver.run(Op::Sync), Ok(()));
    lists_all_but_holes(&clone, &disk, 12 * MIB);
    // After snapshots objects are clean, changed, gone and new.
    for (name, offset) in [("one", 5 * MIB), ("two", 60 * MIB)] {
        cluster.rbd(&["snap", "create", "--no-progress", "--skip-quiesce", &clone.at(name)]);
        driver.write(offset, &[5; 512]).expect("a write");
        assert_eq!(driver.run(Op::Discard { offset: 20 * MIB, len: 4 * MIB }), Ok(()));
        assert_eq!(driver.run(Op::Sync), Ok(()));
        lists_all_but_holes(&clone, &disk, 16 * MIB);
    }
    disk.claim().deactivate();
}

#[test]
fn an_empty_image_of_a_tebibyte_is_listed_in_seconds() {
    let image = Cluster::shared().image(MIB << 20);
    let disk = open(&image, CacheMode::None);
    let start = std::time::Instant::now();
    let read: u64 = data(&disk).iter().map(|(start, end)| end - start).sum();
    assert!(read < 256 * MIB, "{read} bytes of holes count as data");
    assert!(start.elapsed() < std::time::Duration::from_secs(300), "{:?}", start.elapsed());
    println!("listed in {:?}, {read} bytes to read", start.elapsed());
}

/// Keeps what it hears.
#[derive(Default)]
struct Heard {
    sizes: Mutex<Vec<u64>>,
}

impl Notices for Heard {
    fn resized(&self, size: u64) {
        self.sizes.lock().expect("no panic while held").push(size);
    }

    fn quiesce(&self, ask: QuiesceRequest) {
        ask.reply(Ok(()));
    }

    fn unquiesce(&self) {}

    fn state_changed(&self) {}
}

#[test]
fn a_resize_is_noticed_and_bounds_every_op() {
    let image = small_objects(POOL);
    let disk = open(&image, CacheMode::None);
    let heard = Arc::new(Heard::default());
    disk.store().start_notices(heard.clone());
    disk.claim().activate().expect("nobody else has the image");
    let mut driver = Driver::new(&disk, 4);
    driver.write(4 * MIB, &[1; 512]).expect_err("past the end");
    for size in [8 * MIB, 3 * MIB] {
        let (mib, spec) = (format!("{}M", size >> 20), image.spec.as_str());
        image.cluster.rbd(&["resize", "--no-progress", "--allow-shrink", "--size", &mib, spec]);
        eventually("the resize is heard", || heard.sizes.lock().expect("no panic").last() == Some(&size));
        assert_eq!(disk.geometry().size, size);
        driver.write(size - 512, &[2; 512]).expect("the last block");
        // librbd would cut it short and call that a success.
        driver.write(size - 512, &[3; 1024]).expect_err("across the end");
        driver.read(size - 512, 1024).expect_err("across the end");
        assert_eq!(driver.read(size - 512, 512), Ok(vec![2; 512]), "what crosses the end changes nothing");
    }
    drop(driver);
    disk.store().stop_notices();
}

#[test]
fn odd_names_and_many_images_in_one_process() {
    let cluster = Cluster::shared();
    let names = ["a b", "ünïcode", "dash-dot.colon:under_", "1"];
    let mut disks = Vec::new();
    for name in names {
        let spec = format!("{POOL}/{name}");
        cluster.rbd(&["create", "--size", "1M", &spec]);
        let image = Image { cluster, spec };
        let disk = open(&image, CacheMode::Writeback);
        disk.claim().activate().expect("nobody else has the image");
        disks.push((image, disk));
    }
    let mut drivers: Vec<Driver> = disks.iter().map(|(_, disk)| Driver::new(disk, 16)).collect();
    for round in 0..64u64 {
        for (number, driver) in drivers.iter_mut().enumerate() {
            let buf = IoBuf::owned(4096, 4096, 0);
            buf.copy_from(0, &[number as u8 + 1; 4096]);
            driver.push(Op::Write { offset: round * 4096, buf, durable: false });
        }
        if round % 16 == 15 {
            for driver in &mut drivers {
                let mut left = 16;
                while left > 0 {
                    left -= driver.reap().into_iter().inspect(|done| assert_eq!(done.result, Ok(()))).count();
                }
            }
        }
    }
    drop(drivers);
    for (number, (image, disk)) in disks.iter().enumerate() {
        disk.sync().expect("a sync");
        let content = image.content();
        assert!(content[..64 * 4096] == vec![number as u8 + 1; 64 * 4096], "{}", image.spec);
    }
}

#[test]
fn a_blocklisted_client_is_fenced_for_good_and_wakes_whoever_waits() {
    // A cluster of its own: what is shut out is an address of this process's.
    let cluster = Cluster::start(&[]);
    let image = cluster.image(4 * MIB);
    let disk = open(&image, CacheMode::Writeback);
    disk.claim().activate().expect("nobody else has the image");
    let mut driver = Driver::new(&disk, 16);
    driver.write(0, &[1; 4096]).expect("a write");
    assert_eq!(driver.run(Op::Sync), Ok(()));
    cluster.fence(&image);
    eventually("the client notices", || driver.write(4096, &[2; 4096]).is_err() || driver.run(Op::Sync).is_err());
    for _ in 0..3 {
        driver.write(4096, &[3; 4096]).expect_err("fenced");
        driver.read(8192, 4096).expect_err("fenced");
        assert!(matches!(driver.run(Op::Sync), Err(Errno(_))));
        disk.sync().expect_err("fenced");
    }
    assert_eq!(disk.info().image_status().trouble.as_deref(), Some("fenced"));
    // The queue still wakes: whoever waits for a kick is not left asleep.
    let kick = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let mut queue = disk.open_queue(4).expect("a queue");
    queue.watch(Source::Kick, kick.as_fd()).expect("a watch");
    rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("a kick");
    assert!(queue.wait(Some(WAIT_TIMEOUT)).expect("wait").kick);
    drop(queue);
    // Not even when the cluster would have it back.
    cluster.forgive();
    driver.write(4096, &[4; 4096]).expect_err("fenced for good");
    drop(driver);
    disk.claim().deactivate();
    drop(disk);
    assert!(image.content()[4096..8192] == [0; 4096], "a write that failed was carried out");
}
