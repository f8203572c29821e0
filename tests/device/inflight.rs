//! What a server that dies had taken and not answered: the next one does it again, in order, before anything new, and
//! whatever else is in that memory harms nobody but its ring.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kit::front_end::*;
use kit::rig::{Prng, Rig};
use kit::wait::wait_until;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use virtioblkd::backend::Errno;
use virtioblkd::backend::mem::{CompletionOrder, Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::disk::{Disk, Event};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{DeviceOptions, Tuning};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const OK: u8 = 0;
const SIZE: u16 = 64;
const SECTOR: usize = 512;

/// A RAM disk, in the order that `order` says, and the server in front of it.
fn server(order: CompletionOrder) -> (Arc<MemBackend>, Rig) {
    let disk = Arc::new(MemBackend::new(MemOptions { order, ..MemOptions::new(1 << 20) }));
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 2, queue_size: SIZE, serial: String::new() };
    // A server that is dead to the guest must not be woken to look whether its requests hang.
    let tuning = Tuning { stall_after: Duration::from_secs(1000), ..Tuning::default() };
    (disk.clone(), Rig::tuned(disk, &options, &tuning))
}

/// The guest of a front-end that tracks, and the memory that it keeps.
struct Guest {
    front_end: FrontEnd,
    told: VhostUserInflight,
    region: File,
}

fn handshake(rig: &Rig) -> FrontEnd {
    handshake_of(rig, SIZE)
}

fn handshake_of(rig: &Rig, size: u16) -> FrontEnd {
    let mut front_end = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, size, ALL);
    front_end.also(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    front_end
}

impl Guest {
    fn new(rig: &Rig) -> Guest {
        Guest::asking(rig, SIZE, SIZE)
    }

    /// Asks for so many entries, sends that number back as QEMU does (vhost_user_set_inflight_fd), and has a ring of `size`.
    fn asking(rig: &Rig, entries: u16, size: u16) -> Guest {
        let mut front_end = handshake_of(rig, size);
        let wanted = VhostUserInflight { num_queues: 1, queue_size: entries, ..VhostUserInflight::default() };
        let (told, region) = front_end.control.get_inflight_fd(&wanted).unwrap();
        let told = VhostUserInflight { queue_size: entries, ..told };
        let mut guest = Guest { front_end, told, region };
        guest.set_region();
        guest.front_end.start_ring(0, 0);
        guest
    }

    fn set_region(&mut self) {
        use std::os::fd::AsRawFd;
        self.front_end.control.set_inflight_fd(&self.told, self.region.as_raw_fd()).unwrap();
    }

    /// As QEMU does when its server is gone: the same memory and region to the next one, and the used index for a base.
    /// The first server lives on here, with its requests hanging; that is what its death looks like to the guest.
    fn reconnect(&mut self, rig: &Rig) -> FrontEnd {
        let mut front_end = handshake(rig);
        front_end.memory = self.front_end.memory.clone();
        front_end.send_memory_table();
        std::mem::swap(&mut front_end.rings, &mut self.front_end.rings);
        // The first server would take kicks away.
        front_end.rings[0].kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let old = std::mem::replace(&mut self.front_end, front_end);
        self.set_region();
        let ring = &self.front_end.rings[0];
        let used: u16 = self.front_end.memory.read_obj(GuestAddress(ring.used_at().0 + 2)).unwrap();
        let avail = ring.avail;
        self.front_end.restart_ring(0, used, avail);
        old
    }
}

/// Lets what hangs go, so that the first server can end. Dropped before the server is, also by a test that fails.
struct Released(Arc<MemBackend>);

impl Drop for Released {
    fn drop(&mut self) {
        self.0.release(1000);
    }
}

