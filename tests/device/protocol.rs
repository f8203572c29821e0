//! The device model, in process, under a front-end that sends what no decent driver would and control messages in any
//! order.

use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kit::front_end::*;
use kit::rig::Rig;
use kit::wait::wait_until;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::disk::{Disk, Event};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{DeviceOptions, Tuning};
use vm_memory::{Bytes, GuestAddress};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// VIRTIO_BLK_T_BARRIER of virtio 0.9.5.
const BARRIER: u32 = 1 << 31;
/// Feature bits of VIRTIO_BLK_F_SEG_MAX and VIRTIO_RING_F_INDIRECT_DESC.
const F_SEG_MAX: u64 = 1 << 2;
const F_INDIRECT: u64 = 1 << 28;
const SIZE: u64 = 8 << 20;
const SECTORS: u64 = SIZE / 512;

/// Descriptors: address, length, flags.
type Chain<'a> = &'a [(u64, u32, u16)];

/// A served file; one front-end after another.
struct FileRig {
    rig: Rig,
    image: PathBuf,
    _dir: tempfile::TempDir,
}

impl Deref for FileRig {
    type Target = Rig;

    fn deref(&self) -> &Rig {
        &self.rig
    }
}

fn rig(mode: CacheMode) -> FileRig {
    rig_with(mode, |_| ())
}

fn rig_with(mode: CacheMode, change: impl FnOnce(&mut FileOptions)) -> FileRig {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let mut options =
        FileOptions { logical_block_size: Some(512), durable_writes: true, ..FileOptions::new(&image, mode.into()) };
    change(&mut options);
    let backend = Arc::new(FileBackend::open(&options).unwrap());
    let options = DeviceOptions { mode, num_queues: 8, queue_size: 256, serial: "rig-0123456789-too-long".into() };
    FileRig { rig: Rig::on(backend, &options), image, _dir: dir }
}

fn connect(rig: &Rig, rings: usize) -> FrontEnd {
    FrontEnd::connect(&rig.path, rings, 256, ALL)
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect()
}

#[test]
fn every_request_in_every_mode() {
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

/// A driver that puts each segment into a descriptor of the ring hangs when a request does not fit into it.
#[test]
fn a_ring_too_small_for_the_largest_request_is_reported() {
    for (size, mask, reported) in [
        (64, ALL & !F_INDIRECT, true),
        (64, ALL, false),
        (128, ALL & !F_INDIRECT, false),
        (64, !(F_INDIRECT | F_SEG_MAX), false),
    ] {
        let rig = rig(CacheMode::None);
        let mut guest = FrontEnd::connect(&rig.path, 2, size, mask);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        assert_eq!(guest.write(1, 0, &[1; 512]), OK);
        let errors = rig.status().last_errors;
        assert_eq!(!errors.is_empty(), reported, "{size} descriptors, features {mask:x}: {errors:?}");
        assert!(errors.iter().all(|error| error.what.contains("--queue-size 64")), "{errors:?}");
    }
}

/// QEMU without a shared memory back-end sends no region, sets up its ring, is refused, and connects again at once.
#[test]
fn guest_memory_that_is_not_shared_is_reported_once_with_the_fix() {
    let rig = rig(CacheMode::None);
    for _ in 0..5 {
        let guest = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, 128, ALL);
        let mut place = guest.ring_config(0);
        place.desc_table_addr = 0x1000;
        guest.control.set_vring_num(0, 128).unwrap();
        guest.control.set_vring_addr(0, &place).unwrap_err();
        drop(guest);
        rig.disconnected();
    }
    let errors = rig.status().last_errors;
    assert_eq!((errors.len(), errors[0].times), (1, 5), "{errors:?}");
    for part in ["memory-backend-memfd", "share=on", "<access mode='shared'/>"] {
        assert!(errors[0].what.contains(part), "{errors:?}");
    }
    assert_eq!(connect(&rig, 1).write(0, 0, &[1; 512]), OK, "memory that is shared is served");
}

/// A device whose rings are looked at often.
fn watched_rig() -> Rig {
    let backend = Arc::new(MemBackend::new(MemOptions::new(SIZE)));
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 2, queue_size: 256, serial: String::new() };
    let tuning = Tuning { stall_after: Duration::from_millis(400), ..Tuning::default() };
    Rig::tuned(backend, &options, &tuning)
}

/// With share=off in QEMU the guest's writes do not reach the file that virtioblkd maps: all of it stays zero for us.
#[test]
fn memory_that_the_guest_writes_privately_is_reported_with_the_fix() {
    let rig = watched_rig();
    let guest = connect(&rig, 2);
    guest.kick(0);
    guest.kick(1);
    wait_until("the memory is reported", || !rig.status().last_errors.is_empty());
    std::thread::sleep(Duration::from_secs(1));
    let errors = rig.status().last_errors;
    assert_eq!(errors.len(), 1, "{errors:?}");
    for part in ["share=off", "memory-backend-memfd", "share=on", "<access mode='shared'/>"] {
        assert!(errors[0].what.contains(part), "{errors:?}");
    }
}

