//! One driver after another on the same disk, as vhost-user sees it: each is served by its own features and its own
//! number of queues, whoever was there before, and memory comes and goes under requests. (What an earlier driver had
//! asked for is in `tests/device/inflight.rs`.)

use std::collections::BTreeMap;
use std::sync::Arc;

use kit::backend::open_file_or_skip;
use kit::front_end::*;
use kit::rig::{Prng, Rig};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtioblkd::backend::DurableWrite;
use virtioblkd::backend::file::{FileOptions, Locking};
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::disk::Disk;
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

const OK: u8 = 0;
const IOERR: u8 = 1;
const SIZE: u64 = 4 << 20;
const SECTOR: usize = 512;

fn options(mode: CacheMode) -> DeviceOptions {
    DeviceOptions { mode, num_queues: 8, queue_size: 256, serial: String::new() }
}

fn memory_disk(mode: CacheMode, order: CompletionOrder) -> (Arc<MemBackend>, Rig) {
    let disk =
        Arc::new(MemBackend::new(MemOptions { order, durable_write: DurableWrite::Emulate, ..MemOptions::new(SIZE) }));
    (disk.clone(), Rig::on(disk, &options(mode)))
}

/// As QEMU does when another driver takes the device: every ring is stopped, then the new driver's features, then its
/// rings, from scratch.
fn next_driver(guest: &mut FrontEnd, features: u64, rings: usize) {
    for index in 0..guest.rings.len() {
        guest.stop_ring(index);
    }
    guest.control.set_features(features).unwrap();
    for index in 0..guest.rings.len() {
        guest.reset_ring_memory(index);
    }
    for index in 0..rings {
        guest.start_ring(index, 0);
    }
}

#[test]
fn each_driver_is_served_by_the_features_it_acknowledged() {
    for mode in CacheMode::ALL {
        let (disk, rig) = memory_disk(mode, CompletionOrder::InOrder);
        let mut guest = FrontEnd::connect(&rig.path, 4, 64, ALL);
        let linux = guest.features;
        let firmware = linux & !F_FLUSH;
        // What the mode says, and what it is for a driver that cannot flush.
        let configured = rig.status().write_acknowledged;
        let strictest = if mode == CacheMode::Unsafe { configured.clone() } else { "when durable".to_owned() };
        for turn in 0..6u8 {
            let flushes = turn % 2 == 1;
            if turn < 4 {
                next_driver(&mut guest, if flushes { linux } else { firmware }, if flushes { 4 } else { 1 });
            } else {
                // The same of a front-end that changes the features of running rings.
                guest.control.set_features(if flushes { linux } else { firmware }).unwrap();
            }
            let status = rig.status();
            assert_eq!(
                status.write_acknowledged,
                if flushes { &*configured } else { &*strictest },
                "{mode}, turn {turn}"
            );
            let at = usize::from(turn) * SECTOR;
            assert_eq!(guest.write(0, turn.into(), &[turn + 1; SECTOR]), OK);
            let durable = disk.durable_image()[at] == turn + 1;
            assert_eq!(durable, status.write_acknowledged == "when durable", "{mode}, turn {turn}");
            // Acknowledged by a driver that flushes, and not flushed: what follows must not make it look durable.
            assert_eq!(disk.volatile_image()[at], turn + 1);
        }
        assert_eq!(rig.status().total.errors, 0);
    }
}

/// As many as the front-end has memory for.
const MAX_RINGS: usize = 6;

#[test]
fn the_number_of_queues_changes_under_load() {
    let (_disk, rig) = memory_disk(CacheMode::None, CompletionOrder::Shuffled(3));
    let (mut sent, mut answered) = (0, 0);
    let fill = |guest: &mut FrontEnd, rings: usize, round: usize| {
        for ring in 0..rings {
            for n in 0..12 {
                guest.add(ring, OUT, (ring * 12 + n) as u64, &[round as u8; SECTOR], 0);
            }
            guest.kick(ring);
        }
        (rings * 12) as u64
    };
    // On one connection, with requests in flight when the driver goes.
    let mut guest = FrontEnd::connect(&rig.path, MAX_RINGS, 64, ALL);
    let features = guest.features;
    for (round, rings) in [6, 1, 3, 6, 2, 1, 5].into_iter().enumerate() {
        next_driver(&mut guest, features, rings);
        assert_eq!(rig.status().rings.len(), rings);
        assert_eq!(rig.hold(round as u64 + 1).map(|figures| figures.rings), Ok(rings as u32));
        rig.disk.open_gate();
        sent += fill(&mut guest, rings, round);
        // Some are answered, and others in flight, when the next driver comes.
        for ring in 0..rings {
            assert_eq!(guest.wait(ring).1, OK);
            answered += 1;
        }
    }
    drop(guest);
    rig.disconnected();
    // On one connection after another.
    for (round, rings) in [1, 6, 2, 4].into_iter().enumerate() {
        let mut guest = FrontEnd::connect(&rig.path, rings, 64, ALL);
        assert_eq!(rig.status().rings.len(), rings);
        sent += fill(&mut guest, rings, round);
        for ring in 0..rings {
            (0..12).for_each(|_| assert_eq!(guest.wait(ring).1, OK));
            answered += 12;
        }
        drop(guest);
        rig.disconnected();
    }
    let total = rig.status().total;
    assert_eq!((total.errors, total.in_flight), (0, 0));
    // What a driver put into its ring and nobody had taken yet is lost with it; nothing is done twice.
    assert!((answered..=sent).contains(&total.writes), "{} of {sent}, {answered} answered", total.writes);
}

