//! Which parts of an RBD image hold data, as a copy asks for it.

use std::time::Duration;

use kit::backend::{Driver, eventually};
use kit::rbd_stub::Stub;
use virtioblkd::backend::Backend;
use virtioblkd::backend::rbd::{Encryption, RbdBackend};
use virtioblkd::engine::CacheMode;

/// What may hold data, as a copy asks for it.
pub(super) fn data(disk: &RbdBackend) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = disk.next_data(at).expect("a range") {
        assert!(start >= at && end > start, "no progress: {start}..{end} after {at}");
        ranges.push((start, end));
        at = end;
    }
    ranges
}

pub(super) fn covers(ranges: &[(u64, u64)], offset: u64, len: u64) -> bool {
    let held = |byte| ranges.iter().any(|(start, end)| (*start..*end).contains(&byte));
    held(offset) && held(offset + len - 1)
}

#[test]
fn holes_are_listed_and_data_never_missed() {
    let size = 256 << 20;
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_size", &size.to_string());
    let disk = stub.open();
    let holes = |ranges: &[(u64, u64)]| ranges.iter().map(|(start, end)| end - start).sum::<u64>() < 8 << 20;
    // A listing that takes longer than a second is done without, and tried again after ten.
    eventually("an empty image is a hole", || holes(&data(&disk)));
    let mut driver = Driver::new(&disk, 4);
    let written = [0, 4096, (4 << 20) - 512, 70 << 20, (70 << 20) + (600 << 10), 200 << 20, size - 512];
    for offset in written {
        driver.write(offset, &[1; 512]).unwrap();
    }
    eventually("holes do not count as data", || {
        let ranges = data(&disk);
        assert!(written.iter().all(|offset| covers(&ranges, *offset, 512)), "data was missed: {ranges:?}");
        holes(&ranges)
    });
    // What a guest is about to overwrite is asked for between, and does not disturb.
    let mut at = 0;
    let mut between = Vec::new();
    while let Some((start, end)) = disk.next_data(at).expect("a range") {
        between.push((start, end));
        for offset in written {
            let (start, end) = disk.next_data(offset).expect("a range").expect("data");
            assert!(start <= offset && end >= offset + 512, "{offset} is in {start}..{end}");
        }
        at = end;
    }
    assert!(written.iter().all(|offset| covers(&between, *offset, 512)), "data was missed: {between:?}");
}

#[test]
fn holes_that_cannot_be_listed_count_as_data_without_delay() {
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_size", &(64 << 20).to_string());
    let all = |ranges: &[(u64, u64)]| ranges.iter().map(|(start, end)| end - start).sum::<u64>() == 64 << 20;
    let disk = stub.open();
    stub.tell("fail diff 95 -1");
    assert!(all(&data(&disk)));
    drop(disk);
    let disk = stub.open();
    stub.tell("diff-hangs");
    let start = std::time::Instant::now();
    assert!(all(&data(&disk)));
    assert!(start.elapsed() < Duration::from_secs(30), "each range waited for a cluster that does not answer");
    assert_eq!(stub.count("diffs"), 1);
    stub.tell("diff-goes");
    // librbd lists what is stored, which is elsewhere in an encrypted image.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("passphrase");
    std::fs::write(&file, "open sesame").unwrap();
    let mut secret = Stub::new(CacheMode::None);
    secret.set("stub_passphrase", "open sesame").options.encryption = Some((Encryption::Luks2, file));
    let secret = secret.open();
    assert_eq!(data(&secret), [(0, secret.geometry().size)]);
    let mut moved = Stub::new(CacheMode::None);
    moved.set("stub_features", &(61 + 512).to_string());
    assert_eq!(data(&moved.open()).iter().map(|(start, end)| end - start).sum::<u64>(), 8 << 20);
}
