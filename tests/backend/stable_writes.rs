//! Guests that change a buffer while its write is under way, over an image that reads the buffer twice, as a mirror
//! does: two different blocks without stable writes, none with `copy`, the exact count with `detect`.
#![allow(unsafe_code)]
// Each of the kits below has its own pseudo-random generator.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kit::backend;
use kit::backend::{Prng, disk_dir, eventually, image, options, stable};
use kit::driver;
use kit::driver::ALL;
use kit::rig::Rig;
use virtioblkd::backend::bounce_pool::{BouncePool, MAX_PIECE};
use virtioblkd::backend::file::FileOptions;
use virtioblkd::backend::mem::{CompletionOrder, Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::backend::null::NullBackend;
use virtioblkd::backend::point_in_time::PointInTime;
use virtioblkd::backend::stable::{StableBackend, StableWrites};
use virtioblkd::backend::{
    Backend, BufferUse, Completion, Errno, Geometry, ImageInfo, IoBuf, IoQueue, Op, OpId, Source, Wakeups,
};
use virtioblkd::disk::{Copies, CopyOptions, Event, Events, StableWritesStatus};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;
use vm_memory::MmapRegion;

const MIB: usize = 1 << 20;

/// A mirror: the first half reads a write's buffer when it gets it, the second when it carries it out.
struct Mirror {
    first: Arc<Mutex<Vec<u8>>>,
    second: MemBackend,
}

impl Mirror {
    fn new(size: usize, order: CompletionOrder) -> Arc<Self> {
        let second = MemBackend::new(MemOptions { order, ..MemOptions::new(size as u64) });
        Arc::new(Mirror { first: Arc::new(Mutex::new(vec![0; size])), second })
    }

    /// Blocks of `len` bytes that the halves hold differently.
    fn differences(&self, len: usize) -> usize {
        let (first, second) = (self.first.lock().unwrap(), self.second.volatile_image());
        first.chunks(len).zip(second.chunks(len)).filter(|(one, other)| one != other).count()
    }
}

impl Backend for Mirror {
    fn geometry(&self) -> Geometry {
        self.second.geometry()
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        Ok(Box::new(MirrorQueue { first: self.first.clone(), second: self.second.open_queue(depth)? }))
    }

    fn sync(&self) -> io::Result<()> {
        self.second.sync()
    }

    fn describe(&self) -> String {
        "a mirror".into()
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.second.sync_failed()
    }

    fn info(&self) -> &dyn ImageInfo {
        self
    }
}

impl ImageInfo for Mirror {
    fn buffer_use(&self) -> BufferUse {
        BufferUse::ReadsTwice("each half of the mirror reads the buffer".into())
    }
}

struct MirrorQueue {
    first: Arc<Mutex<Vec<u8>>>,
    second: Box<dyn IoQueue>,
}

impl IoQueue for MirrorQueue {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        if let Op::Write { offset, buf, .. } = &op {
            let at = *offset as usize;
            buf.copy_to(0, &mut self.first.lock().unwrap()[at..at + buf.len()]);
        }
        self.second.push(op, id)
    }

    fn submit(&mut self) -> io::Result<()> {
        self.second.submit()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.second.reap(out);
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.second.watch(source, fd)
    }

    fn has_completions(&mut self) -> bool {
        self.second.has_completions()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        self.second.wait(timeout)
    }
}

/// `image` as the daemon stacks it: copies of an instant in front, stable writes behind.
fn stacked(image: Arc<dyn Backend>, how: StableWrites, depot: &Arc<BouncePool>) -> (Arc<PointInTime>, Arc<Events>) {
    let events = Arc::new(Events::new().unwrap());
    let stable = StableBackend::new(image, how, depot.clone(), events.clone());
    (Arc::new(PointInTime::new(Arc::new(stable), events.clone())), events)
}

fn seen(disk: &dyn Backend) -> StableWritesStatus {
    disk.info().image_status().stable_writes.expect("the layer is there")
}

const WRITE: usize = 4096;
const BATCH: usize = 16;
const BATCHES: usize = 64;