#[test]
fn in_flight_requests_are_resubmitted_in_order_before_new_ones() {
    let (first_disk, first) = server(CompletionOrder::OnRequest);
    let (second_disk, second) = server(CompletionOrder::InOrder);
    let _released = Released(first_disk.clone());
    let mut guest = Guest::new(&first);
    // Some are answered out of the ring's order: the RAM disk answers in order, but GET_ID at once.
    let write = |guest: &mut Guest, sector, byte| guest.front_end.add(0, OUT, sector, &[byte; SECTOR], 0);
    let taken = [write(&mut guest, 0, 1), write(&mut guest, 0, 2), write(&mut guest, 0, 3)];
    let id = guest.front_end.add(0, GET_ID, 0, &[], 20);
    let last = write(&mut guest, 0, 4);
    guest.front_end.kick(0);
    assert_eq!(guest.front_end.wait(0), (id, OK));
    // Its slot, and so its head, is used again; and one answered in the middle makes the heads' order differ.
    let again = write(&mut guest, 8, 5);
    guest.front_end.kick(0);
    assert_eq!(again, id);
    wait_until("the requests are taken", || first_disk.waiting() >= 5);
    first_disk.release(1);
    assert_eq!(guest.front_end.wait(0), (taken[0], OK));
    let _old = guest.reconnect(&second);
    let answered: Vec<_> = (0..4).map(|_| guest.front_end.wait(0)).collect();
    assert_eq!(answered, [(taken[1], OK), (taken[2], OK), (last, OK), (again, OK)]);
    assert_eq!(second_disk.volatile_image()[..SECTOR], [4; SECTOR], "the last one is the last one");
    assert_eq!(second_disk.counts().writes, 4);
    assert_eq!(guest.front_end.read(0, 8, SECTOR as u32), (OK, vec![5; SECTOR]), "and it goes on");
}

#[test]
fn blocked_requests_are_not_marked_in_flight() {
    let (first_disk, first) = server(CompletionOrder::OnRequest);
    let (second_disk, second) = server(CompletionOrder::InOrder);
    let _released = Released(first_disk.clone());
    let mut guest = Guest::new(&first);
    let taken = guest.front_end.add(0, OUT, 0, &[1; SECTOR], 0);
    guest.front_end.kick(0);
    wait_until("the requests are taken", || first_disk.waiting() >= 1);
    first.disk.close_gate(1);
    let held = guest.front_end.add(0, OUT, 8, &[2; SECTOR], 0);
    guest.front_end.kick(0);
    wait_until("the write is blocked", || first.status().rings[0].held);
    // The operator holds the next server, too, before the front-end comes.
    assert!(second.hold(1).is_ok());
    let _old = guest.reconnect(&second);
    assert_eq!(guest.front_end.used_within(0, Duration::from_millis(200)), None);
    assert_eq!(second_disk.counts().writes, 0, "a held disk was changed by what an earlier server owed");
    // Stopped and started while it is held: nothing is lost.
    let base = guest.front_end.stop_ring(0);
    let avail = guest.front_end.rings[0].avail;
    guest.front_end.restart_ring(0, base, avail);
    assert_eq!(guest.front_end.used_within(0, Duration::from_millis(100)), None);
    second.disk.open_gate();
    assert_eq!([guest.front_end.wait(0), guest.front_end.wait(0)], [(taken, OK), (held, OK)]);
    assert_eq!(second_disk.counts().writes, 2, "each once");
    first.disk.open_gate();
}

/// The server dies with requests in flight, and before the next one comes the guest is reset. QEMU gives the new driver
/// fresh memory; a front-end that does not must not have the new guest's memory written by what the old one asked for.
#[test]
fn requests_of_an_earlier_driver_are_dropped() {
    for keeps_the_region in [false, true] {
        let (first_disk, first) = server(CompletionOrder::OnRequest);
        let (second_disk, second) = server(CompletionOrder::InOrder);
        let _released = Released(first_disk.clone());
        let mut guest = Guest::new(&first);
        let read = guest.front_end.add(0, IN, 0, &[], SECTOR as u32);
        let written = guest.front_end.add(0, OUT, 8, &[1; SECTOR], 0);
        guest.front_end.kick(0);
        wait_until("the requests are taken", || first_disk.waiting() >= 2);
        // The reset: the new driver's ring lies where the old one did, and other things where its buffers were.
        let mine = [0x77; SECTOR];
        let places = [read, written].map(|slot| guest.front_end.data_at(0, slot));
        guest.front_end.reset_ring_memory(0);
        for place in places {
            guest.front_end.memory.write_slice(&mine, place).unwrap();
        }
        let mut front_end = handshake(&second);
        if !keeps_the_region {
            (guest.told, guest.region) = front_end.control.get_inflight_fd(&guest.told).unwrap();
        }
        drop(front_end);
        let _old = guest.reconnect(&second);
        assert_eq!(guest.front_end.used_within(0, Duration::from_millis(100)), None, "{keeps_the_region}");
        let counts = second_disk.counts();
        assert_eq!((counts.reads, counts.writes), (0, 0), "{keeps_the_region}");
        for place in places {
            let mut found = [0; SECTOR];
            guest.front_end.memory.read_slice(&mut found, place).unwrap();
            assert_eq!(found, mine, "{keeps_the_region}");
        }
        // The new driver is served, and tracked: the next server does what it asked for, and only that.
        assert_eq!(guest.front_end.write(0, 16, &[2; SECTOR]), OK);
        assert_eq!(guest.front_end.read(0, 8, SECTOR as u32), (OK, vec![0; SECTOR]));
    }
}

