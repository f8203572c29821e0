//! `virsh start` alone starts a domain's disks: libvirt's system daemon calls our hook, which reads the disks' options from
//! the domain's `<metadata>`. Real libvirt, real QEMU, a real guest. SKIPPED where libvirt is not installed or we are not
//! root.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kit::guest::libvirt::{DOMAIN, linux_domain};
use kit::guest::system_libvirt::{DAEMON_USER, SystemLibvirt};
use kit::guest::{oracle, output, wait_until};
use kit::prng::Prng;
use kit::programs;
use serde_json::Value;

/// Tests that take a minute or more run in `make check-libvirt` only.
pub(crate) fn is_long_run() -> bool {
    let wanted = std::env::var_os("VIRTIOBLKD_LIBVIRT").is_some_and(|value| value == "long");
    if !wanted {
        kit::guest::tell("SKIPPED: a long test of libvirt's hook: make check-libvirt runs it");
    }
    wanted
}

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const UUID: &str = "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11";

/// An image that the hook's daemons may open.
pub(crate) fn image(libvirt: &SystemLibvirt, name: &str) -> PathBuf {
    let path = roots_image(libvirt, name);
    chown(&path, Some(DAEMON_USER), None).expect("we are root");
    path
}

/// An image that only root may open.
fn roots_image(libvirt: &SystemLibvirt, name: &str) -> PathBuf {
    let path = libvirt.home().join(name);
    fs::File::create(&path).and_then(|file| file.set_len(16 * MIB)).expect("room");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("ours");
    path
}

/// A domain whose job is `job`, with a vhost-user disk for each of `disks`: its target, and its attributes in our element.
pub(crate) fn domain(libvirt: &SystemLibvirt, job: &str, disks: &[(&str, &str)]) -> String {
    let devices: Vec<String> = disks.iter().map(|(target, _)| disk_device(target)).collect();
    let xml = linux(libvirt, job, &devices.join("\n"));
    let ours: Vec<String> = disks.iter().map(|(target, rest)| format!("<v:disk target='{target}' {rest}/>")).collect();
    let metadata = format!(
        "<uuid>{UUID}</uuid><metadata><v:disks xmlns:v='urn:virtioblkd:libvirt:1'>{}</v:disks></metadata>",
        ours.concat()
    );
    libvirt.file("domain.xml", xml.replace("</name>", &format!("</name>{metadata}")))
}

/// A Linux domain. QEMU, which is another user, writes what its guest says into files that exist.
pub(crate) fn linux(libvirt: &SystemLibvirt, job: &str, devices: &str) -> String {
    for name in ["console", "job"] {
        let path = libvirt.file(name, "");
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).expect("ours");
    }
    linux_domain(libvirt.home(), job, "", devices)
}

pub(crate) fn disk_device(target: &str) -> String {
    format!(
        "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/>
         <source type='unix' path='/run/virtioblkd/{DOMAIN}-{target}.sock'><reconnect enabled='yes' timeout='1'/></source>
         <target dev='{target}' bus='virtio'/></disk>"
    )
}

/// What the guest's job has said so far.
pub(crate) fn said(libvirt: &SystemLibvirt) -> Vec<String> {
    let text = fs::read(libvirt.home().join("job")).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().map(|line| line.trim_end_matches('\r').to_owned()).collect()
}

pub(crate) fn until_said(libvirt: &SystemLibvirt, line: &str) {
    wait_until(&format!("the guest says '{line}'"), || said(libvirt).iter().any(|found| found.starts_with(line)));
}

