//! Front-ends and guests that are hostile or wrong: descriptors that are no eventfds, memory tables that make no sense, the
//! longest chains, messages out of order. The device continues, completes each request once, and writes only where a
//! request names. Random messages and chains: `random.rs`.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kit::front_end::*;
use kit::rig::Rig;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VringConfigData};
use virtioblkd::backend::Errno;
use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::backend::mem::{Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::disk::{Disk as _, Event};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

pub(super) const OK: u8 = 0;

pub(super) fn options() -> DeviceOptions {
    DeviceOptions { mode: CacheMode::None, num_queues: 8, queue_size: 1024, serial: "hostile".into() }
}

pub(super) fn memory_disk() -> Rig {
    Rig::on(Arc::new(MemBackend::new(MemOptions::new(1 << 20))), &options())
}

/// A file served with O_DIRECT or without.
pub(super) struct Disk {
    pub(super) path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Disk {
    pub(super) fn new(size: u64) -> Disk {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(size).unwrap();
        Disk { path, _dir: dir }
    }

    pub(super) fn rig(&self, options: DeviceOptions) -> Rig {
        let file = FileOptions {
            logical_block_size: Some(512),
            durable_writes: true,
            ..FileOptions::new(&self.path, options.mode.into())
        };
        Rig::on(Arc::new(FileBackend::open(&file).unwrap()), &options)
    }
}

/// vhost-user's request codes.
pub(super) mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// A message as it is on the wire; `flags` beside the version.
pub(super) fn send(wire: &UnixStream, code: u32, flags: u32, body: &[u8], files: &[BorrowedFd]) -> std::io::Result<()> {
    let mut message: Vec<u8> =
        [code, 1 | flags, body.len() as u32].iter().flat_map(|word| word.to_le_bytes()).collect();
    message.extend(body);
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files)));
    sendmsg(wire, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

pub(super) const NEED_REPLY: u32 = 8;

/// Sends a message that wants an acknowledgement; whether that came and was good.
pub(super) fn accepted(mut wire: &UnixStream, code: u32, body: &[u8], files: &[BorrowedFd]) -> bool {
    wire.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    send(wire, code, NEED_REPLY, body, files).unwrap();
    let mut reply = [0; 20];
    wire.read_exact(&mut reply).is_ok() && reply[12..] == [0; 8]
}

/// A front-end with one ring, and its wire.
pub(super) fn connect(rig: &Rig) -> (FrontEnd, UnixStream) {
    let stream = UnixStream::connect(&rig.path).unwrap();
    let wire = stream.try_clone().unwrap();
    let mut guest = FrontEnd::handshake(stream, 1, 64, ALL);
    guest.start_ring(0, 0);
    (guest, wire)
}

pub(super) fn serves(rig: &Rig) {
    let mut guest = FrontEnd::connect(&rig.path, 2, 64, ALL);
    assert_eq!(guest.write(1, 0, &[1; 512]), OK);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![1; 512]));
}

/// A pipe that takes no more: writing to it blocks.
pub(super) fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

#[test]
fn a_descriptor_that_is_no_eventfd_is_refused() {
    let rig = memory_disk();
    let (_reader, pipe) = full_pipe();
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let zero = File::open("/dev/zero").unwrap();
    for what in [pipe.as_fd(), file.as_fd(), socket.as_fd(), epoll.as_fd(), zero.as_fd()] {
        for code in [code::SET_VRING_KICK, code::SET_VRING_CALL, code::SET_VRING_ERR] {
            let (_guest, wire) = connect(&rig);
            assert!(!accepted(&wire, code, &0u64.to_le_bytes(), &[what]), "{what:?} for {code}");
        }
    }
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let (guest, wire) = connect(&rig);
    for code in [code::SET_VRING_KICK, code::SET_VRING_CALL, code::SET_VRING_ERR] {
        assert!(accepted(&wire, code, &0u64.to_le_bytes(), &[event.as_fd()]), "{code}");
    }
    drop((guest, wire));
    serves(&rig);
}

