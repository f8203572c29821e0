//! `virtioblkctl` and the domains of a real libvirt: disks by name and by domain, `domain status` and `check`, `convert`,
//! `attach`, `detach` and `apply`. SKIPPED where libvirt is not installed or we are not root.

use std::fs;
use std::process::{Command, Output};

use kit::guest::libvirt::DOMAIN;
use kit::guest::output;
use kit::guest::system_libvirt::SystemLibvirt;
use kit::guest::wait_until;
use kit::programs;
use serde_json::Value;

use crate::libvirt_hook::{UUID, disk_device, image, linux, said, until_said};

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
