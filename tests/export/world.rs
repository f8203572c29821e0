//! A disk of which instants can be exported, a guest that overwrites it, and the socket of an export.

use std::io;
use std::ops::Range;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kit::backend::{Driver, Prng, disk_dir, eventually, image, open};
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::backend::point_in_time::{InstantReader, PointInTime, ScratchOptions, Tuning};
use virtioblkd::backend::{Backend, Op};
use virtioblkd::disk::{Copies, CopyStatus, Events, ExportOptions};
use virtioblkd::engine::CacheMode;
use virtioblkd::internal::export::{ClientTimeouts, ServerOptions, start};

pub const CLUSTER: u64 = 64 << 10;

/// The size of the images: not a whole number of clusters.
pub const SIZE: u64 = (4 << 20) + 4096;

/// No client for this long ends an export in tests that do not wait for it.
pub const LONG: Duration = Duration::from_secs(600);

pub struct World {
    pub disk: Arc<PointInTime>,
    pub dir: tempfile::TempDir,
}

impl World {
    pub fn new(image: Arc<dyn Backend>, tuning: Tuning) -> World {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let scratch = tuning.scratch.clone().unwrap_or(ScratchOptions { directory: dir.path().into(), size: 1 << 30 });
        let tuning = Tuning { scratch: Some(scratch), ..tuning };
        let events = Arc::new(Events::new().expect("an eventfd"));
        World { disk: Arc::new(PointInTime::with_tuning(image, events, tuning)), dir }
    }

    /// A RAM disk full of data, whose completions come in an order that the seed determines.
    pub fn mem(seed: u64, tuning: Tuning) -> World {
        let order = if seed.is_multiple_of(2) { CompletionOrder::InOrder } else { CompletionOrder::Shuffled(seed) };
        let world = World::new(Arc::new(MemBackend::new(MemOptions { order, ..MemOptions::new(SIZE) })), tuning);
        world.fill(seed, std::iter::once(0..SIZE));
        world
    }

    /// A sparse file: data, a hole of many clusters, and holes inside clusters.
    pub fn file(mode: CacheMode) -> (World, tempfile::TempDir) {
        let dir = disk_dir();
        let path = image(dir.path(), "image", SIZE);
        let world = World::new(Arc::new(open(&path, mode)), Tuning::default());
        world.fill(1, [0..(1 << 20), (3 << 20)..(3 << 20) + 4096, SIZE - 4096..SIZE].into_iter());
        (world, dir)
    }

    fn fill(&self, seed: u64, ranges: impl Iterator<Item = Range<u64>>) {
        let (mut prng, mut driver) = (Prng::new(seed), Driver::new(&*self.disk, 1));
        for range in ranges {
            for at in range.clone().step_by(CLUSTER as usize) {
                let len = (range.end - at).min(CLUSTER) as usize;
                let bytes: Vec<u8> = (0..len / 512).flat_map(|_| [1 + prng.below(255) as u8; 512]).collect();
                driver.write(at, &bytes).expect("a write");
            }
        }
        assert_eq!(driver.run(Op::Sync), Ok(()));
    }

    pub fn contents(&self) -> Vec<u8> {
        let mut driver = Driver::new(&*self.disk, 1);
        let part = |at: u64| driver.read(at, (SIZE - at).min(1 << 20) as usize).expect("a read");
        (0..SIZE).step_by(1 << 20).flat_map(part).collect()
    }

    pub fn options(&self, idle: Duration) -> ExportOptions {
        let target = self.socket();
        ExportOptions { name: "vda".into(), target, scratch_size: None, bandwidth: 0, idle }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd")
    }

    /// Fixes an instant: its name, its reader, and what it holds.
    pub fn instant(&self) -> (String, InstantReader, Vec<u8>) {
        let (name, reader) = self.disk.prepare_instant(&self.options(LONG)).expect("a prepared export");
        let held = self.contents();
        self.disk.start(&name).expect("nothing is in flight");
        (name, reader, held)
    }

    /// Fixes an instant and serves it on [`World::socket`]: its name, and what it holds.
    pub fn serve(&self, idle: Duration) -> (String, Vec<u8>) {
        self.serve_within(idle, ClientTimeouts::default())
    }

    /// [`World::serve`] to clients that have so much time.
    pub fn serve_within(&self, idle: Duration, timeouts: ClientTimeouts) -> (String, Vec<u8>) {
        let (name, reader) = self.disk.prepare_instant(&self.options(idle)).expect("a prepared export");
        let _ = std::fs::remove_file(self.socket());
        let listener = UnixListener::bind(self.socket()).expect("a socket");
        start(listener, reader, ServerOptions { name: "vda".into(), idle, timeouts }).expect("a served export");
        let held = self.contents();
        self.disk.start(&name).expect("nothing is in flight");
        (name, held)
    }

    pub fn status(&self, name: &str) -> CopyStatus {
        self.disk.status().into_iter().find(|status| status.copy == name).expect("the export is known")
    }

    pub fn wait_ended(&self, name: &str) -> CopyStatus {
        eventually("the export's end", || {
            matches!(self.status(name).state.as_str(), "completed" | "failed" | "cancelled")
        });
        self.status(name)
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///vda?socket={}", self.socket().display())
    }

    /// Runs a program that is a client. `None`: it is not installed.
    pub fn client(&self, program: &str, arguments: &[&str]) -> Option<Output> {
        match Command::new(program).args(arguments).output() {
            Ok(output) => Some(output),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                eprintln!("SKIPPED: {program} is not installed (scripts/install-test-deps)");
                None
            }
            Err(error) => panic!("{program}: {error}"),
        }
    }
}

/// One ring of a guest that writes, discards and writes zeroes anywhere until `stop`. Every op succeeds. Returns how many
/// there were.
pub fn overwrite(disk: &dyn Backend, seed: u64, stop: &AtomicBool) -> u64 {
    let (mut prng, mut driver, mut ops) = (Prng::new(seed), Driver::new(disk, 8), 0);
    let mut in_flight = 0;
    while !stop.load(Ordering::Relaxed) {
        let most = if prng.below(10) == 0 { 600 } else { 16 };
        let blocks = 1 + prng.below(most);
        let (offset, len) = (prng.below(SIZE / 512 - blocks) * 512, blocks * 512);
        let op = match prng.below(8) {
            0 => Op::Discard { offset, len },
            1 => Op::WriteZeroes { offset, len, unmap: prng.below(2) == 0 },
            _ => {
                let buf = virtioblkd::backend::IoBuf::owned(len as usize, 4096, 0);
                let byte = prng.below(256) as u8;
                buf.copy_from(0, &vec![byte; len as usize]);
                Op::Write { offset, buf, durable: false }
            }
        };
        driver.push(op);
        (in_flight, ops) = (in_flight + 1, ops + 1);
        while in_flight == 8 {
            in_flight -= reap(&mut driver);
        }
    }
    while in_flight > 0 {
        in_flight -= reap(&mut driver);
    }
    ops
}

fn reap(driver: &mut Driver) -> usize {
    let done = driver.reap();
    done.iter().for_each(|done| assert_eq!(done.result, Ok(()), "the guest saw an error"));
    done.len()
}

/// The first difference.
pub fn same(seen: &[u8], wanted: &[u8], at: u64) -> Result<(), String> {
    if seen.len() != wanted.len() {
        return Err(format!("{} bytes, not {}", seen.len(), wanted.len()));
    }
    match seen.iter().zip(wanted).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(index) => {
            let byte = at + index as u64;
            Err(format!("byte {byte} (cluster {}) is {}, not {}", byte / CLUSTER, seen[index], wanted[index]))
        }
    }
}