/// Where plugged memory lies, and its size.
const PLUGGED_AT: u64 = 1 << 32;
const PLUGGED: u64 = 64 << 10;

/// A DIMM's worth of memory that a front-end adds.
struct Plugged {
    region: GuestRegionMmap,
}

impl Plugged {
    fn new(number: u64) -> Plugged {
        let file: std::fs::File = rustix::fs::memfd_create("dimm", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(PLUGGED).unwrap();
        let mapped = MmapRegion::from_file(FileOffset::new(file, 0), PLUGGED as usize).unwrap();
        let region = GuestRegionMmap::new(mapped, GuestAddress(PLUGGED_AT + number * PLUGGED)).unwrap();
        Plugged { region }
    }

    fn told(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo::from_guest_region(&self.region).unwrap()
    }
}

/// A guest with plugged memory, and a model of its disk.
struct Plugging {
    guest: FrontEnd,
    plugged: BTreeMap<u64, Plugged>,
    pages: Vec<u8>,
    prng: Prng,
}

/// A request in flight: what it reads is to be found in these pieces of plugged memory.
struct Asked {
    page: usize,
    read: Option<u8>,
    pieces: Vec<(u64, u64, usize)>,
}

const PAGE: u64 = 4096;
const REQUESTS: u64 = 12;

impl Plugging {
    fn new(rig: &Rig, seed: u64) -> Plugging {
        let guest = FrontEnd::connect(&rig.path, 1, 64, ALL);
        Plugging { guest, plugged: BTreeMap::new(), pages: vec![0; (SIZE / PAGE) as usize], prng: Prng::new(seed) }
    }

    fn plug(&mut self, number: u64) {
        let plugged = Plugged::new(number);
        self.guest.control.add_mem_region(&plugged.told()).unwrap();
        self.plugged.insert(number, plugged);
    }

    fn unplug(&mut self, number: u64) -> Plugged {
        let plugged = self.plugged.remove(&number).unwrap();
        self.guest.control.remove_mem_region(&plugged.told()).unwrap();
        plugged
    }

    fn any(&mut self) -> u64 {
        let at = self.prng.below(self.plugged.len() as u64) as usize;
        *self.plugged.keys().nth(at).unwrap()
    }

    fn base(slot: u64) -> u64 {
        0x80_0000 + slot * PAGE
    }

    /// One page, read or written, in plugged memory; the first request's is across two regions where they lie side by
    /// side. Each slot has its own place.
    fn ask(&mut self, slot: u64) -> Asked {
        let number = self.any();
        let half = PAGE / 2;
        let pieces = if slot == 0 && self.plugged.contains_key(&(number + 1)) {
            vec![(number, PLUGGED - half, half as usize), (number + 1, 0, half as usize)]
        } else {
            vec![(number, (slot + 1) * PAGE, PAGE as usize)]
        };
        let page = (slot + REQUESTS * self.prng.below(SIZE / PAGE / REQUESTS)) as usize;
        let write = self.prng.below(2) == 0;
        let byte = self.prng.below(250) as u8;
        let fill = if write { byte } else { 0xee };
        for (number, offset, len) in &pieces {
            self.plugged[number].region.write_slice(&vec![fill; *len], MemoryRegionAddress(*offset)).unwrap();
        }
        let base = Self::base(slot);
        self.guest.put_header(base, if write { OUT } else { IN }, page as u64 * 8);
        let mut parts = vec![(base, 16, 0)];
        let flags = if write { 0 } else { WRITE };
        parts.extend(
            pieces.iter().map(|(number, offset, len)| (PLUGGED_AT + number * PLUGGED + offset, *len as u32, flags)),
        );
        parts.push((base + 64, 1, WRITE));
        self.guest.put_chain(0, slot as u16 * 4, &parts);
        self.guest.make_available(0, slot as u16 * 4);
        if write {
            self.pages[page] = byte;
        }
        Asked { page, read: (!write).then(|| self.pages[page]), pieces }
    }
}

impl Plugging {
    /// What a piece of plugged memory holds.
    fn found(&self, region: &GuestRegionMmap, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        region.read_slice(&mut bytes, MemoryRegionAddress(offset)).unwrap();
        bytes
    }

