//! The shipped domain on a real libvirt: defined, started, suspended while its disk is held, resumed, destroyed.
//! Said aloud and skipped where libvirt is not installed.

use std::fs;

use kit::guest::libvirt::{Libvirt, disk_xml, server_for_all, shipped};
use kit::guest::qemu::install_boot_sector;
use kit::guest::server::program;
use kit::guest::{Qmp, oracle, output, scratch, sparse_image, wait_until};
use serde_json::json;
use virtioblkd::engine::cache::CacheMode;

/// The lines of the `<disk>`, without what is around it.
fn disk_lines(xml: &str) -> Vec<&str> {
    let lines = xml.lines().map(str::trim).skip_while(|line| !line.starts_with("<disk"));
    lines.take_while(|line| *line != "</disk>").collect()
}

#[test]
fn the_two_shipped_disks_are_one() {
    let (domain, disk) = (shipped("domain-minimal.xml"), shipped("disk.xml"));
    assert!(disk_lines(&disk).len() > 3);
    assert_eq!(disk_lines(&domain), disk_lines(&disk));
}

#[test]
fn the_shipped_domain_runs_and_is_suspended_while_its_disk_is_held() {
    let Some(libvirt) = Libvirt::start() else { return };
    let dir = scratch();
    let image = sparse_image(dir.path(), 1 << 20);
    install_boot_sector(&image);
    let server = server_for_all(&image, CacheMode::None, &[]);

    let xml = shipped("domain-minimal.xml")
        .replace("/run/virtioblkd/example.sock", server.socket().to_str().expect("a plain path"))
        .replace("<domain type='kvm'>", "<domain type='qemu'>");
    libvirt.virsh_ok(&["define", "--validate", &libvirt.file("example.xml", xml)]);
    libvirt.virsh_ok(&["start", "example"]);
    wait_until("the guest has written", || server.total("writes") >= 8);
    for sector in 1..=8u8 {
        let found = oracle::read_at(&image, u64::from(sector) * 512, 512);
        assert_eq!(found, [0xa0 + sector; 512], "sector {sector}");
    }

    // Suspended, reset (which runs the boot sector again) and resumed while the disk is held; then the disk goes on.
    let mut control = Qmp::connect(&server.control());
    let held = control.execute("quiesce", json!({"timeout-ms": 60_000, "lease-ms": 600_000}));
    let digest = oracle::digest(&image);
    libvirt.virsh_ok(&["suspend", "example"]);
    assert_eq!(libvirt.virsh_ok(&["domstate", "example"]), "paused");
    libvirt.virsh_ok(&["resume", "example"]);
    libvirt.virsh_ok(&["reset", "example"]);
    assert_eq!(libvirt.virsh_ok(&["domstate", "example"]), "running");
    assert_eq!(oracle::digest(&image), digest);
    assert_eq!(server.total("writes"), 8, "a write passed a held disk");
    control.execute("resume", json!({ "token": held["token"] }));
    wait_until("the guest has written again", || server.total("writes") >= 16);

    libvirt.virsh_ok(&["destroy", "example"]);
    libvirt.virsh_ok(&["undefine", "example"]);
    let (status, log) = server.terminate();
    assert!(status.success(), "{status}\n{log}");
}

const WRITER: &str = r#"
mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt || exit 1
agent
n=0
while sleep 0.05; do n=$((n + 1)); echo $n >/mnt/counter; done
"#;

#[test]
fn a_guest_of_libvirts_is_frozen_snapshotted_and_gets_another_disk() {
    let Some(libvirt) = Libvirt::start() else { return };
    let (dir, other_dir) = (scratch(), scratch());
    let (image, other) = (sparse_image(dir.path(), 64 << 20), sparse_image(other_dir.path(), 8 << 20));
    let server = server_for_all(&image, CacheMode::None, &[]);
    let second = server_for_all(&other, CacheMode::None, &[]);

    let second_disk = libvirt.file("second.xml", disk_xml(&second.socket(), "vdb"));
    let domain = libvirt.linux(WRITER, "", &disk_xml(&server.socket(), "vda"));
    libvirt.virsh_ok(&["create", &libvirt.file("linux.xml", domain)]);
    libvirt.agent(r#"{"execute":"guest-ping"}"#);

    // By hand: a frozen guest writes nothing, a thawed one goes on.
    libvirt.virsh_ok(&["domfsfreeze", "example"]);
    let frozen = oracle::digest(&image);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(oracle::digest(&image), frozen, "a frozen guest's disk changed");
    libvirt.virsh_ok(&["domfsthaw", "example"]);

    // By our command, through libvirt, which owns the agent's channel.
    let target = dir.path().join("snapshot.img");
    // A copy: the other user may not see into the build's directory.
    let copy = libvirt.home().join("virtioblkctl");
    fs::copy(program("virtioblkctl"), &copy).expect("room");
    let mut command = libvirt.command(copy.to_str().expect("a plain path"));
    command.args(["snapshot", "--json", "--level", "filesystem", "--libvirt", "example", "--disk"]);
    command.arg(server.control()).arg("--to").arg(format!("copy:{}", target.display()));
    let taken = output(&mut command);
    let said = String::from_utf8_lossy(&taken.stderr).into_owned();
    assert!(taken.status.success(), "{}\n{said}", taken.status);
    let receipt: serde_json::Value = serde_json::from_slice(&taken.stdout).expect("a receipt");
    assert_eq!(receipt["level"], "filesystem", "{receipt}");
    assert_eq!(receipt["filesystems-frozen"], 1, "{receipt}");
    assert!(target.exists());
    let thawed = libvirt.agent(r#"{"execute":"guest-fsfreeze-status"}"#);
    assert!(thawed.contains("thawed"), "{thawed}");

    // Suspended and resumed under load, and another disk comes and goes.
    for _ in 0..3 {
        libvirt.virsh_ok(&["suspend", "example"]);
        let paused = oracle::digest(&image);
        assert_eq!(oracle::dirty_pages(&image).unwrap_or(0), 0, "a suspended guest's disk is durable");
        assert_eq!(oracle::digest(&image), paused, "a suspended guest's disk changed");
        libvirt.virsh_ok(&["resume", "example"]);
    }
    libvirt.virsh_ok(&["attach-device", "example", &second_disk]);
    wait_until("the second disk's driver is ready", || second.status()["driver-ready"] == true);
    assert!(libvirt.virsh_ok(&["domblklist", "example"]).contains("vdb"));
    libvirt.virsh_ok(&["detach-device", "example", &second_disk]);
    wait_until("the second disk is gone", || second.status()["connected"] == false);

    libvirt.virsh_ok(&["destroy", "example"]);
    assert!(server.terminate().0.success());
    assert!(second.terminate().0.success());
}
