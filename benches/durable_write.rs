//! Compares two ways to make a 4 KiB write durable: a flag on each write (RWF_DSYNC), and the write followed by one
//! fdatasync that all waiting writes share (the engine's sync line). `cargo bench --bench durable_write -- [DIRECTORY]`.
//!
//! The two ways are measured in turn (A B A B ...) on the same file with random offsets, and the medians are compared.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::backend::{Backend, Completion, IoBuf, IoQueue, Op, OpId};
use virtioblkd::engine::CacheMode;

const SIZE: u64 = 256 << 20;
const TURN: Duration = Duration::from_millis(700);
const PAIRS: usize = 7;
const SYNC: OpId = OpId(u64::MAX);

fn main() {
    // cargo passes --bench; the other argument is the directory.
    let directory = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let directory = directory.map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    let image = Image::make(&directory).unwrap_or_else(|error| {
        eprintln!("{}: cannot make an image of {SIZE} bytes: {error}", directory.display());
        std::process::exit(1);
    });
    println!("durable 4 KiB random writes per second in {}", directory.display());
    println!("{:>12} {:>6} {:>10} {:>13} {:>22}", "mode", "depth", "RWF_DSYNC", "shared sync", "shared / RWF_DSYNC");
    for mode in [CacheMode::Directsync, CacheMode::Writethrough] {
        for depth in [1, 16, 64] {
            match compare(&image.0, mode, depth) {
                Ok(line) => println!("{mode:>12} {depth:>6} {line}", mode = mode.name()),
                Err(error) => println!("{mode:>12} {depth:>6} {error}", mode = mode.name()),
            }
        }
    }
}

/// A file whose blocks are all allocated and written. It is removed at the end.
struct Image(PathBuf);

impl Image {
    fn make(directory: &Path) -> std::io::Result<Image> {
        let image = Image(directory.join(format!("durable-write-{}.img", std::process::id())));
        let mut file = std::fs::File::create(&image.0)?;
        for _ in 0..SIZE >> 20 {
            file.write_all(&[0x5a; 1 << 20])?;
        }
        file.sync_all()?;
        Ok(image)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

fn compare(path: &Path, mode: CacheMode, depth: usize) -> Result<String, Box<dyn std::error::Error>> {
    let options = FileOptions { durable_writes: true, ..FileOptions::new(path, mode.into()) };
    let backend = FileBackend::open(&options)?;
    let (mut native, mut shared, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        let first = Turn::new(&backend, depth, pair)?.run(true)?;
        let second = Turn::new(&backend, depth, pair)?.run(false)?;
        native.push(first);
        shared.push(second);
        ratios.push(second / first);
    }
    let (low, high) = (ratios.iter().copied().fold(f64::MAX, f64::min), ratios.iter().copied().fold(0.0, f64::max));
    let (native, shared, ratio) = (median(native), median(shared), median(ratios));
    Ok(format!("{native:>10.0} {shared:>13.0} {ratio:>8.2} ({low:.2} .. {high:.2})"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A measurement of one way, always with `depth` requests in flight. A request is done when it is durable.
struct Turn {
    queue: Box<dyn IoQueue>,
    depth: usize,
    prng: u64,
    /// Requests that are written and wait for a sync that starts from now on.
    written: Vec<IoBuf>,
    /// Requests that the running sync covers.
    covered: Vec<IoBuf>,
    syncing: bool,
}

impl Turn {
    fn new(backend: &FileBackend, depth: usize, seed: usize) -> std::io::Result<Turn> {
        let queue = backend.open_queue(depth + 1)?;
        let prng = seed as u64 * 2 + 0x1234_5677;
        Ok(Turn { queue, depth, prng, written: Vec::new(), covered: Vec::new(), syncing: false })
    }

    /// Measures the requests per second.
    fn run(mut self, durable: bool) -> Result<f64, Box<dyn std::error::Error>> {
        let start = Instant::now();
        let mut finished = 0u64;
        for turn in 0..self.depth {
            self.write(IoBuf::owned(4096, 4096, 0), durable, OpId(turn as u64))?;
        }
        let mut out = Vec::new();
        while start.elapsed() < TURN {
            self.queue.wait(None)?;
            self.queue.reap(&mut out);
            for Completion { id, result, buf } in out.drain(..) {
                result.map_err(|errno| std::io::Error::from_raw_os_error(errno.0))?;
                match buf {
                    Some(buf) if durable => {
                        finished += 1;
                        self.write(buf, durable, id)?;
                    }
                    Some(buf) => self.written.push(buf),
                    None => {
                        self.syncing = false;
                        for buf in std::mem::take(&mut self.covered) {
                            finished += 1;
                            self.write(buf, durable, OpId(finished))?;
                        }
                    }
                }
            }
            if !self.syncing && !self.written.is_empty() {
                self.covered = std::mem::take(&mut self.written);
                self.syncing = true;
                self.queue.push(Op::Sync, SYNC).map_err(|_| "the queue is full")?;
            }
        }
        Ok(finished as f64 / start.elapsed().as_secs_f64())
    }

    fn write(&mut self, buf: IoBuf, durable: bool, id: OpId) -> Result<(), &'static str> {
        self.prng ^= self.prng << 13;
        self.prng ^= self.prng >> 7;
        self.prng ^= self.prng << 17;
        let offset = (self.prng >> 11) % (SIZE / 4096) * 4096;
        self.queue.push(Op::Write { offset, buf, durable }, id).map_err(|_| "the queue is full")
    }
}