#[test]
fn a_full_eventfd_blocks_no_thread() {
    let rig = memory_disk();
    let stream = UnixStream::connect(&rig.path).unwrap();
    let mut guest = FrontEnd::handshake(stream, 2, 64, ALL);
    for ring in &mut guest.rings {
        // Without EFD_NONBLOCK.
        ring.call = EventFd::new(0).unwrap();
        ring.call.write(u64::MAX - 1).unwrap();
    }
    (0..2).for_each(|ring| guest.start_ring(ring, 0));
    for ring in [0, 1, 0] {
        assert_eq!(guest.write(ring, 0, &[1; 512]), OK);
    }
    assert_eq!([0, 1].map(|ring| guest.stop_ring(ring)), [2, 1]);
    drop(guest);
    serves(&rig);
}

/// virtio-queue counts the answers since it last looked for a wish to be interrupted, in 16 bits, and looks only where
/// EVENT_IDX was negotiated.
#[test]
fn the_first_answer_after_event_idx_was_negotiated_is_interrupted_whatever_came_before() {
    let rig = memory_disk();
    let mut guest = FrontEnd::connect(&rig.path, 1, 256, !F_EVENT_IDX);
    let mut left = u16::MAX;
    while left > 0 {
        let batch = left.min(60);
        for _ in 0..batch {
            guest.add(0, GET_ID, 0, &[], 20);
        }
        guest.kick(0);
        for _ in 0..batch {
            assert_eq!(guest.wait(0).1, OK);
        }
        left -= batch;
    }
    let features = guest.features | F_EVENT_IDX;
    guest.control.set_features(features).unwrap();
    consume(&guest.rings[0].call);
    assert_eq!(guest.read(0, 0, 512).0, OK);
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT), "the guest would wait for ever");
}

/// Where [`largest_ring`] puts its parts.
pub(super) const DESC: u64 = 1 << 20;
pub(super) const AVAIL: u64 = 2 << 20;
pub(super) const USED: u64 = 3 << 20;

/// A front-end whose ring 0 has 32768 descriptors, all zero; not running before [`run`].
pub(super) fn largest_ring(rig: &Rig) -> (FrontEnd, UnixStream) {
    let (mut guest, wire) = connect(rig);
    guest.stop_ring(0);
    let host = |at: u64| guest.memory.get_host_address(GuestAddress(at)).unwrap() as u64;
    let config = VringConfigData {
        queue_max_size: 32768,
        queue_size: 32768,
        flags: 0,
        desc_table_addr: host(DESC),
        avail_ring_addr: host(AVAIL),
        used_ring_addr: host(USED),
        log_addr: None,
    };
    guest.control.set_vring_num(0, 32768).unwrap();
    guest.control.set_vring_base(0, 0).unwrap();
    guest.control.set_vring_addr(0, &config).unwrap();
    (guest, wire)
}

/// Starts the largest ring with the first `available` heads that are in it.
pub(super) fn run(guest: &mut FrontEnd, available: u16) {
    guest.memory.write_obj(available, GuestAddress(AVAIL + 2)).unwrap();
    guest.control.set_vring_kick(0, &guest.rings[0].kick).unwrap();
    guest.control.set_vring_enable(0, true).unwrap();
    guest.kick(0);
}

