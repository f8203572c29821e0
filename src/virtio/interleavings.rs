//! Runs a disk in many orders of its threads: a guest that writes and kicks, an operator that holds and releases the disk, a
//! front-end that stops and starts the ring meanwhile, an upgrade that pauses it. All but the storage is the real code.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::blk::features;
use super::blk::request::{ID_BYTES, OK};
use super::options::Tuning;
use super::rings::Rings;
use super::rings::StopMode;
use super::shared_memory::memory_table::MemoryTable;
use super::shared_memory::sigbus::SessionSocket;
use super::vhost_user::activation::Activation;
use super::vhost_user::vring::{RingContext, Vring};
use super::virtqueue::split_ring::RingAddresses;
use crate::backend::null::NullBackend;
use crate::backend::{Backend, Errno, Geometry, ImageClaim, IoQueue};
use crate::base::sync::interleavings::{Mutant, holds};
use crate::base::sync::thread;
use crate::base::sync::{EventNotifier, yield_until_readable};
use crate::disk::{Disk, Event, Events};
use crate::engine::CacheMode;

const SIZE: u16 = 4;
const WRITES: u16 = 3;
/// Guest memory: the ring's parts, then header, data and status byte of the one request that is in flight.
const MEMORY: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const DATA: u64 = 0x3200;
const STATUS: u64 = 0x3100;
const NEXT: u64 = 1 << 32;
const WRITE: u64 = 2 << 32;

/// What the thread of the front-end uses.
struct FrontEnd {
    rings: Arc<Rings>,
    memory: MemoryTable,
    activation: Activation,
    queue: Vring,
    kick: Arc<EventNotifier>,
    _peer: UnixStream,
}

impl FrontEnd {
    fn new(rings: Arc<Rings>) -> FrontEnd {
        let (wire, peer) = SessionSocket::pair();
        let mut memory = MemoryTable::new(wire);
        let file: File = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(MEMORY).unwrap();
        let region = VhostUserMemoryRegion { guest_phys_addr: 0, memory_size: MEMORY, user_addr: 0, mmap_offset: 0 };
        memory.replace(&[region], vec![file]).unwrap();
        let queue = Vring::new(0, SIZE, true);
        let kick = Arc::new(EventNotifier::new().unwrap());
        FrontEnd { rings, memory, activation: Activation::default(), queue, kick, _peer: peer }
    }

    fn change(&mut self, change: impl FnOnce(&mut super::worker::stopped_ring::StoppedRing)) {
        let context = RingContext {
            rings: &self.rings,
            memory: &self.memory,
            activation: &self.activation,
            inflight: None,
            log: None,
            acked_features: features::PROTOCOL_FEATURES,
            serial: &Arc::new([0; ID_BYTES]),
            max_segments: 1,
        };
        self.queue.change(&context, change);
    }

    fn start(&mut self) {
        let kick = File::from(self.kick.as_fd().try_clone_to_owned().unwrap());
        self.change(|ring| {
            ring.addresses = Some(RingAddresses { descriptors: 0, available: AVAIL, used: USED });
            ring.kick = Some(kick);
        });
    }
}

/// Writes one sector after the other, each when the one before is completed.
fn guest(memory: &GuestMemoryMmap, kick: &EventNotifier) {
    let put = |value: u64, at: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    let parts = [(HEADER, 16 | NEXT), (DATA, 512 | NEXT), (STATUS, 1 | WRITE)];
    for (entry, (address, rest)) in (0u64..).zip(parts) {
        put(address, entry * 16);
        put(rest | (entry + 1) << 48, entry * 16 + 8);
    }
    // A write (1) at sector 0.
    put(1, HEADER);
    put(0, HEADER + 8);
    for number in 1..=WRITES {
        memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        memory.write_obj(0u16, GuestAddress(AVAIL + 4 + u64::from((number - 1) % SIZE) * 2)).unwrap();
        memory.write_obj(number, GuestAddress(AVAIL + 2)).unwrap();
        thread::yield_now();
        // A driver does not kick while the device says that it polls (VIRTQ_USED_F_NO_NOTIFY).
        if memory.read_obj::<u16>(GuestAddress(USED)).unwrap() & 1 == 0 {
            kick.notify();
        }
        while completed(memory) != number {
            thread::yield_now();
        }
        assert_eq!(memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), OK);
    }
}

