//! The guest's agent of a snapshot: one that cannot freeze, freezes late, thaws early, or is reached through libvirt.

use std::fs::{self};
use std::time::Duration;

use kit::snapshot::{Mood, err, out, wait_until};
use serde_json::Value;

use super::scene::*;

#[test]
fn an_agent_that_cannot_freeze_makes_nothing() {
    let target: &[&str] = &["--to", "exec:touch \"$PLACE/target\""];
    Scene::new(Mood::MalformedInput).fails("filesystem", target, &["text that is not a reply"]);
    Scene::new(Mood::HooksFail).fails("filesystem", target, &["hook script exited with 3"]);
    Scene::new(Mood::Refuses).fails("filesystem", target, &["hook script exited with 3"]);
    let quick = [&["--freeze-timeout", "500ms"], target].concat();
    Scene::new(Mood::Silent).fails("filesystem", &quick, &["does not answer", "qemu-guest-agent", "--libvirt"]);
    Scene::new(Mood::Dies).fails("filesystem", target, &["closed the connection"]);
    Scene::new(Mood::ThawsEarly).fails("filesystem", &["--to", "exec:true"], &["thawed by another program"]);
    let missing = Scene::new(Mood::Good);
    fs::remove_file(&missing.agent.path).unwrap();
    missing.fails("filesystem", target, &["cannot be reached", "start the guest"]);
    let fewer = Scene::new(Mood::Good);
    fewer.agent.set_count(1);
    fewer.fails("filesystem", target, &["froze 1 filesystem of 2"]);
    let frozen = Scene::new(Mood::Good);
    frozen.agent.set_frozen();
    let output = frozen.run("filesystem", target);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &["frozen already", "another program"]);
    assert!(frozen.agent.is_frozen(), "it is not ours to thaw");
    assert!(!frozen.path("target").exists());
    assert_eq!(receipt(&frozen.run("crash", &["--json", "--to", "exec:true"]))["level"], "crash");
}

