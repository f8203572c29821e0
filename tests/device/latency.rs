//! Latency histograms: each request is counted once, with the time that it took and the back-end's share of it; and what
//! is acknowledged and not durable yet.

use std::sync::Arc;
use std::time::Duration;

use kit::front_end::*;
use kit::rig::Rig;
use kit::wait::wait_until;
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::disk::Disk;
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;

const OK: u8 = 0;

/// How long the back-end is made to take.
const TOOK: Duration = Duration::from_millis(60);

fn rig_on(mode: CacheMode, order: CompletionOrder) -> (Rig, Arc<MemBackend>) {
    let memory = Arc::new(MemBackend::new(MemOptions { order, ..MemOptions::new(1 << 20) }));
    let options = DeviceOptions { mode, num_queues: 4, queue_size: 256, serial: String::new() };
    (Rig::on(memory.clone(), &options), memory)
}

#[test]
fn each_request_is_counted_once_in_the_histogram_of_its_kind() {
    let (rig, _memory) = rig_on(CacheMode::Writeback, CompletionOrder::InOrder);
    let mut guest = FrontEnd::connect(&rig.path, 2, 256, ALL);
    for ring in [0, 1] {
        for sector in 0..5 {
            assert_eq!(guest.write(ring, sector, &[1; 512]), OK);
        }
        assert_eq!(guest.read(ring, 0, 512).0, OK);
    }
    assert_eq!(guest.flush(0), OK);
    let latency = rig.disk.latency();
    let counts = latency.request.each().map(|(kind, histogram)| (kind, histogram.count()));
    assert_eq!(counts, [("read", 2), ("write", 10), ("flush", 1), ("discard", 0), ("write-zeroes", 0)]);
    let backend = latency.backend.each().map(|(_, histogram)| histogram.count());
    assert_eq!(backend, [2, 10, 1, 0, 0], "the sync of the flush counts as one");
    assert_eq!(latency.held.count(), 0);
    // A front-end that comes next counts on.
    drop(guest);
    let mut guest = FrontEnd::connect(&rig.path, 1, 256, ALL);
    assert_eq!(guest.read(0, 0, 512).0, OK);
    assert_eq!(rig.disk.latency().request.read.count(), 3);
}

#[test]
fn a_slow_back_end_is_in_its_own_histogram_and_in_the_requests() {
    let (rig, memory) = rig_on(CacheMode::Directsync, CompletionOrder::OnRequest);
    let mut guest = FrontEnd::connect(&rig.path, 1, 256, ALL);
    guest.add(0, IN, 0, &[], 512);
    guest.kick(0);
    wait_until("the read is in flight", || rig.status().total.in_flight == 1);
    std::thread::sleep(TOOK);
    memory.release(1);
    assert_eq!(guest.wait(0).1, OK);
    let latency = rig.disk.latency();
    for histogram in [&latency.request.read, &latency.backend.read] {
        assert_eq!(histogram.count(), 1);
        assert!(histogram.quantile(1.0) >= Some(TOOK) && histogram.mean() >= Some(TOOK), "{histogram:?}");
        assert_eq!(histogram.cumulative(&[1_000_000]), [0], "none took less than a millisecond");
    }
}

#[test]
fn the_time_at_the_gate_is_counted_apart_from_the_request() {
    let (rig, _memory) = rig_on(CacheMode::Writeback, CompletionOrder::InOrder);
    let mut guest = FrontEnd::connect(&rig.path, 1, 256, ALL);
    rig.hold(1).unwrap();
    guest.add(0, OUT, 0, &[1; 512], 0);
    guest.kick(0);
    wait_until("the write is blocked", || rig.status().rings[0].held);
    std::thread::sleep(TOOK);
    rig.disk.open_gate();
    assert_eq!(guest.wait(0).1, OK);
    let latency = rig.disk.latency();
    assert_eq!(latency.held.count(), 1);
    assert!(latency.held.mean() >= Some(TOOK), "{:?}", latency.held);
    assert_eq!(latency.request.write.count(), 1);
}

#[test]
fn bytes_are_unsynced_from_their_acknowledgement_until_a_sync_of_any_ring() {
    let (rig, _memory) = rig_on(CacheMode::None, CompletionOrder::InOrder);
    let mut guest = FrontEnd::connect(&rig.path, 2, 256, ALL);
    assert_eq!((rig.disk.unsynced().unsynced_bytes, rig.disk.unsynced().last_sync_ms), (0, None));
    assert_eq!(guest.write(0, 0, &[1; 4096]), OK);
    assert_eq!(guest.write(1, 8, &[1; 512]), OK);
    assert_eq!(rig.disk.unsynced().unsynced_bytes, 4608);
    assert_eq!(guest.flush(1), OK);
    let after = rig.disk.unsynced();
    assert_eq!(after.unsynced_bytes, 0, "the flush of one ring covers the writes of all");
    assert!(after.last_sync_ms.is_some());
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert_eq!(rig.disk.unsynced().unsynced_bytes, 512);
    drop(guest);
    rig.disconnected();
    wait_until("the end of a connection has synced", || rig.disk.unsynced().unsynced_bytes == 0);
}

#[test]
fn a_mode_that_acknowledges_durable_writes_has_no_unsynced_bytes() {
    for mode in [CacheMode::Directsync, CacheMode::Writethrough] {
        let (rig, _memory) = rig_on(mode, CompletionOrder::InOrder);
        let mut guest = FrontEnd::connect(&rig.path, 1, 256, ALL);
        assert_eq!(guest.write(0, 0, &[1; 4096]), OK);
        assert_eq!(rig.disk.unsynced().unsynced_bytes, 0, "{mode}");
    }
    let (rig, _memory) = rig_on(CacheMode::Unsafe, CompletionOrder::InOrder);
    let mut guest = FrontEnd::connect(&rig.path, 1, 256, ALL);
    assert_eq!((guest.write(0, 0, &[1; 4096]), guest.flush(0)), (OK, OK));
    assert_eq!(rig.disk.unsynced().unsynced_bytes, 4096, "an ignored flush makes nothing durable");
}
