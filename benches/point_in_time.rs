//! Measures the cost of point-in-time copies: for an op without a copy, and for a guest's write during a copy.
//!
//! `cargo bench --bench point_in_time [-- DIR]`. The image and the target are in DIR (default: the system's temporary
//! directory). Without a copy, it measures nanoseconds for each op of the null back-end, with and without the layer in turn,
//! and prints the median of the pairs' ratios. With a copy, it measures 4 KiB random writes at depth 1 with O_DIRECT, before,
//! during and after a copy of an image full of data.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::backend::null::NullBackend;
use virtioblkd::backend::point_in_time::PointInTime;
use virtioblkd::backend::{Backend, IoBuf, IoQueue, Op, OpId};
use virtioblkd::disk::{Copies, CopyOptions, Events};
use virtioblkd::engine::CacheMode;

const IMAGE: u64 = 1 << 30;
const BATCH: u64 = 32;

fn main() {
    let dir = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).map_or_else(std::env::temp_dir, PathBuf::from);
    idle();
    busy(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
}

fn wrapped(image: Arc<dyn Backend>) -> PointInTime {
    PointInTime::new(image, Arc::new(Events::new().expect("an eventfd")))
}

fn idle() {
    let bare = NullBackend::new(1 << 30, 512);
    let wrapped = wrapped(Arc::new(NullBackend::new(1 << 30, 512)));
    for write in [false, true] {
        let mut ratios = Vec::new();
        let mut last = (0.0, 0.0);
        for _ in 0..15 {
            last = (null_ops(&bare, write), null_ops(&wrapped, write));
            ratios.push(last.1 / last.0);
        }
        ratios.sort_by(f64::total_cmp);
        let what = if write { "write" } else { "read" };
        println!("no copy, null, {what}: {:.1} ns bare, {:.1} ns wrapped, ratio {:.2}", last.0, last.1, ratios[7]);
    }
}

/// The nanoseconds for each op, without any system call.
fn null_ops(disk: &dyn Backend, write: bool) -> f64 {
    const ROUNDS: u64 = 50_000;
    let mut queue = disk.open_queue(BATCH as usize).expect("a queue");
    let mut bufs: Vec<IoBuf> = (0..BATCH).map(|_| IoBuf::owned(4096, 4096, 0)).collect();
    let mut out = Vec::new();
    let start = Instant::now();
    for _ in 0..ROUNDS {
        for (turn, buf) in bufs.drain(..).enumerate() {
            let offset = turn as u64 * 4096;
            let op = if write { Op::Write { offset, buf, durable: false } } else { Op::Read { offset, buf } };
            queue.push(op, OpId(turn as u64)).expect("room");
        }
        queue.reap(&mut out);
        bufs.extend(out.drain(..).filter_map(|done| done.buf));
    }
    start.elapsed().as_nanos() as f64 / (ROUNDS * BATCH) as f64
}

fn busy(dir: &Path) -> std::io::Result<()> {
    let dir = tempfile::tempdir_in(dir)?;
    let path = dir.path().join("disk.img");
    std::fs::write(&path, vec![1u8; IMAGE as usize])?;
    std::fs::File::open(&path)?.sync_all()?;
    let image = FileBackend::open(&FileOptions::new(&path, CacheMode::None.into())).expect("the image");
    let disk = wrapped(Arc::new(image));
    let mut queue = disk.open_queue(1)?;
    let mut place = 88172645463325252u64;
    report("before", &mut latencies(&mut *queue, &mut place, || Duration::from_secs(3)));
    for bandwidth in [0, 64 << 20] {
        let options = CopyOptions { target: dir.path().join(format!("copy-{bandwidth}")), bandwidth, digest: false };
        let copy = disk.prepare(&options).expect("a copy");
        disk.start(&copy).expect("started");
        let start = Instant::now();
        let status = || disk.status().pop().expect("the copy");
        let mut times = latencies(&mut *queue, &mut place, || match status().state.as_str() {
            "running" | "syncing" => start.elapsed() + Duration::from_millis(1),
            _ => Duration::ZERO,
        });
        report(&format!("copy at {bandwidth} B/s (0: no limit)"), &mut times);
        let status = status();
        assert_eq!(status.state, "completed", "{:?}", status.error);
        let (seconds, saved) = (status.seconds, status.saved_before_write_bytes >> 20);
        println!("  {:.0} MiB/s, {saved} MiB saved before a write", (IMAGE >> 20) as f64 / seconds);
        std::fs::remove_file(options.target)?;
    }
    report("after", &mut latencies(&mut *queue, &mut place, || Duration::from_secs(3)));
    Ok(())
}

/// Writes at random offsets until the time that `last` returns has passed. Returns the time of each write.
fn latencies(queue: &mut dyn IoQueue, place: &mut u64, last: impl Fn() -> Duration) -> Vec<Duration> {
    let (mut times, mut out) = (Vec::new(), Vec::new());
    let mut buf = Some(IoBuf::owned(4096, 4096, 0));
    let start = Instant::now();
    while times.len() % 16 != 0 || start.elapsed() < last() {
        *place ^= *place << 13;
        *place ^= *place >> 7;
        *place ^= *place << 17;
        let offset = (*place >> 11) % (IMAGE / 4096) * 4096;
        let begun = Instant::now();
        queue
            .push(Op::Write { offset, buf: buf.take().expect("it came back"), durable: false }, OpId(1))
            .expect("room");
        while out.is_empty() {
            queue.wait(None).expect("wait");
            queue.reap(&mut out);
        }
        times.push(begun.elapsed());
        let done = out.remove(0);
        assert_eq!(done.result, Ok(()));
        buf = done.buf;
    }
    times
}

fn report(what: &str, times: &mut [Duration]) {
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    let (half, most, worst) = (at(0.5), at(0.99), at(1.0));
    println!("{what}: {} writes, median {half:.0?}, 99 % {most:.0?}, longest {worst:.0?}", times.len());
}
