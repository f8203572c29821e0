//! Who may have the image: the back-end is told before the first ring runs and after the last one has stopped and was
//! synced, not in between; and a guest whose image is refused goes on when it is free.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kit::front_end::*;
use kit::rig::Rig;
use vhost::vhost_user::VhostUserFrontend;
use virtioblkd::backend::mem::{MemBackend, MemOptions};
use virtioblkd::backend::{Backend, Errno, Geometry, ImageClaim, IoQueue};
use virtioblkd::disk::{Disk, Event};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;

/// A RAM disk that notes what it is told, and can be somebody else's.
struct GuardedMapping {
    disk: MemBackend,
    told: Mutex<Vec<&'static str>>,
    taken: AtomicBool,
    active: AtomicBool,
}

impl GuardedMapping {
    fn note(&self, what: &'static str) {
        let mut told = self.told.lock().unwrap();
        // How many syncs there are does not matter.
        if told.last() != Some(&what) {
            told.push(what);
        }
    }

    fn told(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.told.lock().unwrap())
    }
}

impl Backend for GuardedMapping {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        assert!(self.active.load(SeqCst), "a ring runs on an image that is not ours");
        self.disk.open_queue(depth)
    }

    fn sync(&self) -> io::Result<()> {
        self.note("sync");
        self.disk.sync()
    }

    fn describe(&self) -> String {
        self.disk.describe()
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.disk.sync_failed()
    }

    fn claim(&self) -> &dyn ImageClaim {
        self
    }
}

impl ImageClaim for GuardedMapping {
    fn activate(&self) -> io::Result<()> {
        if self.taken.load(SeqCst) {
            return Err(io::Error::other("another host has the image; stop its guest"));
        }
        self.note("activate");
        self.active.store(true, SeqCst);
        Ok(())
    }

    fn activate_for_hold(&self) -> io::Result<bool> {
        self.activate().map(|()| true)
    }

    fn deactivate(&self) {
        self.note("deactivate");
        assert!(self.active.swap(false, SeqCst), "deactivated twice");
    }
}

fn watched() -> (Arc<GuardedMapping>, Rig) {
    let disk = MemBackend::new(MemOptions::new(8 << 20));
    let backend = Arc::new(GuardedMapping {
        disk,
        told: Mutex::default(),
        taken: AtomicBool::new(false),
        active: AtomicBool::new(false),
    });
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 8, queue_size: 256, serial: String::new() };
    (backend.clone(), Rig::on(backend, &options))
}

#[test]
fn the_back_end_is_told_before_the_first_ring_and_after_the_last_sync() {
    let (backend, rig) = watched();
    let mut guest = FrontEnd::handshake(std::os::unix::net::UnixStream::connect(&rig.path).unwrap(), 2, 256, ALL);
    assert_eq!(backend.told(), [""; 0], "no ring runs yet");
    guest.start_ring(0, 0);
    guest.start_ring(1, 0);
    assert_eq!(guest.write(0, 0, &[1; 512]), 0);
    assert_eq!(backend.told(), ["activate"]);
    // Pauses.
    guest.send_memory_table();
    guest.control.set_vring_enable(0, false).unwrap();
    guest.control.set_vring_enable(1, false).unwrap();
    guest.control.set_vring_enable(0, true).unwrap();
    guest.control.set_vring_enable(1, true).unwrap();
    assert_eq!(backend.told(), [""; 0]);
    // One of two stops.
    let base = guest.stop_ring(0);
    assert_eq!(backend.told(), ["sync"], "the other one may run");
    guest.stop_ring(1);
    assert_eq!(backend.told(), ["sync", "deactivate"]);
    // And again.
    guest.restart_ring(0, base, base);
    assert_eq!(guest.read(0, 0, 512), (0, vec![1; 512]));
    assert_eq!(backend.told(), ["activate"]);
    drop(guest);
    rig.disconnected();
    assert_eq!(backend.told(), ["sync", "deactivate"]);
}