/// The used ring's index.
fn completed(memory: &GuestMemoryMmap) -> u16 {
    memory.read_obj(GuestAddress(USED + 2)).unwrap()
}

/// Holds the disk. Returns when the hold has settled.
fn hold(rings: &Arc<Rings>, events: &Events, wanted: u64) {
    rings.close_gate(wanted);
    let settled = |event: &Event| matches!(event, Event::HoldSettled { epoch, result: Ok(_) } if *epoch == wanted);
    loop {
        yield_until_readable(&[events.as_fd()], None);
        if events.take().events.iter().any(settled) {
            return;
        }
    }
}

/// Holds the disk twice, and checks that no write completes while it is held.
fn operator(rings: &Arc<Rings>, events: &Events, memory: &GuestMemoryMmap) {
    for epoch in 1..=2 {
        hold(rings, events, epoch);
        let before = completed(memory);
        for _ in 0..10 {
            thread::yield_now();
        }
        assert_eq!(completed(memory), before, "a write completed while the disk was held");
        rings.open_gate();
    }
}

/// A disk. `poll_max`: how long its workers poll. Any time is long enough for some steps of the other threads.
fn disk(poll_max: Duration) -> (Arc<Rings>, Arc<Events>) {
    disk_on(Arc::new(null()), poll_max)
}

fn null() -> NullBackend {
    NullBackend::new(1 << 20, 512)
}

fn disk_on(backend: Arc<dyn Backend>, poll_max: Duration) -> (Arc<Rings>, Arc<Events>) {
    let events = Arc::new(Events::new().unwrap());
    let tuning = Tuning { stall_after: Duration::from_secs(1000), poll_max, ..Tuning::default() };
    let rings = Rings::new(backend, CacheMode::Writeback, events.clone(), tuning);
    (rings, events)
}

/// A ring that stops just when a hold begins may have obeyed its last command. The hold must not wait for it.
fn stop_under_a_hold() {
    let (rings, events) = disk(Duration::ZERO);
    let mut front_end = FrontEnd::new(rings.clone());
    front_end.start();
    let of_operator = rings.clone();
    let operator = thread::spawn(move || hold(&of_operator, &events, 1));
    front_end.queue.pause(&rings, StopMode::Final);
    operator.join().unwrap();
}

/// An image that other hosts may use while this process has not claimed it.
struct SharedImage {
    disk: NullBackend,
    ours: AtomicBool,
}

impl Backend for SharedImage {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn open_queue(&self, depth: usize) -> std::io::Result<Box<dyn IoQueue>> {
        assert!(self.ours.load(SeqCst), "a ring runs on an image that is not claimed");
        self.disk.open_queue(depth)
    }

