//! The Debian package: it installs on a bare Debian, serves a disk, is upgraded under a guest, and leaves nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

use kit::guest::{Vm, oracle, qemu};
use kit::programs;

use crate::machine::Machine;

/// What the guest does: writes and syncs blocks, and says each round, until it is told to stop. Then it reads the whole disk.
/// An error of the disk ends it.
const JOB: &str = r#"
( round=0
  while [ ! -e /tmp/stop ]; do
      round=$((round + 1))
      yes "round $round" | head -c 65536 >/tmp/block
      dd if=/tmp/block of=/dev/vda bs=64k seek=$((round % 64)) count=1 conv=notrunc,fsync 2>/tmp/error || { cat /tmp/error; exit 1; }
      echo "@round $round"
  done ) &
ask stop
touch /tmp/stop
wait $! || exit 1
sync
sha256sum </dev/vda
ask compare
"#;

/// The guest writes on without an error.
fn writes_on(vm: &mut Vm) {
    // What it has said before now does not count.
    while vm.said_so_far("@round ").is_some() {}
    for _ in 0..3 {
        vm.until_line("@round ");
    }
}

/// The package that was built (`make check-deb` sets the variable), and the same with a higher version.
fn packages(directory: &Path) -> Option<()> {
    let Some(built) = std::env::var_os("VIRTIOBLKD_DEB").map(PathBuf::from) else {
        kit::guest::tell("SKIPPED: VIRTIOBLKD_DEB names no package: run make check-deb");
        return None;
    };
    std::fs::copy(&built, directory.join("virtioblkd_1.deb")).expect("the package");
    let next = directory.join("next");
    let script = format!(
        "dpkg-deb -R '{}' '{next}' && sed -i 's/^Version: .*/&+upgrade/' '{next}/DEBIAN/control' && \
         dpkg-deb -Znone -b --root-owner-group '{next}' '{}' && rm -r '{next}'",
        built.display(),
        directory.join("virtioblkd_2.deb").display(),
        next = next.display(),
    );
    let output = Command::new("sh").args(["-c", &script]).output().expect("sh");
    assert!(output.status.success(), "{output:?}");
    Some(())
}

/// Every file of the machine that names us, except what the system itself writes, and every unit. systemd may remember the name
/// of a unit that was enabled, as not found.
fn traces(machine: &Machine) -> String {
    machine.ok(
        "find / -xdev \\( -path /proc -o -path /sys -o -path /packages -o -path /images -o -path /var/log/journal \
         -o -path /var/cache -o -path /var/lib/apt -o -path /var/lib/systemd/coredump -o -path /tmp \\) -prune -o -name '*virtioblk*' -print; \
         find /run /etc -name '*virtioblk*' -not -path '/run/systemd/*' | sort -u; \
         systemctl list-units --all --plain --no-legend 'virtioblk*@*' | { grep -v not-found || true; }",
    )
}

fn on(suite: &str) {
    let directory = programs::disk_dir();
    if packages(directory.path()).is_none() {
        return;
    }
    let Some(machine) = Machine::boot(suite, None, Some(directory.path())) else { return };
    machine.ok("apt-get -q update && apt-get -q -y --no-install-recommends install /packages/virtioblkd_1.deb");
    assert!(machine.ok("virtioblkd --version").starts_with("virtioblkd 0."));
    machine.ok("id virtioblkd && test -d /etc/virtioblkd && test -L /etc/libvirt/hooks/qemu.d/50-virtioblkd");
    machine.describe_disk("vda", "cache = \"none\"");
    machine.ok("systemctl enable --now virtioblkd@vda");
    let list = machine.ok("virtioblkctl list");
    assert!(list.contains("vda"), "{list}");
    let first = machine.property("virtioblkd@vda", "MainPID");
    // This machine's QEMU has a real guest on the packaged daemon's socket.
    let mut vm = qemu::linux(1, JOB).vhost_user_disk(&machine.path("/run/virtioblkd/vda.sock"), "").start();
    vm.until_asked("stop");
    writes_on(&mut vm);
    machine.ok("apt-get -q -y install /packages/virtioblkd_2.deb");
    writes_on(&mut vm);
    let second = machine.property("virtioblkd@vda", "MainPID");
    assert_ne!(first, second, "the upgrade replaced the daemon under its guest\n{}", machine.journal());
    assert!(!machine.ok(&format!("readlink /proc/{second}/exe")).contains("deleted"));
    // The disk of a guest is not taken away.
    let refused = machine.run("apt-get -q -y remove virtioblkd");
    assert!(!refused.status.success(), "{refused:?}");
    // apt gives dpkg a terminal, so its messages are on standard output.
    assert!(String::from_utf8_lossy(&refused.stdout).contains("shut the guests down first"), "{refused:?}");
    writes_on(&mut vm);
    assert_eq!(machine.journal().matches("front-end connected").count(), 1, "QEMU came again\n{}", machine.journal());
    vm.go();
    let sum = vm.until_asked("compare");
    assert_eq!(sum.last(), Some(&format!("{}  -", oracle::digest(&machine.path("/images/vda.raw")))));
    vm.go();
    vm.finish();
    machine.wait_until("the daemon has seen the guest's end", |machine| {
        !machine.ok("virtioblkctl list").contains("in-use")
    });
    machine.ok("apt-get -q -y purge virtioblkd");
    assert_eq!(traces(&machine), "");
    // Access lists of images may name the user, so its number must not become another's.
    machine.ok("id virtioblkd");
}

#[test]
fn the_package_is_installed_upgraded_and_purged_on_debian_12() {
    on("bookworm");
}

#[test]
fn the_package_is_installed_upgraded_and_purged_on_debian_13() {
    on("trixie");
}
