//! What a live migration is told: each page that the device writes, whatever wrote it, is in the dirty log. Judged by
//! the memory itself. With real guests that move: `tests/guest/migration.rs`.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use kit::front_end::*;
use kit::rig::Rig;
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use virtioblkd::backend::Backend;
use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::backend::mem::{MemBackend, MemOptions};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;
use vm_memory::{Bytes, GuestAddress};

const PAGE: usize = 4096;
const SIZE: u64 = 1 << 20;
/// Bytes of log for all of the guest's memory, a bit for each page.
const LOG: usize = (REGION_BORDER as usize) * 2 / PAGE / 8;

/// A front-end on a disk full of ones, and its log.
struct Moving {
    guest: FrontEnd,
    log: File,
    _rig: Rig,
}

impl Moving {
    fn on(backend: Arc<dyn Backend>) -> Moving {
        let serial = "of a guest that moves".into();
        let options = DeviceOptions { mode: CacheMode::Writeback, num_queues: 1, queue_size: 64, serial };
        let rig = Rig::on(backend, &options);
        let mut guest = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, 64, !F_LOG_ALL);
        guest.also(VhostUserProtocolFeatures::LOG_SHMFD);
        guest.start_ring(0, 0);
        assert_eq!(guest.write(0, 0, &[1; 64 << 10]), 0);
        let log = bookkeeping(LOG as u64, MemfdFlags::empty());
        let told = VhostUserDirtyLogRegion { mmap_size: LOG as u64, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
        guest.control.set_log_base(0, Some(told)).unwrap();
        Moving { guest, log, _rig: rig }
    }

    fn logs(&mut self, is_on: bool) {
        let features = self.guest.features & !F_LOG_ALL | if is_on { F_LOG_ALL } else { 0 };
        self.guest.control.set_features(features).unwrap();
    }

    /// So that what is read differs from what was there.
    fn wipe_data(&self) {
        let nothing = vec![0xee; (SLOT_BYTES - DATA_OFFSET) as usize];
        (0..16).for_each(|slot| self.guest.memory.write_slice(&nothing, self.guest.data_at(0, slot)).unwrap());
    }

    /// The memory, page by page. Only what requests and the ring of this test lie in.
    fn memory(&self) -> Vec<Vec<u8>> {
        let page = |at: u64| {
            let mut bytes = vec![0; PAGE];
            self.guest.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        self.pages().map(page).collect()
    }

    fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        let ring = 0..self.guest.data_at(0, 0).0.min(1 << 20);
        let slots = self.guest.data_at(0, 0).0 - DATA_OFFSET;
        ring.chain(slots..slots + 16 * SLOT_BYTES).step_by(PAGE)
    }

    /// Pages that the log has; it is empty then.
    fn take_log(&self) -> Vec<u64> {
        let mut bits = vec![0; LOG];
        self.log.read_exact_at(&mut bits, 0).unwrap();
        self.log.write_all_at(&vec![0; LOG], 0).unwrap();
        (0..LOG as u64 * 8).filter(|page| bits[*page as usize / 8] & (1 << (page % 8)) != 0).collect()
    }

    /// Has the requests of `add` served; nobody touches the memory before, nor after. The pages that changed, and those
    /// of the log.
    fn serve(&mut self, requests: usize, add: impl FnOnce(&mut FrontEnd)) -> (Vec<u64>, Vec<u64>) {
        let base = self.guest.stop_ring(0);
        self.wipe_data();
        add(&mut self.guest);
        let before = self.memory();
        self.take_log();
        let avail = self.guest.rings[0].avail;
        self.guest.restart_ring(0, base, avail);
        for _ in 0..requests {
            self.guest.wait(0);
        }
        // Its worker comes to the end of its turn.
        let base = self.guest.stop_ring(0);
        let (after, log) = (self.memory(), self.take_log());
        self.guest.restart_ring(0, base, avail);
        let changed = self.pages().zip(before.iter().zip(&after)).filter(|(_, (old, new))| old != new);
        (changed.map(|(at, _)| at / PAGE as u64).collect(), log)
    }

    /// As [`Moving::serve`] of one request. How many pages changed.
    fn is_logged(&mut self, what: &str, kind: u32, sector: u64, data: &[u8], read: u32) -> usize {
        self.all_are_logged(what, 1, |guest| {
            guest.add(0, kind, sector, data, read);
        })
    }

    fn all_are_logged(&mut self, what: &str, requests: usize, add: impl FnOnce(&mut FrontEnd)) -> usize {
        let (changed, log) = self.serve(requests, add);
        assert!(changed.len() >= 2, "{what}: the status and the used ring at least: {changed:?}");
        let missing: Vec<_> = changed.iter().filter(|page| !log.contains(page)).collect();
        assert!(missing.is_empty(), "{what}: pages {missing:?} changed and are not in the log");
        changed.len()
    }
}

fn every_kind_of_request(backend: Arc<dyn Backend>) {
    let mut moving = Moving::on(backend);
    moving.logs(true);
    moving.is_logged("a read of a sector", IN, 0, &[], 512);
    assert!(moving.is_logged("a read of nine pages", IN, 8, &[], 9 * PAGE as u32) >= 9);
    moving.is_logged("the serial", GET_ID, 0, &[], 20);
    moving.is_logged("a write", OUT, 0, &[7; 512], 0);
    moving.is_logged("a flush", FLUSH, 0, &[], 0);
    moving.is_logged("a read behind the end", IN, SIZE / 512, &[], 512);
    moving.is_logged("what nobody knows", 99, 0, &[], 512);
    let pages = moving.all_are_logged("eight reads", 8, |guest| {
        for at in 0..8 {
            guest.add(0, IN, at * 8, &[], 2 * PAGE as u32);
        }
    });
    assert!(pages >= 8);
    // What is off is not paid for.
    moving.logs(false);
    let (changed, log) = moving.serve(1, |guest| {
        guest.add(0, IN, 0, &[], 512);
    });
    assert!(changed.len() >= 2 && log.is_empty(), "{log:?} is logged, and nobody wants it");
}

#[test]
fn every_page_written_from_memory_is_in_the_dirty_log() {
    every_kind_of_request(Arc::new(MemBackend::new(MemOptions::new(SIZE))));
}

#[test]
fn every_page_written_from_a_file_is_in_the_dirty_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    let options = FileOptions::new(&path, CacheMode::Writeback.into());
    every_kind_of_request(Arc::new(FileBackend::open(&options).unwrap()));
}
