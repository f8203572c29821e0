//! The size and the snapshots of an RBD image.

use kit::backend::Driver;
use kit::rbd_stub::Stub;
use virtioblkd::backend::Backend;
use virtioblkd::engine::CacheMode;

use super::rbd_listener::*;

#[test]
fn a_new_size_is_reported_once_and_bounds_every_op() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let (_listener, said) = Listener::start(&disk);
    let mut driver = Driver::new(&disk, 4);
    for size in [16 << 20, 4 << 20, (8 << 20) + 512] {
        stub.tell(&format!("resize {size}"));
        hears(&said, Said::Resized(size));
        // A snapshot changes the header too.
        stub.tell(&format!("resize {size}"));
        assert_eq!(disk.geometry().size, size);
        assert_eq!(driver.run(write_op(size - 4096)), Ok(()));
        assert_eq!(driver.run(write_op(size - 3584)), Err(EIO));
    }
    stub.tell(&format!("resize {}", (8 << 20) + 1000));
    hears_nothing_more(&said);
}

#[test]
fn a_snapshot_is_created_or_its_error_names_the_fix() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let snapshots = disk.store().snapshots().unwrap();
    let full = snapshots.full_name("monday");
    assert_eq!(full, format!("{}@monday", stub.options.name));
    snapshots.create("monday").unwrap();
    snapshots.remove("monday").unwrap();
    assert_eq!((stub.count("snaps"), stub.count("removed")), (1, 1));
    let error = snapshots.create("taken").unwrap_err();
    assert_eq!(error.code, "exists");
    assert!(error.message.contains("@taken"), "{}", error.message);
    for (errno, code, part) in [
        (libc::EBUSY, "busy", "try again"),
        (libc::EROFS, "store", "rbd lock ls"),
        (libc::EDQUOT, "store", "full"),
        (libc::EPERM, "store", "profile rbd"),
        (libc::EIO, "store", "ceph status"),
    ] {
        stub.tell(&format!("fail snap {errno} 1"));
        let error = snapshots.create("s").unwrap_err();
        assert_eq!(error.code, code);
        assert!(error.message.contains(part), "'{part}' is missing in: {}", error.message);
    }
    for name in ["", "a@b", "a/b", "a\0b"] {
        assert_eq!(snapshots.create(name).unwrap_err().code, "store", "{name:?}");
    }
    assert_eq!(snapshots.remove("missing").unwrap_err().code, "store");
    assert_eq!(stub.count("snaps"), 1);
}
