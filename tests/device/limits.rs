//! Limits of the disk's rates: what must wait stays in the ring, and nothing but the guest waits for a limit.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use kit::front_end::*;
use kit::rig::Rig;
use kit::wait::wait_until;
use virtioblkd::backend::Errno;
use virtioblkd::backend::mem::{CompletionOrder, Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::disk::Disk;
use virtioblkd::engine::throttle::{Limits, Words};
use virtioblkd::engine::{CacheMode, OnError};
use virtioblkd::virtio::{DeviceOptions, Tuning};

use super::file_rig::*;
use super::tracking;

/// A request of this size fills the bucket of [`SLOW`] for two minutes.
static LARGE: [u8; 64 << 10] = [7; 64 << 10];
const SLOW: u64 = 512;
/// How long to look for a completion that must not come.
const SOON: Duration = Duration::from_millis(100);

fn limits(values: &[(&str, u64)]) -> Limits {
    let mut limits = Limits::default();
    for (name, value) in values {
        assert!(limits.set(Words::Libvirt, name, *value), "{name}");
    }
    limits.check(Words::Libvirt).unwrap();
    limits
}

fn limited(values: &[(&str, u64)]) -> FileRig {
    rig_tuned(CacheMode::Writeback, |_| (), &Tuning { limits: limits(values), ..Tuning::default() })
}

/// A RAM disk with these limits, for a front-end that keeps the region of requests in flight.
fn ram_disk(order: CompletionOrder, values: &[(&str, u64)], on_error: OnError) -> (Arc<MemBackend>, Rig) {
    let disk = Arc::new(MemBackend::new(MemOptions { order, ..MemOptions::new(1 << 20) }));
    let options =
        DeviceOptions { mode: CacheMode::None, num_queues: 2, queue_size: tracking::SIZE, serial: String::new() };
    let tuning = Tuning { limits: limits(values), on_error, ..Tuning::default() };
    (disk.clone(), Rig::tuned(disk, &options, &tuning))
}

/// A disk whose ring 0 has written once and whose next write, at this slot, must wait for two minutes.
fn waiting(name: &str) -> (FileRig, FrontEnd, u16) {
    let rig = limited(&[(name, SLOW)]);
    let mut guest = connect(&rig, 2);
    assert_eq!(guest.write(0, 0, &LARGE), OK, "the first one finds an empty bucket");
    let slot = guest.add(0, OUT, 128, &LARGE, 0);
    guest.kick(0);
    wait_until("the second one waits", || rig.status().rings[0].limited);
    (rig, guest, slot)
}

#[test]
fn a_limit_is_kept_and_what_waits_is_in_the_ring() {
    let rig = limited(&[("total-iops-sec", 50)]);
    let mut guest = connect(&rig, 1);
    let start = Instant::now();
    for _ in 0..60 {
        guest.add(0, IN, 0, &[], 512);
    }
    guest.kick(0);
    wait_until("the ring waits", || rig.status().rings[0].limited && rig.status().rings[0].in_flight == 0);
    for _ in 0..60 {
        assert_eq!(guest.wait(0).1, OK);
    }
    // A tenth of a second's worth and one more go at once: 54 are left, of which the last has gone after 1.06 s.
    assert!(start.elapsed() > Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(!rig.status().total.limited && rig.status().total.reads == 60);
    // Each waits a fiftieth of a second as the foremost, or shorter if the machine was late.
    let latency = rig.disk.latency();
    let waited = &latency.limited;
    assert!((1..=59).contains(&waited.count()), "{waited:?}");
    assert!(waited.quantile(1.0) > Some(Duration::from_millis(10)), "{waited:?}");
    assert_eq!(latency.request.read.count(), 60);
    assert_eq!(rig.status().throttle.unwrap().limits(), limits(&[("total-iops-sec", 50)]));
}

#[test]
fn a_hold_and_a_stop_do_not_wait_for_a_limit() {
    let (rig, mut guest, slot) = waiting("total-bytes-sec");
    let figures = rig.hold(1).unwrap();
    assert_eq!((figures.rings, figures.drained), (2, 0));
    rig.disk.open_gate();
    assert_eq!(rig.status().rings[0].in_flight, 0);
    let base = guest.stop_ring(0);
    assert_eq!((base, guest.status(0, slot)), (1, UNANSWERED), "it was not taken");
    // What the stopped ring waited for is another ring's: nothing is counted for a request that will not go.
    let avail = guest.rings[0].avail;
    guest.start_ring(0, base);
    guest.rings[0].avail = avail;
    assert_eq!(guest.used_within(0, SOON), None, "it waits again");
    rig.disk.set_limits(Limits::default());
    assert_eq!(guest.wait(0), (slot, OK), "no kick was needed");
    assert_eq!(rig.status().throttle, None);
}

#[test]
fn a_changed_limit_takes_effect_for_a_request_that_waits() {
    let (rig, mut guest, slot) = waiting("write-bytes-sec");
    rig.disk.set_limits(limits(&[("total-iops-sec", 1000)]));
    assert_eq!(guest.wait(0), (slot, OK));
    assert_eq!(guest.read(0, 128, LARGE.len() as u32), (OK, LARGE.to_vec()));
}

#[test]
fn reads_and_flushes_pass_a_write_that_waits_for_a_limit_of_writes() {
    let (_rig, mut guest, slot) = waiting("write-bytes-sec");
    let next = guest.add(0, OUT, 256, &LARGE, 0);
    assert_eq!(guest.read(0, 128, 512), (OK, vec![0; 512]), "behind both writes");
    assert_eq!(guest.flush(0), OK);
    assert_eq!(guest.used_within(0, SOON), None);
    // What was set aside cannot be handed back to the front-end, so a stop has it done without the limit.
    assert_eq!(guest.stop_ring(0), 5);
    assert_eq!((guest.status(0, slot), guest.status(0, next)), (OK, OK));
}

/// Where the ring is stopped in a hold, nothing may be left but what the next server finds in it: it may run on another host,
/// which has no region of requests in flight.
#[test]
fn a_stop_in_a_hold_leaves_nothing_that_was_set_aside() {
    let rig = ram_disk(CompletionOrder::InOrder, &[("write-bytes-sec", SLOW)], OnError::Report).1;
    let mut guest = tracking::Guest::new(&rig).front_end;
    assert_eq!(guest.write(0, 0, &LARGE), OK);
    let aside = guest.add(0, OUT, 128, &LARGE, 0);
    assert_eq!(guest.read(0, 0, 512).0, OK, "behind the write");
    assert_eq!(rig.hold(1).unwrap().drained, 1, "it goes before the gate closes");
    assert_eq!(guest.wait(0), (aside, OK));
    assert_eq!(rig.status().rings[0].in_flight, 0);
    let held = guest.add(0, OUT, 256, &LARGE, 0);
    guest.kick(0);
    wait_until("the next one waits", || rig.status().rings[0].limited);
    assert_eq!((guest.stop_ring(0), guest.status(0, held)), (3, UNANSWERED), "it was not taken");
    rig.disk.open_gate();
    rig.disk.set_limits(Limits::default());
    let avail = guest.rings[0].avail;
    guest.restart_ring(0, 3, avail);
    assert_eq!(guest.wait(0), (held, OK));
}

#[test]
fn a_hold_keeps_no_read_that_was_set_aside() {
    let rig = limited(&[("read-bytes-sec", SLOW)]);
    let mut guest = connect(&rig, 1);
    assert_eq!(guest.read(0, 0, LARGE.len() as u32).0, OK);
    let read = guest.add(0, IN, 0, &[], 512);
    assert_eq!(guest.write(0, 0, &LARGE), OK, "behind the read");
    rig.hold(1).unwrap();
    assert_eq!(guest.wait(0), (read, OK));
    rig.disk.open_gate();
}

#[test]
fn what_was_set_aside_goes_before_a_hold_also_behind_a_retained_request() {
    let (disk, rig) = ram_disk(CompletionOrder::OnRequest, &[("write-bytes-sec", SLOW)], OnError::Stop);
    let _released = tracking::Released(disk.clone());
    disk.fail(Fault { op: MemOp::Write, nth: 1, errno: Errno(28), transferred: 0 });
    let mut guest = tracking::Guest::new(&rig).front_end;
    let failing = guest.add(0, OUT, 0, &LARGE, 0);
    let aside = guest.add(0, OUT, 128, &LARGE, 0);
    guest.add(0, IN, 0, &[], 512);
    guest.kick(0);
    wait_until("the read passed", || disk.waiting() == 2);
    disk.release(2);
    assert_eq!(guest.wait(0).1, OK);
    wait_until("the write is retained", || rig.status().rings[0].in_flight == 1);
    rig.disk.close_gate(1);
    wait_until("the other write goes", || disk.waiting() == 1);
    disk.release(1);
    assert_eq!(guest.wait(0), (aside, OK));
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stopped.load(Relaxed) {
                disk.release(1);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        assert_eq!(guest.stop_ring(0), 3);
        stopped.store(true, Relaxed);
    });
    assert_eq!(guest.status(0, failing), OK);
    rig.disk.open_gate();
}

/// What was set aside is counted when it goes early, and nothing is set aside until that has leaked.
#[test]
fn a_guest_that_resets_its_ring_again_and_again_keeps_the_limit() {
    const QUEUED: u16 = 40;
    let rig = limited(&[("write-iops-sec", 1)]);
    let mut guest = connect(&rig, 1);
    for _ in 0..QUEUED {
        guest.add(0, OUT, 0, &[1; 512], 0);
    }
    assert_eq!(guest.read(0, 0, 512).0, OK, "behind the writes");
    assert_eq!((guest.stop_ring(0), rig.status().total.writes), (QUEUED + 1, QUEUED.into()));
    guest.reset_ring_memory(0);
    guest.start_ring(0, 0);
    let write = guest.add(0, OUT, 0, &[2; 512], 0);
    guest.add(0, IN, 0, &[], 512);
    guest.kick(0);
    wait_until("the write waits", || rig.status().rings[0].limited);
    // Its second is over, but those before it count.
    assert_eq!(guest.used_within(0, Duration::from_millis(2500)), None);
    assert_eq!((guest.stop_ring(0), guest.status(0, write)), (0, UNANSWERED));
}

#[test]
fn writes_pass_a_read_that_waits_for_a_limit_of_reads() {
    let rig = limited(&[("read-bytes-sec", SLOW), ("write-iops-sec", 1000)]);
    let mut guest = connect(&rig, 1);
    assert_eq!(guest.read(0, 0, LARGE.len() as u32).0, OK);
    let read = guest.add(0, IN, 0, &[], 512);
    assert_eq!(guest.write(0, 0, &LARGE), OK, "behind the read");
    assert_eq!(guest.used_within(0, SOON), None);
    rig.disk.set_limits(Limits::default());
    assert_eq!(guest.wait(0), (read, OK));
}

#[test]
fn reads_pass_a_waiting_write_also_behind_reads_that_waited() {
    let rig = limited(&[("read-iops-sec", 10), ("write-bytes-sec", SLOW)]);
    let mut guest = connect(&rig, 1);
    assert_eq!(guest.write(0, 0, &LARGE), OK);
    let mut reads: Vec<u16> = (0..4).map(|_| guest.add(0, IN, 0, &[], 512)).collect();
    let write = guest.add(0, OUT, 128, &LARGE, 0);
    reads.extend((0..4).map(|_| guest.add(0, IN, 0, &[], 512)));
    guest.kick(0);
    for read in reads {
        assert_eq!(guest.wait(0), (read, OK));
    }
    assert_eq!(guest.used_within(0, SOON), None);
    rig.disk.set_limits(Limits::default());
    assert_eq!(guest.wait(0), (write, OK));
}

#[test]
fn reads_pass_a_waiting_write_that_came_during_a_hold() {
    let rig = limited(&[("write-bytes-sec", SLOW)]);
    let mut guest = connect(&rig, 1);
    assert_eq!(guest.write(0, 0, &LARGE), OK);
    rig.hold(1).unwrap();
    let write = guest.add(0, OUT, 128, &LARGE, 0);
    let read = guest.add(0, IN, 0, &[], 512);
    guest.kick(0);
    wait_until("the write waits", || rig.status().rings[0].limited);
    rig.disk.open_gate();
    assert_eq!(guest.wait(0), (read, OK));
    assert_eq!(guest.used_within(0, SOON), None);
    rig.disk.set_limits(Limits::default());
    assert_eq!(guest.wait(0), (write, OK));
}

#[test]
fn a_write_whose_time_comes_during_a_hold_waits_for_the_hold() {
    let rig = limited(&[("total-iops-sec", 5)]);
    let mut guest = connect(&rig, 1);
    assert_eq!((guest.write(0, 0, &[1; 512]), rig.hold(1).unwrap().drained), (OK, 0));
    let held = guest.add(0, OUT, 0, &[2; 512], 0);
    guest.kick(0);
    wait_until("the write is blocked", || rig.status().rings[0].held && !rig.status().rings[0].limited);
    assert_eq!(guest.used_within(0, SOON), None);
    std::thread::sleep(Duration::from_secs(2));
    rig.disk.open_gate();
    assert_eq!(guest.wait(0), (held, OK));
    let latency = rig.disk.latency();
    assert!(
        latency.limited.quantile(1.0) < Some(Duration::from_secs(1)),
        "the hold is no limit: {:?}",
        latency.limited
    );
    assert!(latency.held.quantile(1.0) > Some(Duration::from_secs(1)), "{:?}", latency.held);
}

#[test]
fn rings_share_a_limit_evenly() {
    let rig = limited(&[("total-iops-sec", 40)]);
    let mut guest = connect(&rig, 2);
    for ring in [0, 1] {
        for _ in 0..60 {
            guest.add(ring, IN, 0, &[], 512);
        }
    }
    // The first ring has as much as the bucket holds at once before the second one comes.
    guest.kick(0);
    guest.kick(1);
    wait_until("60 are done", || rig.status().total.reads >= 60);
    let rings = rig.status().rings;
    let (one, other) = (rings[0].reads, rings[1].reads);
    assert!(one.abs_diff(other) <= 8, "{one} and {other}");
}

#[test]
fn discards_count_as_operations_without_bytes() {
    let rig = limited(&[("total-bytes-sec", SLOW)]);
    let mut guest = connect(&rig, 1);
    for _ in 0..3 {
        assert_eq!(guest.range(0, DISCARD, 0, 2048, 0), OK);
    }
    assert_eq!(guest.range(0, WRITE_ZEROES, 0, 128, 0), OK);
    let slot = guest.add(0, IN, 0, &[], 512);
    guest.kick(0);
    assert_eq!((guest.used_within(0, SOON), guest.status(0, slot)), (None, UNANSWERED));
}
