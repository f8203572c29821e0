//! What `qemu-configs` ships says what the programs understand. (Its QEMU command lines boot in tests/guest/firmware.rs, its
//! XML in tests/guest/libvirt.rs.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu-configs").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(shipped(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn virtioblkd(argument: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_virtioblkd")).arg(argument).output().expect("virtioblkd starts");
    assert!(output.status.success(), "virtioblkd {argument}: {}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn the_description_for_qemu_names_a_block_back_end() {
    let description: serde_json::Value = serde_json::from_str(&read("vhost-user/50-virtioblkd.json")).expect("JSON");
    assert_eq!(description["type"], "block");
    assert!(description["description"].is_string());
    // `make install` puts PREFIX in the place of /usr/local.
    assert_eq!(description["binary"], "/usr/local/bin/virtioblkd");
    let capabilities: serde_json::Value = serde_json::from_str(&virtioblkd("--print-capabilities")).expect("JSON");
    assert_eq!(capabilities["type"], description["type"]);
}

#[test]
fn every_key_of_the_example_disk_is_an_option() {
    let disk: toml::Table = read("systemd/example.toml").parse().expect("TOML");
    let help = virtioblkd("--help");
    for key in disk.keys() {
        assert!(help.contains(&format!("--{key} ")), "example.toml has '{key}', --help has no --{key}:\n{help}");
    }
    disk["cache"].as_str().expect("a word").parse::<virtioblkd::engine::cache::CacheMode>().expect("a cache mode");
}

#[test]
fn every_option_that_the_pages_name_exists() {
    let mut known = virtioblkd("--help") + " --help ";
    let commands = [
        "quiesce",
        "resume",
        "resize",
        "status",
        "snapshot",
        "attend",
        "exporter",
        "stats",
        "upgrade",
        "list",
        "copies",
        "domblkstat",
        "domblkinfo",
        "blockresize",
        "blkdeviotune",
        "throttle",
    ]
    .map(|command| vec![command, "--help"]);
    let domain = ["convert", "check", "attach", "detach"].map(|command| vec!["domain", command, "--help"]);
    for words in [vec!["--help"]].into_iter().chain(commands).chain(domain) {
        let output =
            Command::new(env!("CARGO_BIN_EXE_virtioblkctl")).args(words).output().expect("virtioblkctl starts");
        known += &String::from_utf8(output.stdout).expect("text");
    }
    // speed.md names options of benchmarks.
    for page in kit::documents::pages().into_iter().filter(|page| page != "docs/speed.md") {
        let text = kit::documents::read(&page);
        // Lines that start one of our programs, and options in running text.
        for (number, line) in text.lines().enumerate() {
            let ours = line.contains("virtioblkd ") || line.contains("virtioblkctl ") || line.contains("`--");
            // Lines about other programs.
            let foreign = [
                "virsh",
                "qm set",
                "lvcreate",
                "qemu-system",
                "snapshot-create",
                "cargo",
                "make ",
                "bench",
                "of `rbd`",
                "cp ",
            ];
            if !ours || foreign.iter().any(|word| line.contains(word)) {
                continue;
            }
            for option in line.split(|c: char| !(c.is_ascii_lowercase() || c == '-')).filter(|w| w.starts_with("--")) {
                let exists = option.trim_matches('-').is_empty()
                    || known.split(|c: char| !(c.is_ascii_lowercase() || c == '-')).any(|w| w == option);
                assert!(exists, "{page}:{}: {option} is no option of ours", number + 1);
            }
        }
    }
}

#[test]
fn systemd_takes_the_units() {
    for unit in UNITS {
        systemd_takes(unit);
    }
}

/// Every unit that is shipped.
const UNITS: [&str; 5] = [
    "virtioblkd@.service",
    "virtioblkd-rbd@.service",
    "virtioblkd@.socket",
    "virtioblk-attend@.service",
    "virtioblk-exporter.service",
];

#[test]
fn every_unit_is_in_the_list_of_units() {
    let files = fs::read_dir(shipped("systemd")).expect("a directory");
    let names = files.map(|file| file.expect("an entry").file_name().into_string().expect("a name"));
    let mut units: Vec<String> = names.filter(|name| name.contains('@') || name.ends_with(".service")).collect();
    let mut listed = UNITS.map(str::to_owned).to_vec();
    units.sort();
    listed.sort();
    assert_eq!(units, listed);
}

