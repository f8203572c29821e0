//! The daemon's point-in-time copy: the target equals the image at the instant, to the byte, whatever the guest does
//! meanwhile and whatever fails; and the guest never notices.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use kit::backend;
use kit::backend::{Driver, Prng, disk_dir, image, opened, options, some_buffer};
use virtioblkd::backend::file::FileOptions;
use virtioblkd::backend::mem::CompletionOrder;
use virtioblkd::backend::point_in_time::{CopyStep, Mutant, PointInTime, Tuning};
use virtioblkd::backend::{Backend, Completion, DurableWrite, Op, OpId};
use virtioblkd::disk::Copies;
use virtioblkd::engine::CacheMode;

use super::copy_world::*;

/// Blocks of one ring: by turns, many in each cluster; and at the end of the image a large part for each.
fn own_range(prng: &mut Prng, ring: u64, blocks: u64, per_cluster: u64) -> Range<u64> {
    let shared = blocks * 3 / 4;
    let (start, len) = match prng.below(10) {
        // Many clusters at once, never starting on one.
        0 => (shared + ring * (blocks - shared) / 2, (blocks - shared) / 2),
        // A stripe of a cluster.
        _ => {
            let stripe = (per_cluster / 5).max(1);
            (prng.below(shared / stripe / 2) * 2 * stripe + ring * stripe, stripe)
        }
    };
    let count = 1 + prng.below(len);
    let first = start + prng.below(len - count + 1);
    first..first + count
}

/// What a ring believes to be on its blocks.
struct Belief {
    ring: u64,
    block: u64,
    disk: Vec<u8>,
    /// By block: not discarded.
    known: Vec<bool>,
}

/// One ring of the guest.
struct Guest {
    belief: Belief,
    driver: Driver,
    prng: Prng,
    busy: HashMap<OpId, (Range<u64>, Option<Vec<u8>>)>,
    native: bool,
}

impl Guest {
    fn new(disk: &dyn Backend, ring: u64, seed: u64) -> Guest {
        let geometry = disk.geometry();
        let block = u64::from(geometry.logical_block);
        let known = vec![true; (geometry.size / block) as usize];
        Guest {
            belief: Belief { ring, block, disk: contents(disk), known },
            driver: Driver::new(disk, 8),
            prng: Prng::new(seed * 2 + ring + 1),
            busy: HashMap::new(),
            native: geometry.durable_write == DurableWrite::Native,
        }
    }

    fn act(&mut self, ops: usize) {
        for _ in 0..ops {
            let blocks = self.belief.known.len() as u64;
            let range = own_range(&mut self.prng, self.belief.ring, blocks, CLUSTER / self.belief.block);
            let in_the_way = |busy: &(Range<u64>, _)| busy.0.start < range.end && range.start < busy.0.end;
            while self.busy.len() == 8 || self.busy.values().any(in_the_way) {
                self.reap();
            }
            self.push(range);
        }
    }

    fn push(&mut self, range: Range<u64>) {
        let (offset, len) = (range.start * self.belief.block, (range.end - range.start) * self.belief.block);
        let place = offset as usize..(offset + len) as usize;
        let blocks = range.start as usize..range.end as usize;
        let mut expected = None;
        let op = match self.prng.below(12) {
            0..7 => {
                let buf = some_buffer(&mut self.prng, len as usize);
                let bytes = vec![1 + self.prng.below(255) as u8; len as usize];
                buf.copy_from(0, &bytes);
                self.belief.disk[place].copy_from_slice(&bytes);
                self.belief.known[blocks].fill(true);
                Op::Write { offset, buf, durable: self.native && self.prng.below(4) == 0 }
            }
            7 => {
                self.belief.disk[place].fill(0);
                self.belief.known[blocks].fill(true);
                Op::WriteZeroes { offset, len, unmap: self.prng.below(2) == 0 }
            }
            8 => {
                self.belief.known[blocks].fill(false);
                Op::Discard { offset, len }
            }
            9 => Op::Sync,
            _ => {
                expected = Some(self.belief.disk[place].to_vec());
                Op::Read { offset, buf: some_buffer(&mut self.prng, len as usize) }
            }
        };
        let touched = if matches!(op, Op::Sync) { 0..0 } else { range };
        let id = self.driver.push(op);
        self.busy.insert(id, (touched, expected));
    }

    /// Every op of the guest succeeds, whatever becomes of the copy.
    fn reap(&mut self) {
        for Completion { id, result, buf } in self.driver.reap() {
            let (range, expected) = self.busy.remove(&id).expect("each token once");
            assert_eq!(result, Ok(()), "the guest saw an error");
            let Some(expected) = expected else { continue };
            let mut seen = vec![0; expected.len()];
            buf.expect("a read's buffer").copy_to(0, &mut seen);
            self.belief.compare(&range, &seen, &expected).unwrap_or_else(|what| panic!("{what}"));
        }
    }