pub(crate) fn status(libvirt: &SystemLibvirt, target: &str) -> Value {
    let control = libvirt.socket(&format!("{UUID}-{target}.ctl"));
    let mut command = Command::new(programs::virtioblkctl());
    let output = output(command.arg("--control").arg(control).args(["--json", "status"]));
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

const LOOK: &str = r#"
for disk in vda vdb; do
    echo "$disk cache=$(cat /sys/block/$disk/queue/write_cache) ro=$(cat /sys/block/$disk/ro) serial=$(cat /sys/block/$disk/serial)"
done
echo hello | dd of=/dev/vda bs=512 count=1 conv=sync oflag=direct 2>/dev/null
echo written
n=0
while sleep 0.1; do
    n=$((n + 1)); echo $n | dd of=/dev/vda bs=512 seek=1 count=1 conv=sync,fsync 2>/dev/null || exit 1
    echo "count $n"
done
"#;

fn two_disks(libvirt: &SystemLibvirt) -> (PathBuf, String) {
    let (one, other) = (image(libvirt, "one.img"), image(libvirt, "other.img"));
    let disks = [
        ("vda", format!("file='{}' cache='writeback' serial='one'", one.display())),
        ("vdb", format!("file='{}' cache='directsync' readonly='yes'", other.display())),
    ];
    let disks: Vec<(&str, &str)> = disks.iter().map(|(target, rest)| (*target, rest.as_str())).collect();
    (one, domain(libvirt, LOOK, &disks))
}

#[test]
fn virsh_start_alone_starts_two_disks_each_in_its_mode_and_destroy_ends_them() {
    let Some(libvirt) = SystemLibvirt::start(1) else { return };
    let (image, xml) = two_disks(&libvirt);
    libvirt.virsh_ok(&["define", "--validate", &xml]);
    assert!(libvirt.left().is_empty());
    libvirt.virsh_ok(&["start", DOMAIN]);
    until_said(&libvirt, "written");
    let said = said(&libvirt);
    assert!(said.contains(&"vda cache=write back ro=0 serial=one".to_owned()), "{said:?}");
    assert!(said.contains(&"vdb cache=write through ro=1 serial=".to_owned()), "{said:?}");
    assert!(oracle::read_at(&image, 0, 5) == *b"hello");
    for (target, mode) in [("vda", "writeback"), ("vdb", "directsync")] {
        assert_eq!(status(&libvirt, target)["cache-mode"], mode);
    }
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new(), "the hook ends what it started");
}

#[test]
fn a_start_that_cannot_be_fails_with_our_words_and_leaves_nothing() {
    let Some(libvirt) = SystemLibvirt::start(2) else { return };
    let good = image(&libvirt, "good.img");
    let good = format!("file='{}'", good.display());
    let directory = format!("file='{}'", libvirt.home().display());
    let cases: [(&str, &str); 5] = [
        ("file='/no/such/image.raw'", "there is no such file"),
        (&directory, "is a directory"),
        (&format!("{good} cache='writeback-ish'"), "invalid value 'writeback-ish'"),
        (&format!("{good} cahce='none'"), "the nearest known one is 'cache'"),
        (&format!("{good} socket_path='/x'"), "set by the hook"),
    ];
    for (attributes, words) in cases {
        // The disk before it is started and ended again.
        let disks = [("vda", good.as_str()), ("vdb", attributes)];
        libvirt.virsh_ok(&["define", &domain(&libvirt, "exit", &disks)]);
        let failed = libvirt.virsh(&["start", DOMAIN]);
        let error = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert!(!failed.status.success() && error.contains(words), "{attributes}: {error}");
        assert!(error.contains(&format!("domain {DOMAIN}")) && error.contains("disk vdb"), "{error}");
        assert_eq!(libvirt.left(), Vec::<String>::new(), "{attributes}");
    }
    // Memory that is not shared would hang the guest; newer libvirt refuses to define such a domain.
    let xml = fs::read_to_string(domain(&libvirt, "exit", &[("vda", &good)])).expect("ours");
    let private = xml.replace("<access mode='shared'/>", "");
    let failed = hook(&libvirt, ["prepare", "begin"], &private).wait_with_output().expect("our own child");
    assert!(String::from_utf8_lossy(&failed.stderr).contains("memory is not shared"), "{failed:?}");
    // An image that another process uses.
    let mut owner = Command::new(programs::virtioblkd());
    owner
        .arg("--socket-path")
        .arg(libvirt.home().join("owner.sock"))
        .arg("--blk-file")
        .arg(libvirt.home().join("good.img"));
    let mut owner = owner.stderr(Stdio::null()).spawn().expect("it runs");
    wait_until("the other daemon has the image", || libvirt.home().join("owner.sock").exists());
    libvirt.virsh_ok(&["define", &domain(&libvirt, "exit", &[("vda", &good)])]);
    let failed = libvirt.virsh(&["start", DOMAIN]);
    assert!(String::from_utf8_lossy(&failed.stderr).contains("another process uses the image"), "{failed:?}");
    // The mark of a migration that was given up before the domain was prepared changes nothing.
    let mark = libvirt.home().join(format!("disks/{UUID}.arrival"));
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(600);
    fs::File::create(&mark).and_then(|file| file.set_modified(long_ago)).expect("room");
    let failed = libvirt.virsh(&["start", DOMAIN]);
    assert!(String::from_utf8_lossy(&failed.stderr).contains("another process uses the image"), "{failed:?}");
    owner.kill().and_then(|()| owner.wait()).expect("ours");
    assert_eq!(libvirt.left(), Vec::<String>::new());
}