/// A driver may kick when there is nothing: at its start, before it makes a request available, and at any later time.
#[test]
fn kicks_of_an_empty_ring_in_shared_memory_are_not_reported() {
    let rig = watched_rig();
    let mut guest = connect(&rig, 2);
    // Something that the guest wrote long before it found its disk.
    guest.memory.write_obj(0xf000_ff53_u32, GuestAddress(0x40)).unwrap();
    guest.kick(0);
    guest.kick(1);
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    for _ in 0..50 {
        guest.kick(0);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    let errors = rig.status().last_errors;
    assert!(errors.is_empty(), "{errors:?}");
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
fn how_many_syncs_each_mode_makes() {
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
fn held_writes_stay_in_the_ring_and_reads_go_on() {
    let rig = rig(CacheMode::Writeback);
    let mut guest = connect(&rig, 2);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    let figures = rig.hold(1).unwrap();
    assert_eq!((figures.rings, figures.drained), (2, 0));
    assert_eq!(guest.read(0, 0, 512).0, OK, "reads go on");
    let held = guest.add(0, OUT, 0, &[2; 512], 0);
    let behind = guest.add(0, IN, 0, &[], 512);
    guest.kick(0);
    wait_until("the write is blocked", || rig.status().rings[0].held);
    assert_eq!(guest.used_within(0, Duration::from_millis(100)), None, "the write and what is behind it wait");
    assert_eq!(guest.status(0, held), UNANSWERED);
    assert_eq!(guest.read(1, 0, 512), (OK, vec![1; 512]), "another ring's reads go on, and nothing was written");
    rig.disk.open_gate();
    let mut answered = [guest.wait(0), guest.wait(0)];
    answered.sort();
    let mut expected = [(held, OK), (behind, OK)];
    expected.sort();
    assert_eq!(answered, expected, "no kick was needed");
    assert_eq!(guest.read(0, 0, 512), (OK, vec![2; 512]));
}

#[test]
fn a_hold_syncs_in_every_mode() {
    for mode in CacheMode::ALL {
        let rig = rig(mode);
        let mut guest = connect(&rig, 1);
        assert_eq!(guest.write(0, 0, &[1; 4096]), OK);
        let before = rig.disk.status().total.syncs;
        rig.hold(7).unwrap();
        assert_eq!(rig.disk.status().total.syncs, before + 1, "{mode}");
        rig.disk.open_gate();
        assert_eq!(guest.write(0, 0, &[1; 4096]), OK, "{mode}: goes on");
    }
}

#[test]
fn a_hold_needs_no_front_end_and_outlives_one() {
    let rig = rig(CacheMode::Writeback);
    assert_eq!(rig.hold(1).unwrap().rings, 0);
    let mut guest = connect(&rig, 1);
    let held = guest.add(0, OUT, 0, &[1; 512], 0);
    guest.kick(0);
    assert_eq!(guest.used_within(0, Duration::from_millis(50)), None, "born into the hold");
    drop(guest);
    let mut guest = connect(&rig, 1);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![0; 512]), "nothing was written: {held}");
    rig.disk.open_gate();
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
}

#[test]
fn get_vring_base_answers_while_held_and_loses_nothing() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    rig.hold(1).unwrap();
    guest.add(0, OUT, 0, &[9; 512], 0);
    guest.add(0, OUT, 8, &[9; 512], 0);
    guest.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    let base = guest.stop_ring(0);
    assert_eq!(base, 0, "held writes were not taken");
    rig.disk.open_gate();
    assert_eq!(guest.used_within(0, Duration::from_millis(50)), None, "stopped is stopped");
    // QEMU's `cont`: the same ring from the base on; the requests are still in it.
    let avail = guest.rings[0].avail;
    guest.start_ring(0, base);
    guest.rings[0].avail = avail;
    assert_eq!((guest.wait(0).1, guest.wait(0).1), (OK, OK));
    assert_eq!(guest.read(0, 8, 512), (OK, vec![9; 512]));
}

