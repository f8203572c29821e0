//! A front-end that does as it is told: it builds rings and descriptors by hand, so that tests can send what no decent
//! driver would, and control messages in any order. (For decent drivers there are virtio-driver and QEMU.)

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Virtio request types.
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;
/// Feature bits.
pub const F_FLUSH: u64 = 1 << 9;
pub const F_LOG_ALL: u64 = 1 << 26;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_PROTOCOL: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;
pub const ALL: u64 = u64::MAX;
/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
/// What a status byte is before the device writes it.
pub const UNANSWERED: u8 = 0xaa;

/// How long an answer may take before a test fails.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of guest memory, and where its parts lie.
const MEMORY: u64 = 64 << 20;
const RING_BYTES: u64 = 0x1_0000;
const SLOTS_AT: u64 = 16 << 20;
/// A slot holds header, status and data of one request.
pub const SLOT_BYTES: u64 = 128 << 10;
const STATUS_OFFSET: u64 = 64;
pub const DATA_OFFSET: u64 = 4096;

pub struct FrontEnd {
    pub control: Frontend,
    pub memory: GuestMemoryMmap,
    pub features: u64,
    pub rings: Vec<Ring>,
    connection: UnixStream,
}

/// Hangs up at once: a child that another test forks holds the connection open until its exec, so that closing it tells the
/// daemon nothing yet, and a front-end that connects meanwhile would be turned away.
impl Drop for FrontEnd {
    fn drop(&mut self) {
        // The daemon may have hung up first.
        let _ = self.connection.shutdown(std::net::Shutdown::Both);
    }
}

/// One split ring, filled by hand. Request slot `n` uses descriptors 4n to 4n+3.
pub struct Ring {
    pub index: usize,
    pub size: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub avail: u16,
    pub used_seen: u16,
    free: Vec<u16>,
}

impl FrontEnd {
    /// Connects and sets up `rings` rings of `size` descriptors, running, with the features offered less what `mask`
    /// leaves out.
    pub fn connect(path: &std::path::Path, rings: usize, size: u16, mask: u64) -> FrontEnd {
        let mut front_end = Self::handshake(UnixStream::connect(path).unwrap(), rings, size, mask);
        for index in 0..rings {
            front_end.start_ring(index, 0);
        }
        front_end
    }

    /// Everything up to the memory table; no ring is set up.
    pub fn handshake(stream: UnixStream, rings: usize, size: u16, mask: u64) -> FrontEnd {
        let connection = stream.try_clone().unwrap();
        let mut control = Frontend::from_stream(stream, 256);
        control.set_owner().unwrap();
        let features = control.get_features().unwrap() & (mask | F_PROTOCOL | F_VERSION_1);
        let wanted = usual_protocol();
        let offered = control.get_protocol_features().unwrap();
        assert!(offered.contains(wanted));
        control.set_protocol_features(wanted).unwrap();
        control.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        control.set_features(features).unwrap();
        let memory = guest_memory();
        let mut front_end = FrontEnd { control, memory, features, rings: Vec::new(), connection };
        front_end.send_memory_table();
        for index in 0..rings {
            front_end.rings.push(Ring::new(index, size));
        }
        front_end
    }

    /// Negotiates more protocol features than a front-end has.
    pub fn also(&mut self, features: VhostUserProtocolFeatures) {
        self.control.set_protocol_features(usual_protocol() | features).unwrap();
    }

