//! Measures how long a quiesce takes under full load: from the command to the reply that the disk is held.
//!
//! `cargo bench --bench quiesce -- [--dir DIR] [--rounds N] [--size MiB] [--only MODE]`
//!
//! Method: the real program in its sandbox serves an image in DIR (default: the system's temporary directory). A
//! front-end keeps four queues at depth 32 full of random 4 KiB requests, half of them writes, and records when each was
//! submitted and completed. Meanwhile a client quiesces the disk, resumes it, and repeats that after a pause of varying
//! length. The time of each quiesce is compared with what it had to wait for: the slowest write that was in flight at the
//! command, from start to end, and one sync, whose time is in the reply (`sync-us`). The goal is at most 1 ms more than
//! both.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kit::driver::{ALL, Driver};
use kit::guest;
use kit::prng::Prng;
use serde_json::json;
use virtioblkd::engine::CacheMode;
use virtioblkd::internal::control::client::Client;

const QUEUES: usize = 4;
const DEPTH: usize = 32;
const BLOCK: usize = 4096;
const MIB: u64 = 1 << 20;
const GOAL: Duration = Duration::from_millis(1);
/// The wait until the front-end has recorded the last completion. It is longer than the time between two polls of the
/// front-end.
const AFTERWARDS: Duration = Duration::from_millis(3);

struct Options {
    dir: PathBuf,
    rounds: usize,
    size: u64,
    only: String,
}

/// A write: when it was submitted, and when it was completed.
type Written = (Instant, Instant);

/// One quiesce.
struct Held {
    took: Duration,
    in_flight: Duration,
    sync: Duration,
    drain: Duration,
    drained: u64,
}

impl Held {
    /// The part of the time that neither the writes in flight nor the sync explain.
    fn beyond(&self) -> Duration {
        self.took.saturating_sub(self.in_flight + self.sync)
    }
}