/// Waits until the largest ring has `wanted` answers.
pub(super) fn wait_for_used(rig: &Rig, guest: &FrontEnd, wanted: u16) {
    let end = Instant::now() + WAIT_TIMEOUT;
    while guest.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != wanted {
        assert!(Instant::now() < end, "not all was answered: {:?}", rig.status().last_errors);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One entry of a table of descriptors at `table`.
pub(super) fn put_entry(guest: &FrontEnd, table: u64, entry: u16, (address, len, flags): (u64, u32, u16), next: u16) {
    let at = table + u64::from(entry) * 16;
    guest.memory.write_obj(address, GuestAddress(at)).unwrap();
    let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
    guest.memory.write_obj(rest, GuestAddress(at + 8)).unwrap();
}

/// A file backend's queue cannot be as deep as the largest ring.
#[test]
fn the_largest_ring_is_served() {
    let disk = Disk::new(1 << 20);
    let rig = disk.rig(DeviceOptions { queue_size: 32768, ..options() });
    let (mut guest, _wire) = largest_ring(&rig);
    // As many requests as there are descriptors for: header and status are shared, data is one sector for all.
    let (header, data, requests) = (4u64 << 20, 5u64 << 20, 32768 / 3);
    guest.put_header(header, OUT, 0);
    guest.memory.write_slice(&[9; 512], GuestAddress(data)).unwrap();
    for request in 0..requests as u16 {
        let parts = [(header, 16, NEXT), (data, 512, NEXT), (header + 64, 1, WRITE)];
        for (part, entry) in (request * 3..).zip(parts) {
            put_entry(&guest, DESC, part, entry, part + 1);
        }
        guest.memory.write_obj(request * 3, GuestAddress(AVAIL + 4 + u64::from(request) * 2)).unwrap();
    }
    run(&mut guest, requests as u16);
    wait_for_used(&rig, &guest, requests as u16);
    let total = rig.status().total;
    assert_eq!((total.writes, total.errors, total.written_bytes), (requests, 0, requests * 512));
}

/// Where long chains have their header (the status byte 64 bytes behind), their data and an indirect table.
pub(super) const HEADER: u64 = 4 << 20;
pub(super) const DATA: u64 = 5 << 20;
pub(super) const TABLE: u64 = 6 << 20;

/// A read of a sector that fills `entries` descriptors at `table`, most of them data.
pub(super) fn put_long_read(guest: &FrontEnd, table: u64, entries: u16) {
    guest.put_header(HEADER, IN, 0);
    put_entry(guest, table, 0, (HEADER, 16, NEXT), 1);
    for entry in 1..entries - 1 {
        put_entry(guest, table, entry, (DATA, 512, NEXT | WRITE), entry + 1);
    }
    put_entry(guest, table, entries - 1, (HEADER + 64, 1, WRITE), 0);
}

/// The longest that there can be: in the ring, in an indirect table, and in both; and a chain that goes round for ever.
/// One request is refused, or returned without an answer where no status byte can be found; the ring goes on.
#[test]
fn chains_of_65535_entries_cost_their_request() {
    const ENTRIES: u16 = 65_535;
    const TABLE_BYTES: u32 = ENTRIES as u32 * 16;
    type Put = fn(&FrontEnd);
    let indirect: Put = |guest| {
        put_long_read(guest, TABLE, ENTRIES);
        put_entry(guest, DESC, 0, (TABLE, TABLE_BYTES, INDIRECT), 0);
    };
    let too_long: Put = |guest| {
        put_long_read(guest, TABLE, ENTRIES);
        put_entry(guest, DESC, 0, (TABLE, TABLE_BYTES + 16, INDIRECT), 0);
    };
    // The three descriptors that are left are for a plain request.
    let direct: Put = |guest| put_long_read(guest, DESC, 32_764);
    let both: Put = |guest| {
        put_long_read(guest, DESC, 32_764);
        put_long_read(guest, TABLE, ENTRIES);
        put_entry(guest, TABLE, 0, (DATA, 512, NEXT | WRITE), 1);
        put_entry(guest, DESC, 32_763, (TABLE, TABLE_BYTES, INDIRECT), 0);
    };
    let round: Put = |guest| {
        put_long_read(guest, DESC, 32_764);
        put_entry(guest, DESC, 32_763, (DATA, 512, NEXT | WRITE), 1);
    };
    // What, and whether its status byte is found.
    let cases = [
        ("in an indirect table", indirect, true),
        ("in a table that is too long", too_long, false),
        ("in the ring", direct, true),
        ("in both", both, true),
        ("round and round", round, false),
    ];
    for (what, put, answered) in cases {
        let rig = Rig::on(
            Arc::new(MemBackend::new(MemOptions::new(1 << 20))),
            &DeviceOptions { queue_size: 32768, ..options() },
        );
        let (mut guest, _wire) = largest_ring(&rig);
        put(&guest);
        guest.memory.write_obj(UNANSWERED, GuestAddress(HEADER + 64)).unwrap();
        // A plain one behind it.
        let plain = HEADER + 0x1000;
        guest.put_header(plain, IN, 0);
        for (entry, part) in (32_765..).zip([(plain, 16, NEXT), (DATA, 512, NEXT | WRITE), (plain + 64, 1, WRITE)]) {
            put_entry(&guest, DESC, entry, part, entry + 1);
        }
        guest.memory.write_obj([0u16, 32_765], GuestAddress(AVAIL + 4)).unwrap();
        run(&mut guest, 2);
        wait_for_used(&rig, &guest, 2);
        let status: u8 = guest.memory.read_obj(GuestAddress(HEADER + 64)).unwrap();
        assert_eq!(status, if answered { 1 } else { UNANSWERED }, "{what}");
        assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(plain + 64)).unwrap(), OK, "{what}");
        let total = rig.status().total;
        assert_eq!((total.errors, total.reads, total.read_bytes), (u64::from(answered), 1, 512), "{what}");
    }
}

