//! The shipped units under a real systemd.

use std::time::{Duration, Instant};

use crate::machine::{Machine, WAIT_TIMEOUT, while_writing};

const UNIT: &str = "virtioblkd@vda";

/// Debian 12 with our programs in /usr/local, and the user and the directories that the shipped files describe.
fn machine() -> Option<Machine> {
    let machine = Machine::boot("bookworm", Some("/usr/local"), None)?;
    machine.ok("systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload && id virtioblkd");
    Some(machine)
}

fn is_active(machine: &Machine, unit: &str) -> bool {
    machine.run(&format!("systemctl is-active {unit}")).status.success()
}

fn mode(machine: &Machine) -> String {
    let status = machine.ok("virtioblkctl --control vda --json status");
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    status["cache-mode"].as_str().expect("a mode").to_owned()
}

#[test]
fn a_disk_starts_changes_its_mode_survives_kill_9_and_stops() {
    let Some(machine) = machine() else { return };
    machine.describe_disk("vda", "cache = \"none\"");
    machine.ok(&format!("virtioblkd --check --config /etc/virtioblkd/vda.toml && systemctl start {UNIT}"));
    let ls = machine.ok("ls -l /run/virtioblkd/vda.sock");
    assert!(ls.contains("srw-rw----") && ls.contains("virtioblkd kvm"), "{ls}");
    let guest = machine.guest("vda");
    let first = machine.property(UNIT, "MainPID");
    let (guest, writes) = while_writing(guest, || {
        machine.ok("sed -i 's/^cache.*/cache = \"writethrough\"/' /etc/virtioblkd/vda.toml");
        machine.ok(&format!("systemctl reload {UNIT}"));
    });
    assert!(writes > 1);
    assert_eq!(mode(&machine), "writethrough");
    let second = machine.property(UNIT, "MainPID");
    assert_ne!(first, second, "another process serves the same guest");
    // A broken file: the daemon that runs serves on, and systemd says that the reload failed.
    let (guest, _) = while_writing(guest, || {
        machine.ok("echo 'cahce = 1' >>/etc/virtioblkd/vda.toml");
        assert!(!machine.run(&format!("systemctl reload {UNIT}")).status.success());
        machine.ok("sed -i '/^cahce/d' /etc/virtioblkd/vda.toml");
    });
    assert!(machine.journal().contains("'cahce'"), "{}", machine.journal());
    assert_eq!(machine.property(UNIT, "MainPID"), second);
    drop(guest);
    machine.ok(&format!("kill -9 {second}"));
    machine.wait_until("systemd starts the daemon again", |machine| {
        is_active(machine, UNIT) && machine.property(UNIT, "MainPID") != second
    });
    while_writing(machine.guest("vda"), || {});
    machine.ok(&format!("systemctl stop {UNIT}"));
    assert_eq!(machine.property(UNIT, "Result"), "success");
    assert!(!machine.path("/run/virtioblkd/vda.sock").exists() && !machine.path("/run/virtioblkd/vda.ctl").exists());
}

#[test]
fn a_late_mount_is_waited_for_and_a_wrong_configuration_is_not_retried() {
    let Some(machine) = machine() else { return };
    machine.describe_disk("vda", "");
    machine.ok("mv /images/vda.raw /images/late.raw");
    machine.run(&format!("systemctl start {UNIT}"));
    // More failures than systemd's default limit of five allows.
    machine.wait_until("eight starts", |machine| {
        machine.property(UNIT, "NRestarts").parse::<u32>().is_ok_and(|restarts| restarts >= 8)
    });
    machine.ok("mv /images/late.raw /images/vda.raw");
    machine.wait_until("the disk is served", |machine| is_active(machine, UNIT));
    while_writing(machine.guest("vda"), || {});
    machine.ok(&format!("systemctl stop {UNIT}"));
    machine.describe_disk("vdb", "cahce = \"none\"");
    assert!(!machine.run("systemctl start virtioblkd@vdb").status.success());
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        assert_eq!(machine.property("virtioblkd@vdb", "NRestarts"), "0");
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(machine.property("virtioblkd@vdb", "ExecMainStatus"), "2");
    assert!(machine.property("virtioblkd@vdb", "ActiveState") == "failed");
}

#[test]
fn systemd_listens_and_starts_the_daemon_for_the_first_front_end() {
    let Some(machine) = machine() else { return };
    machine.describe_disk("vda", "");
    machine.ok("sed -i -e 's/^socket-path.*/fd = 3/' -e '/^socket-group/d' /etc/virtioblkd/vda.toml");
    machine.ok("systemctl start virtioblkd@vda.socket");
    assert!(!is_active(&machine, UNIT));
    let begun = Instant::now();
    let guest = machine.guest("vda");
    kit::guest::tell(&format!("the first front-end was served after {:?}", begun.elapsed()));
    assert!(is_active(&machine, UNIT));
    let (guest, _) = while_writing(guest, || drop(machine.ok(&format!("systemctl reload {UNIT}"))));
    drop(guest);
    machine.ok(&format!("systemctl restart {UNIT}"));
    while_writing(machine.guest("vda"), || {});
    machine.ok(&format!("systemctl stop virtioblkd@vda.socket {UNIT}"));
}

/// The daemon says why it reaches no cluster, instead of blaming the cluster.
#[test]
fn an_rbd_image_in_the_unit_for_files_is_refused_with_the_reason() {
    let Some(machine) = machine() else { return };
    machine.ok("printf 'socket-path = \"/run/virtioblkd/vda.sock\"\\nrbd = \"p/i\"\\n' >/etc/virtioblkd/vda.toml");
    assert!(!machine.run(&format!("systemctl start {UNIT}")).status.success());
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !machine.journal().contains("may not open AF_INET sockets") {
        assert!(Instant::now() < deadline, "{}", machine.journal());
        std::thread::sleep(Duration::from_millis(500));
    }
    assert!(machine.journal().contains("virtioblkd-rbd@"), "{}", machine.journal());
}

#[test]
fn systemd_rates_the_unit_as_documented() {
    let Some(machine) = machine() else { return };
    for unit in ["virtioblkd@vda.service", "virtioblkd-rbd@vda.service"] {
        let text = machine.run(&format!("systemd-analyze security --no-pager {unit}"));
        let text = String::from_utf8_lossy(&text.stdout).into_owned();
        let rated = text.lines().find(|line| line.contains("Overall exposure")).unwrap_or_else(|| panic!("{text}"));
        kit::guest::tell(rated);
        let number: f32 = rated
            .split(": ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next())
            .and_then(|n| n.parse().ok())
            .expect("a number");
        assert!(number < 5.0, "{text}");
    }
}
