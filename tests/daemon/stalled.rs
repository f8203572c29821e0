//! One request that the medium does not answer holds up no other of its ring: reads, writes and flushes pass a read
//! that is stalled, and reads pass a stalled sync and a stalled write.

use std::collections::HashMap;
use std::sync::Arc;

use kit::driver::{ALL, Driver};
use kit::front_end::{FrontEnd, IN, OUT};
use kit::guest;
use kit::prng::Prng;
use kit::rig::Rig;
use kit::stall::frozen::Freezable;
use kit::stall::fuse::{Stalling, Unable};
use kit::stall::withheld::Withholding;
use vhost::VhostBackend;
use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::disk::Event;
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{DeviceOptions, Tuning};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const PAGE: usize = 4096;
const SIZE: u64 = 4 << 20;
const PAGES: u64 = SIZE / PAGE as u64;
/// The page whose read is stalled. No other request touches it.
const STALLED: u64 = PAGES / 2;
const STALLED_ID: u64 = u64::MAX - 1;
const DEPTH: u64 = 16;
const REQUESTS: u64 = 1000;

/// A page of the image at the start; later it has a generation.
fn page(number: u64, generation: u64) -> Vec<u8> {
    (number << 32 | generation).to_le_bytes().repeat(PAGE / 8)
}

fn content() -> Vec<u8> {
    (0..PAGES).flat_map(|number| page(number, 0)).collect()
}

/// What may be asked beside the one that is stalled.
#[derive(Clone, Copy, PartialEq)]
enum Others {
    Reads,
    ReadsAndWrites,
    ReadsWritesAndFlushes,
}

/// A thousand requests at depth through ring 0 while something of it is stalled. All must be answered, rightly; and
/// nothing else.
fn stream(guest: &mut Driver, others: Others, first_generation: u64) {
    let mut prng = Prng::new(7);
    let mut generations: HashMap<u64, u64> = HashMap::new();
    let mut reads: HashMap<u64, Vec<u8>> = HashMap::new();
    for round in 0..REQUESTS / DEPTH {
        reads.clear();
        let mut pages = Vec::new();
        for slot in 0..DEPTH {
            let at = slot as usize * PAGE;
            // Two at once on a page could overtake each other.
            let number = loop {
                let number = prng.below(PAGES);
                if number != STALLED && !pages.contains(&number) {
                    break number;
                }
            };
            pages.push(number);
            let offset = number * PAGE as u64;
            match (others, prng.below(8)) {
                (Others::ReadsWritesAndFlushes, 0) => guest.flush(0, slot),
                (Others::ReadsAndWrites | Others::ReadsWritesAndFlushes, 1..4) => {
                    let generation = first_generation + round;
                    guest.fill(at, &page(number, generation));
                    guest.write(0, offset, at, PAGE, slot);
                    generations.insert(number, generation);
                }
                _ => {
                    reads.insert(slot, page(number, generations.get(&number).copied().unwrap_or(0)));
                    guest.read(0, offset, at, PAGE, slot);
                }
            }
        }
        guest.kick(0);
        let mut answered = 0;
        while answered < DEPTH {
            for (id, result) in guest.wait(0) {
                assert!(id < DEPTH, "what is stalled was answered");
                assert_eq!(result, 0);
                if let Some(wanted) = reads.get(&id) {
                    assert_eq!(&guest.fetch(id as usize * PAGE, PAGE), wanted, "round {round}, request {id}");
                }
                answered += 1;
            }
        }
    }
}

/// Where the stalled request's data goes: behind that of the others.
const STALLED_AT: usize = DEPTH as usize * PAGE;
const MEMORY: usize = STALLED_AT + PAGE;

fn others(mode: CacheMode) -> Others {
    match mode {
        // Where every write is through a guest has nothing to flush, and is not offered it.
        CacheMode::Directsync | CacheMode::Writethrough => Others::ReadsAndWrites,
        _ => Others::ReadsWritesAndFlushes,
    }
}

