//! The largest ring and the longest descriptor chains: each is served or fails alone, and the ring can be held and stopped
//! meanwhile.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kit::front_end::*;
use kit::rig::Rig;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VringConfigData};
use virtioblkd::backend::mem::{MemBackend, MemOptions};
use virtioblkd::disk::Disk as _;
use virtioblkd::virtio::DeviceOptions;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::wire::*;

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
fn chains_of_65535_entries_fail_only_their_request() {
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
