//! The daemon's point-in-time copy: the target equals the image at the instant, to the byte, whatever the guest does
//! meanwhile and whatever fails; and the guest never notices.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use kit::backend;
use kit::backend::{Driver, Prng, disk_dir, eventually, image, opened, options, some_buffer};
use virtioblkd::backend::file::{FileBackend, FileOptions, Locking};
use virtioblkd::backend::mem::{CompletionOrder, Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::backend::point_in_time::{CopyStep, Mutant, PointInTime, ScratchOptions, TargetHook, Tuning};
use virtioblkd::backend::{Backend, Completion, DurableWrite, Errno, IoBuf, Op, OpId};
use virtioblkd::disk::{Copies, CopyError, CopyOptions, CopyStatus, Event, Events};
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

    fn mem(order: CompletionOrder, tuning: Tuning) -> (World, Arc<MemBackend>) {
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
        // A thread may still end.
        assert_eq!(ended, Some(CopyStatus { ending: false, ..self.status(copy) }));
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
    // For a long run: VIRTIOBLKD_COPY_ROUNDS=5000 cargo test --release --test backend copy::.
    let rounds = std::env::var("VIRTIOBLKD_COPY_ROUNDS").map_or(120, |rounds| rounds.parse().expect("a number"));
    for seed in 0..rounds {
        let order = if seed % 2 == 0 { CompletionOrder::InOrder } else { CompletionOrder::Shuffled(seed) };
        let memory = if seed % 3 == 0 { 4 * CLUSTER as usize } else { Tuning::default().memory };
        let (world, _) = World::mem(order, Tuning { memory, ..Tuning::default() });
        round(&world, seed, End::Itself).unwrap_or_else(|what| panic!("{what}"));
    }
}

/// A slow target, little memory, and a scratch of `size` bytes in which every so many'th store fails; `loads` counts
/// what was read back.
fn with_scratch(size: u64, fails: u32, loads: &Arc<AtomicU32>) -> (Tuning, tempfile::TempDir) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let (loads, stores) = (Arc::clone(loads), AtomicU32::new(0));
    let hook = move |step| match step {
        CopyStep::Write => {
            thread::sleep(Duration::from_millis(1));
            Ok(())
        }
        CopyStep::Store if fails > 0 && stores.fetch_add(1, Ordering::Relaxed) % fails == fails - 1 => {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        }
        CopyStep::Load => {
            loads.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        _ => Ok(()),
    };
    let tuning = Tuning {
        memory: 4 * CLUSTER as usize,
        hook: Some(Arc::new(hook)),
        scratch: Some(ScratchOptions { directory: dir.path().into(), size }),
        ..Tuning::default()
    };
    (tuning, dir)
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
    let (world, _) = World::mem(CompletionOrder::Shuffled(9), Tuning::default());
    let mut ended = [0, 0];
    for seed in 0..100 {
        round(&world, 9000 + seed, End::Cancelled).unwrap_or_else(|what| panic!("{what}"));
        ended[usize::from(world.disk.status().last().expect("the copy").state == "cancelled")] += 1;
    }
    assert!(ended[1] > 10, "completed and cancelled: {ended:?}");
}

#[test]
fn a_target_that_fails_at_any_time_leaves_nothing_and_the_guest_alone() {
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
fn a_scratch_that_is_freed_too_soon_is_noticed() {
    let noticed = (0..100).any(|seed| {
        let (tuning, _dir) = with_scratch(16 << 20, 0, &Arc::default());
        let (world, _) = World::mem(CompletionOrder::InOrder, Tuning { mutant: Some(Mutant::PunchesFirst), ..tuning });
        round(&world, seed, End::Itself).is_err()
    });
    assert!(noticed, "the mutant lives");
}

// What goes wrong.

/// Starts a copy of a disk on which nothing is in flight.
fn started(world: &World, bandwidth: u64) -> String {
    let copy = world.prepare(bandwidth);
    world.disk.start(&copy).expect("nothing is in flight");
    copy
}

fn failing_at(step: CopyStep, nth: u32, errno: i32) -> Tuning {
    let seen = AtomicU32::new(0);
    let hook = move |now| {
        let fails = now == step && seen.fetch_add(1, Ordering::Relaxed) + 1 == nth;
        if fails { Err(io::Error::from_raw_os_error(errno)) } else { Ok(()) }
    };
    Tuning { hook: Some(Arc::new(hook)), ..Tuning::default() }
}

/// A block of every cluster is overwritten while the copy runs or fails; all of it must succeed.
fn write_everywhere(disk: &PointInTime) {
    let clusters = disk.geometry().size / CLUSTER;
    let mut guest = Driver::new(disk, 64);
    let mut open: Vec<OpId> = Vec::new();
    for cluster in 0..clusters {
        let buf = IoBuf::owned(4096, 4096, 0);
        buf.copy_from(0, &[7; 4096]);
        open.push(guest.push(Op::Write { offset: cluster * CLUSTER, buf, durable: false }));
    }
    for id in open {
        assert_eq!(guest.finish(id).result, Ok(()), "the guest saw an error");
    }
    for cluster in 0..clusters {
        assert_eq!(guest.read(cluster * CLUSTER, 4096), Ok(vec![7; 4096]));
    }
}

/// The disk full of ones.
fn fill(mem: &MemBackend) {
    let mut driver = Driver::new(mem, 1);
    (0..2).for_each(|at| driver.write(at << 20, &[1; 1 << 20]).expect("a write"));
}

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

/// A hook that keeps every write to the target waiting until the sender is dropped.
fn hanging_target() -> (mpsc::Sender<()>, TargetHook) {
    let (release, hangs) = mpsc::channel::<()>();
    let hangs = Mutex::new(hangs);
    let hook = move |step| {
        if step == CopyStep::Write {
            // Until the test lets go.
            let _ = hangs.lock().expect("one writer").recv();
        }
        Ok(())
    };
    (release, Arc::new(hook))
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
fn a_scratch_without_room_costs_nothing() {
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

// What is asked of it.

fn refused(result: Result<impl std::fmt::Debug, CopyError>, code: &str, words: &[&str]) {
    let error = result.expect_err("refused");
    assert_eq!(error.code, code, "{}", error.message);
    for word in words {
        assert!(error.message.contains(word), "'{word}' is not in: {}", error.message);
    }
}

#[test]
fn invalid_copy_targets_are_refused() {
    let (world, _) = World::mem(CompletionOrder::InOrder, Tuning::default());
    let dir = world.dir.path();
    std::fs::write(dir.join("there"), "precious").expect("a file");
    std::fs::write(dir.join("half.partial"), "left").expect("a file");
    std::os::unix::fs::symlink("/nowhere", dir.join("link")).expect("a link");
    let long = "x".repeat(250);
    for (target, words) in [
        ("there", &["there", "exists already", "another path"][..]),
        ("link", &["exists already"]),
        ("half", &["half.partial", "left by a daemon", "remove it"]),
        ("no/such", &["no such directory", "create it"]),
        ("there/file", &["not a directory"]),
        ("..", &["absolute path of a file"]),
        (&long, &["too long", "shorter"]),
        ("nul\0byte", &["a path cannot have"]),
    ] {
        let options = CopyOptions { target: dir.join(target), bandwidth: 0, digest: false };
        refused(world.disk.prepare(&options), "target", words);
    }
    let relative = CopyOptions { target: "copy.img".into(), bandwidth: 0, digest: false };
    refused(world.disk.prepare(&relative), "target", &["absolute"]);
    let mut left = world.files();
    left.sort();
    assert_eq!(left, ["half.partial", "link", "there"]);
    assert_eq!(std::fs::read(dir.join("there")).expect("the file"), b"precious");
}

/// The image may have the name that a copy has until it is complete. To remove it would cost the guest its disk.
#[test]
fn an_image_with_a_partial_files_name_stays() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("disk.img.partial"), vec![7; 1 << 20]).expect("an image");
    std::os::unix::fs::symlink(path("disk.img.partial"), path("linked.partial")).expect("a link");
    std::os::unix::fs::symlink(path("disk.img.partial"), path("image")).expect("a link");
    for image in ["disk.img.partial", "image"] {
        let file = FileBackend::open(&FileOptions::new(path(image), CacheMode::Writeback.into())).expect("an image");
        let disk = PointInTime::new(Arc::new(file), Arc::new(Events::new().expect("events")));
        for target in ["disk.img", "linked"] {
            let options = CopyOptions { target: path(target), bandwidth: 0, digest: false };
            let why = disk.prepare(&options).expect_err("the image is there");
            assert!(why.message.contains("this disk's image") && why.message.contains("another target"), "{why:?}");
            assert!(!why.message.contains("remove"), "{why:?}");
        }
    }
    assert_eq!(std::fs::read(path("disk.img.partial")).expect("the image"), vec![7; 1 << 20]);
}

#[test]
fn a_file_put_in_the_partial_files_place_is_not_removed() {
    let (world, _) = World::mem(CompletionOrder::InOrder, Tuning::default());
    let copy = world.prepare(0);
    let partial = world.dir.path().join("copy.img.partial");
    std::fs::rename(&partial, world.dir.path().join("elsewhere")).expect("moved");
    std::fs::write(&partial, "another disk").expect("a file");
    world.disk.cancel(&copy).expect("cancelled");
    assert_eq!(world.wait_ended(&copy).state, "cancelled");
    assert_eq!(std::fs::read(&partial).expect("not ours to remove"), b"another disk");
}

/// Even if the caller forgets to hold the disk still, no instant is torn.
#[test]
fn a_start_with_a_write_in_flight_is_refused() {
    let (world, mem) = World::mem(CompletionOrder::OnRequest, Tuning::default());
    let mut guest = Driver::new(&*world.disk, 4);
    let copy = world.prepare(0);
    let read = guest.push(Op::Read { offset: 0, buf: IoBuf::owned(4096, 4096, 0) });
    let write = guest.push(Op::WriteZeroes { offset: 0, len: 4096, unmap: true });
    refused(world.disk.start(&copy), "busy", &["in flight", "quiesce it first"]);
    mem.release(2);
    guest.finish(write);
    guest.finish(read);
    let other = guest.push(Op::Read { offset: 0, buf: IoBuf::owned(4096, 4096, 0) });
    world.disk.start(&copy).expect("a read changes nothing");
    refused(world.disk.start(&copy), "busy", &["already been started"]);
    refused(world.disk.start("copy-7"), "no-such-copy", &["virtioblkctl copies"]);
    mem.release(1000);
    guest.finish(other);
    assert_eq!(world.wait_ended(&copy).state, "completed");
    refused(world.disk.cancel(&copy), "no-such-copy", &["already ended", "completed"]);
}

#[test]
fn something_that_appears_at_the_target_is_not_replaced() {
    let (world, _) = World::mem(CompletionOrder::InOrder, Tuning::default());
    let copy = world.prepare(0);
    std::fs::write(world.target(), "precious").expect("a file");
    world.disk.start(&copy).expect("started");
    let status = world.wait_ended(&copy);
    assert!(status.error.is_some_and(|why| why.contains("replaces nothing")));
    assert_eq!(world.files(), ["copy.img"]);
    assert_eq!(std::fs::read(world.target()).expect("the file"), b"precious");
}

/// The owner of the target's directory may put another file under the partial file's name at any time.
#[test]
fn a_file_put_in_the_partial_files_place_is_not_published() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let place = dir.path().to_path_buf();
    let hook = move |step| {
        if step == CopyStep::Publish {
            std::fs::rename(place.join("copy.img.partial"), place.join("elsewhere"))?;
            std::fs::write(place.join("copy.img.partial"), "forged")?;
        }
        Ok(())
    };
    let (world, mem) = World::mem(CompletionOrder::InOrder, Tuning { hook: Some(Arc::new(hook)), ..Tuning::default() });
    let world = World { dir, ..world };
    fill(&mem);
    let copy = started(&world, 0);
    assert_eq!(world.wait_ended(&copy).state, "completed");
    assert!(std::fs::read(world.target()).expect("the copy") == vec![1; 2 << 20]);
    assert_eq!(std::fs::read(world.dir.path().join("copy.img.partial")).expect("not ours to remove"), b"forged");
}

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
fn a_thin_image_stays_as_thin_down_to_the_block() {
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

#[test]
fn dropping_the_disk_cancels_and_lets_the_image_go() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 2 << 20);
    let world = World::new(Arc::new(backend::open(&path, CacheMode::None)), Tuning::default());
    let copy = started(&world, 1);
    let World { disk, events, dir } = world;
    drop(disk);
    assert!(std::fs::read_dir(dir.path()).expect("the directory").next().is_none());
    let ended = |event| matches!(event, Event::CopyEnded(status) if status.copy == copy && status.state == "cancelled");
    assert!(events.take().0.into_iter().any(ended));
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
fn a_guest_that_left_waits_for_a_copy_as_for_a_write_and_one_that_comes_back_does_not_harm_it() {
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
