//! Requests of every kind, shape and driver, in every mode: results, syncs, and what malformed ones do.

use std::sync::Arc;

use kit::front_end::*;
use kit::rig::Rig;
use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::disk::Disk;
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{DeviceOptions, Tuning};
use vm_memory::{Bytes, GuestAddress};

use super::file_rig::*;

/// VIRTIO_BLK_T_BARRIER of virtio 0.9.5.
const BARRIER: u32 = 1 << 31;

/// Descriptors: address, length, flags.
type Chain<'a> = &'a [(u64, u32, u16)];

#[test]
fn every_request_type_works_in_every_mode() {
    for mode in CacheMode::ALL {
        let rig = rig(mode);
        let mut guest = connect(&rig, 2);
        let data = pattern(7, 8192);
        assert_eq!(guest.write(0, 16, &data), OK, "{mode}");
        assert_eq!(guest.read(1, 16, 8192), (OK, data), "{mode}");
        assert_eq!(guest.flush(1), OK, "{mode}: synced or ignored, never refused");
        assert_eq!(guest.range(0, WRITE_ZEROES, 16, 8, 1), OK);
        assert_eq!(guest.read(0, 16, 4096), (OK, vec![0; 4096]), "{mode}");
        assert_eq!(guest.range(0, DISCARD, 16, 16, 0), OK);
        let (status, serial) = guest.ask(0, GET_ID, 0, &[], 20);
        assert_eq!((status, &serial[..]), (OK, &b"rig-0123456789-too-l"[..]));
        for len in [1, 8, 19, 21, 64] {
            let (status, serial) = guest.ask(0, GET_ID, 0, &[], len);
            let shown = serial.len().min(20);
            assert_eq!((status, &serial[..shown]), (OK, &b"rig-0123456789-too-l"[..shown]), "{len} bytes");
        }
        assert_eq!(guest.ask(0, GET_ID, 0, &[], 0).0, OK);
        assert_eq!(guest.ask(0, 99, 0, &[], 512).0, UNSUPP);
        assert_eq!(guest.read(0, SECTORS, 512).0, IOERR);
        assert_eq!(guest.write(0, SECTORS - 1, &[1; 1024]), IOERR);
        let has_cache = matches!(mode, CacheMode::None | CacheMode::Writeback | CacheMode::Unsafe);
        assert_eq!(guest.features & F_FLUSH != 0, has_cache, "{mode}");
        let config = guest.config(60);
        assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), SECTORS);
        assert_eq!(config[32], u8::from(has_cache));
        assert_eq!(guest.config(96).len(), 96);
    }
}

/// A driver of virtio 0.9.5 flushes with type 5, and may set the bit of a barrier in any type.
#[test]
fn old_drivers_flush_and_write_with_their_own_types() {
    for mode in CacheMode::ALL {
        for flush in [FLUSH | 1, FLUSH | BARRIER, FLUSH | 1 | BARRIER] {
            let rig = rig(mode);
            let mut guest = connect(&rig, 1);
            let data = pattern(3, 4096);
            assert_eq!(guest.ask(0, OUT | BARRIER, 8, &data, 0).0, OK);
            assert_eq!(guest.ask(0, IN | BARRIER, 8, &[], 4096), (OK, data), "{mode}");
            let before = rig.status().total.syncs;
            assert_eq!(guest.ask(0, flush, 0, &[], 0).0, OK, "{mode}: {flush:#x}");
            let synced = rig.status().total.syncs - before;
            let has_cache = matches!(mode, CacheMode::None | CacheMode::Writeback);
            assert!(synced == 1 || !has_cache, "{mode}: {flush:#x} made {synced} syncs");
        }
    }
}

