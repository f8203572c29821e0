//! README's commands, pasted as they stand and in their order: a disk, a QEMU that uses it, a hold, a snapshot and an upgrade.
//! Then the daemon is killed and started by the same line: QEMU reconnects.

use kit::documents::{Block, Terminal, blocks, pasted, read};
use kit::guest::{Qmp, qemu, wait_until};
use serde_json::json;

/// README's block with this beginning.
fn block(start: &str) -> Block {
    let found =
        blocks("README.md").into_iter().find(|block| block.language == "sh" && block.first_line().starts_with(start));
    found.unwrap_or_else(|| panic!("README.md has no block that begins with '{start}'"))
}

#[test]
fn readmes_commands_work_in_their_order_and_qemu_survives_a_killed_daemon() {
    let mut terminal = Terminal::default();
    // There is no display here; and an older QEMU has another name for the option, as README says.
    let older =
        if qemu::version() < (9, 2) { "set -- $(echo \"$@\" | sed s/reconnect-ms=1000/reconnect=1/)\n" } else { "" };
    let real = kit::documents::installed("qemu-system-x86_64").expect("QEMU");
    terminal
        .program("qemu-system-x86_64", &format!("#!/bin/sh\n{older}exec {} \"$@\" -display none\n", real.display()));
    let first = block("mkdir -p run backup");
    let starts = [
        "qemu-system-x86_64",
        "virtioblkctl --control run/vda.ctl quiesce",
        "virtioblkctl --control run/vda.ctl upgrade",
    ];
    let script: String = starts.iter().map(|start| pasted(&block(start))).collect();
    terminal.run_ok(&(pasted(&first) + &script), &[]);

    let control = terminal.dir().join("run/vda.ctl");
    let status = || Qmp::connect(&control).execute("query-status", json!({}));
    wait_until("QEMU is connected", || status()["connected"] == true);
    assert_eq!(status()["cache-mode"], "writeback", "the upgrade changed it");
    assert!(terminal.dir().join("backup/disk.img").exists(), "the snapshot");

    // From then on QEMU reports a connection that is lost.
    wait_until("the firmware uses the disk", || status()["driver-ready"] == true);
    let pid = status()["daemon"]["pid"].as_i64().expect("a pid") as i32;
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("a process that we started");
    wait_until("it is dead", || rustix::process::test_kill_process(pid).is_err());
    terminal.run_ok(&format!("rm run/vda.ctl\n{}", pasted(&first)), &[]);
    wait_until("QEMU has reconnected", || status()["connected"] == true);

    // An older QEMU has other words.
    if qemu::version() >= (10, 0) {
        qemus_messages_are_explained(&terminal.output());
    }
}

/// docs/troubleshooting.md has each message that QEMU printed, up to where it differs from case to case ("...").
fn qemus_messages_are_explained(output: &str) {
    let page = read("docs/troubleshooting.md");
    let table = page.split("## QEMU's messages").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("a section");
    let phrases: Vec<&str> =
        table.split('`').skip(1).step_by(2).map(|phrase| phrase.split("...").next().unwrap()).collect();
    for message in output.lines().filter_map(|line| line.strip_prefix("qemu-system-x86_64: ")) {
        let is_explained = phrases.iter().any(|phrase| message.starts_with(phrase.trim_end()));
        assert!(is_explained, "docs/troubleshooting.md does not explain QEMU's '{message}'");
    }
}