/// A front-end that changes some of its buffers after the device has the writes and before they are carried out.
/// Returns how many it changed, the image's halves, and the disk.
fn mutating_guest(how: StableWrites) -> (usize, Arc<Mirror>, Arc<PointInTime>, Arc<Events>) {
    let mirror = Mirror::new(BATCH * BATCHES * WRITE, CompletionOrder::OnRequest);
    let (disk, events) = stacked(mirror.clone(), how, &BouncePool::new(BouncePool::DEFAULT_BYTES));
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 1, queue_size: 64, serial: String::new() };
    let rig = Rig::on(disk.clone(), &options);
    let mut guest = driver::Driver::connect_soon(&rig.path, 1, 64, BATCH * WRITE, ALL);
    let mut prng = Prng::new(11);
    let mut changed = 0;
    for batch in 0..BATCHES {
        for turn in 0..BATCH {
            guest.fill(turn * WRITE, &[1 + turn as u8; WRITE]);
            guest.write(0, ((batch * BATCH + turn) * WRITE) as u64, turn * WRITE, WRITE, turn as u64);
        }
        guest.kick(0);
        eventually("all writes are with the image", || mirror.second.waiting() == BATCH);
        for turn in 0..BATCH {
            if prng.below(3) == 0 {
                // One byte is enough, wherever it is.
                guest.fill(turn * WRITE + prng.below(WRITE as u64) as usize, &[0xee]);
                changed += 1;
            }
        }
        mirror.second.release(BATCH as u64);
        let mut done = 0;
        while done < BATCH {
            let completed = guest.wait(0);
            assert!(completed.iter().all(|&(_, result)| result == 0));
            done += completed.len();
        }
    }
    drop(guest);
    drop(rig);
    (changed, mirror, disk, events)
}

#[test]
fn without_stable_writes_the_halves_differ() {
    let (changed, mirror, disk, _) = mutating_guest(StableWrites::Off);
    assert!(changed > 100);
    assert_eq!(mirror.differences(WRITE), changed);
    let status = seen(&*disk);
    assert_eq!((&*status.asked, &*status.in_effect, status.copied_writes), ("off", "off", 0));
    assert!(status.why.contains("each half of the mirror"), "{}", status.why);
}

#[test]
fn copied_writes_are_equal_on_both_halves_of_a_mirror() {
    // `auto` knows that this image reads twice.
    for how in [StableWrites::Copy, StableWrites::Auto] {
        let (changed, mirror, disk, _) = mutating_guest(how);
        assert!(changed > 100);
        assert_eq!(mirror.differences(WRITE), 0);
        let stored = mirror.second.volatile_image();
        let expected = |at: usize| 1 + (at % BATCH) as u8;
        assert!(stored.chunks(WRITE).enumerate().all(|(at, block)| block.iter().all(|&byte| byte == expected(at))));
        let status = seen(&*disk);
        assert_eq!((&*status.asked, &*status.in_effect), (how.name(), "copy"));
        assert_eq!(status.copied_writes, (BATCH * BATCHES) as u64);
        assert_eq!(status.copied_bytes, (BATCH * BATCHES * WRITE) as u64);
        assert!(status.most_memory_bytes <= (BATCH * WRITE) as u64, "no more than is in flight");
    }
}

#[test]
fn changed_writes_are_detected_counted_and_reported() {
    let (changed, mirror, disk, events) = mutating_guest(StableWrites::Detect);
    assert_eq!(mirror.differences(WRITE), changed, "detect changes nothing");
    let status = seen(&*disk);
    assert_eq!((&*status.in_effect, status.checked_writes), ("detect", (BATCH * BATCHES) as u64));
    assert_eq!(status.changed_writes, changed as u64);
    let first = mirror.first.lock().unwrap();
    let second = mirror.second.volatile_image();
    let differing: Vec<u64> = (0..first.len())
        .step_by(WRITE)
        .filter(|&at| first[at..at + WRITE] != second[at..at + WRITE])
        .map(|at| at as u64)
        .collect();
    let last: Vec<u64> = status.last_changed.iter().map(|write| write.offset).collect();
    assert_eq!(last, differing[differing.len() - 8..], "the last ones, newest last");
    assert!(status.last_changed.iter().all(|write| write.length == WRITE as u64 && write.when > 1_600_000_000));
    let (mut told, mut suppressed) = (Vec::new(), 0);
    for event in events.take().0 {
        if let Event::BufferChanged { offset, len, suppressed: before } = event {
            assert_eq!(len, WRITE as u64);
            told.push(offset);
            suppressed += before as usize;
        }
    }
    assert!(!told.is_empty() && told.len() + suppressed <= changed);
    assert_eq!(told[..20.min(told.len())], differing[..20.min(told.len())], "the first ones of a second");
}

