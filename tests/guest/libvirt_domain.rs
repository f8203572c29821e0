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

use crate::libvirt_hook::{UUID, disk_device, image, is_long_run, linux, said, until_said};

/// `virtioblkctl` on the machine of this libvirt.
fn ctl(libvirt: &SystemLibvirt, arguments: &[&str]) -> Output {
    let mut command: Command = libvirt.inside(programs::virtioblkctl());
    command.args(arguments).env("LIBVIRT_DEFAULT_URI", libvirt.uri()).env_remove("VIRTIOBLK_CONTROL");
    output(&mut command)
}

fn ctl_ok(libvirt: &SystemLibvirt, arguments: &[&str]) -> String {
    let output = ctl(libvirt, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn ctl_json(libvirt: &SystemLibvirt, arguments: &[&str]) -> Value {
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