#[test]
fn a_guest_whose_image_is_refused_waits_and_goes_on() {
    let (backend, rig) = watched();
    backend.taken.store(true, SeqCst);
    let mut guest = FrontEnd::connect(&rig.path, 2, 256, ALL);
    let trouble = |event| if let Event::ImageState(state) = event { Some(state) } else { None };
    let state = rig.event(trouble);
    assert_eq!(state.trouble.as_deref(), Some("not-ours"));
    assert!(state.trouble_detail.as_deref().unwrap().contains("stop its guest"), "{state:?}");
    assert_eq!(rig.status().image_status, state);
    let slot = guest.add(0, IN, 0, &[], 512);
    guest.kick(0);
    assert_eq!(guest.used_within(0, Duration::from_millis(100)), None);
    assert_eq!(backend.told(), [""; 0]);
    // What another host's guest writes cannot be held from here.
    rig.disk.close_gate(1);
    rig.event(|event| (event == Event::HoldRefused { epoch: 1 }).then_some(()));
    rig.disk.open_gate();
    backend.told();
    backend.taken.store(false, SeqCst);
    assert_eq!(guest.wait(0), (slot, 0), "tried again without the front-end's help");
    assert_eq!(rig.event(trouble).trouble, None);
    // The rings start one after the other.
    assert_eq!(guest.write(1, 0, &[3; 512]), 0);
    assert_eq!(rig.status().rings.len(), 2);
    assert_eq!(backend.told()[0], "activate");
}

/// What else is told the test does not know: how many syncs there are, and when, is no matter.
fn until_told(backend: &GuardedMapping, what: &str) -> Vec<&'static str> {
    let end = std::time::Instant::now() + WAIT_TIMEOUT;
    let mut told = Vec::new();
    while told.last() != Some(&what) {
        assert!(std::time::Instant::now() < end, "{what}: {told:?}");
        std::thread::sleep(Duration::from_millis(1));
        told.extend(backend.told());
    }
    told
}

#[test]
fn a_held_disk_keeps_its_image_until_it_is_resumed() {
    let (backend, rig) = watched();
    // Without a guest.
    assert!(rig.hold(1).is_ok());
    assert_eq!(backend.told(), ["activate", "sync"]);
    rig.disk.open_gate();
    assert_eq!(until_told(&backend, "deactivate"), ["deactivate"]);
    // The guest leaves while it is held.
    let mut guest = FrontEnd::connect(&rig.path, 1, 256, ALL);
    assert!(rig.hold(2).is_ok());
    let base = guest.stop_ring(0);
    assert!(backend.active.load(SeqCst), "another host may write what is held");
    // And it comes back: nothing is given up when the hold ends.
    guest.restart_ring(0, base, base);
    rig.disk.open_gate();
    assert_eq!(guest.write(0, 0, &[1; 512]), 0);
    assert!(rig.hold(3).is_ok());
    backend.told();
    drop(guest);
    rig.disconnected();
    rig.disk.open_gate();
    assert_eq!(until_told(&backend, "deactivate"), ["sync", "deactivate"]);
    // A hold that nobody waits for any more.
    for epoch in 4..200 {
        rig.disk.close_gate(epoch);
        if epoch % 3 == 0 {
            std::thread::yield_now();
        }
        rig.disk.open_gate();
    }
    assert!(rig.hold(200).is_ok());
    rig.disk.open_gate();
    until_told(&backend, "deactivate");
    std::thread::sleep(Duration::from_millis(50));
    assert!(!backend.active.load(SeqCst), "nobody uses it: {:?}", backend.told());
}

#[test]
fn a_front_end_that_stops_its_rings_no_longer_waits_for_the_image() {
    let (backend, rig) = watched();
    backend.taken.store(true, SeqCst);
    let mut guest = FrontEnd::connect(&rig.path, 1, 256, ALL);
    assert_eq!(guest.stop_ring(0), 0);
    assert_eq!(rig.status().image_status.trouble, None);
    backend.taken.store(false, SeqCst);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(!backend.told().contains(&"activate"), "nobody wants it");
}