/// The same without a death: a ring that is stopped while an earlier server's requests are held leaves them in the region.
#[test]
fn blocked_requests_of_an_earlier_driver_are_dropped() {
    let (first_disk, first) = server(CompletionOrder::OnRequest);
    let (second_disk, second) = server(CompletionOrder::InOrder);
    let _released = Released(first_disk.clone());
    let mut guest = Guest::new(&first);
    guest.front_end.add(0, OUT, 0, &[1; SECTOR], 0);
    guest.front_end.kick(0);
    wait_until("the requests are taken", || first_disk.waiting() >= 1);
    assert!(second.hold(1).is_ok());
    let _old = guest.reconnect(&second);
    guest.front_end.stop_ring(0);
    // The driver is reset; the front-end says nothing of a region.
    guest.front_end.reset_ring_memory(0);
    guest.front_end.start_ring(0, 0);
    second.disk.open_gate();
    assert_eq!(guest.front_end.used_within(0, Duration::from_millis(100)), None);
    assert_eq!(second_disk.counts().writes, 0, "the earlier driver's write was done");
    assert_eq!(guest.front_end.write(0, 8, &[2; SECTOR]), OK);
}

#[test]
fn after_an_orderly_restart_nothing_is_resubmitted() {
    let (_, first) = server(CompletionOrder::Shuffled(7));
    let (second_disk, second) = server(CompletionOrder::Shuffled(8));
    let mut guest = Guest::new(&first);
    for round in 0..100u64 {
        for sector in 0..10 {
            guest.front_end.add(0, OUT, sector, &[round as u8; SECTOR], 0);
        }
        guest.front_end.kick(0);
        (0..10).for_each(|_| assert_eq!(guest.front_end.wait(0).1, OK));
    }
    guest.front_end.stop_ring(0);
    let old = guest.reconnect(&second);
    assert_eq!(guest.front_end.read(0, 0, SECTOR as u32).0, OK);
    assert_eq!(second_disk.counts().writes, 0);
    drop(old);
}

#[test]
fn a_region_for_more_rings_than_allowed_is_refused() {
    let (_disk, rig) = server(CompletionOrder::InOrder);
    for (queues, size) in [(3, SIZE), (1, 32769)] {
        let mut front_end = handshake(&rig);
        let wanted = VhostUserInflight { num_queues: queues, queue_size: size, ..VhostUserInflight::default() };
        assert!(front_end.control.get_inflight_fd(&wanted).is_err());
        drop(front_end);
        assert!(rig.disconnected().contains("protocol"));
    }
}

/// Of QEMU's default --queue-size.
fn large_server(order: CompletionOrder) -> (Arc<MemBackend>, Rig) {
    let disk = Arc::new(MemBackend::new(MemOptions { order, ..MemOptions::new(1 << 20) }));
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 2, queue_size: 1024, serial: String::new() };
    let tuning = Tuning { stall_after: Duration::from_secs(1000), ..Tuning::default() };
    (disk.clone(), Rig::tuned(disk, &options, &tuning))
}

