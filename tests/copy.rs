//! The daemon's point-in-time copy: the target equals the image at the instant, to the byte, whatever the guest does
//! meanwhile and whatever fails; and the guest never notices.

mod backend;

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use backend::{Chance, Driver, disk_dir, eventually, image, opened, options, some_buffer};
use virtioblkd::backend::file::FileOptions;
use virtioblkd::backend::mem::{MemBackend, MemOptions, Order};
use virtioblkd::backend::point_in_time::{Mutant, PointInTime, Tuning};
use virtioblkd::backend::{Backend, Completion, DurableWrite, Op, OpId};
use virtioblkd::disk::{Copies, CopyOptions, CopyStatus, Event, Events};
use virtioblkd::engine::CacheMode;

const CLUSTER: u64 = 64 << 10;

/// A disk of which copies can be made, and where they go.
struct World {
    disk: Arc<PointInTime>,
    events: Arc<Events>,
    dir: tempfile::TempDir,
}

impl World {
    fn new(image: Arc<dyn Backend>, tuning: Tuning) -> World {
        let events = Arc::new(Events::new().expect("an eventfd"));
        let disk = Arc::new(PointInTime::with_tuning(image, Arc::clone(&events), tuning));
        World { disk, events, dir: tempfile::tempdir_in("/dev/shm").expect("a directory") }
    }

    fn mem(order: Order, tuning: Tuning) -> (World, Arc<MemBackend>) {
        let mem = Arc::new(MemBackend::new(MemOptions { order, ..MemOptions::new(2 << 20) }));
        (World::new(mem.clone(), tuning), mem)
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("copy.img")
    }

    fn prepare(&self, bandwidth: u64) -> String {
        let options = CopyOptions { target: self.target(), bandwidth, digest: false };
        self.disk.prepare(&options).expect("a prepared copy")
    }

    fn status(&self, copy: &str) -> CopyStatus {
        self.disk.status().into_iter().find(|status| status.copy == copy).expect("the copy is known")
    }

    /// Waits for its event, which says the same as its status.
    fn wait_ended(&self, copy: &str) -> CopyStatus {
        let mut ended = None;
        eventually("the copy's end", || {
            for event in self.events.take().0 {
                if let Event::CopyEnded(status) = event {
                    assert_eq!(status.copy, copy);
                    assert!(ended.replace(status).is_none(), "told twice");
                }
            }
            ended.is_some()
        });
        assert_eq!(ended, Some(self.status(copy)));
        ended.expect("just seen")
    }

    fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).expect("the directory");
        names.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name")).collect()
    }
}

/// All of the image, as a reader sees it.
fn contents(disk: &dyn Backend) -> Vec<u8> {
    let size = disk.geometry().size as usize;
    let mut driver = Driver::new(disk, 1);
    (0..size)
        .step_by(1 << 20)
        .flat_map(|at| driver.read(at as u64, (size - at).min(1 << 20)).expect("a read"))
        .collect()
}

/// The first difference, as a message.
fn same(what: &str, seen: &[u8], wanted: &[u8]) -> Result<(), String> {
    if seen.len() != wanted.len() {
        return Err(format!("{what}: {} bytes, not {}", seen.len(), wanted.len()));
    }
    if seen == wanted {
        return Ok(());
    }
    match seen.iter().zip(wanted).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => {
            Err(format!("{what}: byte {at} (cluster {}) is {}, not {}", at as u64 / CLUSTER, seen[at], wanted[at]))
        }
    }
}

// The guest: two rings, each with blocks of its own, in between those of the other.