/// Memory that a queue's ops use and another thread writes to.
struct Scribbled {
    region: Arc<MmapRegion>,
    stop: Arc<AtomicBool>,
    scribbler: Option<thread::JoinHandle<()>>,
}

impl Scribbled {
    fn new(len: usize) -> Self {
        let region: Arc<MmapRegion> = Arc::new(MmapRegion::new(len).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, stopped) = (region.clone(), stop.clone());
        let scribbler = thread::spawn(move || {
            let mut value = 0u64;
            while !stopped.load(Relaxed) {
                value += 1;
                for at in (0..len).step_by(1024) {
                    // SAFETY: inside the region, which this thread keeps mapped, and aligned; no reference to it exists.
                    unsafe { (*theirs.as_ptr().add(at).cast::<AtomicU64>()).store(value, Relaxed) };
                }
            }
        });
        Scribbled { region, stop, scribbler: Some(scribbler) }
    }

    fn buf(&self, at: usize, len: usize) -> IoBuf {
        assert!(at + len <= self.region.size());
        // SAFETY: inside the region, which the buffer keeps mapped; nobody makes a reference to it.
        unsafe {
            let base = self.region.as_ptr().add(at).cast();
            IoBuf::from_iovecs(vec![libc::iovec { iov_base: base, iov_len: len }], self.region.clone())
        }
    }
}

impl Drop for Scribbled {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        self.scribbler.take().unwrap().join().unwrap();
    }
}

/// Writes of random lengths from memory that is scribbled on all the time, each to a place of its own.
fn scribbled_writes(how: StableWrites, limit: usize) -> (Arc<Mirror>, StableWritesStatus, Vec<(usize, usize)>) {
    const SIZE: usize = 48 * MIB;
    let mirror = Mirror::new(SIZE, CompletionOrder::Shuffled(3));
    let disk = stable(mirror.clone(), how, limit);
    let memory = Scribbled::new(4 * MIB);
    let mut driver = backend::Driver::new(&disk, 16);
    let mut prng = Prng::new(5);
    let (mut offset, mut out, mut places) = (0, 0, Vec::new());
    loop {
        let len = if prng.below(40) == 0 { 3 * MIB + 512 } else { 512 * (1 + prng.below(128) as usize) };
        if offset + len > SIZE {
            break;
        }
        driver.push(Op::Write { offset: offset as u64, buf: memory.buf(0, len), durable: false });
        places.push((offset, len));
        (offset, out) = (offset + len, out + 1);
        while out == 16 {
            out -= driver.reap().len();
        }
    }
    while out > 0 {
        out -= driver.reap().len();
    }
    (mirror, seen(&disk), places)
}

/// Writes that the halves of the mirror hold differently.
fn torn(mirror: &Mirror, places: &[(usize, usize)]) -> usize {
    let (first, second) = (mirror.first.lock().unwrap(), mirror.second.volatile_image());
    places.iter().filter(|&&(at, len)| first[at..at + len] != second[at..at + len]).count()
}

#[test]
fn copy_and_detect_withstand_constant_changes() {
    let (mirror, _, places) = scribbled_writes(StableWrites::Off, 0);
    assert!(torn(&mirror, &places) > 0, "the test's guest is not nasty enough");
    for limit in [0, BouncePool::DEFAULT_BYTES] {
        let (mirror, status, places) = scribbled_writes(StableWrites::Copy, limit);
        assert_eq!(torn(&mirror, &places), 0);
        assert_eq!(status.copied_writes, places.len() as u64);
        assert_eq!(status.copied_bytes, places.iter().map(|&(_, len)| len as u64).sum::<u64>(), "copied once");
    }
    let (mirror, status, places) = scribbled_writes(StableWrites::Detect, 0);
    assert_eq!(status.checked_writes, places.len() as u64);
    assert!(status.changed_writes >= torn(&mirror, &places) as u64, "what differs had changed");
}