/// QEMU 10.0.13 (Debian 13) asks for entries for its queue-size, 128, and sends that number back; then its firmware sets up
/// a ring of 256 descriptors and its Linux, after a reset, one of 1024.
#[test]
fn a_ring_larger_than_its_front_end_asked_for_runs_and_is_tracked() {
    let (_, firmware) = large_server(CompletionOrder::InOrder);
    for size in [256, 1024] {
        let (first_disk, first) = large_server(CompletionOrder::OnRequest);
        let (second_disk, second) = large_server(CompletionOrder::InOrder);
        let _released = Released(first_disk.clone());
        let mut guest = Guest::asking(&first, 128, size);
        // Heads beyond those asked for, too.
        let taken: Vec<u16> = (0..60).map(|sector| guest.front_end.add(0, OUT, sector, &[7; SECTOR], 0)).collect();
        assert!(taken.iter().any(|slot| slot * 4 >= 128));
        guest.front_end.kick(0);
        wait_until("the requests are taken", || first_disk.waiting() >= 60);
        assert!(!first.status().rings[0].untracked);
        let _old = guest.reconnect(&second);
        let answered: Vec<u16> = (0..60).map(|_| guest.front_end.wait(0).0).collect();
        assert_eq!(answered, taken);
        assert_eq!(second_disk.counts().writes, 60, "each once");
        assert!(!second.status().rings[0].untracked);
        guest.front_end.stop_ring(0);
        // The other order: what serves the firmware serves the reset driver.
        let mut guest = Guest::asking(&firmware, 128, size);
        assert_eq!(guest.front_end.write(0, 0, &[1; SECTOR]), OK);
    }
}

/// A region that another server made for smaller rings: the ring is served all the same, and the status says that it is
/// not tracked.
#[test]
fn a_ring_that_does_not_fit_the_region_of_another_server_is_served() {
    use std::os::fd::AsRawFd;
    let (_disk, rig) = large_server(CompletionOrder::InOrder);
    // 16 bytes a ring, 16 a descriptor (libvhost-user's vu_inflight_queue_size).
    let told = VhostUserInflight { mmap_size: 2112, mmap_offset: 0, num_queues: 1, queue_size: 128 };
    let region = bookkeeping(4096, rustix::fs::MemfdFlags::empty());
    let mut front_end = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, 1024, ALL);
    front_end.also(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    front_end.control.set_inflight_fd(&told, region.as_raw_fd()).unwrap();
    front_end.start_ring(0, 0);
    for sector in 0..200 {
        assert_eq!(front_end.write(0, sector, &[3; SECTOR]), OK);
    }
    assert!(rig.status().rings[0].untracked);
    let base = front_end.stop_ring(0);
    let avail = front_end.rings[0].avail;
    front_end.restart_ring(0, base, avail);
    assert_eq!(front_end.read(0, 0, SECTOR as u32), (OK, vec![3; SECTOR]));
    // A reset: a region of our own is large enough.
    let wanted = VhostUserInflight { num_queues: 1, queue_size: 128, ..VhostUserInflight::default() };
    front_end.stop_ring(0);
    let (told, region) = front_end.control.get_inflight_fd(&wanted).unwrap();
    front_end.control.set_inflight_fd(&told, region.as_raw_fd()).unwrap();
    front_end.reset_ring_memory(0);
    front_end.start_ring(0, 0);
    assert_eq!(front_end.read(0, 0, SECTOR as u32), (OK, vec![3; SECTOR]));
    assert!(!rig.status().rings[0].untracked);
}

