//! Blocks of the medium that are larger than those of the guest: reading and writing back what surrounds a write.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kit::backend::{Driver, Loop, Prng, disk_dir, image, open, opened, options, skip};
use virtioblkd::backend::file::FileOptions;
use virtioblkd::backend::{Backend, IoBuf, Op, OpId};
use virtioblkd::engine::CacheMode;

use super::tmpfs::*;

/// Tells the others to stop, also when its thread panics.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn read_modify_write_never_loses_a_neighbours_write() {
    let dir = disk_dir();
    let file = image(dir.path(), "disk.img", 1 << 20);
    let Some(device) = Loop::attach(&file, 4096) else { return };
    let options = FileOptions { logical_block_size: Some(512), ..options(&device.0, DIRECT) };
    let backend = opened(&options);
    // Two queues in two threads own the even and the odd sectors of the same 16 blocks; each sector holds a count that
    // only grows, so that a write lost shows as one that went back.
    let stop = AtomicBool::new(false);
    let counts = thread::scope(|scope| {
        let owners = [0, 1].map(|parity| {
            let (backend, stop) = (&backend, &stop);
            scope.spawn(move || {
                let mut driver = Driver::new(backend, 8);
                let mut prng = Prng::new(parity + 1);
                let mut counts = [0u8; 128];
                let _stop = StopAtEnd(stop);
                for _ in 0..1500 {
                    let sector = prng.below(64) * 2 + parity;
                    let seen = driver.read(sector * 512, 512).expect("a read");
                    assert_eq!(seen, [counts[sector as usize]; 512], "sector {sector} of thread {parity} went back");
                    let next = counts[sector as usize].wrapping_add(1);
                    counts[sector as usize] = next;
                    match prng.below(8) {
                        // Zeroes in the same block, of the kernel or written.
                        0 => {
                            driver
                                .run(Op::WriteZeroes { offset: sector * 512, len: 512, unmap: true })
                                .expect("zeroes");
                            counts[sector as usize] = 0;
                        }
                        _ => driver.write(sector * 512, &[next; 512]).expect("a write"),
                    }
                }
                counts
            })
        });
        // A third writes whole blocks behind them and must not be disturbed either.
        scope.spawn(|| {
            let mut driver = Driver::new(&backend, 8);
            let mut turn = 0u8;
            while !stop.load(Ordering::Relaxed) {
                turn = turn.wrapping_add(1);
                driver.write(65536, &[turn; 8192]).expect("a write");
                assert_eq!(driver.read(65536, 8192), Ok(vec![turn; 8192]));
            }
        });
        owners.map(|owner| owner.join().expect("an owner"))
    });
    let mut driver = Driver::new(&backend, 1);
    for sector in 0..128usize {
        let seen = driver.read(sector as u64 * 512, 512).expect("a read");
        assert_eq!(seen, [counts[sector % 2][sector]; 512], "sector {sector}");
    }
}

#[test]
fn a_dropped_queue_leaves_no_lock_and_no_descriptor() {
    let dir = disk_dir();
    let file = image(dir.path(), "disk.img", 1 << 20);
    let Some(device) = Loop::attach(&file, 4096) else { return };
    let options = FileOptions { logical_block_size: Some(512), ..options(&device.0, DIRECT) };
    let backend = opened(&options);
    let open_ones = || {
        let links =
            fs::read_dir("/proc/self/fd").expect("procfs").filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.filter(|link| *link == device.0).count()
    };
    let before = open_ones();
    for _ in 0..20 {
        let mut queue = backend.open_queue(16).expect("a queue");
        for turn in 0..15 {
            // All in one block: one runs, the others wait for it.
            let op = Op::Write { offset: turn % 8 * 512, buf: IoBuf::owned(512, 512, 0), durable: false };
            queue.push(op, OpId(turn)).expect("room");
        }
        queue.push(Op::Discard { offset: 8192, len: 65536 }, OpId(15)).expect("room");
        queue.submit().expect("submit");
        drop(queue);
        let mut next = Driver::new(&backend, 1);
        assert_eq!(next.write(0, &[7; 512]), Ok(()));
        assert_eq!(next.read(0, 512), Ok(vec![7; 512]), "an op outlived its queue");
        assert_eq!(next.write(8192, &[7; 65536]), Ok(()));
        assert_eq!(next.read(8192, 65536), Ok(vec![7; 65536]), "a discard outlived its queue");
    }
    assert_eq!(open_ones(), before);
}

#[test]
fn a_partial_block_write_fails_if_the_rest_of_its_block_cannot_be_read() {
    let dir = disk_dir();
    let file = image(dir.path(), "disk.img", 1 << 20);
    let Some(device) = Loop::attach(&file, 4096) else { return };
    let options = FileOptions { logical_block_size: Some(512), ..options(&device.0, DIRECT) };
    let backend = opened(&options);
    let mut driver = Driver::new(&backend, 4);
    driver.write(0, &[3; 1 << 20]).expect("a write");
    driver.run(Op::Sync).expect("a sync");
    // The medium behind the device ends early now: reads there fail.
    fs::OpenOptions::new().write(true).open(&file).and_then(|file| file.set_len(65536)).expect("cut");
    let result = driver.write(131072 + 512, &[4; 512]);
    let grown = fs::metadata(&file).expect("the file").len();
    match driver.read(131072, 4096) {
        // The loop driver reads zeroes past the end instead of failing: then there is nothing to show.
        Ok(_) => drop(skip::<()>("this kernel's loop device reads beyond its file")),
        Err(_) => {
            assert!(result.is_err());
            assert_eq!(grown, 65536, "something was stored");
        }
    }
}

#[test]
fn geometry_follows_the_medium_and_not_the_mode() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let geometries = CacheMode::ALL.map(|mode| open(&path, mode).geometry());
    assert!(geometries.windows(2).all(|pair| pair[0] == pair[1]), "{geometries:?}");
    assert_eq!(geometries[0].size, 1 << 20);
    assert!(geometries[0].physical_block >= geometries[0].logical_block);
    let Some(device) = Loop::attach(&path, 4096) else { return };
    let geometries = CacheMode::ALL.map(|mode| open(&device.0, mode).geometry());
    assert!(geometries.windows(2).all(|pair| pair[0] == pair[1]), "{geometries:?}");
    assert_eq!((geometries[0].logical_block, geometries[0].physical_block), (4096, 4096));
    let smaller = FileOptions { logical_block_size: Some(512), ..options(&device.0, DIRECT) };
    let backend = opened(&smaller);
    assert_eq!((backend.geometry().logical_block, backend.geometry().physical_block), (512, 4096));
    assert!(backend.describe().contains("read-modify-write"), "{}", backend.describe());
}
