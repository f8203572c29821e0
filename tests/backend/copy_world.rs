//! A disk of which the tests of copies make copies: over a RAM disk or a file, with a target that fails or hangs.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use kit::backend::{Driver, eventually};
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::backend::point_in_time::{CopyStep, PointInTime, ScratchOptions, TargetHook, Tuning};
use virtioblkd::backend::{Backend, IoBuf, Op, OpId};
use virtioblkd::disk::{Copies, CopyOptions, CopyStatus, Event, Events};

pub(super) const CLUSTER: u64 = 64 << 10;

/// A disk of which copies can be made, and where they go.
pub(super) struct World {
    pub(super) disk: Arc<PointInTime>,
    pub(super) events: Arc<Events>,
    pub(super) dir: tempfile::TempDir,
}

impl World {
    pub(super) fn new(image: Arc<dyn Backend>, tuning: Tuning) -> World {
        let events = Arc::new(Events::new().expect("an eventfd"));
        let disk = Arc::new(PointInTime::with_tuning(image, Arc::clone(&events), tuning));
        World { disk, events, dir: tempfile::tempdir_in("/dev/shm").expect("a directory") }
    }

    pub(super) fn mem(order: CompletionOrder, tuning: Tuning) -> (World, Arc<MemBackend>) {
        let mem = Arc::new(MemBackend::new(MemOptions { order, ..MemOptions::new(2 << 20) }));
        (World::new(mem.clone(), tuning), mem)
    }

    pub(super) fn target(&self) -> PathBuf {
        self.dir.path().join("copy.img")
    }

    pub(super) fn prepare(&self, bandwidth: u64) -> String {
        let options = CopyOptions { target: self.target(), bandwidth, digest: false };
        self.disk.prepare(&options).expect("a prepared copy")
    }

    pub(super) fn status(&self, copy: &str) -> CopyStatus {
        self.disk.status().into_iter().find(|status| status.copy == copy).expect("the copy is known")
    }

    /// Waits for its event, which says the same as its status.
    pub(super) fn wait_ended(&self, copy: &str) -> CopyStatus {
        let mut ended = None;
        eventually("the copy's end", || {
            for event in self.events.take().events {
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

    pub(super) fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).expect("the directory");
        names.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name")).collect()
    }
}

/// All of the image, as a reader sees it.
pub(super) fn contents(disk: &dyn Backend) -> Vec<u8> {
    let size = disk.geometry().size as usize;
    let mut driver = Driver::new(disk, 1);
    (0..size)
        .step_by(1 << 20)
        .flat_map(|at| driver.read(at as u64, (size - at).min(1 << 20)).expect("a read"))
        .collect()
}

/// The first difference, as a message.
pub(super) fn same(what: &str, seen: &[u8], wanted: &[u8]) -> Result<(), String> {
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

/// A slow target, little memory, and a scratch of `size` bytes in which every so many'th store fails; `loads` counts
/// what was read back.
pub(super) fn with_scratch(size: u64, fails: u32, loads: &Arc<AtomicU32>) -> (Tuning, tempfile::TempDir) {
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

/// Starts a copy of a disk on which nothing is in flight.
pub(super) fn started(world: &World, bandwidth: u64) -> String {
    let copy = world.prepare(bandwidth);
    world.disk.start(&copy).expect("nothing is in flight");
    copy
}

pub(super) fn failing_at(step: CopyStep, nth: u32, errno: i32) -> Tuning {
    let seen = AtomicU32::new(0);
    let hook = move |now| {
        let fails = now == step && seen.fetch_add(1, Ordering::Relaxed) + 1 == nth;
        if fails { Err(io::Error::from_raw_os_error(errno)) } else { Ok(()) }
    };
    Tuning { hook: Some(Arc::new(hook)), ..Tuning::default() }
}

/// A block of every cluster is overwritten while the copy runs or fails; all of it must succeed.
pub(super) fn write_everywhere(disk: &PointInTime) {
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
pub(super) fn fill(mem: &MemBackend) {
    let mut driver = Driver::new(mem, 1);
    (0..2).for_each(|at| driver.write(at << 20, &[1; 1 << 20]).expect("a write"));
}

/// A hook that keeps every write to the target waiting until the sender is dropped.
pub(super) fn hanging_target() -> (mpsc::Sender<()>, TargetHook) {
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