#[test]
fn a_freeze_that_windows_gave_up_is_no_snapshot() {
    let windows = |holds: u64, admits| Mood::Windows { holds: Duration::from_millis(holds), admits };
    // The thaw fails: the freeze was lost, whatever the status was.
    let scene = Scene::new(windows(100, true));
    scene.fails("filesystem", &["--to", "exec:sleep 0.5"], &["Windows (VSS)", "hold writes", "10 s at most"]);
    let weaker = receipt(&scene.run("filesystem", &["--json", "--or-weaker", "--to", "exec:sleep 0.5"]));
    assert_eq!((&weaker["level"], &weaker["filesystems-frozen"]), (&"crash".into(), &0.into()));
    // In time.
    let scene = Scene::new(windows(60_000, true));
    assert_eq!(receipt(&scene.run("filesystem", &["--json", "--to", "exec:true"]))["level"], "filesystem");
    // Beyond VSS's limit nothing that the agent says counts; and nothing is begun that would be in vain.
    let scene = Scene::new(windows(60_000, false));
    let output = scene.run("filesystem", &["--json", "--to", "exec:sleep 30; touch $PLACE/target"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&out(&output), &["thawed-early", "10 s after the freeze", "copy:"]);
    scene.is_over();
    let options = ["--json", "--or-weaker", "--to", "exec:sleep 10.5"];
    assert_eq!(receipt(&scene.run("filesystem", &options))["level"], "crash");
}

#[test]
fn the_volumes_of_windows_are_counted() {
    let volume = |id: &str, mountpoint: &str, kind: &str| serde_json::json!({"name": format!(r"\\?\Volume{{{id}}}\"), "mountpoint": mountpoint, "type": kind, "disk": []});
    let scene = Scene::new(Mood::Windows { holds: Duration::from_secs(10), admits: true });
    let list = [volume("a", r"C:\", "NTFS"), volume("b", "System Reserved", "FAT32"), volume("c", r"D:\", "CDFS")];
    scene.agent.set_filesystems(Value::Array(list.into()));
    // The EFI partition is on a fixed drive, so VSS holds it, too; or it is not. The CD is never frozen.
    for (count, open) in [(1, "FAT32"), (2, "CDFS")] {
        scene.agent.set_count(count);
        let receipt = receipt(&scene.run("filesystem", &["--json", "--to", "exec:true"]));
        assert_eq!((&receipt["level"], &receipt["filesystems-frozen"]), (&"filesystem".into(), &count.into()));
        contains(&receipt["verified"].to_string(), &[&format!(" frozen of {count}")]);
        contains(&receipt["trusted"].to_string(), &[open]);
    }
    scene.agent.set_count(0);
    scene.fails("filesystem", &["--to", "exec:true"], &["froze 0 filesystems of 1"]);
}

#[test]
fn a_guest_frozen_by_another_client_after_the_check_stays_frozen() {
    let scene = Scene::new(Mood::FrozenMeanwhile);
    let output = scene.run("filesystem", &["--to", "exec:touch \"$PLACE/target\""]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &["the agent is in frozen state", "another program"]);
    assert_eq!(scene.agent.asked("guest-fsfreeze-thaw"), 0, "it is not ours to thaw");
    assert!(scene.agent.is_frozen() && !scene.path("target").exists());
}

#[test]
fn a_weaker_level_is_taken_only_on_request_and_reported() {
    let cases = [Mood::MalformedInput, Mood::Refuses, Mood::Silent, Mood::Dies, Mood::ThawsEarly];
    for mood in cases {
        let scene = Scene::new(mood.clone());
        // Only silence lasts until the timeout.
        let timeout = if mood == Mood::Silent { "500ms" } else { "30s" };
        let options = ["--json", "--or-weaker", "--freeze-timeout", timeout, "--to", "exec:true"];
        let output = scene.run("filesystem", &options);
        let receipt = receipt(&output);
        assert_eq!(
            (&receipt["level"], &receipt["requested-level"]),
            (&"crash".into(), &"filesystem".into()),
            "{mood:?}"
        );
        assert_eq!(receipt["filesystems-frozen"], 0, "{mood:?}");
        contains(&receipt["warnings"].to_string(), &["level filesystem is not reached"]);
        contains(&err(&output), &["WEAKER THAN REQUESTED"]);
        scene.is_over();
    }
}

#[test]
fn a_guest_s_hook_that_fails_to_thaw_is_told() {
    let scene = Scene::new(Mood::ThawHookFails);
    let receipt = receipt(&scene.run("filesystem", &["--json", "--to", "exec:true"]));
    assert_eq!(receipt["level"], "filesystem");
    contains(&receipt["warnings"].to_string(), &["applications may not be", "thaw hook exited with 4"]);
    assert_eq!(scene.agent.journaled(), ["freeze", "thaw"], "thawed once, not again and again");
    scene.is_over();
}

#[test]
fn another_client_of_the_agent_is_told_apart_from_a_dead_one() {
    let scene = Scene::new(Mood::Good);
    let _other = std::os::unix::net::UnixStream::connect(&scene.agent.path).unwrap();
    scene.fails("filesystem", &["--to", "exec:true"], &["no other program is connected", "--libvirt"]);
}

#[test]
fn a_freeze_that_comes_late_is_found_and_thawed() {
    let scene = Scene::new(Mood::Late(Duration::from_secs(8)));
    let output = scene.run("filesystem", &["--freeze-timeout", "3s", "--to", "exec:touch \"$PLACE/target\""]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &["does not answer", "MAY BE FROZEN", "retries the thaw"]);
    wait_until("the freeze came", || scene.agent.journaled().contains(&"freeze".to_owned()));
    scene.agent.wait_thawed();
    scene.is_over();
}

#[test]
fn libvirt_s_channel_is_used_through_virsh() {
    let scene = Scene::new(Mood::Good);
    let bin = scene.path("bin");
    fs::create_dir(&bin).unwrap();
    let virsh = r#"#!/bin/sh
echo "$@" >> $PLACE/virsh
for last; do :; done
case "$*" in *"--domain guest"*) ;; *) echo "error: failed to get domain 'x'" >&2; exit 1 ;; esac
case $last in
*freeze-status*) [ -e $PLACE/frozen ] && echo '{"return":"frozen"}' || echo '{"return":"thawed"}' ;;
*freeze-freeze*) touch $PLACE/frozen; echo '{"return":2}' ;;
*freeze-thaw*) rm -f $PLACE/frozen; echo '{"return":2}' ;;
*guest-info*) echo '{"return":{"supported_commands":[{"name":"guest-fsfreeze-freeze","enabled":true}]}}' ;;
*) echo "error: internal error: unable to execute QEMU agent command 'x': disabled" >&2; exit 1 ;;
esac
"#;
    kit::programs::make_script(&bin.join("virsh"), virsh);
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let run = |domain: &str| {
        let mut command = snapshot(&[&scene.disk], "filesystem", &["--json", "--to", "exec:true", "--libvirt", domain]);
        command.env("PATH", &path).env("PLACE", scene.dir.path()).output().unwrap()
    };
    let receipt = receipt(&run("guest"));
    assert_eq!((&receipt["level"], &receipt["filesystems-frozen"]), (&"filesystem".into(), &2.into()));
    contains(&receipt["warnings"].to_string(), &["does not list its filesystems"]);
    contains(&fs::read_to_string(scene.path("virsh")).unwrap(), &["qemu-agent-command --timeout"]);
    assert!(!scene.path("frozen").exists());
    let output = run("nobody");
    assert_eq!(output.status.code(), Some(1));
    contains(&err(&output), &["libvirt's domain 'nobody'", "failed to get domain"]);
}