#[test]
fn garbage_in_the_region_harms_its_ring_only() {
    let (_disk, rig) = server(CompletionOrder::InOrder);
    let mut prng = Prng::new(5);
    let mut stopped = 0;
    for round in 0..200 {
        let mut guest = Guest::new(&rig);
        assert_eq!(guest.front_end.write(0, 0, &[1; SECTOR]), OK);
        let used = guest.front_end.stop_ring(0);
        let len = usize::try_from(guest.told.mmap_size).unwrap();
        let mut bytes = vec![0; len];
        guest.region.read_exact_at(&mut bytes, 0).unwrap();
        // All of it, or only the marks and the orders.
        let from = if round % 2 == 0 { 0 } else { 16 };
        bytes[from..].iter_mut().for_each(|byte| *byte = prng.below(if round % 4 < 2 { 256 } else { 3 }) as u8);
        guest.region.write_all_at(&bytes, 0).unwrap();
        // A driver that waits for nothing is owed nothing.
        (0..8).for_each(|_| _ = guest.front_end.add(0, IN, 0, &[], SECTOR as u32));
        let avail = guest.front_end.rings[0].avail;
        guest.front_end.restart_ring(0, used, avail);
        // It may answer heads that nobody asked for, or nothing at all; the server lives.
        guest.front_end.kick(0);
        guest.front_end.used_within(0, Duration::from_millis(5));
        guest.front_end.stop_ring(0);
        drop(guest);
        rig.event(|event| match event {
            Event::ProtocolError(_) => {
                stopped += 1;
                None
            }
            Event::Disconnected(_) => Some(()),
            _ => None,
        });
    }
    assert!(stopped > 20, "{stopped} rings were stopped");
    let mut good = Guest::new(&rig);
    assert_eq!(good.front_end.write(0, 0, &[1; SECTOR]), OK);
}

const STEPS: usize = 80;
/// Slots of a ring of 64 descriptors, less some.
const MAX_ASKED: usize = 12;

/// One ring through the deaths of its servers, its operator's holds, failures, stops and resets, in an order drawn at
/// random.
struct Walk {
    prng: Prng,
    guest: Guest,
    /// What was made available and not answered, by slot: its kind.
    asked: BTreeMap<u16, u32>,
    /// The hold's epoch, and the writes that the disk had when it was still.
    held: Option<u64>,
    epochs: u64,
    /// A failure of such a kind was planted into this server's disk.
    fails: bool,
    old: Vec<FrontEnd>,
    /// Those that died, and the one that serves.
    servers: Vec<(Released, Arc<MemBackend>, Rig)>,
}

impl Walk {
    fn new(seed: u64) -> Walk {
        let (disk, rig) = server(CompletionOrder::OnRequest);
        let guest = Guest::new(&rig);
        Walk {
            prng: Prng::new(seed),
            guest,
            asked: BTreeMap::new(),
            held: None,
            epochs: 0,
            fails: false,
            old: Vec::new(),
            servers: vec![(Released(disk.clone()), disk, rig)],
        }
    }

    fn disk(&self) -> Arc<MemBackend> {
        self.servers[self.servers.len() - 1].1.clone()
    }

    fn rig(&self) -> &Rig {
        &self.servers[self.servers.len() - 1].2
    }

    fn step(&mut self) {
        match self.prng.below(20) {
            0..=8 => self.ask(),
            9..=12 => self.disk().release(1 + self.prng.below(4)),
            13 => self.plant(),
            14 => self.hold(),
            15 => self.let_go(),
            16 => self.stop(false),
            17 => self.stop(true),
            18 => self.die(),
            _ => self.guest.front_end.kick(0),
        }
        self.collect();
    }

    fn ask(&mut self) {
        if self.asked.len() == MAX_ASKED {
            return;
        }
        let front_end = &mut self.guest.front_end;
        let sector = self.prng.below(64);
        let (kind, slot) = match self.prng.below(4) {
            0 => (IN, front_end.add(0, IN, sector, &[], SECTOR as u32)),
            1 => (FLUSH, front_end.add(0, FLUSH, 0, &[], 0)),
            _ => (OUT, front_end.add(0, OUT, sector, &[7; SECTOR], 0)),
        };
        assert_eq!(self.asked.insert(slot, kind), None, "a slot that is in use was free");
        if self.prng.below(3) > 0 {
            front_end.kick(0);
        }
    }

    /// Each answer is one that is owed, and right.
    fn collect(&mut self) {
        while let Some((head, _)) = self.guest.front_end.used(0) {
            let slot = (head / 4) as u16;
            let kind = self.asked.remove(&slot).expect("answered once, and only if asked");
            let status = self.guest.front_end.status(0, slot);
            assert!(status == OK || (self.fails && status == 1), "kind {kind}: status {status}");
            self.guest.front_end.give_back(0, slot);
        }
    }