/// A guest that keeps to the rules: each buffer gets new data as soon as its write is over, and not before.
#[test]
fn no_false_positive_in_millions_of_writes() {
    const WRITES: u64 = 3_000_000;
    let disk = stable(Arc::new(NullBackend::new(1 << 30, 512)), StableWrites::Detect, 0);
    let mut queue = disk.open_queue(64).unwrap();
    let mut bufs: Vec<IoBuf> = (1..=64).map(|turn| IoBuf::owned(512 * (1 + turn % 3), 512, turn % 2)).collect();
    let mut out = Vec::new();
    let (mut count, mut prng) = (0, Prng::new(1));
    while count < WRITES {
        for (turn, buf) in bufs.drain(..).enumerate() {
            buf.copy_from(prng.below(buf.len() as u64 - 8) as usize, &count.to_ne_bytes());
            let offset = turn as u64 * 4096;
            // Reads change their buffers, and are not looked at.
            let op = if turn % 8 == 7 { Op::Read { offset, buf } } else { Op::Write { offset, buf, durable: false } };
            count += u64::from(matches!(op, Op::Write { .. }));
            queue.push(op, OpId(turn as u64)).expect("room");
        }
        queue.reap(&mut out);
        bufs.extend(out.drain(..).filter_map(|done| done.buf));
    }
    let status = seen(&disk);
    assert_eq!((status.checked_writes, status.changed_writes, status.last_changed.len()), (count, 0, 0));
}

/// The same through the whole device, over an image that reorders, with failing writes in between.
#[test]
fn no_false_positive_in_a_device() {
    let mem = Arc::new(MemBackend::new(MemOptions { order: CompletionOrder::Shuffled(9), ..MemOptions::new(1 << 20) }));
    let (disk, _) = stacked(mem.clone(), StableWrites::Detect, &BouncePool::new(0));
    let options = DeviceOptions { mode: CacheMode::Directsync, num_queues: 1, queue_size: 64, serial: String::new() };
    let rig = Rig::on(disk.clone(), &options);
    let mut guest = driver::Driver::connect_soon(&rig.path, 1, 64, 16 * WRITE, ALL);
    let (mut failed, mut count) = (0, 0u64);
    while count < 100_000 {
        if count % 1600 == 0 {
            mem.fail(Fault { op: MemOp::Write, nth: 5, errno: Errno(libc::ENOSPC), transferred: 512 });
        }
        for turn in 0..16 {
            count += 1;
            guest.fill(turn * WRITE, &count.to_ne_bytes());
            guest.write(0, (turn * WRITE) as u64, turn * WRITE, 2048, turn as u64);
        }
        guest.kick(0);
        let mut out = 16;
        while out > 0 {
            let completed = guest.wait(0);
            out -= completed.len();
            for (turn, result) in completed {
                failed += u64::from(result != 0);
                guest.fill(turn as usize * WRITE, &[turn as u8; 64]);
            }
        }
    }
    let status = seen(&*disk);
    assert!(failed > 50 && status.checked_writes == count);
    assert_eq!(status.changed_writes, 0);
}