/// A ring full of the longest chains is work for seconds. Its worker hears of a hold and of its stop meanwhile.
#[test]
fn a_ring_full_of_the_longest_chains_can_be_held_and_stopped() {
    let rig = memory_disk();
    let mut guest = FrontEnd::connect(&rig.path, 1, 1024, ALL);
    put_long_read(&guest, TABLE, u16::MAX);
    for head in 0..1024 {
        guest.put_descriptor(0, head, TABLE, 65_535 * 16, INDIRECT, 0);
        guest.make_available(0, head);
    }
    guest.kick(0);
    guest.used_within(0, WAIT_TIMEOUT).expect("the first is refused");
    rig.hold(1).unwrap();
    let held_at = rig.status().total.errors;
    assert!(held_at < 1024, "the hold had to wait for all of them");
    let base = guest.stop_ring(0);
    assert_eq!((u64::from(base), rig.status().total.in_flight), (rig.status().total.errors, 0));
    assert!(base < 1024, "the stop had to wait for all of them");
    rig.disk.open_gate();
}

/// The tables of vhost-user: guest address, size, the front-end's address, offset in the file.
pub(super) type Region = (u64, u64, u64, u64);

pub(super) fn table(regions: &[Region]) -> Vec<u8> {
    let mut body = (regions.len() as u64).to_le_bytes().to_vec();
    for &(guest, size, user, offset) in regions {
        body.extend([guest, size, user, offset].iter().flat_map(|word| word.to_le_bytes()));
    }
    body
}

pub(super) fn one_region((guest, size, user, offset): Region) -> Vec<u8> {
    [0, guest, size, user, offset].iter().flat_map(|word: &u64| word.to_le_bytes()).collect()
}

pub(super) fn memfd(len: u64) -> OwnedFd {
    let memory = rustix::fs::memfd_create("hostile", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, len).unwrap();
    memory
}

#[test]
fn a_memory_table_in_any_order_is_served_and_one_that_makes_no_sense_refused() {
    let rig = memory_disk();
    let memory = memfd(1 << 20);
    let user = 0x7000_0000_0000;
    let page = 4096;
    let good: &[&[Region]] = &[
        &[(0, page, user, 0)],
        // The specification asks for no order.
        &[(4 * page, page, user, 0), (0, page, user + page, page), (2 * page, page, user + 2 * page, 0)],
    ];
    let bad: &[&[Region]] = &[
        &[(0, 0, user, 0)],
        &[(0, 2 * page, user, 0), (page, page, user + 2 * page, 0)],
        &[(page, page, user, 0), (page, page, user + 2 * page, 0)],
        &[(u64::MAX - page + 1, page, user, 0)],
        &[(u64::MAX - 5, page, user, 0)],
        &[(0, 1 << 62, user, 0)],
        &[(0, 2 << 20, user, 0)],
        &[(0, page, user, 1 << 20)],
        &[(0, page, user, u64::MAX - page + 1)],
        &[(0, page, u64::MAX - 5, 0)],
        &[(0, page, user, 5)],
    ];
    for (regions, wanted) in good.iter().map(|good| (good, true)).chain(bad.iter().map(|bad| (bad, false))) {
        let (guest, wire) = connect(&rig);
        let files = vec![memory.as_fd(); regions.len()];
        assert_eq!(accepted(&wire, code::SET_MEM_TABLE, &table(regions), &files), wanted, "{regions:x?}");
        if regions.len() == 1 && !wanted {
            let (_guest, wire) = connect_again(&rig, (guest, wire));
            assert!(!accepted(&wire, code::ADD_MEM_REG, &one_region(regions[0]), &files), "{regions:x?}");
        }
    }
    serves(&rig);
}