fn main() {
    let options = parse(std::env::args().skip(1));
    let dir = tempfile::tempdir_in(&options.dir).unwrap_or_else(|error| panic!("{}: {error}", options.dir.display()));
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![1u8; (options.size * MIB) as usize]).expect("an image");
    fs::File::open(&image).and_then(|file| file.sync_all()).expect("it is stored");
    println!(
        "{} quiesces in each mode, {QUEUES} queues at depth {DEPTH}, an image in {}",
        options.rounds,
        options.dir.display()
    );
    for mode in CacheMode::ALL {
        if mode.name().contains(&options.only) {
            report(mode, &measure(&image, mode, &options));
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Options {
    let mut options = Options { dir: std::env::temp_dir(), rounds: 100, size: 256, only: String::new() };
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--dir" => options.dir = value().into(),
            "--rounds" => options.rounds = value().parse().expect("a number of rounds"),
            "--size" => options.size = value().parse().expect("MiB"),
            "--only" => options.only = value(),
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}

fn measure(image: &Path, mode: CacheMode, options: &Options) -> Vec<Held> {
    let server = guest::Server::start(image, mode, &["--log-level", "error"]);
    let load = Load::start(&server.socket(), options.size * MIB);
    let mut operator = Client::connect(&server.control()).unwrap_or_else(|failure| panic!("{failure}"));
    let mut prng = Prng::new(3);
    let mut found = Vec::new();
    for _ in 0..options.rounds {
        std::thread::sleep(Duration::from_micros(20_000 + prng.below(20_000)));
        load.forget();
        let begun = Instant::now();
        let reply = operator.execute("quiesce", json!({"timeout-ms": 60_000}), Duration::from_secs(70));
        let took = begun.elapsed();
        let reply = reply.unwrap_or_else(|failure| panic!("{failure}"));
        std::thread::sleep(AFTERWARDS);
        let in_flight = load.slowest_in_flight(begun);
        let number = |name: &str| reply[name].as_u64().unwrap_or_else(|| panic!("no {name} in {reply}"));
        found.push(Held {
            took,
            in_flight,
            sync: Duration::from_micros(number("sync-us")),
            drain: Duration::from_micros(number("drain-us")),
            drained: number("drained"),
        });
        let resumed = operator.execute("resume", json!({"token": reply["token"]}), Duration::from_secs(10));
        resumed.unwrap_or_else(|failure| panic!("{failure}"));
    }
    found
}

fn report(mode: CacheMode, found: &[Held]) {
    let line = |what: &str, pick: &dyn Fn(&Held) -> Duration| {
        let mut values: Vec<Duration> = found.iter().map(pick).collect();
        values.sort();
        let at = |share: f64| values[((values.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
        println!(
            "    {what:<36} median {:>8.2} ms, p90 {:>8.2}, p99 {:>8.2}, most {:>8.2}",
            at(0.5),
            at(0.9),
            at(0.99),
            at(1.0)
        );
    };
    let writes = found.iter().map(|held| held.drained).sum::<u64>() / found.len() as u64;
    println!("\n{}: {writes} writes in flight at the command, on average", mode.name());
    line("from the command to held", &|held| held.took);
    line("slowest write in flight", &|held| held.in_flight);
    line("draining, as the server saw it", &|held| held.drain);
    line("one sync", &|held| held.sync);
    line("beyond the slowest and one sync", &Held::beyond);
    let over = found.iter().filter(|held| held.beyond() > GOAL).count();
    println!("    more than {GOAL:?} beyond: {over} of {}", found.len());
    println!("    from the command to held:");
    bars(found.iter().map(|held| held.took));
}

/// Prints a line for each doubling of the time.
fn bars(times: impl Iterator<Item = Duration>) {
    let mut counts: Vec<usize> = Vec::new();
    for time in times {
        let bucket = (time.as_micros() / 125).checked_ilog2().map_or(0, |log| log as usize + 1);
        counts.resize(counts.len().max(bucket + 1), 0);
        counts[bucket] += 1;
    }
    let most = counts.iter().max().copied().unwrap_or(1);
    for (bucket, count) in counts.iter().enumerate().skip_while(|(_, count)| **count == 0) {
        println!(
            "    up to {:>8.2} ms {:<50} {count}",
            0.125 * 2f64.powi(bucket as i32),
            "#".repeat((count * 50).div_ceil(most))
        );
    }
}

/// The front-end, which runs in a thread of its own until this is dropped.
struct Load {
    written: Arc<Mutex<Vec<Written>>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start(socket: &Path, size: u64) -> Load {
        let mut guest = Driver::connect_soon(socket, QUEUES, 128, QUEUES * DEPTH * BLOCK, ALL);
        let (written, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (answers, ended) = (written.clone(), stop.clone());
        let thread = std::thread::spawn(move || keep_full(&mut guest, size, &answers, &ended));
        Load { written, stop, thread: Some(thread) }
    }

    fn forget(&self) {
        self.written.lock().expect("the load runs").clear();
    }

    /// The time of the slowest write that was submitted before this moment and completed after it. While the disk is held,
    /// no other write is completed.
    fn slowest_in_flight(&self, command: Instant) -> Duration {
        let written = self.written.lock().expect("the load runs");
        let over = written.iter().filter(|(asked, answered)| *asked < command && *answered > command);
        over.map(|(asked, answered)| *answered - *asked).max().unwrap_or_default()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().expect("until here").join();
        if !std::thread::panicking() {
            ended.expect("the load had no error");
        }
    }
}

fn keep_full(guest: &mut Driver, size: u64, written: &Mutex<Vec<Written>>, ended: &AtomicBool) {
    let mut prng = Prng::new(11);
    let mut asked = vec![(Instant::now(), false); QUEUES * DEPTH];
    let mut ask = |guest: &mut Driver, queue: usize, slot: usize, asked: &mut [(Instant, bool)]| {
        let (offset, write) = (prng.below(size / BLOCK as u64) * BLOCK as u64, prng.below(2) == 0);
        asked[slot] = (Instant::now(), write);
        match write {
            true => guest.write(queue, offset, slot * BLOCK, BLOCK, slot as u64),
            false => guest.read(queue, offset, slot * BLOCK, BLOCK, slot as u64),
        }
    };
    for queue in 0..QUEUES {
        (0..DEPTH).for_each(|slot| ask(guest, queue, queue * DEPTH + slot, &mut asked));
        guest.kick(queue);
    }
    while !ended.load(Ordering::Relaxed) {
        let mut any = false;
        for queue in 0..QUEUES {
            let done = guest.completed(queue);
            let now = Instant::now();
            for &(slot, result) in &done {
                assert_eq!(result, 0, "an I/O error");
                let slot = slot as usize;
                let (since, write) = asked[slot];
                if write {
                    written.lock().expect("the operator runs").push((since, now));
                }
                ask(guest, queue, slot, &mut asked);
            }
            if !done.is_empty() {
                any = true;
                guest.kick(queue);
            }
        }
        if !any {
            // The front-end must neither use a core that the server needs, nor sleep until the end of a hold wakes it.
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