#[test]
fn more_demand_than_memory_waits_and_stays_within_the_bound() {
    const QUEUES: usize = 3;
    const LIMIT: usize = 2 * MAX_PIECE;
    let depot = BouncePool::new(LIMIT);
    let mem =
        Arc::new(MemBackend::new(MemOptions { order: CompletionOrder::Shuffled(2), ..MemOptions::new(64 << 20) }));
    let (disk, _) = stacked(mem.clone(), StableWrites::Copy, &depot);
    thread::scope(|scope| {
        for ring in 0..QUEUES {
            let disk = disk.clone();
            scope.spawn(move || {
                let mut driver = backend::Driver::new(&*disk, 64);
                // From a block to 5 MiB, 20 MiB in all: ten times what there is.
                let lens = [512, 5 * MIB, 4096, MIB + 512, 3 * MIB, 70_144, 2 * MIB, 8 * MIB - 512];
                let base = ring as u64 * (21 << 20);
                let mut offset = base;
                let mut ids = Vec::new();
                for (turn, &len) in lens.iter().enumerate() {
                    let buf = backend::some_buffer(&mut Prng::new(turn as u64), len);
                    buf.copy_from(0, &vec![1 + turn as u8; len]);
                    ids.push(driver.push(Op::Write { offset, buf, durable: turn % 2 == 0 }));
                    offset += len as u64;
                }
                for (id, len) in ids.into_iter().zip(lens) {
                    let done = driver.finish(id);
                    assert_eq!((done.result, done.buf.map(|buf| buf.len())), (Ok(()), Some(len)));
                }
            });
        }
    });
    let stored = mem.volatile_image();
    for ring in 0..QUEUES {
        let mut at = ring * (21 << 20);
        for (turn, len) in
            [512, 5 * MIB, 4096, MIB + 512, 3 * MIB, 70_144, 2 * MIB, 8 * MIB - 512].into_iter().enumerate()
        {
            assert!(stored[at..at + len].iter().all(|&byte| byte == 1 + turn as u8), "write {turn} of ring {ring}");
            at += len;
        }
    }
    let status = seen(&*disk);
    assert!(status.waited_writes > 0, "there was enough memory");
    assert!(status.most_memory_bytes <= (LIMIT + QUEUES * MAX_PIECE) as u64, "{status:?}");
    assert_eq!(status.shared_memory_limit, LIMIT as u64);
    assert!(status.memory_bytes <= LIMIT as u64, "what the queues had is freed with them");
}

#[test]
fn reads_and_syncs_pass_writes_that_wait_for_memory() {
    let mem = Arc::new(MemBackend::new(MemOptions { order: CompletionOrder::OnRequest, ..MemOptions::new(16 << 20) }));
    let disk = stable(mem.clone(), StableWrites::Copy, 0);
    let mut driver = backend::Driver::new(&disk, 16);
    let write = |offset: usize| Op::Write { offset: offset as u64, buf: IoBuf::owned(MIB, 512, 0), durable: false };
    let writes: Vec<OpId> = (0..4).map(|turn| driver.push(write(turn * MIB))).collect();
    assert_eq!((mem.waiting(), seen(&disk).waited_writes), (1, 3));
    let read = driver.push(Op::Read { offset: 0, buf: IoBuf::owned(4096, 4096, 0) });
    let sync = driver.push(Op::Sync);
    assert_eq!(mem.waiting(), 3);
    mem.release(3);
    assert_eq!(driver.finish(writes[0]).result, Ok(()));
    assert_eq!((driver.finish(read).result, driver.finish(sync).result), (Ok(()), Ok(())));
    assert_eq!(mem.waiting(), 1, "the next write has the memory now");
    mem.release(3);
    for id in &writes[1..] {
        assert_eq!(driver.finish(*id).result, Ok(()));
    }
}

#[test]
fn a_part_that_fails_fails_its_write_once_and_nothing_else() {
    let enospc = Errno(libc::ENOSPC);
    for (limit, nth) in [
        (0, 1),
        (0, 2),
        (0, 4),
        (BouncePool::DEFAULT_BYTES, 1),
        (BouncePool::DEFAULT_BYTES, 3),
        (BouncePool::DEFAULT_BYTES, 4),
    ] {
        let mem = Arc::new(MemBackend::new(MemOptions {
            order: CompletionOrder::Shuffled(nth),
            ..MemOptions::new(16 << 20)
        }));
        let disk = stable(mem.clone(), StableWrites::Copy, limit);
        let mut driver = backend::Driver::new(&disk, 4);
        mem.fail(Fault { op: MemOp::Write, nth, errno: enospc, transferred: 0 });
        let long = driver.push(Op::Write { offset: 0, buf: IoBuf::owned(4 * MIB, 512, 0), durable: false });
        let done = driver.finish(long);
        assert_eq!((done.result, done.buf.map(|buf| buf.len())), (Err(enospc), Some(4 * MIB)), "{limit} {nth}");
        assert_eq!(driver.write(0, &[7; 3 * MIB]), Ok(()), "{limit} {nth}");
        assert!(driver.read(0, 3 * MIB).unwrap().iter().all(|&byte| byte == 7));
        assert_eq!(seen(&disk).copied_writes, 2);
    }
}