pub(super) fn connect_again(rig: &Rig, old: (FrontEnd, UnixStream)) -> (FrontEnd, UnixStream) {
    drop(old);
    connect(rig)
}

/// What QEMU would not start either, and what no driver does.
#[test]
fn a_ring_of_which_a_part_lies_in_two_regions_waits_for_a_better_place() {
    let rig = memory_disk();
    let (mut guest, wire) = connect(&rig);
    guest.stop_ring(0);
    let memory = memfd(0x2000);
    let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    // Side by side for the guest and in their file, but two regions.
    let regions = [(0, 0x1000, 0x7000_0000_0000, 0), (0x1000, 0x1000, 0x7000_0000_1000, 0x1000)];
    let files = [memory.as_fd(); 2];
    assert!(accepted(&wire, code::SET_MEM_TABLE, &table(&regions), &files));
    assert!(accepted(&wire, code::SET_VRING_KICK, &0u64.to_le_bytes(), &[kick.as_fd()]));
    assert!(accepted(&wire, code::SET_VRING_ENABLE, &(1u64 << 32).to_le_bytes(), &[]));
    // 64 descriptors: 0x400 bytes of table, 0x86 of the available and 0x206 of the used ring.
    for (descriptors, available, used, fits) in [
        (0u64, 0x400u64, 0x800u64, true),
        (0xe00, 0x400, 0x800, false),
        (0, 0xf80, 0x800, false),
        (0, 0x400, 0xf00, false),
        (0x1400, 0x400, 0x1800, true),
    ] {
        let at = [descriptors, used, available].map(|at| 0x7000_0000_0000 + at);
        let body: Vec<u8> = [0, at[0], at[1], at[2], 0].iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        assert!(accepted(&wire, code::SET_VRING_ADDR, &body, &[]));
        assert_eq!(rig.disk.status().rings.len(), usize::from(fits), "{descriptors:#x} {available:#x} {used:#x}");
        if !fits {
            let why = rig.event(|event| match event {
                Event::ProtocolError(why) => Some(why),
                _ => None,
            });
            assert!(why.contains("two regions"), "{why}");
        }
    }
    drop((guest, wire));
    serves(&rig);
}

#[test]
fn no_more_regions_than_were_said_to_be_possible() {
    let rig = memory_disk();
    let (mut guest, wire) = connect(&rig);
    let most = guest.control.get_max_mem_slots().unwrap();
    let memory = memfd(4096);
    // Two are there already.
    for number in 2..most {
        let at = (1 << 40) + number * 8192;
        let body = one_region((at, 4096, 0x7000_0000_0000 + at, 0));
        assert!(accepted(&wire, code::ADD_MEM_REG, &body, &[memory.as_fd()]), "{number}");
    }
    assert_eq!(guest.write(0, 0, &[1; 512]), OK, "the first are still there");
    let last = (1 << 40) + most * 8192;
    let body = one_region((last, 4096, 0x7000_0000_0000 + last, 0));
    assert!(!accepted(&wire, code::ADD_MEM_REG, &body, &[memory.as_fd()]));
    drop((guest, wire));
    serves(&rig);
}

#[test]
fn a_broken_ring_is_told_of_on_its_error_descriptor() {
    let rig = memory_disk();
    let (mut guest, _wire) = connect(&rig);
    let error = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    guest.control.set_vring_err(0, &error).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(!readable(&error, Duration::ZERO));
    // A head that no ring has.
    guest.make_available(0, 64);
    guest.kick(0);
    assert!(readable(&error, WAIT_TIMEOUT));
}