    fn plant(&mut self) {
        let op = [MemOp::Write, MemOp::Read][self.prng.below(2) as usize];
        self.disk().fail(Fault { op, nth: 1 + self.prng.below(3), errno: Errno(libc::EIO), transferred: 0 });
        self.fails = true;
    }

    /// `work`, which waits for what is in flight.
    fn while_released<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let (disk, over) = (self.disk(), Arc::new(AtomicBool::new(false)));
        let until = over.clone();
        let releasing = std::thread::spawn(move || {
            while !until.load(Ordering::Acquire) {
                disk.release(16);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let result = work(self);
        over.store(true, Ordering::Release);
        releasing.join().unwrap();
        result
    }

    fn hold(&mut self) {
        if self.held.is_none() {
            self.epochs += 1;
            let epoch = self.epochs;
            self.while_released(|walk| walk.rig().hold(epoch).expect("a hold"));
            self.held = Some(self.disk().counts().writes);
        }
    }

    fn let_go(&mut self) {
        if let Some(writes) = self.held.take() {
            assert_eq!(self.disk().counts().writes, writes, "a held disk was written");
            self.rig().disk.open_gate();
        }
    }

    /// GET_VRING_BASE, and on; or a driver that is reset and begins anew.
    fn stop(&mut self, reset: bool) {
        let base = self.while_released(|walk| walk.guest.front_end.stop_ring(0));
        self.collect();
        let avail = self.guest.front_end.rings[0].avail;
        // What a hold keeps from being done again stays marked, and counts as taken.
        if self.held.is_none() {
            assert_eq!(usize::from(avail.wrapping_sub(base)), self.asked.len(), "taken and not answered");
        }
        if reset {
            self.asked.clear();
            self.guest.front_end.reset_ring_memory(0);
            self.guest.front_end.start_ring(0, 0);
        } else {
            self.guest.front_end.restart_ring(0, base, avail);
        }
    }

    /// The server dies, and the next one goes on with an image of its own. The dead one lives on here, so first it must
    /// have nothing left to do.
    fn die(&mut self) {
        self.guest.front_end.kick(0);
        let (end, mut still) = (Instant::now() + WAIT_TIMEOUT, (0, None));
        while still.0 < 3 {
            let (ring, waiting) = (self.rig().status().rings[0].clone(), self.disk().waiting());
            let front_end = &self.guest.front_end;
            let used: u16 = front_end.memory.read_obj(GuestAddress(front_end.rings[0].used_at().0 + 2)).unwrap();
            let open = u64::from(front_end.rings[0].avail.wrapping_sub(used));
            let has_all = ring.in_flight == open || ring.held;
            let now = (has_all && (waiting > 0 || ring.in_flight == 0)).then_some((ring.in_flight, waiting, used));
            still = if now.is_some() && now == still.1 { (still.0 + 1, now) } else { (0, now) };
            assert!(Instant::now() < end, "it does not take what is available: {ring:?}, {waiting} of {open}");
            std::thread::sleep(Duration::from_micros(300));
        }
        self.collect();
        let (disk, rig) = server(CompletionOrder::OnRequest);
        self.old.push(self.guest.reconnect(&rig));
        self.servers.push((Released(disk.clone()), disk, rig));
        (self.held, self.fails) = (None, false);
    }

    /// Nothing is owed any more, and the ring is as good as new.
    fn end(mut self) {
        self.let_go();
        self.guest.front_end.kick(0);
        let end = Instant::now() + WAIT_TIMEOUT;
        while !self.asked.is_empty() {
            self.disk().release(16);
            self.collect();
            assert!(Instant::now() < end, "never answered: {:?}", self.asked);
        }
        // A failure that was planted and not met yet may meet these.
        let answers = self.while_released(|walk| [1, 2].map(|byte| walk.guest.front_end.write(0, 0, &[byte; SECTOR])));
        assert!(answers.iter().all(|&status| status == OK || self.fails), "{answers:?}");
    }
}

#[test]
fn requests_in_any_order_are_completed_once() {
    for seed in 1..=40 {
        let mut walk = Walk::new(seed);
        (0..STEPS).for_each(|_| walk.step());
        walk.end();
    }
}