#[test]
fn stop_and_start_under_load_answers_everything_once() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    let (mut sent, mut answered) = (0, 0);
    for round in 0..40 {
        for _ in 0..16 {
            guest.add(0, OUT, (sent % 1000) * 8, &pattern(round, 4096), 0);
            sent += 1;
        }
        guest.kick(0);
        let base = guest.stop_ring(0);
        while guest.used(0).is_some_and(|(head, _)| {
            let slot = (head / 4) as u16;
            assert_eq!(guest.status(0, slot), OK);
            guest.give_back(0, slot);
            true
        }) {
            answered += 1;
        }
        let avail = guest.rings[0].avail;
        assert_eq!(u64::from(base), answered % 65536, "what was taken was answered before the base was told");
        guest.restart_ring(0, base, avail);
        while answered < sent {
            assert_eq!(guest.wait(0).1, OK);
            answered += 1;
        }
    }
    assert_eq!(rig.disk.status().total.writes, sent);
}

#[test]
fn the_memory_table_changes_under_load() {
    let rig = rig(CacheMode::Writeback);
    let mut guest = connect(&rig, 2);
    for _ in 0..50 {
        for _ in 0..8 {
            guest.add(0, OUT, 0, &[3; 4096], 0);
            guest.add(1, IN, 0, &[], 4096);
        }
        guest.kick(0);
        guest.kick(1);
        guest.send_memory_table();
        for _ in 0..8 {
            assert_eq!(guest.wait(0).1, OK);
            assert_eq!(guest.wait(1).1, OK);
        }
    }
}

#[test]
fn a_disabled_ring_rests_and_an_enabled_one_wakes() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    guest.control.set_vring_enable(0, false).unwrap();
    guest.add(0, OUT, 0, &[1; 512], 0);
    guest.kick(0);
    assert_eq!(guest.used_within(0, Duration::from_millis(50)), None);
    assert!(rig.disk.status().rings.is_empty(), "no thread for a ring at rest");
    guest.control.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.wait(0).1, OK);
}

/// Between SET_VRING_ADDR and the start of a ring its indices can still change: firmware hands its disk over to a system that
/// takes the ring up where it is.
#[test]
fn a_ring_goes_on_at_the_used_index_that_it_starts_with() {
    let rig = rig(CacheMode::None);
    let mut front_end = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, 64, ALL);
    let config = front_end.ring_config(0);
    front_end.control.set_vring_num(0, 64).unwrap();
    front_end.control.set_vring_addr(0, &config).unwrap();
    let indices = [front_end.rings[0].avail_at(), front_end.rings[0].used_at()].map(|at| GuestAddress(at.0 + 2));
    let data = pattern(1, 512);
    // The second time as after a reset of the driver, of which only its memory tells.
    for round in 0..2 {
        indices.into_iter().for_each(|at| front_end.memory.write_obj(5u16, at).unwrap());
        (front_end.rings[0].avail, front_end.rings[0].used_seen) = (5, 5);
        front_end.control.set_vring_base(0, 5).unwrap();
        front_end.control.set_vring_kick(0, &front_end.rings[0].kick).unwrap();
        front_end.control.set_vring_call(0, &front_end.rings[0].call).unwrap();
        front_end.control.set_vring_enable(0, true).unwrap();
        assert_eq!(front_end.write(0, 0, &data), OK, "round {round}");
        assert_eq!(front_end.memory.read_obj::<u16>(indices[1]).unwrap(), 6, "round {round}");
        assert_eq!(front_end.stop_ring(0), 6, "round {round}");
    }
}

#[test]
fn the_call_descriptor_is_changed_while_running() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT), "an interrupt");
    guest.rings[0].call = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    guest.control.set_vring_call(0, &guest.rings[0].call).unwrap();
    consume(&guest.rings[0].call);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT), "an interrupt on the new descriptor");
}

#[test]
fn an_answer_given_before_the_call_descriptor_came_is_signalled_with_it() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    let base = guest.stop_ring(0);
    let avail = guest.rings[0].avail;
    // GET_VRING_BASE took the descriptor away; QEMU's `cont` starts the ring and sends a new one last.
    guest.restart_ring_without_call(0, base, avail);
    consume(&guest.rings[0].call);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(!readable(&guest.rings[0].call, Duration::from_millis(20)));
    guest.control.set_vring_call(0, &guest.rings[0].call).unwrap();
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT));
}