/// Blocks of one ring: by turns, many in each cluster; and at the end of the image a large part for each.
fn own_range(chance: &mut Chance, ring: u64, blocks: u64, per_cluster: u64) -> Range<u64> {
    let shared = blocks * 3 / 4;
    let (start, len) = match chance.below(10) {
        // Many clusters at once, never starting on one.
        0 => (shared + ring * (blocks - shared) / 2, (blocks - shared) / 2),
        // A stripe of a cluster.
        _ => {
            let stripe = (per_cluster / 5).max(1);
            (chance.below(shared / stripe / 2) * 2 * stripe + ring * stripe, stripe)
        }
    };
    let count = 1 + chance.below(len);
    let first = start + chance.below(len - count + 1);
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
    chance: Chance,
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
            chance: Chance::new(seed * 2 + ring + 1),
            busy: HashMap::new(),
            native: geometry.durable_write == DurableWrite::Native,
        }
    }

    fn act(&mut self, ops: usize) {
        for _ in 0..ops {
            let blocks = self.belief.known.len() as u64;
            let range = own_range(&mut self.chance, self.belief.ring, blocks, CLUSTER / self.belief.block);
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
        let op = match self.chance.below(12) {
            0..7 => {
                let buf = some_buffer(&mut self.chance, len as usize);
                let bytes = vec![1 + self.chance.below(255) as u8; len as usize];
                buf.copy_from(0, &bytes);
                self.belief.disk[place].copy_from_slice(&bytes);
                self.belief.known[blocks].fill(true);
                Op::Write { offset, buf, durable: self.native && self.chance.below(4) == 0 }
            }
            7 => {
                self.belief.disk[place].fill(0);
                self.belief.known[blocks].fill(true);
                Op::WriteZeroes { offset, len, unmap: self.chance.below(2) == 0 }
            }
            8 => {
                self.belief.known[blocks].fill(false);
                Op::Discard { offset, len }
            }
            9 => Op::Sync,
            _ => {
                expected = Some(self.belief.disk[place].to_vec());
                Op::Read { offset, buf: some_buffer(&mut self.chance, len as usize) }
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
}

/// One round: two rings write, stop, the instant is fixed, and they write on while the copy is made.
fn round(world: &World, seed: u64, end: End) -> Result<(), String> {
    let mut chance = Chance::new(seed + 77);
    let disk: &PointInTime = &world.disk;
    let copy = world.prepare(if chance.below(3) == 0 { 0 } else { CLUSTER << chance.below(8) });
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
            thread::sleep(Duration::from_micros(chance.below(3000)));
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
    if end == End::Cancelled && status.state == "cancelled" {
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
    for seed in 0..120 {
        let order = if seed % 2 == 0 { Order::InOrder } else { Order::Shuffled(seed) };
        let memory = if seed % 3 == 0 { 4 * CLUSTER as usize } else { Tuning::default().memory };
        let (world, _) = World::mem(order, Tuning { memory, ..Tuning::default() });
        round(&world, seed, End::Itself).unwrap_or_else(|what| panic!("{what}"));
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
fn the_copy_of_a_device_with_large_sectors() {
    let dir = disk_dir();
    let Some(device) = backend::Loop::attach(&image(dir.path(), "loop.img", (2 << 20) + 4096), 4096) else { return };
    let options = FileOptions { logical_block_size: Some(512), ..options(&device.0, CacheMode::None) };
    let world = World::new(Arc::new(opened(&options)), Tuning::default());
    for seed in 0..15 {
        round(&world, 5000 + seed, End::Itself).unwrap_or_else(|what| panic!("{what}"));
    }
}

#[test]
fn a_cancelled_copy_leaves_nothing_and_the_guest_alone() {
    let (world, _) = World::mem(Order::Shuffled(9), Tuning::default());
    let mut ended = [0, 0];
    for seed in 0..100 {
        round(&world, 9000 + seed, End::Cancelled).unwrap_or_else(|what| panic!("{what}"));
        ended[usize::from(world.disk.status().last().expect("the copy").state == "cancelled")] += 1;
    }
    assert!(ended[1] > 10, "completed and cancelled: {ended:?}");
}

/// The rounds can fail: a copier that does it wrong is noticed.
#[test]
fn mutants_are_noticed() {
    for mutant in [Mutant::SavesNothing, Mutant::ForgetsRanges, Mutant::ReleasesEarly] {
        let noticed = (0..300).any(|seed| {
            let tuning = Tuning { mutant: Some(mutant), ..Tuning::default() };
            let (world, _) = World::mem(Order::Shuffled(seed), tuning);
            round(&world, seed, End::Itself).is_err()
        });
        assert!(noticed, "{mutant:?} lives");
    }
}
