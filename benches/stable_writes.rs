//! Measures the cost of `--stable-writes`: writes of 4 KiB to 1 MiB with `off`, `detect` and `copy`.
//!
//! `cargo bench --bench stable_writes [-- DIR]`. The image is in DIR (default: the system's temporary directory). It is
//! written with O_DIRECT at depth 8, from 64 MiB of buffers in turn, so that a buffer is not in the processor's caches from
//! its last use. The same writes to an image that stores nothing measure the layer alone. The three modes are measured in
//! turn (A B C A B C ...). The output has MiB per second with `off`, and the ratios of the others to it (medians of the
//! ratios of each round); and the processor time of the ring's thread for each write, in microseconds.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtioblkd::backend::bounce_pool::BouncePool;
use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::backend::null::NullBackend;
use virtioblkd::backend::stable::{StableBackend, StableWrites};
use virtioblkd::backend::{Backend, IoBuf, Op, OpId};
use virtioblkd::disk::Events;
use virtioblkd::engine::CacheMode;

const IMAGE: u64 = 1 << 30;
const BUFFERS: usize = 64 << 20;
const DEPTH: usize = 8;
const ROUNDS: usize = 7;
const RUN: Duration = Duration::from_millis(300);
const WAYS: [StableWrites; 3] = [StableWrites::Off, StableWrites::Detect, StableWrites::Copy];

/// The result of one run: MiB per second, and microseconds of processor time for each write.
#[derive(Clone, Copy)]
struct Figures {
    rate: f64,
    cpu: f64,
}

fn main() {
    let dir = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let path = dir.path().join("disk.img");
    fs::write(&path, vec![1u8; IMAGE as usize]).expect("an image");
    fs::File::open(&path).and_then(|file| file.sync_all()).expect("it is stored");
    println!("image      size    MiB/s: off  detect    copy    CPU us a write: off   detect     copy");
    for (name, path) in [("null", None), ("file", Some(&*path))] {
        for size in [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20] {
            compare(name, path, size);
        }
    }
}

fn disk(path: Option<&Path>, how: StableWrites) -> StableBackend {
    let image: Arc<dyn Backend> = match path {
        Some(path) => {
            Arc::new(FileBackend::open(&FileOptions::new(path, CacheMode::None.into())).expect("the image opens"))
        }
        None => Arc::new(NullBackend::new(IMAGE, 512)),
    };
    StableBackend::new(
        image,
        how,
        BouncePool::new(BouncePool::DEFAULT_BYTES),
        Arc::new(Events::new().expect("an eventfd")),
    )
}

fn compare(name: &str, path: Option<&Path>, size: usize) {
    let mut rounds: Vec<[Figures; 3]> = Vec::new();
    for _ in 0..ROUNDS {
        // The image is opened for each run, because only one back-end at a time can have it open.
        rounds.push(WAYS.map(|how| run(&disk(path, how), size)));
    }
    let median = |pick: &dyn Fn(&[Figures; 3]) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(pick).collect();
        values.sort_by(f64::total_cmp);
        values[ROUNDS / 2]
    };
    let rate = |way: usize| median(&|round| round[way].rate / round[0].rate);
    let [off, detect, copy] = [0, 1, 2].map(|way| median(&|round| round[way].cpu));
    let size = format!("{} KiB", size >> 10);
    // This image stores nothing, so its rate would be that of the layer alone.
    let rates = match path {
        Some(_) => format!("{:>10.0}  x {:.2}  x {:.2}", median(&|round| round[0].rate), rate(1), rate(2)),
        None => " ".repeat(26),
    };
    println!("{name:<5} {size:>9}  {rates}                   {off:>7.2}  {detect:>7.2}  {copy:>7.2}");
}

fn run(disk: &dyn Backend, size: usize) -> Figures {
    let mut queue = disk.open_queue(DEPTH).expect("a queue");
    let mut bufs: std::collections::VecDeque<IoBuf> =
        (0..BUFFERS / size).map(|_| IoBuf::owned(size, 4096, 0)).collect();
    let (mut place, mut count, mut in_flight) = (88172645463325252u64, 0u64, 0);
    let mut out = Vec::new();
    let mut begun = (Instant::now(), processor_time());
    let mut warm = false;
    loop {
        while in_flight < DEPTH {
            place ^= place << 13;
            place ^= place >> 7;
            place ^= place << 17;
            let offset = (place >> 11) % (IMAGE / size as u64) * size as u64;
            let buf = bufs.pop_front().expect("more than are in flight");
            queue.push(Op::Write { offset, buf, durable: false }, OpId(in_flight as u64)).expect("room");
            in_flight += 1;
        }
        queue.submit().expect("submit");
        queue.reap(&mut out);
        if out.is_empty() {
            queue.wait(None).expect("wait");
            queue.reap(&mut out);
        }
        in_flight -= out.len();
        count += out.len() as u64;
        for done in out.drain(..) {
            assert_eq!(done.result, Ok(()));
            bufs.extend(done.buf);
        }
        if !warm && begun.0.elapsed() > RUN / 6 {
            // By now the pool has allocated its memory.
            (warm, begun, count) = (true, (Instant::now(), processor_time()), 0);
        } else if warm && begun.0.elapsed() > RUN {
            break;
        }
    }
    let (seconds, cpu) = (begun.0.elapsed().as_secs_f64(), processor_time() - begun.1);
    Figures {
        rate: count as f64 * size as f64 / (1 << 20) as f64 / seconds,
        cpu: cpu.as_secs_f64() * 1e6 / count as f64,
    }
}

/// The processor time of this thread, user and system.
fn processor_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("a kernel with schedstats");
    let nanoseconds = text.split_whitespace().next().and_then(|first| first.parse().ok()).expect("a number");
    Duration::from_nanos(nanoseconds)
}