    pub fn send_memory_table(&mut self) {
        let regions: Vec<_> =
            self.memory.iter().map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()).collect();
        self.control.set_mem_table(&regions).unwrap();
    }

    /// Sets a ring up from available index `base` and enables it.
    pub fn start_ring(&mut self, index: usize, base: u16) {
        self.start_ring_without_call(index, base);
        self.control.set_vring_call(index, &self.rings[index].call).unwrap();
    }

    /// Where a ring lies, in our own addresses, for SET_VRING_ADDR.
    pub fn ring_config(&self, index: usize) -> VringConfigData {
        let ring = &self.rings[index];
        let host = |address: GuestAddress| self.memory.get_host_address(address).unwrap() as u64;
        VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: host(ring.desc_at()),
            avail_ring_addr: host(ring.avail_at()),
            used_ring_addr: host(ring.used_at()),
            log_addr: None,
        }
    }

    fn start_ring_without_call(&mut self, index: usize, base: u16) {
        let config = self.ring_config(index);
        let ring = &mut self.rings[index];
        ring.avail = base;
        ring.used_seen = self.memory.read_obj(GuestAddress(ring.used_at().0 + 2)).unwrap();
        self.control.set_vring_num(index, ring.size).unwrap();
        self.control.set_vring_base(index, base).unwrap();
        self.control.set_vring_addr(index, &config).unwrap();
        self.control.set_vring_kick(index, &ring.kick).unwrap();
        self.control.set_vring_enable(index, true).unwrap();
    }

    /// Stops a ring as QEMU does: disable, then GET_VRING_BASE. Returns the base.
    pub fn stop_ring(&mut self, index: usize) -> u16 {
        self.control.set_vring_enable(index, false).unwrap();
        self.control.get_vring_base(index).unwrap() as u16
    }

    /// `start_ring` after `stop_ring`, for a ring that still has requests up to `avail` in it.
    pub fn restart_ring(&mut self, index: usize, base: u16, avail: u16) {
        self.start_ring(index, base);
        self.rings[index].avail = avail;
    }

    /// `restart_ring`, with nowhere to send interrupts yet.
    pub fn restart_ring_without_call(&mut self, index: usize, base: u16, avail: u16) {
        self.start_ring_without_call(index, base);
        self.rings[index].avail = avail;
    }

    /// As a driver does before it sets a ring up from scratch.
    pub fn reset_ring_memory(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        self.memory.write_slice(&[0; RING_BYTES as usize], ring.desc_at()).unwrap();
        *ring = Ring {
            kick: ring.kick.try_clone().unwrap(),
            call: ring.call.try_clone().unwrap(),
            ..Ring::new(index, ring.size)
        };
    }

    /// A request slot whose answer was taken with `used` is free again.
    pub fn give_back(&mut self, ring: usize, slot: u16) {
        self.rings[ring].free.push(slot);
    }

    /// The configuration space.
    pub fn config(&mut self, size: u32) -> Vec<u8> {
        let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
        self.control.get_config(0, size, flags, &vec![0; size as usize]).unwrap().1
    }

    fn slot_at(&self, ring: usize, slot: u16) -> u64 {
        SLOTS_AT + (ring as u64 * 64 + u64::from(slot)) * SLOT_BYTES
    }

    /// Where a slot's data lies.
    pub fn data_at(&self, ring: usize, slot: u16) -> GuestAddress {
        GuestAddress(self.slot_at(ring, slot) + DATA_OFFSET)
    }

    /// Makes a request available (no kick): header, one data descriptor (if any), status. Returns its slot.
    pub fn add(&mut self, ring: usize, kind: u32, sector: u64, data: &[u8], read: u32) -> u16 {
        let slot = self.prepare(ring, kind, sector, data, read);
        self.make_available(ring, slot * 4);
        slot
    }

    /// The same for writes of (sector, data), made available at once: a worker that just looks takes all or none.
    pub fn add_writes<const N: usize>(&mut self, ring: usize, writes: [(u64, &[u8]); N]) -> [u16; N] {
        let slots = writes.map(|(sector, data)| self.prepare(ring, OUT, sector, data, 0));
        self.make_all_available(ring, &slots.map(|slot| slot * 4));
        slots
    }

    fn prepare(&mut self, ring: usize, kind: u32, sector: u64, data: &[u8], read: u32) -> u16 {
        let slot = self.rings[ring].free.pop().expect("a free request slot");
        let base = self.slot_at(ring, slot);
        self.put_header(base, kind, sector);
        self.memory.write_slice(data, GuestAddress(base + DATA_OFFSET)).unwrap();
        let mut parts = vec![(base, 16, 0)];
        if !data.is_empty() {
            parts.push((base + DATA_OFFSET, data.len() as u32, 0));
        }
        if read > 0 {
            parts.push((base + DATA_OFFSET, read, WRITE));
        }
        parts.push((base + STATUS_OFFSET, 1, WRITE));
        self.put_chain(ring, slot * 4, &parts);
        slot
    }

    /// A request header at an address.
    pub fn put_header(&self, at: u64, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(at)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(at + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(UNANSWERED, GuestAddress(at + STATUS_OFFSET)).unwrap();
    }

    /// Chains descriptors from `first` on.
    pub fn put_chain(&self, ring: usize, first: u16, parts: &[(u64, u32, u16)]) {
        for (at, &(address, len, flags)) in parts.iter().enumerate() {
            let next = if at + 1 < parts.len() { NEXT } else { 0 };
            let index = first + at as u16;
            self.put_descriptor(ring, index, address, len, flags | next, index + 1);
        }
    }

    pub fn put_descriptor(&self, ring: usize, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.rings[ring].desc_at().0 + u64::from(index) * 16;
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub fn make_available(&mut self, ring: usize, head: u16) {
        self.make_all_available(ring, &[head]);
    }

    fn make_all_available(&mut self, ring: usize, heads: &[u16]) {
        let ring = &mut self.rings[ring];
        for head in heads {
            let at = ring.avail_at().0 + 4 + u64::from(ring.avail % ring.size) * 2;
            self.memory.write_obj(*head, GuestAddress(at)).unwrap();
            ring.avail = ring.avail.wrapping_add(1);
        }
        self.memory.store(ring.avail, GuestAddress(ring.avail_at().0 + 2), Ordering::Release).unwrap();
        // Interrupt at the next completion (EVENT_IDX).
        let event_at = ring.avail_at().0 + 4 + u64::from(ring.size) * 2;
        self.memory.write_obj(ring.used_seen, GuestAddress(event_at)).unwrap();
    }

    pub fn kick(&self, ring: usize) {
        fence(Ordering::SeqCst);
        self.rings[ring].kick.write(1).unwrap();
    }

    /// The next used element, if there is one: (head, written).
    pub fn used(&mut self, ring: usize) -> Option<(u32, u32)> {
        let ring = &mut self.rings[ring];
        let index: u16 = self.memory.load(GuestAddress(ring.used_at().0 + 2), Ordering::Acquire).unwrap();
        if index == ring.used_seen {
            return None;
        }
        let at = ring.used_at().0 + 4 + u64::from(ring.used_seen % ring.size) * 8;
        ring.used_seen = ring.used_seen.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let written = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head, written))
    }

    /// Waits for the next used element within `timeout`.
    pub fn used_within(&mut self, ring: usize, timeout: Duration) -> Option<(u32, u32)> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(used) = self.used(ring) {
                return Some(used);
            }
            if Instant::now() > end {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits for one request of `add` to be answered; its slot is free again. Returns (slot, status).
    pub fn wait(&mut self, ring: usize) -> (u16, u8) {
        let (head, _) = self.used_within(ring, WAIT_TIMEOUT).expect("an answer");
        let slot = (head / 4) as u16;
        self.rings[ring].free.push(slot);
        (slot, self.status(ring, slot))
    }

    pub fn status(&self, ring: usize, slot: u16) -> u8 {
        self.memory.read_obj(GuestAddress(self.slot_at(ring, slot) + STATUS_OFFSET)).unwrap()
    }

    /// One request, start to end. Returns its status and, for a read, its data.
    pub fn ask(&mut self, ring: usize, kind: u32, sector: u64, data: &[u8], read: u32) -> (u8, Vec<u8>) {
        let slot = self.add(ring, kind, sector, data, read);
        self.kick(ring);
        let (answered, status) = self.wait(ring);
        assert_eq!(answered, slot);
        let mut bytes = vec![0; read as usize];
        self.memory.read_slice(&mut bytes, self.data_at(ring, slot)).unwrap();
        (status, bytes)
    }

    pub fn write(&mut self, ring: usize, sector: u64, data: &[u8]) -> u8 {
        self.ask(ring, OUT, sector, data, 0).0
    }

    pub fn read(&mut self, ring: usize, sector: u64, len: u32) -> (u8, Vec<u8>) {
        self.ask(ring, IN, sector, &[], len)
    }

    pub fn flush(&mut self, ring: usize) -> u8 {
        self.ask(ring, FLUSH, 0, &[], 0).0
    }

    /// DISCARD or WRITE_ZEROES of `count` sectors.
    pub fn range(&mut self, ring: usize, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(count.to_le_bytes());
        range.extend(flags.to_le_bytes());
        self.ask(ring, kind, 0, &range, 0).0
    }
}

