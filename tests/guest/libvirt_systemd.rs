//! The disks' daemons as units of a real systemd, which libvirt's hook starts: real libvirt, real QEMU. SKIPPED where libvirt is
//! not installed, where no systemd can be booted, or if we are not root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use kit::documents::{Block, blocks, pasted};
use kit::guest::libvirt::DOMAIN;
use kit::guest::system_libvirt::SystemLibvirt;
use kit::guest::{output, wait_until};
use kit::programs;

use crate::libvirt_hook::{UUID, domain, image, is_long_run, kill_hooks, linux, said, status, until_said};

/// What a command on the machine prints.
fn shown(libvirt: &SystemLibvirt, program: &str, arguments: &[&str]) -> String {
    let output = output(libvirt.inside(program).args(arguments));
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

fn unit(target: &str) -> String {
    format!("virtioblkd-hook-{UUID}-{target}.service")
}

pub(crate) fn property(libvirt: &SystemLibvirt, target: &str, property: &str) -> String {
    shown(libvirt, "systemctl", &["show", "--value", "--property", property, &unit(target)])
}

/// All units of the hook that systemd knows, whatever their state.
pub(crate) fn units(libvirt: &SystemLibvirt) -> Vec<String> {
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

pub(crate) fn goes_on(libvirt: &SystemLibvirt) {
    let lines = said(libvirt).len();
    wait_until("the guest writes", || said(libvirt).len() > lines + 2);
}

pub(crate) fn describe(libvirt: &SystemLibvirt, images: &[PathBuf; 2], mode: &str) -> String {
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
    let now = status(&libvirt, "vda");
    let after = now["daemon"]["pid"].to_string();
    assert_ne!(after, before, "{now}");
    // systemd handles the daemon's message later than the daemon handles ours.
    wait_until("systemd knows the new process", || property(&libvirt, "vda", "MainPID") == after);
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

/// What stands on the machine before the page: the users of libvirt's packages, and our programs where `make install` puts
/// them.
const BEFORE: &str = "
mkdir -p /etc/sysusers.d
echo 'u libvirt-qemu 64055 - /var/lib/libvirt' > /etc/sysusers.d/libvirt.conf
systemd-sysusers
";

#[test]
fn the_pages_first_section_converts_an_existing_machine_as_it_stands() {
    if !is_long_run() {
        return;
    }
    let Some(libvirt) = SystemLibvirt::boot(31) else { return };
    fs::create_dir(libvirt.home().join("lib/images")).expect("room");
    let image = libvirt.home().join("lib/images/example.raw");
    fs::File::create(&image).and_then(|file| file.set_len(16 << 20)).expect("room");
    let disk = "<disk type='file' device='disk'><driver name='qemu' type='raw'/>
        <source file='/var/lib/libvirt/images/example.raw'/><target dev='vda' bus='virtio'/></disk>";
    let job = format!("echo \"sees $(cat /sys/block/vda/queue/write_cache)\"\n{COUNT}");
    let xml = libvirt.file("domain.xml", linux(&libvirt, &job, disk));
    let mut script = format!("{BEFORE}\nsystemctl start libvirtd\nvirsh define {xml}\n");
    let section = |block: &Block| {
        ["mkdir -p /etc/libvirt", "install -D", "virtioblkctl domain convert example vda --define", "virsh start"]
            .iter()
            .any(|start| block.first_line().starts_with(start))
    };
    let blocks: Vec<Block> =
        blocks("docs/libvirt.md").into_iter().filter(|block| block.language == "sh").take(4).collect();
    assert!(blocks.iter().all(section), "{blocks:#?}");
    for block in &blocks {
        script += &pasted(block);
    }
    if !Command::new("setfacl").arg("--version").output().is_ok_and(|output| output.status.success()) {
        kit::guest::tell("SKIPPED: no setfacl (Debian: acl): the page's command was replaced by chown");
        script = script.replace("setfacl -m u:virtioblkd:rw ", "chown virtioblkd ");
    }
    let mut shell = libvirt.inside("bash");
    shell.args(["-ec", &format!("cd {}\n{script}", programs::root().join("qemu-configs/systemd").display())]);
    let ran = output(&mut shell);
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(ran.status.success(), "{script}: {ran:?}");
    assert!(said.contains("no problem was found"), "{said}");
    until_said(&libvirt, "sees write back");
    goes_on(&libvirt);
    let show = |arguments: &[&str]| {
        let mut command = libvirt.inside(programs::virtioblkctl());
        String::from_utf8_lossy(&output(command.args(arguments)).stdout).into_owned()
    };
    assert!(show(&["domain", "status", DOMAIN]).contains("in-use"), "{said}");
    // The guest's flushes have reached the image.
    let counted = show(&["domblkstat", DOMAIN, "vda"]);
    assert!(!counted.contains("flush_operations 0\n") && counted.contains("flush_operations"), "{counted}");
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
}

#[test]
fn a_hook_that_is_killed_leaves_no_unit_that_the_next_one_does_not_end() {
    if !is_long_run() {
        return;
    }
    let Some(libvirt) = SystemLibvirt::start_on_systemd(32) else { return };
    kill_hooks(&libvirt, 12);
    assert_eq!(units(&libvirt), Vec::<String>::new());
}

#[test]
fn a_domain_migrates_between_two_machines_of_systemd_and_back_with_its_units() {
    if !is_long_run() {
        return;
    }
    let Some(here) = SystemLibvirt::start_on_systemd(33) else { return };
    // The images, the guest's files and the socket of the migration lie in a directory that both machines have.
    let Some(there) = SystemLibvirt::start_on_systemd_with(34, &[here.home()]) else { return };
    let ways = here.home().join("ways");
    fs::create_dir(&ways).and_then(|()| fs::set_permissions(&ways, fs::Permissions::from_mode(0o777))).expect("ours");
    let images = [image(&here, "one.img"), image(&here, "other.img")];
    here.virsh_ok(&["define", &describe(&here, &images, "writeback")]);
    here.virsh_ok(&["start", DOMAIN]);
    until_said(&here, "count 3");
    let own = [unit("vda"), unit("vdb")];
    let migrate = |from: &SystemLibvirt, to: &SystemLibvirt, way: &str, more: &[&str]| {
        let way = format!("unix://{}", ways.join(way).display());
        let how = ["migrate", "--live", "--persistent", "--undefinesource", "--unsafe", "--migrateuri", &way, DOMAIN];
        from.virsh(&[&how[..], &[to.uri().as_str()], more].concat())
    };
    // Given up half way: the guest goes on with its daemons, and the other machine keeps neither files nor units.
    let daemons = ["vda", "vdb"].map(|target| property(&here, target, "MainPID"));
    std::thread::scope(|scope| {
        let given_up = scope.spawn(|| migrate(&here, &there, "given-up", &["--bandwidth", "1"]));
        wait_until("it is on its way", || {
            String::from_utf8_lossy(&here.virsh(&["domjobinfo", DOMAIN]).stdout).contains("Memory processed")
        });
        assert_eq!(units(&there), own, "the target's daemons are units");
        here.virsh_ok(&["domjobabort", DOMAIN]);
        let said = given_up.join().expect("no panic");
        assert!(!said.status.success(), "{said:?}");
    });
    goes_on(&here);
    assert_eq!((there.left(), units(&there)), (Vec::new(), Vec::new()));
    assert_eq!(["vda", "vdb"].map(|target| property(&here, target, "MainPID")), daemons);
    for (from, to, way) in [(&here, &there, "there"), (&there, &here, "back")] {
        let moved = migrate(from, to, way, &["--timeout", "5", "--timeout-suspend"]);
        assert!(moved.status.success(), "{moved:?}");
        goes_on(&here);
        assert_eq!((from.left(), units(from)), (Vec::new(), Vec::new()), "the source's daemons have ended");
        assert_eq!(units(to), own);
        assert_eq!(property(to, "vda", "ActiveState"), "active");
        assert_eq!(to.virsh_ok(&["domstate", DOMAIN]), "running");
    }
    here.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!((here.left(), units(&here)), (Vec::new(), Vec::new()));
}