#[test]
fn each_mode_makes_its_number_of_syncs() {
    // mode, driver flushes, durable writes by flag: syncs after 3 writes, and after one flush more.
    for (mode, mask, native, after_writes, after_flush) in [
        (CacheMode::None, ALL, true, 0, 1),
        (CacheMode::Writeback, ALL, true, 0, 1),
        (CacheMode::Unsafe, ALL, true, 0, 0),
        (CacheMode::Writethrough, ALL, false, 3, 4),
        (CacheMode::Directsync, ALL, false, 3, 4),
        (CacheMode::Writethrough, ALL, true, 0, 1),
        // A driver that cannot flush.
        (CacheMode::None, !F_FLUSH, false, 3, 4),
        (CacheMode::Writeback, !F_FLUSH, false, 3, 4),
        (CacheMode::Unsafe, !F_FLUSH, false, 0, 0),
    ] {
        let rig = rig_with(mode, |options| options.durable_writes = native);
        let mut guest = FrontEnd::connect(&rig.path, 1, 64, mask);
        for sector in 0..3 {
            assert_eq!(guest.write(0, sector * 8, &[1; 4096]), OK);
        }
        assert_eq!(rig.disk.status().total.syncs, after_writes, "{mode} {native}");
        assert_eq!(guest.flush(0), OK);
        assert_eq!(rig.disk.status().total.syncs, after_flush, "{mode} {native}");
    }
}

#[test]
fn buffers_of_every_shape_are_served() {
    for mode in [CacheMode::None, CacheMode::Writeback] {
        let rig = rig(mode);
        let mut guest = connect(&rig, 1);
        // Across the border of two regions, and not aligned to anything.
        let data = pattern(5, 16384);
        for start in [REGION_BORDER - 4096, REGION_BORDER - 1, REGION_BORDER - 8191, 40 << 20, (40 << 20) + 3] {
            guest.memory.write_slice(&data, GuestAddress(start)).unwrap();
            let header = 0x80_0000;
            guest.put_header(header, OUT, 32);
            guest.put_chain(0, 200, &[(header, 16, 0), (start, 16384, 0), (header + 64, 1, WRITE)]);
            guest.make_available(0, 200);
            guest.kick(0);
            assert_eq!(guest.used_within(0, WAIT_TIMEOUT), Some((200, 1)));
            assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(header + 64)).unwrap(), OK);
            assert_eq!(guest.read(0, 32, 16384), (OK, data.clone()), "{mode} from {start:x}");
            // And back, in odd pieces.
            guest.put_header(header, IN, 32);
            let to = start + 100_000;
            let parts = [
                (header, 16, 0),
                (to, 1, WRITE),
                (to + 1, 511, WRITE),
                (to + 512, 15872, WRITE),
                (header + 64, 1, WRITE),
            ];
            guest.put_chain(0, 200, &parts);
            guest.make_available(0, 200);
            guest.kick(0);
            assert_eq!(guest.used_within(0, WAIT_TIMEOUT), Some((200, 16385)));
            let mut back = vec![0; 16384];
            guest.memory.read_slice(&mut back, GuestAddress(to)).unwrap();
            assert_eq!(back, data, "{mode} to {to:x}");
        }
    }
}

#[test]
fn malformed_chains_are_returned_and_the_ring_continues() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    let header = 0x80_0000u64;
    let status = header + 64;
    let (far, page) = (1 << 40, 0x90_0000u64);
    // What the chain is, and the status where one can be written.
    let cases: &[(Chain, Option<u8>)] = &[
        (&[(header, 16, 0)], None),
        (&[(header, 16, 0), (status, 0, WRITE)], None),
        (&[(header, 3, 0), (status, 1, WRITE)], None),
        (&[(far, 16, 0), (status, 1, WRITE)], None),
        (&[(status, 1, WRITE), (header, 16, 0)], None),
        (&[(header, 16, 0), (far, 512, 0), (status, 1, WRITE)], Some(IOERR)),
        (&[(header, 16, 0), (REGION_BORDER * 2 - 256, 512, 0), (status, 1, WRITE)], Some(IOERR)),
        (&[(header, 16, 0), (page, 512, 0), (far, 1, WRITE)], None),
        (&[(header, 16, 0), (page, 100, 0), (status, 1, WRITE)], Some(IOERR)),
        (&[(header, 16, 0), (page, 1 << 31, 0), (status, 1, WRITE)], Some(IOERR)),
        (&[(header, 16, 0), (page, 1 << 31, 0), (page, 1 << 31, 0), (status, 1, WRITE)], None),
        (&[(page, 33, INDIRECT)], None),
        (&[(far, 32, INDIRECT)], None),
    ];
    for (parts, expected) in cases {
        guest.put_header(header, OUT, 0);
        guest.put_chain(0, 200, parts);
        guest.make_available(0, 200);
        guest.kick(0);
        let (head, _) = guest.used_within(0, WAIT_TIMEOUT).expect("returned");
        assert_eq!(head, 200);
        let answer: u8 = guest.memory.read_obj(GuestAddress(status)).unwrap();
        assert_eq!(answer, expected.unwrap_or(UNANSWERED), "{parts:x?}");
        assert_eq!(guest.write(0, 0, &[1; 512]), OK, "the ring goes on after {parts:x?}");
    }
    // A chain that bites its tail, and one through an indirect table in an indirect table.
    guest.put_header(header, OUT, 0);
    guest.put_descriptor(0, 200, header, 16, NEXT, 201);
    guest.put_descriptor(0, 201, page, 512, NEXT, 200);
    guest.make_available(0, 200);
    guest.put_descriptor(0, 210, page, 16, INDIRECT, 0);
    guest.memory.write_obj(page, GuestAddress(page)).unwrap();
    guest.memory.write_obj((u64::from(INDIRECT) << 32) | 16, GuestAddress(page + 8)).unwrap();
    guest.make_available(0, 210);
    guest.kick(0);
    assert_eq!(guest.used_within(0, WAIT_TIMEOUT), Some((200, 0)));
    assert_eq!(guest.used_within(0, WAIT_TIMEOUT), Some((210, 0)));
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
}

