//! A guest whose requests in flight are tracked in memory that its front-end keeps, and the servers that it meets.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use kit::front_end::*;
use kit::rig::Rig;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{DeviceOptions, Tuning};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(super) const OK: u8 = 0;

pub(super) const SIZE: u16 = 64;

pub(super) const SECTOR: usize = 512;

/// A RAM disk, in the order that `order` says, and the server in front of it.
pub(super) fn server(order: CompletionOrder) -> (Arc<MemBackend>, Rig) {
    let disk = Arc::new(MemBackend::new(MemOptions { order, ..MemOptions::new(1 << 20) }));
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 2, queue_size: SIZE, serial: String::new() };
    // A server that is dead to the guest must not be woken to look whether its requests hang.
    let tuning = Tuning { stall_after: Duration::from_secs(1000), ..Tuning::default() };
    (disk.clone(), Rig::tuned(disk, &options, &tuning))
}

/// The guest of a front-end that tracks, and the memory that it keeps.
pub(super) struct Guest {
    pub(super) front_end: FrontEnd,
    pub(super) told: VhostUserInflight,
    pub(super) region: File,
}

pub(super) fn handshake(rig: &Rig) -> FrontEnd {
    handshake_of(rig, SIZE)
}

pub(super) fn handshake_of(rig: &Rig, size: u16) -> FrontEnd {
    let mut front_end = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, size, ALL);
    front_end.also(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    front_end
}

impl Guest {
    pub(super) fn new(rig: &Rig) -> Guest {
        Guest::asking(rig, SIZE, SIZE)
    }

    /// Asks for so many entries, sends that number back as QEMU does (vhost_user_set_inflight_fd), and has a ring of `size`.
    pub(super) fn asking(rig: &Rig, entries: u16, size: u16) -> Guest {
        let mut front_end = handshake_of(rig, size);
        let wanted = VhostUserInflight { num_queues: 1, queue_size: entries, ..VhostUserInflight::default() };
        let (told, region) = front_end.control.get_inflight_fd(&wanted).unwrap();
        let told = VhostUserInflight { queue_size: entries, ..told };
        let mut guest = Guest { front_end, told, region };
        guest.set_region();
        guest.front_end.start_ring(0, 0);
        guest
    }

    pub(super) fn set_region(&mut self) {
        use std::os::fd::AsRawFd;
        self.front_end.control.set_inflight_fd(&self.told, self.region.as_raw_fd()).unwrap();
    }

    /// As QEMU does when its server is gone: the same memory and region to the next one, and the used index for a base.
    /// The first server lives on here, with its requests hanging; that is what its death looks like to the guest.
    pub(super) fn reconnect(&mut self, rig: &Rig) -> FrontEnd {
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
pub(super) struct Released(pub(super) Arc<MemBackend>);

impl Drop for Released {
    fn drop(&mut self) {
        self.0.release(1000);
    }
}