#[test]
fn requests_pass_a_stalled_read_of_the_device() {
    for mode in CacheMode::ALL {
        let (disk, withheld) = Withholding::new(SIZE, STALLED * PAGE as u64);
        let options = DeviceOptions { mode, num_queues: 1, queue_size: 128, serial: String::new() };
        let rig = Rig::on(Arc::new(disk), &options);
        let mut guest = Driver::connect(&rig.path, 1, 128, MEMORY, ALL).unwrap();
        for number in 0..PAGES {
            guest.fill(0, &page(number, 0));
            assert_eq!(guest.one(0, |guest, id| guest.write(0, number * PAGE as u64, 0, PAGE, id)), 0);
        }
        guest.read(0, STALLED * PAGE as u64, STALLED_AT, PAGE, STALLED_ID);
        guest.kick(0);
        guest::wait_until("the read is under way", || withheld.waiting() == 1);
        stream(&mut guest, others(mode), 1);
        assert_eq!(withheld.waiting(), 1, "{mode}: it is stalled still");
        withheld.let_go();
        // The ring looks when there is something to do.
        guest.read(0, 0, 0, PAGE, 0);
        guest.kick(0);
        let mut answers: Vec<_> = guest.wait(0);
        while answers.len() < 2 {
            answers.extend(guest.wait(0));
        }
        answers.sort();
        assert_eq!(answers, [(0, 0), (STALLED_ID, 0)], "{mode}");
        assert_eq!(guest.fetch(STALLED_AT, PAGE), page(STALLED, 0));
    }
}

/// The program, serving a file on a filesystem that stalls.
struct Served {
    guest: Driver,
    server: guest::Server,
    disk: Stalling,
}

impl Served {
    /// `None`, and said so, where no such filesystem can be mounted.
    fn start(mode: CacheMode) -> Option<Served> {
        Self::start_on(Stalling::mount(content()), mode)
    }

    fn start_on(disk: Result<Stalling, Unable>, mode: CacheMode) -> Option<Served> {
        let disk = match disk {
            Ok(disk) => disk,
            Err(Unable(why)) => {
                guest::tell(&format!("SKIPPED: a stalled request of a real file: {why}"));
                return None;
            }
        };
        let server = guest::Server::start(&disk.image(), mode, &[]);
        let guest = Driver::connect_soon(&server.socket(), 1, 128, MEMORY, ALL);
        Some(Served { guest, server, disk })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // A process that waits for FUSE cannot be killed.
        self.disk.let_go();
    }
}

#[test]
fn requests_pass_a_stalled_read_of_a_file() {
    for mode in CacheMode::ALL {
        let Some(mut served) = Served::start(mode) else { return };
        let Served { guest, disk, .. } = &mut served;
        disk.stall_reads_of(STALLED * PAGE as u64);
        guest.read(0, STALLED * PAGE as u64, STALLED_AT, PAGE, STALLED_ID);
        guest.kick(0);
        guest::wait_until("the read is under way", || disk.waiting() == 1);
        stream(guest, others(mode), 1);
        assert_eq!(disk.waiting(), 1, "{mode}: it is stalled still");
        disk.let_go();
        assert_eq!(guest.wait(0), [(STALLED_ID, 0)], "{mode}");
        assert_eq!(guest.fetch(STALLED_AT, PAGE), page(STALLED, 0));
    }
}

/// Writes need not pass: a sync of FUSE has the file's lock, and so have they.
#[test]
fn reads_pass_a_stalled_sync_of_a_file() {
    for mode in [CacheMode::None, CacheMode::Writeback] {
        let Some(mut served) = Served::start(mode) else { return };
        let Served { guest, disk, .. } = &mut served;
        // There must be something to sync.
        guest.fill(0, &page(0, 0));
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, PAGE, id)), 0);
        disk.stall_syncs();
        guest.flush(0, STALLED_ID);
        guest.kick(0);
        guest::wait_until("the sync is under way", || disk.waiting() == 1);
        stream(guest, Others::Reads, 1);
        assert_eq!(disk.waiting(), 1, "{mode}: it is stalled still");
        disk.let_go();
        assert_eq!(guest.wait(0), [(STALLED_ID, 0)], "{mode}");
    }
}