#[test]
fn dropping_a_queue_carries_out_what_waits_for_memory() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 32 << 20);
    let little = FileOptions { memory: BouncePool::new(0), ..options(&path, CacheMode::None) };
    let bounced: Arc<dyn Backend> = Arc::new(backend::opened(&little));
    let mem = MemBackend::new(MemOptions { order: CompletionOrder::Shuffled(1), ..MemOptions::new(32 << 20) });
    let copied = stable(Arc::new(mem), StableWrites::Copy, 0);
    for (round, disk) in [bounced, Arc::new(copied)].into_iter().enumerate() {
        let mut queue = disk.open_queue(16).unwrap();
        for turn in 0..16u64 {
            // Not aligned: O_DIRECT refuses it.
            let buf = IoBuf::owned(2 * MIB, 4096, 1);
            buf.copy_from(0, &vec![1 + turn as u8; 2 * MIB]);
            queue.push(Op::Write { offset: turn << 21, buf, durable: false }, OpId(turn)).expect("room");
        }
        queue.submit().unwrap();
        drop(queue);
        let mut driver = backend::Driver::new(&*disk, 1);
        for turn in 0..16u64 {
            let read = driver.read(turn << 21, 2 * MIB).unwrap();
            assert!(read.iter().all(|&byte| byte == 1 + turn as u8), "round {round}: write {turn} is lost");
        }
    }
    assert!(little.memory.allocated().1 <= MAX_PIECE, "bounced within the bound: {:?}", little.memory.allocated());
}

/// A copy is aligned and goes to O_DIRECT as it is.
#[test]
fn a_copied_write_is_not_bounced_again() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 8 << 20);
    let bounces = BouncePool::new(BouncePool::DEFAULT_BYTES);
    let file = FileOptions { memory: bounces.clone(), ..options(&path, CacheMode::None) };
    let disk = stable(Arc::new(backend::opened(&file)), StableWrites::Copy, BouncePool::DEFAULT_BYTES);
    let mut driver = backend::Driver::new(&disk, 4);
    let buf = IoBuf::owned(65536, 4096, 1);
    buf.copy_from(0, &[9; 65536]);
    assert_eq!(driver.run(Op::Write { offset: 4096, buf, durable: true }), Ok(()));
    assert_eq!((seen(&disk).copied_bytes, bounces.allocated().1), (65536, 0));
    let read = driver.push(Op::Read { offset: 4096, buf: IoBuf::owned(65536, 4096, 1) });
    assert_eq!(driver.finish(read).result, Ok(()));
    assert_eq!(bounces.allocated().1, 65536, "the read was: the same buffer is one that O_DIRECT refuses");
}

/// A sysfs in which the disk below `file` asks for stable buffers.
fn sysfs_that_asks(dir: &Path, file: &Path) {
    use std::os::unix::fs::MetadataExt;
    let device = file.metadata().unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::create_dir_all(dir.join("devices/sdx/queue")).unwrap();
    std::fs::write(dir.join("devices/sdx/queue/stable_writes"), "1\n").unwrap();
    std::fs::create_dir_all(dir.join("dev/block")).unwrap();
    std::os::unix::fs::symlink(dir.join("devices/sdx"), dir.join(format!("dev/block/{major}:{minor}"))).unwrap();
}