impl Ring {
    fn new(index: usize, size: u16) -> Ring {
        Ring {
            index,
            size,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            avail: 0,
            used_seen: 0,
            free: (0..(size / 4).min(64)).rev().collect(),
        }
    }

    pub fn desc_at(&self) -> GuestAddress {
        GuestAddress(0x1000 + self.index as u64 * RING_BYTES)
    }

    pub fn avail_at(&self) -> GuestAddress {
        GuestAddress(self.desc_at().0 + 0x8000)
    }

    pub fn used_at(&self) -> GuestAddress {
        GuestAddress(self.desc_at().0 + 0xa000)
    }
}

/// Two regions side by side, so that a buffer can cross from one into the other.
fn usual_protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}

/// Memory of a front-end's own bookkeeping, which nobody sealed: `flags` beside close-on-exec.
pub fn bookkeeping(len: u64, flags: MemfdFlags) -> File {
    let file: File = memfd_create("bookkeeping", MemfdFlags::CLOEXEC | flags).unwrap().into();
    file.set_len(len).unwrap();
    file
}

fn guest_memory() -> GuestMemoryMmap {
    let file: File = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap().into();
    file.set_len(MEMORY).unwrap();
    let half = MEMORY / 2;
    let ranges = [
        (GuestAddress(0), half as usize, Some(FileOffset::new(file.try_clone().unwrap(), 0))),
        (GuestAddress(half), half as usize, Some(FileOffset::new(file, half))),
    ];
    GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
}

/// The last address of the first region: what starts before it and is longer crosses.
pub const REGION_BORDER: u64 = MEMORY / 2;

/// Waits for a descriptor to become readable.
pub fn readable(fd: &impl AsRawFd, timeout: Duration) -> bool {
    let raw = fd.as_raw_fd();
    let end = Instant::now() + timeout;
    loop {
        // vmm-sys-util's EventFd does not implement AsFd; its read is non-blocking, so poll by trying.
        let path = format!("/proc/self/fdinfo/{raw}");
        let info = std::fs::read_to_string(path).unwrap();
        let count = info.lines().find_map(|line| line.strip_prefix("eventfd-count:")).unwrap().trim();
        if u64::from_str_radix(count, 16).unwrap() > 0 {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Forgets the signals so far.
pub fn consume(fd: &EventFd) {
    // None came is fine.
    let _ = fd.read();
}
