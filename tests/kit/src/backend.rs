//! What the contract tests share: a driver for one queue, a model to compare with, loop devices.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use virtioblkd::backend::bounce_pool::BouncePool;
use virtioblkd::backend::file::{FileBackend, FileOptions, Locking};
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::backend::null::NullBackend;
use virtioblkd::backend::point_in_time::PointInTime;
use virtioblkd::backend::stable::{StableBackend, StableWrites};
use virtioblkd::backend::{Backend, Completion, Errno, IoBuf, IoQueue, Op, OpId};
use virtioblkd::disk::{Copies, CopyOptions, Events};
use virtioblkd::engine::{CacheMode, CachePolicy};

pub use crate::prng::Prng;

/// Longest that anything may hang before a test fails instead of the whole run.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// Opens a file as a back-end. Returns `None`, and says so, where its filesystem has no O_DIRECT and `mode` wants it.
pub fn open_file_or_skip(options: &FileOptions, mode: CacheMode) -> Option<FileBackend> {
    match FileBackend::open(options) {
        Ok(backend) => Some(backend),
        Err(error) if CachePolicy::from(mode).opens_direct() => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// One queue, used the way a worker does.
pub struct Driver {
    pub queue: Box<dyn IoQueue>,
    last: u64,
    finished: HashMap<OpId, Completion>,
}

impl Driver {
    pub fn new(backend: &dyn Backend, depth: usize) -> Self {
        Driver { queue: backend.open_queue(depth).expect("a queue"), last: 0, finished: HashMap::new() }
    }

    pub fn push(&mut self, op: Op) -> OpId {
        self.last += 1;
        let id = OpId(self.last);
        self.queue.push(op, id).expect("the queue has room");
        id
    }

    /// Waits until something finished and takes all that has.
    pub fn reap(&mut self) -> Vec<Completion> {
        let mut out = Vec::new();
        while out.is_empty() {
            self.queue.wait(Some(WAIT_TIMEOUT)).expect("wait");
            self.queue.reap(&mut out);
        }
        out
    }

    pub fn finish(&mut self, id: OpId) -> Completion {
        loop {
            if let Some(completion) = self.finished.remove(&id) {
                return completion;
            }
            for completion in self.reap() {
                let twice = self.finished.insert(completion.id, completion);
                assert!(twice.is_none(), "a token came back twice");
            }
        }
    }

    pub fn run(&mut self, op: Op) -> Result<(), Errno> {
        let id = self.push(op);
        self.finish(id).result
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let buf = IoBuf::owned(bytes.len(), 4096, 0);
        buf.copy_from(0, bytes);
        self.run(Op::Write { offset, buf, durable: false })
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let id = self.push(Op::Read { offset, buf: IoBuf::owned(len, 4096, 0) });
        let Completion { result, buf, .. } = self.finish(id);
        let mut bytes = vec![0; len];
        buf.expect("a read's buffer comes back").copy_to(0, &mut bytes);
        result.map(|()| bytes)
    }
}

/// A buffer as a guest may make it: one part or many, aligned or not.
pub fn some_buffer(prng: &mut Prng, len: usize) -> IoBuf {
    match prng.below(4) {
        0 => IoBuf::owned(len, 4096, 0),
        1 => IoBuf::owned(len, 4096, 1 + prng.below(511) as usize),
        2 => {
            let mut lens = vec![512; len / 512];
            lens.extend((!len.is_multiple_of(512)).then_some(len % 512));
            IoBuf::owned_parts(&lens, 4096)
        }
        _ => {
            let mut lens = Vec::new();
            let mut left = len;
            while left > 0 {
                let part = (1 + prng.below(len.min(5000) as u64) as usize).min(left);
                lens.push(part);
                left -= part;
            }
            IoBuf::owned_parts(&lens, 4096)
        }
    }
}

/// Runs `rounds` random ops, up to the depth at once and never two on the same block, and compares with a model: each
/// read when it comes back, and all of the image at the end.
pub fn random_ops(backend: &dyn Backend, seed: u64, rounds: usize) {
    let geometry = backend.geometry();
    let block = u64::from(geometry.logical_block);
    let blocks = geometry.size / block;
    let mut prng = Prng::new(seed);
    let mut driver = Driver::new(backend, 16);
    let mut disk = vec![0u8; geometry.size as usize];
    for at in (0..disk.len()).step_by(1 << 20) {
        let end = disk.len().min(at + (1 << 20));
        disk[at..end].copy_from_slice(&driver.read(at as u64, end - at).expect("a first look"));
    }
    // After a discard a block may read as anything until it is written.
    let mut known = vec![true; blocks as usize];
    let mut busy: HashMap<OpId, (std::ops::Range<u64>, Option<Vec<u8>>)> = HashMap::new();
    for _ in 0..rounds {
        let count = 1 + if prng.below(20) == 0 { prng.below(blocks / 4) } else { prng.below(16) };
        let first = prng.below(blocks - count + 1);
        let range = first..first + count;
        if busy.values().any(|(other, _)| other.start < range.end && range.start < other.end) {
            continue;
        }
        let (offset, len) = (first * block, count * block);
        let place = offset as usize..(offset + len) as usize;
        let op = match prng.below(10) {
            0..4 => {
                let buf = some_buffer(&mut prng, len as usize);
                let bytes = prng.bytes(len as usize);
                buf.copy_from(0, &bytes);
                disk[place].copy_from_slice(&bytes);
                known[first as usize..range.end as usize].fill(true);
                let native = geometry.durable_write == virtioblkd::backend::DurableWrite::Native;
                Op::Write { offset, buf, durable: native && prng.below(4) == 0 }
            }
            4..7 => Op::Read { offset, buf: some_buffer(&mut prng, len as usize) },
            7 if geometry.write_zeroes.is_some() => {
                disk[place].fill(0);
                known[first as usize..range.end as usize].fill(true);
                Op::WriteZeroes { offset, len, unmap: prng.below(2) == 0 }
            }
            8 if geometry.discard.is_some() => {
                known[first as usize..range.end as usize].fill(false);
                Op::Discard { offset, len }
            }
            _ => Op::Sync,
        };
        let expected = matches!(op, Op::Read { .. }).then(|| disk[offset as usize..(offset + len) as usize].to_vec());
        let touched = if matches!(op, Op::Sync) { 0..0 } else { range };
        let id = driver.push(op);
        busy.insert(id, (touched, expected));
        while busy.len() >= 12 {
            reap_some(&mut driver, &mut busy, &known, block);
        }
    }
    while !busy.is_empty() {
        reap_some(&mut driver, &mut busy, &known, block);
    }
    let chunk = (1 << 20) / block;
    for first in (0..blocks).step_by(chunk as usize) {
        let range = first..blocks.min(first + chunk);
        let seen = driver.read(first * block, ((range.end - first) * block) as usize).expect("the last look");
        for (index, found) in range.zip(seen.chunks(block as usize)) {
            let place = (index * block) as usize..((index + 1) * block) as usize;
            assert!(!known[index as usize] || found == &disk[place], "block {index} differs, seed {seed}");
        }
    }
}

type Busy = HashMap<OpId, (std::ops::Range<u64>, Option<Vec<u8>>)>;

fn reap_some(driver: &mut Driver, busy: &mut Busy, known: &[bool], block: u64) {
    for Completion { id, result, buf } in driver.reap() {
        let (range, expected) = busy.remove(&id).expect("each token once");
        result.expect("no op fails here");
        let Some(expected) = expected else { continue };
        let mut seen = vec![0; expected.len()];
        buf.expect("a read's buffer").copy_to(0, &mut seen);
        for index in range.clone().filter(|&index| known[index as usize]) {
            let place = ((index - range.start) * block) as usize..((index - range.start + 1) * block) as usize;
            assert!(seen[place.clone()] == expected[place], "block {index} read wrong");
        }
    }
}

/// The defaults, with native durable writes in every mode, so that these are tested.
pub fn options(path: &Path, mode: CacheMode) -> FileOptions {
    FileOptions { durable_writes: true, ..FileOptions::new(path, mode.into()) }
}

pub fn open(path: &Path, mode: CacheMode) -> FileBackend {
    opened(&options(path, mode))
}

/// Opens an image that nobody uses. A test in another thread that starts a program has, until that runs, a copy of
/// every descriptor, and with it of locks that were let go here: hence the long timeout.
pub fn opened(options: &FileOptions) -> FileBackend {
    let mut found = None;
    eventually("the image is free", || {
        found = Some(FileBackend::open(options));
        !matches!(&found, Some(Err(error)) if error.to_string().contains("another process"))
    });
    found.expect("tried once at least").unwrap_or_else(|error| panic!("{error}"))
}

/// Why an image that nobody uses cannot be opened. See [`opened`] for what may seem to use it.
pub fn open_error(options: &FileOptions) -> String {
    let mut error = String::new();
    eventually("the image is free", || {
        error = FileBackend::open(options).err().expect("an error").to_string();
        !error.contains("another process")
    });
    error
}

/// Asks again and again until it is so.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !is_so() {
        assert!(start.elapsed() < WAIT_TIMEOUT, "never came: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A directory on the disk that the build runs on.
pub fn disk_dir() -> tempfile::TempDir {
    crate::programs::disk_dir()
}

pub fn image(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path).and_then(|file| file.set_len(size)).expect("an image");
    path
}

/// A loop device, detached when dropped.
pub struct Loop(pub PathBuf);

impl Loop {
    /// None, said loudly, where there are none to be had (not root, a container).
    pub fn attach(file: &Path, sector: u32) -> Option<Loop> {
        let args = ["--find", "--show", "--sector-size", &sector.to_string()];
        match Command::new("losetup").args(args).arg(file).output() {
            Ok(output) if output.status.success() => {
                Some(Loop(String::from_utf8(output.stdout).expect("a path").trim().into()))
            }
            Ok(output) => skip(&format!("no loop device: {}", String::from_utf8_lossy(&output.stderr).trim())),
            Err(error) => skip(&format!("no losetup: {error}")),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let status = Command::new("losetup").arg("-d").arg(&self.0).status();
        assert!(std::thread::panicking() || status.is_ok_and(|status| status.success()), "losetup -d failed");
    }
}

/// Says that a test could not run here.
pub fn skip<T>(why: &str) -> Option<T> {
    eprintln!("SKIPPED: {why}");
    None
}

/// Every back-end, null included; 8 MiB each.
pub fn each(check: &dyn Fn(&str, &dyn Backend)) {
    check("null", &NullBackend::new(8 << 20, 512));
    each_that_stores(check);
}

/// Every back-end whose reads return what was written.
pub fn each_that_stores(check: &dyn Fn(&str, &dyn Backend)) {
    for order in [CompletionOrder::InOrder, CompletionOrder::Shuffled(3)] {
        check(&format!("mem, {order:?}"), &MemBackend::new(MemOptions { order, ..MemOptions::new(8 << 20) }));
    }
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 8 << 20);
    for mode in [CacheMode::None, CacheMode::Writeback] {
        check(&format!("file, {mode}"), &open(&path, mode));
    }
    for active in [false, true] {
        let mem = MemBackend::new(MemOptions { order: CompletionOrder::Shuffled(5), ..MemOptions::new(8 << 20) });
        let direct = open(&path, CacheMode::None);
        for (name, image) in [("mem", Arc::new(mem) as Arc<dyn Backend>), ("file", Arc::new(direct))] {
            let disk = PointInTime::new(image, Arc::new(Events::new().expect("an eventfd")));
            // So slow that it lasts: all that is saved is saved because of what the test writes.
            let options = CopyOptions { target: dir.path().join("copy.img"), bandwidth: 1, digest: false };
            if active {
                let copy = disk.prepare(&options).expect("a copy");
                disk.start(&copy).expect("a quiet disk");
            }
            check(&format!("point-in-time copy ({}) of {name}", if active { "running" } else { "none" }), &disk);
        }
    }
    for (name, limit) in [("copied", BouncePool::DEFAULT_BYTES), ("copied with little memory", 0)] {
        let mem = MemBackend::new(MemOptions { order: CompletionOrder::Shuffled(7), ..MemOptions::new(8 << 20) });
        let direct = open(&path, CacheMode::None);
        for (of, image) in [("mem", Arc::new(mem) as Arc<dyn Backend>), ("file", Arc::new(direct))] {
            check(&format!("{name}, {of}"), &stable(image, StableWrites::Copy, limit));
        }
    }
    let little = FileOptions { memory: BouncePool::new(0), ..options(&path, CacheMode::None) };
    check("file, none, with little memory", &opened(&little));
    check("detecting, file", &stable(Arc::new(open(&path, CacheMode::None)), StableWrites::Detect, 0));
    for mode in [CacheMode::None, CacheMode::Unsafe] {
        check(&format!("rbd (stub), {mode}"), &crate::rbd_stub::Stub::new(mode).open());
    }
    let shm = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let path = image(shm.path(), "disk.img", 8 << 20);
    check("file on tmpfs", &open(&path, CacheMode::Unsafe));
    match FileBackend::open(&FileOptions { locking: Locking::Off, ..options(&path, CacheMode::None) }) {
        Ok(file) => check("file on tmpfs, O_DIRECT", &file),
        // Before Linux 6.6.
        Err(error) => drop(skip::<()>(&error.to_string())),
    }
    for (sector, logical, mode) in [
        (512, None, CacheMode::None),
        (512, Some(4096), CacheMode::None),
        (512, None, CacheMode::Writeback),
        (4096, None, CacheMode::None),
        (4096, None, CacheMode::Writeback),
        (4096, Some(512), CacheMode::None),
        (4096, Some(512), CacheMode::Writeback),
    ] {
        let Some(device) = Loop::attach(&image(dir.path(), "loop.img", 8 << 20), sector) else { return };
        let options = FileOptions { logical_block_size: logical, ..options(&device.0, mode) };
        let backend = opened(&options);
        assert_eq!(backend.geometry().logical_block, logical.unwrap_or(sector));
        check(&format!("loop device with {sector}-byte sectors as {logical:?}, {mode}"), &backend);
    }
}

/// `image` with stable writes, and this much memory to share.
pub fn stable(image: Arc<dyn Backend>, how: StableWrites, limit: usize) -> StableBackend {
    StableBackend::new(image, how, BouncePool::new(limit), Arc::new(Events::new().expect("an eventfd")))
}

/// Dirty pages of a file in the page cache (cachestat(2)); None before Linux 6.5.
#[allow(unsafe_code)]
pub fn dirty_pages(path: &Path) -> Option<u64> {
    use std::os::fd::AsRawFd;
    const CACHESTAT: libc::c_long = 451;
    let file = std::fs::File::open(path).expect("the image");
    let range = [0u64, 0];
    // nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted
    let mut stat = [0u64; 5];
    // SAFETY: cachestat reads two u64 and writes five, all of which live through the call.
    let result = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0) };
    if result < 0 {
        return skip(&format!("no cachestat: {}", std::io::Error::last_os_error()));
    }
    Some(stat[1] + stat[2])
}
