//! `virtioblkctl` and the domains of a real libvirt: disks by name and by domain, `domain status` and `check`, `convert`,
//! `attach`, `detach` and `apply`. SKIPPED where libvirt is not installed or we are not root.

use std::fs;
use std::process::{Command, Output};

use kit::guest::libvirt::DOMAIN;
use kit::guest::output;
use kit::guest::system_libvirt::{DAEMON_USER, SystemLibvirt};
use kit::guest::wait_until;
use kit::programs;
use serde_json::Value;

use crate::libvirt_hook::{UUID, disk_device, image, is_long_run, linux, said, status, until_said};

/// `virtioblkctl` on the machine of this libvirt.
fn ctl(libvirt: &SystemLibvirt, arguments: &[&str]) -> Output {
    let mut command: Command = libvirt.inside(programs::virtioblkctl());
    command.args(arguments).env("LIBVIRT_DEFAULT_URI", libvirt.uri()).env_remove("VIRTIOBLK_CONTROL");
    output(&mut command)
}

pub(crate) fn ctl_ok(libvirt: &SystemLibvirt, arguments: &[&str]) -> String {
    let output = ctl(libvirt, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

pub(crate) fn ctl_json(libvirt: &SystemLibvirt, arguments: &[&str]) -> Value {
    let text = ctl_ok(libvirt, &[&["--json"], arguments].concat());
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Runs a command of docs/libvirt.md as it stands there, with these words for others.
fn documented(libvirt: &SystemLibvirt, command: &str, words: &[(&str, &str)]) -> String {
    let document = fs::read_to_string(programs::root().join("docs/libvirt.md")).expect("shipped");
    let full = format!("virtioblkctl {command}");
    assert!(document.lines().any(|line| line == full), "docs/libvirt.md lacks: {full}");
    let replaced = words.iter().fold(command.to_owned(), |text, (from, to)| text.replace(from, to));
    ctl_ok(libvirt, &replaced.split_whitespace().collect::<Vec<_>>())
}

/// A domain of two disks, whose guest runs `job`. The first one may be copied into HOME/backup.
fn two_disks(libvirt: &SystemLibvirt, job: &str) -> String {
    let (one, other) = (image(libvirt, "one.img"), image(libvirt, "other.img"));
    let backup = libvirt.home().join("backup");
    fs::create_dir_all(&backup).expect("room");
    std::os::unix::fs::chown(&backup, Some(DAEMON_USER), None).expect("we are root");
    let copies = format!("<v:copy_dir path='{}'/>", backup.display());
    let metadata = format!(
        "<uuid>{UUID}</uuid><metadata><v:disks xmlns:v='urn:virtioblkd:libvirt:1'>
         <v:disk target='vda' file='{}' cache='writeback'>{copies}</v:disk>
         <v:disk target='vdb' file='{}' cache='directsync'>{copies}</v:disk></v:disks></metadata>",
        one.display(),
        other.display()
    );
    let xml = linux(libvirt, job, &(disk_device("vda") + &disk_device("vdb")));
    libvirt.file("domain.xml", xml.replace("</name>", &format!("</name>{metadata}")))
}

const WITH_AGENT: &str = "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && agent && echo up; sleep 1000";

#[test]
fn a_domain_stands_for_all_its_disks_at_one_instant() {
    let Some(libvirt) = SystemLibvirt::start(20) else { return };
    libvirt.virsh_ok(&["define", &two_disks(&libvirt, WITH_AGENT)]);
    let ended = ctl(&libvirt, &["--domain", DOMAIN, "status"]);
    assert!(String::from_utf8_lossy(&ended.stderr).contains("does the domain run?"), "{ended:?}");
    libvirt.virsh_ok(&["start", DOMAIN]);
    until_said(&libvirt, "up");

    let list = ctl_json(&libvirt, &["list"]);
    let rows: Vec<[&Value; 5]> = list
        .as_array()
        .expect("disks")
        .iter()
        .map(|disk| ["name", "domain", "target", "cache-mode", "state"].map(|key| &disk[key]))
        .collect();
    assert_eq!(rows[0], ["example:vda", DOMAIN, "vda", "writeback", "in-use"]);
    assert_eq!(rows[1], ["example:vdb", DOMAIN, "vdb", "directsync", "in-use"]);
    assert!(documented(&libvirt, "list", &[]).contains("example:vdb"));
    assert!(documented(&libvirt, "--control example:vda status", &[]).contains("one.img"));
    documented(&libvirt, "--domain example status", &[]);
    let both = ctl_json(&libvirt, &["--domain", DOMAIN, "status"]);
    assert_eq!((&both["example:vda"]["connected"], &both["example:vdb"]["connected"]), (&true.into(), &true.into()));
    assert_eq!(ctl_json(&libvirt, &["--domain", UUID, "stats"]).as_object().expect("disks").len(), 2);

    let tokens = ctl_ok(&libvirt, &["--domain", DOMAIN, "quiesce"]);
    let state = |target: &str| {
        ctl_json(&libvirt, &["--domain", DOMAIN, "status"])[format!("example:{target}")]["quiesce"]["state"].clone()
    };
    assert_eq!((state("vda"), state("vdb")), ("quiesced".into(), "quiesced".into()));
    ctl_ok(&libvirt, &["--domain", DOMAIN, "resume", tokens.trim()]);
    assert_eq!((state("vda"), state("vdb")), ("open".into(), "open".into()));

    // Under a command that asks for the status, with the command's own status.
    let ctl_path = programs::virtioblkctl().display().to_string();
    let script = format!("{ctl_path} --domain {DOMAIN} --json status; exit 7");
    let held = ctl(&libvirt, &["--domain", DOMAIN, "quiesce", "--", "sh", "-c", &script]);
    assert_eq!(held.status.code(), Some(7), "{held:?}");
    let both: Value = serde_json::from_slice(&held.stdout).expect("JSON");
    for name in ["example:vda", "example:vdb"] {
        assert_eq!(both[name]["quiesce"]["state"], "quiesced", "{both}");
    }
    assert_eq!((state("vda"), state("vdb")), ("open".into(), "open".into()));

    wait_until("the agent answers", || {
        libvirt.virsh(&["qemu-agent-command", DOMAIN, r#"{"execute":"guest-ping"}"#]).status.success()
    });
    let backup = libvirt.home().join("backup");
    let snapshot = "snapshot --domain example --level filesystem --to copy:/backup/{}";
    let receipt = documented(&libvirt, snapshot, &[("/backup", backup.to_str().expect("text"))]);
    assert!(receipt.contains("filesystem consistent"), "{receipt}");
    for name in ["one.img", "other.img"] {
        assert!(libvirt.home().join("backup").join(name).exists());
    }
    assert!(documented(&libvirt, "domblkstat example vda --human", &[]).contains("number of write operations:"));
    assert!(documented(&libvirt, "domblkinfo example --all", &[]).contains("16777216"));
    documented(&libvirt, "blockresize example vda 20G", &[]);
    documented(&libvirt, "blkdeviotune example vda --total-iops-sec 500 --live --config", &[]);
    assert_eq!(status(&libvirt, "vda")["size"], 20_u64 << 30);
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
    assert_eq!(said(&libvirt).iter().filter(|line| *line == "up").count(), 1);
}

/// A domain with a disk that QEMU serves.
fn qemus_disk(libvirt: &SystemLibvirt, job: &str) -> String {
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='writethrough' io='threads'/>
         <source file='{}'/><target dev='vda' bus='virtio'/><serial>root</serial></disk>",
        image(libvirt, "root.img").display()
    );
    let xml = linux(libvirt, job, &disk).replace("</name>", &format!("</name><uuid>{UUID}</uuid>"));
    // As a domain is that never had a vhost-user disk.
    let memory = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
    assert!(xml.contains(memory));
    libvirt.file("domain.xml", xml.replace(memory, ""))
}

#[test]
fn a_disk_is_converted_and_back_again_and_the_domain_is_what_it_was() {
    let Some(libvirt) = SystemLibvirt::start(21) else { return };
    libvirt.virsh_ok(&[
        "define",
        &qemus_disk(&libvirt, "echo \"cache=$(cat /sys/block/vda/queue/write_cache)\"; sleep 1000"),
    ]);
    let original = libvirt.virsh_ok(&["dumpxml", "--inactive", DOMAIN]);
    let printed = documented(&libvirt, "domain convert example vda --cache none", &[]);
    assert!(printed.contains("type='vhostuser'") && printed.contains("cache='none'"), "{printed}");
    assert_eq!(libvirt.virsh_ok(&["dumpxml", "--inactive", DOMAIN]), original, "it was printed only");

    documented(&libvirt, "domain convert example vda --define", &[]);
    let checked = documented(&libvirt, "domain check example", &[]);
    assert!(checked.contains("no problem was found") && checked.contains("the guest sees write through"), "{checked}");
    libvirt.virsh_ok(&["start", DOMAIN]);
    let status = documented(&libvirt, "domain status example", &[]);
    let words: Vec<&str> = status.lines().nth(2).unwrap_or_default().split_whitespace().collect();
    assert_eq!(words[..5], ["vda", "writethrough", "write", "through", "in-use"], "{status}");
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    documented(&libvirt, "domain convert example vda --back --define", &[]);
    assert_eq!(libvirt.virsh_ok(&["dumpxml", "--inactive", DOMAIN]), original);

    // What is wrong is found before the start, each thing with its fix.
    let converted = ctl_ok(&libvirt, &["domain", "convert", DOMAIN, "vda"]);
    fs::remove_file(libvirt.home().join("root.img")).expect("ours");
    let broken = converted.replace("<access mode='shared'/>", "").replace("<reconnect enabled='yes' timeout='1'/>", "");
    let checked = ctl(&libvirt, &["domain", "check", &libvirt.file("broken.xml", broken)]);
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert_eq!(checked.status.code(), Some(1), "{said}");
    for words in ["not shared", "<reconnect enabled='yes'", "no image"] {
        assert!(said.contains(words), "'{words}': {said}");
    }
}

#[test]
fn a_converted_disk_has_the_guests_data() {
    if !is_long_run() {
        return;
    }
    let Some(libvirt) = SystemLibvirt::start(22) else { return };
    let job = "dd if=/dev/vda bs=512 count=1 2>/dev/null | tr -d '\\0' | sed 's/^/found /'; echo
        n=$(date +%s%N); echo \"data $n\" | dd of=/dev/vda bs=512 count=1 conv=sync,fsync 2>/dev/null; echo \"wrote $n\"; sleep 1000";
    libvirt.virsh_ok(&["define", &qemus_disk(&libvirt, job)]);
    let mut wrote = 0;
    let mut run = |before: &str| {
        libvirt.virsh_ok(&["start", DOMAIN]);
        let count = |said: &[String]| said.iter().filter(|line| line.starts_with("wrote ")).count();
        wait_until("the guest writes", || count(&said(&libvirt)) > wrote);
        wrote = count(&said(&libvirt));
        libvirt.virsh_ok(&["destroy", DOMAIN]);
        let lines = said(&libvirt);
        let last = lines.iter().rfind(|line| line.starts_with("wrote ")).expect("written").replace("wrote ", "");
        assert!(lines.contains(&format!("found {before}")) || before.is_empty(), "{before}: {lines:?}");
        format!("data {last}")
    };
    let one = run("");
    ctl_ok(&libvirt, &["domain", "convert", DOMAIN, "vda", "--define"]);
    // libvirt gave the image to QEMU's user, and then to root.
    std::os::unix::fs::chown(libvirt.home().join("root.img"), Some(DAEMON_USER), None).expect("we are root");
    let two = run(&one);
    ctl_ok(&libvirt, &["domain", "convert", DOMAIN, "vda", "--back", "--define"]);
    run(&two);
}

/// Says each new mode of each disk, and counts on.
const WATCH: &str = r#"
dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2>/dev/null
old=
n=0
while sleep 0.2; do
    new=$(cd /sys/block; for disk in vd?; do echo -n "$disk=$(cat $disk/queue/write_cache)/$(cat $disk/serial) "; done)
    [ "$new" = "$old" ] || echo "disks $new"
    old=$new
    n=$((n + 1)); echo $n | dd of=/dev/vda bs=512 count=1 conv=sync,fsync 2>/dev/null || exit 1
    echo "count $n"
done
"#;

#[test]
fn a_running_domain_gets_a_disk_loses_it_and_has_its_daemons_options_changed() {
    let Some(libvirt) = SystemLibvirt::start(23) else { return };
    let xml = two_disks(&libvirt, WATCH);
    libvirt.virsh_ok(&["define", &xml]);
    libvirt.virsh_ok(&["start", DOMAIN]);
    until_said(&libvirt, "disks vda=write back/ vdb=write through/");
    let before = libvirt.left();
    let another = image(&libvirt, "another.raw");
    let words = [("/images/another.raw", another.to_str().expect("text"))];
    documented(&libvirt, "domain attach example vdc file=/images/another.raw cache=directsync serial=more", &words);
    until_said(&libvirt, "disks vda=write back/ vdb=write through/ vdc=write through/more");
    assert!(libvirt.virsh_ok(&["dumpxml", DOMAIN]).contains("another.raw"), "its metadata travels with the domain");
    assert!(!libvirt.virsh_ok(&["dumpxml", "--inactive", DOMAIN]).contains("another.raw"));
    let twice = ctl(&libvirt, &["domain", "attach", DOMAIN, "vdc", "file=/x"]);
    assert!(String::from_utf8_lossy(&twice.stderr).contains("already"), "{twice:?}");
    let missing = ctl(&libvirt, &["domain", "attach", DOMAIN, "vdd", "file=/no/such.raw"]);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("there is no such file"), "{missing:?}");
    // libvirt itself refuses: there is no such target.
    let good = format!("file={}", image(&libvirt, "refused.raw").display());
    let refused = ctl(&libvirt, &["domain", "attach", DOMAIN, "sda1x", &good]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("libvirt: "), "{refused:?}");
    assert!(!libvirt.left().iter().any(|name| name.contains("sda1x")), "its daemon has ended: {:?}", libvirt.left());
    let unknown = ctl(&libvirt, &["domain", "attach", DOMAIN, "vdd", "file=/x", "cahce=none"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("nearest known one is 'cache'"), "{unknown:?}");
    documented(&libvirt, "domain detach example vdc", &[]);
    assert_eq!(libvirt.left(), before, "its daemon has ended, and nothing of it is left");
    assert!(!libvirt.virsh_ok(&["dumpxml", DOMAIN]).contains("another.raw"));
    // A disk that virsh alone has detached leaves its daemon and its metadata; detach ends both.
    let file = words[0].1;
    ctl_ok(&libvirt, &["domain", "attach", DOMAIN, "vdc", &format!("file={file}")]);
    libvirt.virsh_ok(&["detach-disk", DOMAIN, "vdc", "--live"]);
    wait_until("the guest releases the disk", || {
        !libvirt.virsh_ok(&["domblklist", DOMAIN]).split_whitespace().any(|word| word == "vdc")
    });
    let again = ctl(&libvirt, &["domain", "attach", DOMAIN, "vdc", &format!("file={file}")]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("runs already"), "{again:?}");
    ctl_ok(&libvirt, &["domain", "detach", DOMAIN, "vdc"]);
    assert_eq!(libvirt.left(), before);
    assert!(!libvirt.virsh_ok(&["dumpxml", DOMAIN]).contains("another.raw"));

    // virsh edit or virsh metadata changes the next start; apply brings it to what runs.
    let edited = |mode: &str| {
        let path = |name: &str| libvirt.home().join(name).display().to_string();
        let copies = format!("<copy_dir path='{}'/>", path("backup"));
        let vda = format!("<disk target='vda' file='{}' cache='writeback'>{copies}</disk>", path("one.img"));
        let vdb = format!("<disk target='vdb' file='{}' cache='{mode}'>{copies}</disk>", path("other.img"));
        let element = format!("<disks>{vda}{vdb}</disks>");
        let uri = "urn:virtioblkd:libvirt:1";
        libvirt.virsh_ok(&["metadata", DOMAIN, "--uri", uri, "--key", "v", "--config", "--set", &element]);
    };
    edited("writethrough");
    let count = said(&libvirt).len();
    let applied = documented(&libvirt, "domain apply example", &[]);
    assert_eq!(applied, "vda: unchanged\nvdb: has its new options\n");
    assert_eq!(ctl_json(&libvirt, &["--control", "example:vdb", "status"])["cache-mode"], "writethrough");
    wait_until("the guest goes on", || said(&libvirt).len() > count + 2);
    assert_eq!(documented(&libvirt, "domain apply example", &[]), "vda: unchanged\nvdb: unchanged\n");
    assert!(libvirt.virsh_ok(&["dumpxml", DOMAIN]).contains("writethrough"));
    // What cannot change is refused, and the daemon serves on as it was.
    edited("writethrough' readonly='yes");
    let refused = ctl(&libvirt, &["domain", "apply", DOMAIN]);
    assert!(!refused.status.success(), "{refused:?}");
    edited("writethrough");
    assert_eq!(documented(&libvirt, "domain apply example", &[]), "vda: unchanged\nvdb: unchanged\n");
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
}
