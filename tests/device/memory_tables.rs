//! Memory tables in any order, with and without sense.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use kit::front_end::*;
use kit::rig::Rig;
use vhost::vhost_user::VhostUserFrontend;
use virtioblkd::disk::{Disk as _, Event};

use super::wire::*;

#[test]
fn a_memory_table_in_any_order_is_accepted_and_an_invalid_one_refused() {
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
fn a_ring_that_spans_two_regions_does_not_start_until_it_is_moved() {
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
fn more_regions_than_get_max_mem_slots_are_refused() {
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