#[test]
fn a_driver_before_version_1_or_without_flush_is_served_write_through() {
    let rig = rig_with(CacheMode::None, |options| options.durable_writes = false);
    let mut bios = FrontEnd::connect(&rig.path, 1, 64, 0);
    assert_eq!(bios.write(0, 0, &[1; 512]), OK);
    let status = rig.disk.status();
    assert_eq!((status.total.syncs, &status.write_acknowledged[..]), (1, "when durable"));
    drop(bios);
    let mut linux = connect(&rig, 1);
    assert_eq!(linux.write(0, 0, &[1; 512]), OK);
    let status = rig.disk.status();
    assert_eq!(status.write_acknowledged, "when the host's device has it");
    // The BIOS's write and its disconnect; Linux's write needs none.
    assert_eq!(status.total.syncs, 1);
}

/// Windows 11 trims nothing where the unit is 4 KiB. The unit is advice: a discard that does not fill it is carried out.
#[test]
fn the_discard_granularity_is_shown_and_discards_need_not_fill_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::write(&image, vec![7; 256 << 10]).unwrap();
    let backend = FileBackend::open(&FileOptions {
        logical_block_size: Some(512),
        ..FileOptions::new(&image, CacheMode::Writeback.into())
    });
    let backend = Arc::new(backend.unwrap());
    let options = DeviceOptions { mode: CacheMode::Writeback, num_queues: 1, queue_size: 64, serial: String::new() };
    for granularity in [512, 32 << 10, 1 << 20] {
        let tuning = Tuning { discard_granularity: Some(granularity), ..Tuning::default() };
        let rig = Rig::tuned(backend.clone(), &options, &tuning);
        let mut guest = FrontEnd::connect(&rig.path, 1, 64, ALL);
        let config = guest.config(60);
        let le32 = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!(le32(44), granularity / 512, "discard_sector_alignment");
        assert_eq!(u64::from(le32(36)) * 512, 1 << 30, "max_discard_sectors is the back-end's");
        assert_eq!(guest.write(0, 0, &vec![7; 256 << 10]), OK);
        // Blocks 5 to 20 of 4 KiB: neither end is a multiple of 32 KiB.
        assert_eq!(guest.range(0, DISCARD, 40, 128, 0), OK);
        let (status, data) = guest.read(0, 0, 256 << 10);
        assert_eq!(status, OK);
        for (block, bytes) in data.chunks(4096).enumerate() {
            let expected = if (5..21).contains(&block) { 0 } else { 7 };
            assert!(bytes.iter().all(|byte| *byte == expected), "{granularity}: block {block}");
        }
    }
}

#[test]
fn a_read_only_disk_is_reported_and_refuses_writes() {
    let rig = rig_with(CacheMode::None, |options| options.read_only = true);
    let mut guest = connect(&rig, 1);
    assert_ne!(guest.features & (1 << 5), 0, "VIRTIO_BLK_F_RO");
    assert_eq!(guest.write(0, 0, &[1; 512]), IOERR);
    assert_eq!(guest.range(0, WRITE_ZEROES, 0, 8, 0), UNSUPP);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![0; 512]));
    assert!(std::fs::read(&rig.image).unwrap().iter().all(|&byte| byte == 0));
}