    fn sync(&self) -> std::io::Result<()> {
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

impl ImageClaim for SharedImage {
    fn activate(&self) -> std::io::Result<()> {
        self.ours.store(true, SeqCst);
        Ok(())
    }

    fn activate_for_hold(&self) -> std::io::Result<bool> {
        self.activate().map(|()| true)
    }

    fn deactivate(&self) {
        assert!(self.ours.swap(false, SeqCst), "released twice");
    }
}

/// A guest comes and goes while an operator holds and releases the disk. The image is claimed while the disk is held, and
/// released when it has no user.
fn image_that_others_want() {
    let image = Arc::new(SharedImage { disk: null(), ours: AtomicBool::new(false) });
    let (rings, events) = disk_on(image.clone(), Duration::ZERO);
    let mut front_end = FrontEnd::new(rings.clone());
    let (of_operator, held) = (rings.clone(), image.clone());
    let operator = thread::spawn(move || {
        for epoch in 1..=2 {
            hold(&of_operator, &events, epoch);
            for _ in 0..10 {
                assert!(held.ours.load(SeqCst), "another host may write what is held");
                thread::yield_now();
            }
            of_operator.open_gate();
        }
    });
    for _ in 0..2 {
        front_end.start();
        front_end.queue.pause(&rings, StopMode::Final);
        front_end.activation.release(&rings);
    }
    operator.join().unwrap();
    // The threads of holds that ended release the image.
    while image.ours.load(SeqCst) {
        thread::yield_now();
    }
}

/// A worker that polls, and that only the guest wakes.
fn polled_ring() {
    let (rings, _events) = disk(Duration::from_nanos(1));
    let mut front_end = FrontEnd::new(rings.clone());
    let (kick, memory) = (front_end.kick.clone(), front_end.memory.pin());
    front_end.start();
    thread::spawn(move || guest(&memory, &kick)).join().unwrap();
    front_end.queue.pause(&rings, StopMode::Final);
}

/// A disk whose guest writes while an operator holds it. `meanwhile`: what the thread of the front-end does in that time.
fn disk_under_holds(poll_max: Duration, meanwhile: impl FnOnce(&mut FrontEnd, &GuestMemoryMmap)) {
    let (rings, events) = disk(poll_max);
    let mut front_end = FrontEnd::new(rings.clone());
    let memory = front_end.memory.pin();
    let (kick, of_guest, of_operator) = (front_end.kick.clone(), memory.clone(), memory.clone());
    let guest = thread::spawn(move || guest(&of_guest, &kick));
    let held = rings.clone();
    let operator = thread::spawn(move || operator(&held, &events, &of_operator));
    front_end.start();
    meanwhile(&mut front_end, &memory);
    guest.join().unwrap();
    operator.join().unwrap();
    front_end.queue.pause(&rings, StopMode::Final);
    assert_eq!(rings.status().total.writes, u64::from(WRITES));
}

fn restarts(front_end: &mut FrontEnd, _: &GuestMemoryMmap) {
    for _ in 0..2 {
        thread::yield_now();
        front_end.change(|_| ());
    }
}

/// Upgrades in place that are abandoned: the first while the ring is paused, the second before the ring has paused, the
/// third after the ring has stopped, which then starts again.
fn pauses(front_end: &mut FrontEnd, memory: &GuestMemoryMmap) {
    for upgrade in 1..=3 {
        thread::yield_now();
        let pause = front_end.queue.request_pause().expect("it runs");
        if upgrade != 2 {
            pause.recv().expect("it pauses");
            let before = completed(memory);
            for _ in 0..10 {
                thread::yield_now();
            }
            assert_eq!(completed(memory), before, "a write completed while the ring was paused");
        }
        if upgrade == 3 {
            front_end.change(|_| ());
        }
        // This command also goes to a ring that has just started, or did not pause.
        front_end.queue.request_resume().expect("it runs").recv().expect("it resumes");
    }
}

#[test]
fn every_write_completes_and_every_hold_settles() {
    use Mutant::*;
    let sleeping = || disk_under_holds(Duration::ZERO, restarts);
    holds(sleeping, &[NotifyBeforeMessage, OneCommandPerWakeUp, StartsUnblocked, GateStaysOpen, IgnoresResume]);
}

#[test]
fn a_polling_worker_misses_no_request() {
    holds(polled_ring, &[Mutant::SleepsWithoutCheck]);
    holds(|| disk_under_holds(Duration::from_nanos(1), restarts), &[]);
}

#[test]
fn a_hold_does_not_wait_for_a_ring_that_stopped() {
    holds(stop_under_a_hold, &[Mutant::HoldAwaitsStoppedRing]);
}

#[test]
fn an_image_is_claimed_while_it_is_held_and_no_longer_than_it_is_used() {
    holds(image_that_others_want, &[Mutant::ReleasesHeldImage, Mutant::NeverReleasesImage]);
}

#[test]
fn a_ring_that_is_asked_to_pause_does_so_and_misses_nothing() {
    use Mutant::*;
    holds(|| disk_under_holds(Duration::ZERO, pauses), &[PopsWhilePaused, StopsAfterResume, OneCommandPerWakeUp]);
    holds(|| disk_under_holds(Duration::from_nanos(1), pauses), &[]);
}