    fn drain(&mut self) {
        while !self.busy.is_empty() {
            self.reap();
        }
    }
}

impl Belief {
    fn compare(&self, range: &Range<u64>, seen: &[u8], wanted: &[u8]) -> Result<(), String> {
        let block = self.block as usize;
        for (index, at) in (range.start as usize..range.end as usize).zip((0..).step_by(block)) {
            if self.known[index] {
                same(&format!("block {index}"), &seen[at..at + block], &wanted[at..at + block])?;
            }
        }
        Ok(())
    }

    /// What is on its blocks, with the other's for the others.
    fn own_blocks(&self) -> impl Iterator<Item = Range<u64>> {
        let (blocks, per_cluster) = (self.known.len() as u64, CLUSTER / self.block);
        let (shared, stripe) = (blocks * 3 / 4, (per_cluster / 5).max(1));
        let ring = self.ring;
        let stripes = (0..shared / stripe / 2).map(move |turn| {
            let start = turn * 2 * stripe + ring * stripe;
            start..start + stripe
        });
        let large = shared + ring * (blocks - shared) / 2;
        stripes.chain(std::iter::once(large..large + (blocks - shared) / 2))
    }
}

/// When a round's copy ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// When it is complete.
    Itself,
    /// Cancelled some time after the start.
    Cancelled,
    /// The target fails at some time.
    Failing,
}

/// One round: two rings write, stop, the instant is fixed, and they write on while the copy is made.
fn round(world: &World, seed: u64, end: End) -> Result<(), String> {
    let mut prng = Prng::new(seed + 77);
    let disk: &PointInTime = &world.disk;
    let copy = world.prepare(if prng.below(3) == 0 { 0 } else { CLUSTER << prng.below(8) });
    let quiet = Barrier::new(3);
    let instant = thread::scope(|scope| {
        let guests = [0, 1].map(|ring| {
            let quiet = &quiet;
            scope.spawn(move || {
                let mut guest = Guest::new(disk, ring, seed);
                quiet.wait();
                guest.act(30);
                guest.drain();
                quiet.wait();
                // Here the instant is.
                quiet.wait();
                guest.act(80);
                guest.drain();
                guest.belief
            })
        });
        quiet.wait();
        quiet.wait();
        let instant = contents(disk);
        disk.start(&copy).expect("nothing is in flight");
        quiet.wait();
        if end == End::Cancelled {
            thread::sleep(Duration::from_micros(prng.below(3000)));
            drop(disk.cancel(&copy));
        }
        let guests = guests.map(|guest| guest.join().expect("the guest"));
        // It may have completed, or been cancelled, meanwhile.
        drop(disk.set_bandwidth(&copy, 0));
        let now = contents(disk);
        for guest in guests {
            for range in guest.own_blocks() {
                let place = (range.start * guest.block) as usize..(range.end * guest.block) as usize;
                guest.compare(&range, &now[place.clone()], &guest.disk[place]).expect("the source is the guest's");
            }
        }
        instant
    });
    let status = world.wait_ended(&copy);
    let ends = [(End::Cancelled, "cancelled"), (End::Failing, "failed")];
    if ends.contains(&(end, &status.state)) {
        assert!(world.files().is_empty(), "{:?}", world.files());
        return Ok(());
    }
    assert_eq!((status.state.as_str(), &status.error), ("completed", &None));
    assert_eq!(status.done_bytes, status.total_bytes);
    assert_eq!(world.files(), ["copy.img"]);
    let seen = std::fs::read(world.target()).expect("the copy");
    std::fs::remove_file(world.target()).expect("removed");
    same(&format!("the copy, seed {seed}"), &seen, &instant)
}

#[test]
fn the_copy_is_the_image_at_the_instant() {
    // For a long run: VIRTIOBLKD_COPY_ROUNDS=5000 cargo test --release --test backend copy_instant::.
    let rounds = std::env::var("VIRTIOBLKD_COPY_ROUNDS").map_or(120, |rounds| rounds.parse().expect("a number"));
    for seed in 0..rounds {
        let order = if seed % 2 == 0 { CompletionOrder::InOrder } else { CompletionOrder::Shuffled(seed) };
        let memory = if seed % 3 == 0 { 4 * CLUSTER as usize } else { Tuning::default().memory };
        let (world, _) = World::mem(order, Tuning { memory, ..Tuning::default() });
        round(&world, seed, End::Itself).unwrap_or_else(|what| panic!("{what}"));
    }
}