/// With FUSE_ASYNC_DIO and without: then O_DIRECT transfers wait in the thread that begins them. A read that was under way
/// before the write is answered beside it, too.
#[test]
fn reads_pass_a_stalled_write_of_a_file() {
    const EARLIER: u64 = STALLED - 8;
    const EARLIER_ID: u64 = STALLED_ID - 1;
    for (mode, async_dio) in CacheMode::ALL.into_iter().flat_map(|mode| [(mode, true), (mode, false)]) {
        let disk = Stalling::mount_as(content(), async_dio, usize::MAX);
        let Some(mut served) = Served::start_on(disk, mode) else { return };
        let Served { guest, disk, server } = &mut served;
        disk.stall_reads_of(EARLIER * PAGE as u64);
        guest.read(0, EARLIER * PAGE as u64, 0, PAGE, EARLIER_ID);
        guest.kick(0);
        guest::wait_until("the read is under way", || disk.waiting() == 1);
        disk.stall_writes_of(STALLED * PAGE as u64);
        guest.fill(STALLED_AT, &page(STALLED, 1));
        guest.write(0, STALLED * PAGE as u64, STALLED_AT, PAGE, STALLED_ID);
        guest.kick(0);
        guest::wait_until("the write is under way", || disk.waiting() == 2);
        disk.let_reads_go();
        assert_eq!(guest.wait(0), [(EARLIER_ID, 0)], "{mode}");
        assert_eq!(guest.fetch(0, PAGE), page(EARLIER, 0), "{mode}");
        stream(guest, Others::Reads, 1);
        // The last read's answer comes before its count.
        guest::wait_until("one is in flight", || server.total("in-flight") == 1);
        assert_eq!(disk.waiting(), 1, "{mode}: it is stalled still");
        disk.let_go();
        assert_eq!(guest.wait(0), [(STALLED_ID, 0)], "{mode}");
        // Writes go on, in whichever thread.
        stream(guest, others(mode), 1);
        assert_eq!(guest.one(0, |guest, id| guest.read(0, STALLED * PAGE as u64, 0, PAGE, id)), 0);
        assert_eq!(guest.fetch(0, PAGE), page(STALLED, 1), "{mode}");
    }
}

/// Reads, a change of the interrupt and the status beside writes that wait for a frozen filesystem.
fn beside_frozen_writes(kind: &str, mode: CacheMode) -> Result<(), String> {
    let dir = guest::scratch();
    let filesystem = Freezable::mount(dir.path(), kind)?;
    let image = filesystem.path().join("disk.img");
    std::fs::write(&image, content()).unwrap();
    let disk = FileBackend::open(&FileOptions::new(&image, mode.into())).map_err(|error| error.to_string())?;
    let options = DeviceOptions { mode, num_queues: 1, queue_size: 128, serial: String::new() };
    let limit = std::time::Duration::from_secs(1);
    let rig = Rig::tuned(Arc::new(disk), &options, &Tuning { stall_after: limit, ..Tuning::default() });
    let mut guest = FrontEnd::connect(&rig.path, 1, 128, ALL);
    let sector = |page: u64| page * PAGE as u64 / 512;
    assert_eq!(guest.write(0, sector(1), &page(1, 1)), 0);

    // Twice: the second time the ring's thread is another one.
    for round in 2..4 {
        filesystem.freeze();
        let writes = [2, 3].map(|number| guest.add(0, OUT, sector(number), &page(number, round), 0));
        guest.kick(0);
        for number in 4..200 {
            assert_eq!(guest.read(0, sector(number), PAGE as u32), (0, page(number, 0)), "{kind}, {mode}");
        }
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        guest.control.set_vring_call(0, &call).unwrap();
        let stalled = rig.event(|event| match event {
            Event::IoStalled { ring: 0, requests, .. } => Some(requests),
            _ => None,
        });
        let total = rig.status().total;
        assert!(stalled > 0 && total.in_flight == 2 && total.stalled > 0, "{kind}, {mode}: {stalled}, {total:?}");
        let slot = guest.add(0, IN, sector(4), &[], PAGE as u32);
        guest.kick(0);
        assert_eq!(guest.wait(0), (slot, 0));
        filesystem.thaw();
        let mut answered = [guest.wait(0), guest.wait(0)];
        answered.sort();
        let mut wanted = writes.map(|slot| (slot, 0));
        wanted.sort();
        assert_eq!(answered, wanted, "{kind}, {mode}");
        rig.event(|event| matches!(event, Event::IoResumed { ring: 0 }).then_some(()));
        for number in [2, 3] {
            assert_eq!(guest.read(0, sector(number), PAGE as u32), (0, page(number, round)), "{kind}, {mode}");
        }
        assert_eq!(guest.write(0, sector(1), &page(1, round)), 0);
    }
    guest.stop_ring(0);
    Ok(())
}

#[test]
fn reads_pass_writes_that_wait_for_a_frozen_file_system() {
    for kind in ["ext4", "xfs"] {
        for mode in CacheMode::ALL {
            if let Err(why) = beside_frozen_writes(kind, mode) {
                guest::tell(&format!("SKIPPED: writes of a frozen {kind}: {why}"));
                break;
            }
        }
    }
}