/// The settings of a unit: the lines that are neither empty nor comments.
fn settings(unit: &str) -> Vec<String> {
    let lines = read(&format!("systemd/{unit}"));
    lines.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect()
}

#[test]
fn the_unit_for_rbd_is_the_one_for_files_with_the_network() {
    let (file, rbd) = (settings("virtioblkd@.service"), settings("virtioblkd-rbd@.service"));
    let without = |lines: &[String], others: &[String]| -> Vec<String> {
        lines.iter().filter(|line| !others.contains(line)).cloned().collect()
    };
    assert_eq!(
        without(&file, &rbd),
        ["Description=vhost-user-blk server for the disk %i", "PrivateNetwork=yes", "RestrictAddressFamilies=AF_UNIX"]
    );
    assert_eq!(
        without(&rbd, &file),
        [
            "Description=vhost-user-blk server for the disk %i on Ceph RBD",
            "Wants=network-online.target",
            "After=network-online.target",
            "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK"
        ]
    );
}

#[test]
fn a_late_mount_is_waited_for_and_a_wrong_configuration_is_not_retried() {
    for unit in ["virtioblkd@.service", "virtioblkd-rbd@.service"] {
        let settings = settings(unit);
        for line in ["StartLimitIntervalSec=0", "Restart=on-failure", "RestartPreventExitStatus=2"] {
            assert!(settings.iter().any(|setting| setting == line), "{unit} lacks {line}");
        }
        // They would hide the host's block devices from the daemon.
        for word in ["PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock"] {
            assert!(!settings.iter().any(|setting| setting.starts_with(word)), "{unit} has {word}");
        }
    }
}

fn systemd_takes(name: &str) {
    let dir = tempfile::tempdir().expect("a directory");
    let (template, extension) = name.split_once('.').expect("a unit's name");
    // Verification looks for the programs, and for the service of a socket.
    for unit in UNITS {
        let (template, extension) = unit.split_once('.').expect("a unit's name");
        let text = read(&format!("systemd/{unit}"))
            .replace("/usr/local/bin/virtioblkd", env!("CARGO_BIN_EXE_virtioblkd"))
            .replace("/usr/local/bin/virtioblkctl", env!("CARGO_BIN_EXE_virtioblkctl"));
        fs::write(dir.path().join(format!("{template}example.{extension}")), text).expect("room");
    }
    let path = dir.path().join(format!("{template}example.{extension}"));
    match Command::new("systemd-analyze").args(["verify", "--recursive-errors=no"]).arg(&path).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            // What it says of other units is not about ours.
            let about_us = |line: &&str| line.contains("virtioblk") && !line.contains("man virtioblk");
            let ours: Vec<_> = said.lines().filter(about_us).collect();
            assert!(ours.is_empty(), "systemd-analyze verify: {ours:#?}");
        }
        Err(error) => {
            use std::io::Write;
            let note = format!("SKIPPED: systemd-analyze ({error}): the unit was not verified\n");
            std::io::stderr().write_all(note.as_bytes()).expect("standard error");
        }
    }
}

#[test]
fn the_unit_runs_as_the_user_that_the_shipped_file_makes() {
    let unit = read("systemd/virtioblkd@.service");
    let users = read("systemd/sysusers.d/virtioblkd.conf");
    let user = users.lines().find_map(|line| line.strip_prefix("u ")).and_then(|line| line.split(' ').next());
    assert!(unit.lines().any(|line| line.strip_prefix("User=") == user && user.is_some()), "{unit}");
    let root = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(root.path().join("etc")).expect("room");
    let mut command = Command::new("systemd-sysusers");
    command.arg("--root").arg(root.path()).arg(shipped("systemd/sysusers.d/virtioblkd.conf"));
    match command.output() {
        Ok(output) => {
            assert!(output.status.success(), "{output:?}");
            let made = |file: &str| fs::read_to_string(root.path().join("etc").join(file)).expect("it was made");
            assert!(made("passwd").starts_with("virtioblkd:"), "{}", made("passwd"));
            assert!(made("group").lines().any(|line| line.starts_with("kvm:") && line.ends_with(":virtioblkd")));
        }
        Err(error) => {
            use std::io::Write;
            let note = format!("SKIPPED: systemd-sysusers ({error}): the user was not made\n");
            std::io::stderr().write_all(note.as_bytes()).expect("standard error");
        }
    }
}
