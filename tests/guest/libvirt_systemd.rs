//! The disks' daemons as units of a real systemd, which libvirt's hook starts: real libvirt, real QEMU. SKIPPED where libvirt is
//! not installed, where no systemd can be booted, or if we are not root.

use std::fs;
use std::path::PathBuf;

use kit::guest::libvirt::DOMAIN;
use kit::guest::system_libvirt::SystemLibvirt;
use kit::guest::{output, wait_until};
use kit::programs;

use crate::libvirt_hook::{UUID, domain, image, said, status, until_said};

/// What a command on the machine prints.
fn shown(libvirt: &SystemLibvirt, program: &str, arguments: &[&str]) -> String {
    let output = output(libvirt.inside(program).args(arguments));
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

fn unit(target: &str) -> String {
    format!("virtioblkd-hook-{UUID}-{target}.service")
}

fn property(libvirt: &SystemLibvirt, target: &str, property: &str) -> String {
    shown(libvirt, "systemctl", &["show", "--value", "--property", property, &unit(target)])
}

/// All units of the hook that systemd knows, whatever their state.
fn units(libvirt: &SystemLibvirt) -> Vec<String> {
    let text =
        shown(libvirt, "systemctl", &["list-units", "--all", "--plain", "--no-legend", "--full", "virtioblkd-hook-*"]);
    text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

const COUNT: &str = r#"
n=0
while sleep 0.1; do
    n=$((n + 1)); echo $n | dd of=/dev/vda bs=512 seek=1 count=1 conv=sync,fsync 2>/dev/null || exit 1
    echo "count $n"
done
"#;

fn goes_on(libvirt: &SystemLibvirt) {
    let lines = said(libvirt).len();
    wait_until("the guest writes", || said(libvirt).len() > lines + 2);
}

fn describe(libvirt: &SystemLibvirt, images: &[PathBuf; 2], mode: &str) -> String {
    let [one, other] = images;
    let disks = [
        ("vda", format!("file='{}' cache='{mode}'", one.display())),
        ("vdb", format!("file='{}' cache='directsync'", other.display())),
    ];
    let disks: Vec<(&str, &str)> = disks.iter().map(|(target, rest)| (*target, rest.as_str())).collect();
    domain(libvirt, COUNT, &disks)
}

#[test]
fn systemd_starts_a_daemon_again_that_died_and_the_hook_ends_its_own_units_only() {
    let Some(libvirt) = SystemLibvirt::start_on_systemd(30) else { return };
    let images = [image(&libvirt, "one.img"), image(&libvirt, "other.img")];
    libvirt.virsh_ok(&["define", &describe(&libvirt, &images, "writeback")]);
    // Units of the same kind that are another domain's and an operator's.
    let others = ["virtioblkd-hook-other-vda.service", "virtioblkd@other.service"];
    for other in others {
        shown(&libvirt, "systemd-run", &["--quiet", "--unit", other, "sleep", "infinity"]);
    }
    libvirt.virsh_ok(&["start", DOMAIN]);
    until_said(&libvirt, "count 1");
    for target in ["vda", "vdb"] {
        assert_eq!(property(&libvirt, target, "ActiveState"), "active");
        let pid = property(&libvirt, target, "MainPID");
        assert_eq!(pid, status(&libvirt, target)["daemon"]["pid"].to_string());
        let log = shown(&libvirt, "journalctl", &["--quiet", "--unit", &unit(target)]);
        assert!(log.contains("img"), "the daemon's log is systemd's: {log}");
    }

    // The guest's requests wait until systemd has started the daemon again.
    let died = property(&libvirt, "vda", "MainPID");
    shown(&libvirt, "kill", &["-9", &died]);
    wait_until("systemd starts it again", || {
        let pid = property(&libvirt, "vda", "MainPID");
        pid != "0" && pid != died && property(&libvirt, "vda", "ActiveState") == "active"
    });
    goes_on(&libvirt);

    // An upgrade in place stays in the unit.
    libvirt.virsh_ok(&["define", &describe(&libvirt, &images, "writethrough")]);
    let before = property(&libvirt, "vda", "MainPID");
    let mut apply = libvirt.inside(programs::virtioblkctl());
    let applied = output(apply.args(["domain", "apply", DOMAIN]).env("LIBVIRT_DEFAULT_URI", libvirt.uri()));
    assert_eq!(String::from_utf8_lossy(&applied.stdout), "vda: has its new options\nvdb: unchanged\n", "{applied:?}");
    let after = property(&libvirt, "vda", "MainPID");
    let now = status(&libvirt, "vda");
    let serves = now["daemon"]["pid"].to_string();
    assert!(after != before && after == serves, "{before}, {after}: {now}");
    assert_eq!(now["cache-mode"], "writethrough");
    let group = shown(&libvirt, "cat", &[&format!("/proc/{after}/cgroup")]);
    assert!(group.contains(&unit("vda")), "{group}");
    goes_on(&libvirt);
    // The image cannot change under a guest; why is the upgrade's own words.
    let wrong = describe(&libvirt, &images, "writethrough' readonly='yes");
    libvirt.virsh_ok(&["define", &wrong]);
    let mut apply = libvirt.inside(programs::virtioblkctl());
    let refused = output(apply.args(["domain", "apply", DOMAIN]).env("LIBVIRT_DEFAULT_URI", libvirt.uri()));
    let words = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(!refused.status.success() && words.contains("vda: failed: ") && words.contains("read-only"), "{refused:?}");
    goes_on(&libvirt);

    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
    assert_eq!(units(&libvirt), [others[0]], "the hook ends what it started, and nothing else");
    assert_eq!(shown(&libvirt, "systemctl", &["is-active", others[1]]), "active");

    // A start that fails has the daemon's own words, and leaves no unit.
    fs::remove_file(&images[1]).expect("ours");
    libvirt.virsh_ok(&["define", &describe(&libvirt, &images, "writeback")]);
    let failed = libvirt.virsh(&["start", DOMAIN]);
    let error = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(error.contains("disk vdb") && error.contains("there is no such file"), "{error}");
    assert_eq!(libvirt.left(), Vec::<String>::new());
    assert_eq!(units(&libvirt), [others[0]]);
}