    /// Waits for all requests of the batch. Those that name `gone` may fail; every other is right.
    fn settle(&mut self, asked: &[Asked], gone: Option<(u64, &Plugged)>) {
        for _ in asked {
            let (head, _) = self.guest.used_within(0, WAIT_TIMEOUT).expect("an answer");
            let slot = u64::from(head / 4);
            let status: u8 = self.guest.memory.read_obj(GuestAddress(Self::base(slot) + 64)).unwrap();
            let Asked { read, pieces, .. } = &asked[slot as usize];
            if gone.is_some_and(|(gone, _)| pieces.iter().any(|(number, ..)| *number == gone)) {
                assert!(status == OK || status == IOERR, "{status}");
                continue;
            }
            assert_eq!(status, OK);
            let Some(byte) = read else { continue };
            for (number, offset, len) in pieces {
                let found = self.found(&self.plugged[number].region, *offset, *len);
                assert!(found == vec![*byte; *len], "a read of {byte} brought {}...", found[0]);
            }
        }
    }

    /// Reads the pages of a batch into the model.
    fn look_again(&mut self, asked: &[Asked]) {
        for Asked { page, .. } in asked {
            let (status, bytes) = self.guest.read(0, *page as u64 * 8, SECTOR as u32);
            assert_eq!(status, OK);
            self.pages[*page] = bytes[0];
        }
    }
}

/// Memory is plugged in and out while requests are in flight, now other memory than theirs, now their own.
fn plugs(rig: &Rig, seed: u64) {
    let mut this = Plugging::new(rig, seed);
    let most = 100;
    (0..most / 2).for_each(|number| this.plug(number * 2));
    let (mut failed, mut in_use) = (0, 0);
    for step in 0..400 {
        let asked: Vec<Asked> = (0..REQUESTS).map(|slot| this.ask(slot)).collect();
        this.guest.kick(0);
        let number = this.prng.below(most);
        let used = asked.iter().any(|asked| asked.pieces.iter().any(|(piece, ..)| *piece == number));
        if !this.plugged.contains_key(&number) {
            this.plug(number);
            this.settle(&asked, None);
        } else if !used {
            this.unplug(number);
            this.settle(&asked, None);
        } else if step % 2 == 0 {
            // No decent guest does that. When the front-end has its answer the memory is its own again.
            let gone = this.unplug(number);
            let before = this.found(&gone.region, 0, PLUGGED as usize);
            in_use += 1;
            let errors = rig.status().total.errors;
            this.settle(&asked, Some((number, &gone)));
            failed += rig.status().total.errors - errors;
            assert!(this.found(&gone.region, 0, PLUGGED as usize) == before, "memory that was taken away was written");
            // The model knows no longer what became of the writes.
            this.look_again(&asked);
        } else {
            this.settle(&asked, None);
        }
    }
    assert!(in_use > 5, "memory in use was taken away {in_use} times only");
    assert!(this.plugged.len() > 20, "{}", this.plugged.len());
    println!("{in_use} regions were taken away under requests, {failed} of which failed");
    // All that is left goes, and the ring in the first memory still works.
    for number in this.plugged.keys().copied().collect::<Vec<_>>() {
        this.unplug(number);
    }
    let asked = this.guest.read(0, 0, SECTOR as u32);
    assert_eq!(asked.0, OK);
}

#[test]
fn memory_comes_and_goes_under_requests() {
    let (_disk, rig) = memory_disk(CacheMode::None, CompletionOrder::Shuffled(11));
    plugs(&rig, 1);
}

#[test]
fn memory_comes_and_goes_under_io_uring() {
    for mode in [CacheMode::None, CacheMode::Writeback] {
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        image.as_file().set_len(SIZE).unwrap();
        let file = FileOptions { locking: Locking::Off, ..FileOptions::new(image.path(), mode.into()) };
        let Some(backend) = open_file_or_skip(&file, mode) else { continue };
        plugs(&Rig::on(Arc::new(backend), &options(mode)), 2);
    }
}