/// The effective user of the daemon of a disk.
fn user(libvirt: &SystemLibvirt, target: &str) -> u32 {
    let pid = status(libvirt, target)["daemon"]["pid"].as_u64().expect("a pid");
    let shown = output(libvirt.inside("stat").args(["-c", "%u", &format!("/proc/{pid}/task")]));
    String::from_utf8(shown.stdout).expect("text").trim().parse().expect("a user id")
}

#[test]
fn a_daemon_is_a_user_of_its_own_and_root_only_where_the_domain_asks() {
    let Some(libvirt) = SystemLibvirt::start(10) else { return };
    let (own, roots) = (image(&libvirt, "own.img"), roots_image(&libvirt, "roots.img"));
    let (own, roots) = (format!("file='{}'", own.display()), format!("file='{}'", roots.display()));
    libvirt.virsh_ok(&["define", &domain(&libvirt, "exit", &[("vda", &own), ("vdb", &roots)])]);
    let failed = libvirt.virsh(&["start", DOMAIN]);
    let error = String::from_utf8_lossy(&failed.stderr).into_owned();
    let words = ["disk vdb", "--user virtioblkd: that user cannot open", "setfacl -m u:virtioblkd:rw", "--user root"];
    assert!(!failed.status.success() && words.iter().all(|word| error.contains(word)), "{error}");
    assert_eq!(libvirt.left(), Vec::<String>::new());

    let disks = [("vda", own.as_str()), ("vdb", &format!("{roots} user='root'"))];
    libvirt.virsh_ok(&["define", &domain(&libvirt, LOOK, &disks)]);
    libvirt.virsh_ok(&["start", DOMAIN]);
    // QEMU, a third user, has reached both, and the guest its image.
    until_said(&libvirt, "count 1");
    assert_eq!((user(&libvirt, "vda"), user(&libvirt, "vdb")), (DAEMON_USER, 0));
    let socket = |target: &str| libvirt.socket(&format!("{DOMAIN}-{target}.sock")).metadata().expect("a socket");
    for target in ["vda", "vdb"] {
        let socket = socket(target);
        assert_eq!((socket.mode() & 0o777, socket.uid()), (0o660, 0), "{target}");
        assert_ne!(socket.gid(), 0, "{target}");
    }
    for (target, kind) in
        ["vda", "vdb"].into_iter().flat_map(|target| ["pid", "lock", "toml"].map(|kind| (target, kind)))
    {
        let file = libvirt.home().join(format!("disks/{UUID}-{target}.{kind}"));
        let mode = file.metadata().expect("a file of the hook's").mode();
        assert_eq!(mode & 0o777, 0o600, "another user could lock {file:?}, and it would count as a daemon");
    }
    let mut upgrade = libvirt.inside(programs::virtioblkctl());
    let control = format!("/run/virtioblkd/{UUID}-vda.ctl");
    let configuration = format!("/run/virtioblkd-libvirt/{UUID}-vda.toml");
    upgrade.args(["--control", &control, "upgrade", "--config", &configuration]);
    let upgraded = output(&mut upgrade);
    assert!(upgraded.status.success(), "{upgraded:?}");
    assert_eq!(user(&libvirt, "vda"), DAEMON_USER);
    let lines = said(&libvirt).len();
    wait_until("the guest writes by the new daemon", || said(&libvirt).len() > lines + 2);
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new(), "what the daemon's user may not remove, the hook does");

    // A machine without the user: root is not taken for it in silence.
    let users = fs::read_to_string(libvirt.home().join("passwd")).expect("ours");
    libvirt.file("passwd", users.replace("virtioblkd:", "other:"));
    libvirt.virsh_ok(&["define", &domain(&libvirt, "exit", &[("vda", &own)])]);
    let failed = libvirt.virsh(&["start", DOMAIN]);
    let error = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(error.contains("no user 'virtioblkd'") && error.contains("systemd-sysusers"), "{error}");
    assert!(error.contains("user='root'"), "{error}");
    assert_eq!(libvirt.left(), Vec::<String>::new());
}