#[test]
fn messages_out_of_order_end_only_their_connection() {
    let rig = memory_disk();
    let zero = 0u64.to_le_bytes();
    let connected = || {
        let wire = UnixStream::connect(&rig.path).unwrap();
        wire.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
        wire
    };
    // Addresses before memory: the connection ends.
    let wire = connected();
    send(&wire, code::SET_VRING_ADDR, 0, &[0; 40], &[]).unwrap();
    assert_eq!((&wire).read(&mut [0; 1]).unwrap(), 0);
    // The base of a ring that never was is zero.
    let wire = connected();
    send(&wire, code::GET_VRING_BASE, 0, &zero, &[]).unwrap();
    let mut reply = [0; 20];
    (&wire).read_exact(&mut reply).unwrap();
    assert_eq!(reply[12..], [0; 8]);
    drop(wire);
    // The configuration space from anywhere, as much as a message holds; a size that is none is answered with nothing.
    for (offset, size) in [(0u32, 60u32), (0, 256), (59, 1), (60, 196), (0x100, 60), (255, 1), (4095, 1), (4095, 2)] {
        let wire = connected();
        let features = (1u64 << 30).to_le_bytes();
        send(&wire, code::GET_FEATURES, 0, &[], &[]).unwrap();
        (&wire).read_exact(&mut [0; 20]).unwrap();
        send(&wire, code::SET_FEATURES, 0, &features, &[]).unwrap();
        send(&wire, code::SET_PROTOCOL_FEATURES, 0, &(1u64 << 9).to_le_bytes(), &[]).unwrap();
        let mut body: Vec<u8> = [offset, size, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        body.resize(12 + size as usize, 0);
        send(&wire, code::GET_CONFIG, 0, &body, &[]).unwrap();
        let mut answer = vec![0; 24 + size as usize];
        if offset + size <= 4096 {
            (&wire).read_exact(&mut answer).unwrap();
        } else {
            // Past what the protocol allows.
            assert_eq!((&wire).read(&mut answer).unwrap(), 0, "{offset} {size}");
        }
    }
    // Without protocol features the rings need no SET_VRING_ENABLE, also if that is settled late.
    let (mut guest, wire) = connect(&rig);
    guest.control.set_vring_enable(0, false).unwrap();
    let features = guest.features & !F_PROTOCOL;
    guest.control.set_features(features).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    drop((guest, wire));
    serves(&rig);
}

#[test]
fn a_connection_that_ends_within_a_message_is_a_disconnect() {
    let rig = memory_disk();
    for bytes in [&[][..], &[1], &[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0], &[5, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0, 1, 2, 3]]
    {
        let mut wire = UnixStream::connect(&rig.path).unwrap();
        wire.write_all(bytes).unwrap();
        drop(wire);
        rig.disconnected();
    }
    let long: Vec<u8> = [2u32, 1, u32::MAX].iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut wire = UnixStream::connect(&rig.path).unwrap();
    wire.write_all(&long).unwrap();
    assert!(rig.disconnected().contains("broke the protocol"));
    serves(&rig);
}

#[test]
fn thousands_of_malformed_requests_cost_a_bounded_log_and_status() {
    let disk = Arc::new(MemBackend::new(MemOptions::new(1 << 20)));
    let rig = Rig::on(disk.clone(), &options());
    let (mut guest, _wire) = connect(&rig);
    let failed_write = |guest: &mut FrontEnd| {
        disk.fail(Fault { op: MemOp::Write, nth: 1, errno: Errno(28), transferred: 0 });
        assert_eq!(guest.write(0, 0, &[1; 512]), 1);
    };
    failed_write(&mut guest);
    for _ in 0..500 {
        for slot in 0..10u16 {
            guest.put_chain(0, slot, &[(0x80_0000, 3, 0)]);
            guest.make_available(0, slot);
        }
        guest.kick(0);
        for _ in 0..10 {
            guest.used_within(0, WAIT_TIMEOUT).expect("returned");
        }
    }
    failed_write(&mut guest);
    let status = rig.status();
    assert_eq!(status.last_errors.len(), 8);
    let first = &status.last_errors[0].what;
    assert!(first.contains("No space left"), "the guest hid the disk's own error: {status:?}");
    let (events, dropped) = rig.events.take();
    assert!(events.len() <= 256 && dropped > 0, "{} events, {dropped} dropped", events.len());
    assert!(matches!(events.last(), Some(Event::IoError(_))), "{:?}", events.last());
}
