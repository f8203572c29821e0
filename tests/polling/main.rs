//! A ring's thread that looks for work before it sleeps (`--poll-max-ns`): nothing is missed, nothing waits for the
//! guest to pause, and a guest that is idle costs nothing.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use kit::driver::{ALL, Driver};
use kit::rig;
use kit::rig::Rig;
use kit::wait::wait_until;
use virtioblkd::backend::Backend;
use virtioblkd::backend::mem::{MemBackend, MemOptions};
use virtioblkd::backend::null::NullBackend;
use virtioblkd::disk::Disk;
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{DeviceOptions, Tuning};

const SIZE: u64 = 1 << 20;
/// The longest that can be asked for.
const LONG: Duration = Duration::from_millis(1);

/// One test at a time: the rings' threads of the process are those of its rig, and it has the processor.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    // Another test's failure is its own.
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn rig(backend: Arc<dyn Backend>, poll_max: Duration) -> Rig {
    let options = DeviceOptions { mode: CacheMode::Writeback, num_queues: 1, queue_size: 128, serial: String::new() };
    Rig::tuned(backend, &options, &Tuning { poll_max, ..Tuning::default() })
}

#[test]
fn every_request_is_answered_whenever_it_comes() {
    let _turn = alone();
    let disk = Arc::new(MemBackend::new(MemOptions::new(SIZE)));
    let rig = rig(disk, Duration::from_micros(30));
    let mut driver = Driver::connect(&rig.path, 1, 128, 4096, ALL).unwrap();
    let mut prng = rig::Prng::new(3);
    for round in 0..3000u64 {
        // Before the look, in it, about its end, and long after it.
        let (pause, start) = (Duration::from_micros(prng.below(90)), Instant::now());
        while start.elapsed() < pause {
            std::hint::spin_loop();
        }
        let page = (round % 16) * 4096;
        driver.fill(0, &[round as u8; 4096]);
        assert_eq!(driver.one(0, |driver, id| driver.write(0, page, 0, 4096, id)), 0);
        assert_eq!(driver.one(0, |driver, id| driver.read(0, page, 0, 4096, id)), 0);
        assert_eq!(driver.fetch(0, 4096), [round as u8; 4096]);
    }
    let total = rig.status().total;
    assert_eq!((total.reads, total.writes), (3000, 3000));
    assert!(total.polled > 0, "it never found work by looking");
}

#[test]
fn an_operator_is_heard_though_the_guest_never_pauses() {
    let _turn = alone();
    let rig = rig(Arc::new(NullBackend::new(SIZE, 512)), LONG);
    let mut driver = Driver::connect(&rig.path, 1, 128, 4096, ALL).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Reads are answered under a hold too. The ring never runs dry: a new one for each that is done.
            (0..32).for_each(|id| driver.read(0, 0, 0, 4096, id));
            driver.kick(0);
            while !is_over.load(Relaxed) {
                for (id, result) in driver.completed(0) {
                    assert_eq!(result, 0);
                    driver.read(0, 0, 0, 4096, id);
                    driver.kick(0);
                }
            }
        });
        for epoch in 1..50 {
            rig.hold(epoch).expect("a hold");
            rig.disk.open_gate();
        }
        is_over.store(true, Relaxed);
    });
}

#[test]
fn an_idle_guest_costs_nothing() {
    let _turn = alone();
    let rig = rig(Arc::new(NullBackend::new(SIZE, 512)), LONG);
    let mut driver = Driver::connect(&rig.path, 1, 128, 4096, ALL).unwrap();
    assert_eq!(driver.one(0, |driver, id| driver.read(0, 0, 0, 4096, id)), 0);
    // The look is over when a millisecond is; on a loaded machine the thread may not have run yet.
    wait_until("the ring's thread sleeps", || {
        let before = rings_cpu_time();
        std::thread::sleep(Duration::from_millis(500));
        rings_cpu_time() == before
    });
}

/// Nanoseconds of processor time that rings used so far.
fn rings_cpu_time() -> u64 {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap().path());
    let is_ring =
        |thread: &PathBuf| std::fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.starts_with("ring"));
    let rings: Vec<PathBuf> = threads.filter(is_ring).collect();
    assert_eq!(rings.len(), 1, "{rings:?}");
    let figures = std::fs::read_to_string(rings[0].join("schedstat")).unwrap();
    figures.split(' ').next().unwrap().parse().unwrap()
}