#[test]
fn the_copy_through_a_scratch_is_the_image_at_the_instant() {
    for (size, fails) in [(16 << 20, 0), (3 * CLUSTER, 0), (16 << 20, 5), (0, 0)] {
        let loads = Arc::new(AtomicU32::new(0));
        for seed in 0..30 {
            let order = if seed % 2 == 0 { CompletionOrder::InOrder } else { CompletionOrder::Shuffled(seed) };
            let (tuning, dir) = with_scratch(size, fails, &loads);
            let (world, _) = World::mem(order, tuning);
            round(&world, 7000 + seed, End::Itself).unwrap_or_else(|what| panic!("{size}, {fails}: {what}"));
            assert_eq!(std::fs::read_dir(dir.path()).expect("the directory").count(), 0, "its file has no name");
        }
        let loads = loads.load(Ordering::Relaxed);
        assert!(if size > 0 { loads > 30 } else { loads == 0 }, "{size}, {fails}: {loads} loads");
    }
}

#[test]
fn the_copy_of_a_file_is_the_image_at_the_instant() {
    let dir = disk_dir();
    for (turn, mode) in [CacheMode::None, CacheMode::Directsync, CacheMode::Writeback].into_iter().enumerate() {
        let path = image(dir.path(), &format!("{turn}.img"), 2 << 20);
        let world = World::new(Arc::new(backend::open(&path, mode)), Tuning::default());
        for seed in 0..15 {
            round(&world, 1000 * turn as u64 + seed, End::Itself).unwrap_or_else(|what| panic!("{mode}: {what}"));
        }
    }
}

/// 4 KiB sectors shown as 512 bytes: writes of the guest read and write back what surrounds them. And a size that is
/// not whole clusters.
#[test]
fn the_copy_of_a_device_with_large_sectors_is_the_image_at_the_instant() {
    let dir = disk_dir();
    let Some(device) = backend::Loop::attach(&image(dir.path(), "loop.img", (2 << 20) + 4096), 4096) else { return };
    let options = FileOptions { logical_block_size: Some(512), ..options(&device.0, CacheMode::None) };
    let world = World::new(Arc::new(opened(&options)), Tuning::default());
    for seed in 0..15 {
        round(&world, 5000 + seed, End::Itself).unwrap_or_else(|what| panic!("{what}"));
    }
}

#[test]
fn a_cancelled_copy_leaves_no_file_and_disturbs_no_write() {
    let (world, _) = World::mem(CompletionOrder::Shuffled(9), Tuning::default());
    let mut ended = [0, 0];
    for seed in 0..100 {
        round(&world, 9000 + seed, End::Cancelled).unwrap_or_else(|what| panic!("{what}"));
        ended[usize::from(world.disk.status().last().expect("the copy").state == "cancelled")] += 1;
    }
    assert!(ended[1] > 10, "completed and cancelled: {ended:?}");
}

#[test]
fn a_target_that_fails_at_any_time_leaves_no_file_and_disturbs_no_write() {
    let mut ended = [0, 0];
    for seed in 0..60 {
        let mut prng = Prng::new(seed);
        let step = if prng.below(8) == 0 { CopyStep::Sync } else { CopyStep::Write };
        let (world, _) =
            World::mem(CompletionOrder::Shuffled(seed), failing_at(step, 1 + prng.below(24) as u32, libc::ENOSPC));
        round(&world, seed, End::Failing).unwrap_or_else(|what| panic!("{what}"));
        ended[usize::from(world.disk.status().last().expect("the copy").state == "failed")] += 1;
    }
    assert!(ended[1] > 10, "completed and failed: {ended:?}");
}

/// The rounds can fail: a copier that does it wrong is noticed.
#[test]
fn planted_faults_of_the_copier_are_found() {
    for mutant in [Mutant::SavesNothing, Mutant::ForgetsRanges, Mutant::ReleasesEarly] {
        let noticed = (0..300).any(|seed| {
            let tuning = Tuning { mutant: Some(mutant), ..Tuning::default() };
            let (world, _) = World::mem(CompletionOrder::Shuffled(seed), tuning);
            round(&world, seed, End::Itself).is_err()
        });
        assert!(noticed, "{mutant:?} lives");
    }
}

/// So is a scratch whose hole is punched too soon.
#[test]
fn a_planted_fault_that_frees_the_scratch_too_soon_is_found() {
    let noticed = (0..100).any(|seed| {
        let (tuning, _dir) = with_scratch(16 << 20, 0, &Arc::default());
        let (world, _) = World::mem(CompletionOrder::InOrder, Tuning { mutant: Some(Mutant::PunchesFirst), ..tuning });
        round(&world, seed, End::Itself).is_err()
    });
    assert!(noticed, "the mutant lives");
}