#[test]
fn a_libvirtd_that_is_killed_and_started_again_finds_guest_and_disks_at_work() {
    if !is_long_run() {
        return;
    }
    let Some(mut libvirt) = SystemLibvirt::start(3) else { return };
    let (_, xml) = two_disks(&libvirt);
    libvirt.virsh_ok(&["define", &xml]);
    libvirt.virsh_ok(&["start", DOMAIN]);
    until_said(&libvirt, "count 1");
    let before = libvirt.left();
    libvirt.kill_daemon();
    let lines = said(&libvirt).len();
    wait_until("the guest writes without libvirtd", || said(&libvirt).len() > lines + 2);
    // A disk's daemon dies meanwhile: the hook starts it again, and QEMU connects again.
    let pid = fs::read_to_string(libvirt.home().join(format!("disks/{UUID}-vda.pid"))).expect("a pid file");
    let killed = status(&libvirt, "vda");
    assert_eq!(killed["connected"], true);
    let inside = libvirt.inside("pkill").args(["-9", "-f", &format!("{UUID}-vda.toml")]).status().expect("pkill runs");
    assert!(inside.success(), "no daemon {pid}");
    libvirt.start_daemon();
    assert_eq!(libvirt.virsh_ok(&["domstate", DOMAIN]), "running");
    let lines = said(&libvirt).len();
    wait_until("the guest writes again", || said(&libvirt).len() > lines + 2);
    assert_eq!(libvirt.left(), before);
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
}

#[test]
fn a_saved_domain_is_restored_without_a_manual_step() {
    if !is_long_run() {
        return;
    }
    let Some(libvirt) = SystemLibvirt::start(4) else { return };
    let (_, xml) = two_disks(&libvirt);
    libvirt.virsh_ok(&["define", &xml]);
    libvirt.virsh_ok(&["start", DOMAIN]);
    until_said(&libvirt, "count 3");
    let saved = libvirt.home().join("saved");
    let saved = saved.to_str().expect("a plain path");
    libvirt.virsh_ok(&["save", DOMAIN, saved]);
    assert_eq!(libvirt.left(), Vec::<String>::new(), "a saved domain needs no daemon");
    let lines = said(&libvirt).len();
    libvirt.virsh_ok(&["restore", saved]);
    wait_until("the guest writes again", || said(&libvirt).len() > lines + 2);
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
    // And as libvirt does at the host's shutdown.
    libvirt.virsh_ok(&["start", DOMAIN]);
    libvirt.virsh_ok(&["managedsave", DOMAIN]);
    libvirt.virsh_ok(&["start", DOMAIN]);
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
}

#[test]
fn a_domain_without_our_element_is_left_alone() {
    let Some(libvirt) = SystemLibvirt::start(5) else { return };
    let xml = linux(&libvirt, "echo up; sleep 1000", "");
    libvirt.virsh_ok(&["create", &libvirt.file("plain.xml", xml)]);
    until_said(&libvirt, "up");
    assert_eq!(libvirt.left(), Vec::<String>::new());
    let plain = libvirt.virsh_ok(&["dumpxml", DOMAIN]);
    for operation in [["prepare", "begin"], ["release", "end"]] {
        let fastest = (0..20).map(|_| {
            let began = std::time::Instant::now();
            succeeds(hook(&libvirt, operation, &plain));
            began.elapsed()
        });
        let fastest = fastest.min().unwrap_or_default();
        kit::guest::tell(&format!("the hook costs a domain without our element {fastest:?} at {}", operation[0]));
    }
    assert_eq!(libvirt.virsh_ok(&["domstate", DOMAIN]), "running");
    libvirt.virsh_ok(&["destroy", DOMAIN]);
}

/// Calls the hook as libvirt does.
pub(crate) fn hook(libvirt: &SystemLibvirt, operation: [&str; 2], xml: &str) -> Child {
    let mut command = libvirt.inside(programs::virtioblkctl());
    command.arg("libvirt-hook").arg(DOMAIN).args(operation).arg("-");
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
    let mut input = child.stdin.take().expect("a pipe");
    // A hook that was killed reads nothing.
    let _ = input.write_all(xml.as_bytes());
    child
}

