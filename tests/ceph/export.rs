//! The instant of a real Ceph image over NBD, read by libnbd's tools while a guest overwrites the image.

use std::fs;
use std::process::{Command, Output};

use kit::ceph::{Cluster, serve};
use kit::driver::{ALL, Driver};
use kit::guest::{Server, scratch, tell};
use kit::snapshot::{ctl, err};
use serde_json::Value;

const MIB: usize = 1 << 20;
/// Four objects of 4 MiB.
const SIZE: usize = 16 * MIB;

fn write(guest: &mut Driver, offset: usize, byte: u8, len: usize) {
    guest.fill(0, &vec![byte; len]);
    assert_eq!(guest.one(0, |guest, id| guest.write(0, offset as u64, 0, len, id)), 0, "the guest saw an error");
}

/// Begins an export in the background.
fn export(server: &Server, socket: &str) -> Output {
    let mut command = ctl();
    command.args(["--json", "snapshot", "--level", "crash", "--background", "--idle", "600s", "--disk"]);
    command.arg(server.control()).args(["--to", &format!("nbd:{socket}")]).output().expect("virtioblkctl")
}

#[test]
fn what_clients_read_is_the_image_at_the_instant() {
    if Command::new("nbdcopy").arg("--version").output().is_err() {
        return tell("SKIPPED: nbdcopy is not installed (scripts/install-test-deps)");
    }
    for mode in ["none", "writeback"] {
        let image = Cluster::shared().image(SIZE as u64);
        let dir = scratch();
        let place = dir.path().to_str().expect("UTF-8");
        let server = serve(&image, mode, &["--copy-dir", place]);
        let mut guest = Driver::connect_soon(&server.socket(), 1, 64, MIB, ALL);
        // The third object does not exist, and the fourth is there in part.
        for at in (0..8 * MIB).step_by(MIB / 2) {
            write(&mut guest, at, 1 + (at / MIB) as u8, MIB / 2);
        }
        write(&mut guest, 13 * MIB + 4096, 0x55, 8192);
        assert_eq!(guest.one(0, |guest, id| guest.flush(0, id)), 0);
        let held = image.content();
        let socket = format!("{place}/nbd");
        let taken = export(&server, &socket);
        assert!(taken.status.success(), "{mode}: {}", err(&taken));
        let uri = format!("nbd+unix:///?socket={socket}");
        let read = |connections: &str| {
            let copy = dir.path().join("copy");
            let _ = fs::remove_file(&copy);
            let done = Command::new("nbdcopy").args([connections, &uri]).arg(&copy).output().expect("nbdcopy");
            assert!(done.status.success(), "{mode}: {}", err(&done));
            assert!(fs::read(&copy).expect("a copy") == held, "{mode}: the copy is not the instant");
        };
        let map: Value = serde_json::from_str(&server.ctl_ok(&["--json", "map"])).expect("JSON");
        let extents = map.as_array().expect("a list");
        let holes = extents.iter().filter(|extent| extent["type"] == 3).filter_map(|extent| extent["length"].as_u64());
        assert!(holes.sum::<u64>() >= 4 * MIB as u64, "{mode}: the object that does not exist is a hole: {map}");
        read("--connections=1");
        // Overwrites a part of each cluster, fills the hole, and makes new ones.
        for at in (0..SIZE).step_by(64 << 10) {
            write(&mut guest, at + 512, 0xee, 4096);
        }
        assert_eq!(guest.one(0, |guest, id| guest.discard(0, 4 * MIB as u64, 4 * MIB as u64, id)), 0);
        read("--connections=4");
        // The guest's data is in the image alone.
        server.ctl_ok(&["copies", "cancel", "copy-1"]);
        assert_eq!(guest.one(0, |guest, id| guest.flush(0, id)), 0);
        let now = image.content();
        assert!(now[512..512 + 4096] == [0xee; 4096] && now[5 * MIB..6 * MIB] == [0; MIB], "{mode}");
    }
}