#[test]
fn without_event_idx_the_no_interrupt_flag_is_honoured() {
    let rig = rig(CacheMode::None);
    let mut guest = FrontEnd::connect(&rig.path, 1, 64, !F_EVENT_IDX);
    let flags_at = guest.rings[0].avail_at();
    guest.memory.write_obj(1u16, flags_at).unwrap();
    consume(&guest.rings[0].call);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(!readable(&guest.rings[0].call, Duration::from_millis(50)));
    guest.memory.write_obj(0u16, flags_at).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT));
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
fn malformed_chains_are_returned_and_the_ring_goes_on() {
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
fn a_broken_ring_stops_alone() {
    type Break = fn(&mut FrontEnd);
    let breaks: [(&str, Break); 3] = [
        ("available index", |guest| {
            let at = guest.rings[0].avail_at().0 + 2;
            guest.memory.write_obj(1000u16, GuestAddress(at)).unwrap();
        }),
        ("made available twice", |guest| {
            // Held, so that the first is still in flight when the second comes.
            guest.put_header(0x80_0000, OUT, 0);
            for _ in 0..2 {
                let parts = [(0x80_0000, 16, 0), (0x90_0000, 512 << 10, 0), (0x80_0040, 1, WRITE)];
                guest.put_chain(0, 200, &parts);
                guest.make_available(0, 200);
            }
        }),
        ("outside the ring", |guest| guest.make_available(0, 256)),
    ];
    for (what, break_it) in breaks {
        let rig = rig(CacheMode::None);
        let mut guest = connect(&rig, 2);
        break_it(&mut guest);
        guest.kick(0);
        let why = rig.event(|event| match event {
            Event::ProtocolError(why) => Some(why),
            _ => None,
        });
        assert!(why.starts_with("ring 0 stopped"), "{what}: {why}");
        assert_eq!(guest.write(1, 0, &[1; 512]), OK, "{what}: the other ring goes on");
        // A hold still settles, and a reset ring works again.
        rig.hold(1).unwrap();
        rig.disk.open_gate();
        guest.stop_ring(0);
        guest.reset_ring_memory(0);
        guest.start_ring(0, 0);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK, "{what}: set up anew");
    }
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

#[test]
fn a_front_end_that_misbehaves_is_dropped_and_the_next_is_served() {
    let rig = rig(CacheMode::None);
    type Misbehave = fn(&mut FrontEnd) -> bool;
    let cases: [(&str, Misbehave); 6] = [
        ("too many rings", |guest| guest.control.set_vring_num(8, 64).is_err()),
        ("a ring too large", |guest| guest.control.set_vring_num(0, 512).is_err()),
        ("not a power of two", |guest| guest.control.set_vring_num(0, 100).is_err()),
        ("a feature never offered", |guest| guest.control.set_features(u64::MAX).is_err()),
        ("in-flight region", |guest| {
            let wanted = vhost::vhost_user::message::VhostUserInflight::default();
            guest.control.get_inflight_fd(&wanted).is_err()
        }),
        ("gone", |_| true),
    ];
    for (what, misbehave) in cases {
        let mut guest = connect(&rig, 1);
        assert!(misbehave(&mut guest), "{what}");
        drop(guest);
        let mut guest = connect(&rig, 1);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK, "after: {what}");
    }
}

#[test]
fn config_space_cannot_be_written() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    let before = guest.config(60);
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    guest.control.set_config(32, flags, &[0]).unwrap();
    assert_eq!(guest.config(60), before);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
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
fn read_only_is_shown_and_kept() {
    let rig = rig_with(CacheMode::None, |options| options.read_only = true);
    let mut guest = connect(&rig, 1);
    assert_ne!(guest.features & (1 << 5), 0, "VIRTIO_BLK_F_RO");
    assert_eq!(guest.write(0, 0, &[1; 512]), IOERR);
    assert_eq!(guest.range(0, WRITE_ZEROES, 0, 8, 0), UNSUPP);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![0; 512]));
    assert!(std::fs::read(&rig.image).unwrap().iter().all(|&byte| byte == 0));
}

/// QEMU reads the used index when it sees the server gone, and gives the next one what is not answered by then.
#[test]
fn a_front_end_sees_the_end_after_the_last_answer() {
    let options = MemOptions { order: CompletionOrder::OnRequest, ..MemOptions::new(SIZE) };
    let backend = Arc::new(MemBackend::new(options));
    let device = DeviceOptions { mode: CacheMode::Writeback, num_queues: 1, queue_size: 64, serial: String::new() };
    let rig = Rig::on(backend.clone(), &device);
    let stream = UnixStream::connect(&rig.path).unwrap();
    let wire = stream.try_clone().unwrap();
    let mut guest = FrontEnd::handshake(stream, 1, 64, ALL);
    guest.start_ring(0, 0);
    guest.add(0, OUT, 0, &[1; 512], 0);
    guest.kick(0);
    wait_until("the write is in flight", || backend.waiting() > 0);
    let ended = |timeout| {
        let timeout = Timespec { tv_sec: 0, tv_nsec: timeout };
        poll(&mut [PollFd::new(&wire, PollFlags::RDHUP)], Some(&timeout)).unwrap() > 0
    };
    std::thread::scope(|scope| {
        scope.spawn(|| rig.device.shutdown());
        let early = ended(300_000_000);
        // The write, and the sync at the end.
        backend.release(2);
        while !ended(1_000_000) {}
        assert!(!early, "a request is in flight");
        assert!(guest.used(0).is_some(), "answered before");
    });
}