pub(crate) fn succeeds(child: Child) {
    let output = child.wait_with_output().expect("our own child");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_hook_that_is_killed_at_any_step_leaves_nothing_that_the_next_one_does_not_end() {
    let Some(libvirt) = SystemLibvirt::start(6) else { return };
    kill_hooks(&libvirt, 12);
}

/// Kills hooks at random steps, and lets the next ones start and end all disks.
pub(crate) fn kill_hooks(libvirt: &SystemLibvirt, rounds: u32) {
    let images: Vec<String> =
        (0..3).map(|n| format!("file='{}'", image(libvirt, &format!("{n}.img")).display())).collect();
    let disks: Vec<(&str, &str)> = ["vda", "vdb", "vdc"].into_iter().zip(images.iter().map(String::as_str)).collect();
    let xml = fs::read_to_string(domain(libvirt, "exit", &disks)).expect("ours");
    let mut prng = Prng::new(1);
    for round in 0..rounds {
        let operation = if round % 3 == 2 { ["release", "end"] } else { ["prepare", "begin"] };
        let mut killed = hook(libvirt, operation, &xml);
        std::thread::sleep(Duration::from_millis(prng.below(200)));
        // Not nsenter, whose child the hook is: a hook that goes on would end the next one's daemons.
        libvirt.inside("pkill").args(["-9", "-f", "libvirt-hook"]).status().expect("pkill runs");
        killed.wait().expect("our own child");
        succeeds(hook(libvirt, ["prepare", "begin"], &xml));
        for target in ["vda", "vdb", "vdc"] {
            assert_eq!(status(libvirt, target)["connected"], false);
        }
        succeeds(hook(libvirt, ["release", "end"], &xml));
        assert_eq!(libvirt.left(), Vec::<String>::new(), "round {round}");
    }
}

#[test]
fn twenty_domains_start_at_once_and_each_end_concerns_its_own_disks_only() {
    let Some(libvirt) = SystemLibvirt::start(7) else { return };
    let described = |n: usize| {
        let disk = format!("file='{}'", image(&libvirt, &format!("{n}.img")).display());
        let xml = fs::read_to_string(domain(&libvirt, "exit", &[("vda", &disk)])).expect("ours");
        xml.replace(UUID, &format!("{}{n:02}", &UUID[..34])).replace(&format!("{DOMAIN}-vda"), &format!("{n}-vda"))
    };
    let domains: Vec<String> = (0..20).map(described).collect();
    let calls = |operation: [&str; 2], domains: &[String]| {
        let all: Vec<Child> = domains.iter().map(|xml| hook(&libvirt, operation, xml)).collect();
        all.into_iter().for_each(succeeds);
    };
    calls(["prepare", "begin"], &domains);
    let files = libvirt.left().len();
    calls(["release", "end"], &domains[..10]);
    assert_eq!(libvirt.left().len(), files / 2);
    calls(["release", "end"], &domains[10..]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
}

#[test]
fn a_domain_migrates_there_and_back_without_a_manual_step() {
    if !is_long_run() {
        return;
    }
    let Some(here) = SystemLibvirt::start(8) else { return };
    let Some(there) = SystemLibvirt::start(9) else { return };
    let (_, xml) = two_disks(&here);
    here.virsh_ok(&["define", &xml]);
    here.virsh_ok(&["start", DOMAIN]);
    until_said(&here, "count 3");
    let goes_on = || {
        let lines = said(&here).len();
        wait_until("the guest writes", || said(&here).len() > lines + 3);
    };
    let migrate = |from: &SystemLibvirt, to: &SystemLibvirt, port: u16, more: &[&str]| {
        let uri = format!("tcp://127.0.0.1:{port}");
        let how = ["migrate", "--live", "--persistent", "--undefinesource", "--unsafe", "--migrateuri", &uri, DOMAIN];
        from.virsh(&[&how[..], &[to.uri().as_str()], more].concat())
    };
    // Given up half way: the guest goes on where it is, and the other host keeps nothing.
    std::thread::scope(|scope| {
        let given_up = scope.spawn(|| migrate(&here, &there, 49900, &["--bandwidth", "1"]));
        wait_until("it is on its way", || {
            String::from_utf8_lossy(&here.virsh(&["domjobinfo", DOMAIN]).stdout).contains("Memory processed")
        });
        here.virsh_ok(&["domjobabort", DOMAIN]);
        assert!(!given_up.join().expect("no panic").status.success());
    });
    goes_on();
    assert_eq!(there.left(), Vec::<String>::new());
    for (from, to, port) in [(&here, &there, 49901), (&there, &here, 49902)] {
        let moved = migrate(from, to, port, &["--timeout", "5", "--timeout-suspend"]);
        assert!(moved.status.success(), "{moved:?}");
        goes_on();
        assert_eq!(from.left(), Vec::<String>::new(), "the source's daemons have ended");
        assert_eq!(to.virsh_ok(&["domstate", DOMAIN]), "running");
    }
    here.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(here.left(), Vec::<String>::new());
}