#[test]
fn the_medium_decides_and_the_status_says_why() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    sysfs_that_asks(dir.path(), &path);
    let empty = tempfile::tempdir().unwrap();
    let sees = |sysfs: &Path, mode: CacheMode, read_only: bool, how: StableWrites| {
        let file = FileOptions { sysfs: sysfs.into(), read_only, ..options(&path, mode) };
        let file = backend::opened(&file);
        let status = seen(&stable(Arc::new(file), how, 0));
        assert_eq!(status.asked, how.name());
        (status.in_effect, status.why)
    };
    use StableWrites::{Auto, Copy, Detect, Off};
    for (sysfs, mode, read_only, how, effect, why) in [
        (dir.path(), CacheMode::None, false, Auto, "copy", "sdx asks"),
        (dir.path(), CacheMode::Directsync, false, Auto, "copy", "sdx asks"),
        (dir.path(), CacheMode::None, false, Off, "off", "although the host's sdx asks"),
        (dir.path(), CacheMode::None, false, Detect, "detect", "sdx asks"),
        (dir.path(), CacheMode::None, true, Copy, "off", "read-only"),
        (empty.path(), CacheMode::None, false, Auto, "off", "no block device"),
        (empty.path(), CacheMode::None, false, Copy, "copy", "no block device"),
        // The page cache has a copy: nothing is copied twice.
        (dir.path(), CacheMode::Writeback, false, Auto, "off", "page cache"),
        (dir.path(), CacheMode::Writethrough, false, Copy, "off", "not copied a second time: the host's page cache"),
        (dir.path(), CacheMode::Unsafe, false, Copy, "off", "page cache"),
        (dir.path(), CacheMode::Writeback, false, Detect, "detect", "page cache"),
    ] {
        let (effective, told) = sees(sysfs, mode, read_only, how);
        assert_eq!(effective, effect, "{how} in {mode}: {told}");
        assert!(told.contains(why), "{how} in {mode}: {told}");
    }
}

/// The real sysfs: a loop device copies into the page cache, or, told to pass O_DIRECT on, is as its file.
#[test]
fn a_real_loop_device_is_seen_through() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 8 << 20);
    let Some(device) = backend::Loop::attach(&path, 512) else { return };
    let below_the_file = backend::opened(&options(&path, CacheMode::None)).buffer_use();
    let used = || backend::opened(&options(&device.0, CacheMode::None)).buffer_use();
    let BufferUse::Copies(why) = used() else { panic!("{:?}", used()) };
    assert!(why.contains("loop") && why.contains("page cache"), "{why}");
    match std::process::Command::new("losetup").arg("--direct-io=on").arg(&device.0).status() {
        Ok(status) if status.success() => assert_eq!(used(), below_the_file),
        other => drop(backend::skip::<()>(&format!("no loop device with O_DIRECT: {other:?}"))),
    }
}

/// A copy of an instant delays writes; what is delayed is stable, too, and the copy is the instant's.
#[test]
fn delayed_writes_are_stable_and_the_copy_holds_the_instant() {
    const SIZE: usize = 8 * MIB;
    let dir = disk_dir();
    let mirror = Mirror::new(SIZE, CompletionOrder::Shuffled(4));
    let (disk, _) = stacked(mirror.clone(), StableWrites::Copy, &BouncePool::new(0));
    let target = dir.path().join("copy.img");
    let copy = disk.prepare(&CopyOptions { target: target.clone(), bandwidth: 1, digest: false }).unwrap();
    disk.start(&copy).unwrap();
    let memory = Scribbled::new(MIB);
    let mut driver = backend::Driver::new(&*disk, 16);
    let mut places = Vec::new();
    let mut out = 0;
    for turn in 0..SIZE / (16 << 10) {
        let (at, len) = (turn * (16 << 10), 512 * (1 + turn % 32));
        driver.push(Op::Write { offset: at as u64, buf: memory.buf(0, len), durable: false });
        places.push((at, len));
        out += 1;
        while out == 16 {
            out -= driver.reap().len();
        }
    }
    while out > 0 {
        out -= driver.reap().len();
    }
    assert_eq!(torn(&mirror, &places), 0);
    disk.set_bandwidth(&copy, 0).unwrap();
    eventually("the copy ends", || disk.status().last().is_some_and(|copy| copy.state == "completed"));
    assert!(disk.status()[0].saved_before_write_bytes > 0, "no write was delayed");
    assert!(std::fs::read(&target).unwrap().iter().all(|&byte| byte == 0), "the instant was before all writes");
}
