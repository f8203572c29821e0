//! `virtioblkctl snapshot` as a process: the order of its steps, its receipt, its usage, and the commands that it runs.

use std::fs::{self, File};
use std::process::Output;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use kit::snapshot::{Agent, Daemon, Mood, ctl, err, hooks, out, wait_until};
use rustix::process::{Pid, Signal, kill_process};

use super::scene::*;

#[test]
fn the_order_is_hooks_freeze_instant_thaw_hooks() {
    let scene = Scene::new(Mood::Good);
    let directory = hooks(
        scene.dir.path(),
        r#"echo "hook freeze $VIRTIOBLK_LEVEL $VIRTIOBLK_DISK_1" >> "$JOURNAL""#,
        r#"echo "hook thaw" >> "$JOURNAL"; echo "a hook speaks""#,
    );
    let exec = r#"exec:"$CTL" --control "$VIRTIOBLK_CONTROLS" --json status | grep -c '"quiesced"' >> "$JOURNAL""#;
    let output = scene.run("application", &["--json", "--to", exec, "--hooks", directory.to_str().unwrap()]);
    let receipt = receipt(&output);
    let image = scene.disk.image.display().to_string();
    let order =
        [format!("hook freeze application {image}"), "freeze".into(), "1".into(), "thaw".into(), "hook thaw".into()];
    assert_eq!(scene.agent.journaled(), order);
    assert_eq!((&receipt["level"], &receipt["requested-level"]), (&"application".into(), &"application".into()));
    assert_eq!(receipt["filesystems-frozen"], 2);
    assert!(receipt["frozen-us"].as_u64() > receipt["held-us"].as_u64(), "{receipt}");
    assert_eq!(receipt["hooks"][0], directory.join("freeze").to_str().unwrap());
    assert_eq!(receipt["disks"][0]["image"], image.as_str());
    assert_eq!(receipt["disks"][0]["held-us"], receipt["held-us"]);
    assert!(receipt["instant"].as_f64().unwrap() > 1.6e9);
    assert_eq!(receipt["warnings"].as_array().unwrap().len(), 0, "{receipt}");
    contains(&receipt["trusted"].to_string(), &["vda15 (vfat)"]);
    contains(&err(&output), &["a hook speaks"]);
    scene.is_over();
}

#[test]
fn the_text_receipt_has_the_facts_of_the_json_one() {
    let scene = Scene::new(Mood::Stale);
    let output = scene.run("filesystem", &["--to", "exec:true"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let words = ["filesystem consistent", "2 filesystems", "writes waited at most", "exec: true", "vda15 (vfat)"];
    contains(&out(&output), &words);
    scene.is_over();
}

#[test]
fn wrong_usage_is_status_two() {
    let scene = Scene::new(Mood::Good);
    let usage = |output: Output, words: &[&str]| {
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        contains(&err(&output), words);
    };
    usage(scene.run("crash", &[]), &["--to", "reflink:PATH", "copy:PATH", "exec:COMMAND"]);
    usage(scene.run("crash", &["--to", "zip:/x"]), &["'zip:/x'", "reflink:PATH"]);
    usage(scene.run("crash", &["--to", "exec:true", "--digest"]), &["--digest"]);
    usage(scene.run("crash", &["--to", "reflink:/tmp"]), &["directory"]);
    usage(scene.run("power", &["--to", "exec:true"]), &["crash, filesystem or application"]);
    usage(snapshot(&[&scene.disk], "filesystem", &["--to", "exec:true"]).output().unwrap(), &["--qga", "--libvirt"]);
    usage(snapshot(&[&scene.disk, &scene.disk], "crash", &["--to", "exec:true"]).output().unwrap(), &["twice"]);
    usage(snapshot(&[], "crash", &["--to", "exec:true"]).output().unwrap(), &["--disk"]);
    // The global option stands in.
    let mut command = ctl();
    command.arg("--control").arg(scene.disk.control()).args(["snapshot", "--level", "crash", "--to", "exec:true"]);
    assert_eq!(command.output().unwrap().status.code(), Some(0));
}

/// What a path is made of reaches hooks and commands as it is.
#[test]
fn names_of_disks_are_not_altered_and_not_ambiguous() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let name = |bytes: &[u8]| dir.path().join(std::ffi::OsStr::from_bytes(bytes));
    let images = [name(b"a b\xff.raw"), name(b"c\nd")];
    for image in &images {
        File::create(image).unwrap().set_len(1 << 20).unwrap();
    }
    let disks = images.each_ref().map(|image| Daemon::start(image, "writeback"));
    let tell = r#"printf '%s|' "$VIRTIOBLK_DISK_COUNT" "$VIRTIOBLK_DISK_1" "$VIRTIOBLK_DISK_2" "$VIRTIOBLK_CONTROL_2""#;
    let directory = hooks(dir.path(), &format!("{tell} > $PLACE/hook"), "true");
    let exec = format!("exec:{tell} > $PLACE/exec");
    let options = ["--to", &exec, "--hooks", directory.to_str().unwrap()];
    let mut command = snapshot(&[&disks[0], &disks[1]], "crash", &options);
    let output = command.arg("--json").env("PLACE", dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // JSON has text only: what is altered there is there in base64, too.
    let receipt_of_two = receipt(&output);
    assert_eq!(receipt_of_two["disks"][0]["image-b64"], BASE64.encode(images[0].as_os_str().as_bytes()));
    assert_eq!(receipt_of_two["disks"][1]["image"], images[1].to_str().unwrap());
    assert_eq!(receipt_of_two["disks"][1].get("image-b64"), None);
    let control = disks[1].control();
    let words =
        [&b"2"[..], images[0].as_os_str().as_bytes(), images[1].as_os_str().as_bytes(), control.as_os_str().as_bytes()];
    let expected = [words.join(&b'|'), b"|".to_vec()].concat();
    for told in ["hook", "exec"] {
        assert_eq!(
            fs::read(dir.path().join(told)).unwrap().escape_ascii().to_string(),
            expected.escape_ascii().to_string()
        );
    }
    // Hooks and an agent whose own path is no UTF-8.
    let agent = Agent::start(Mood::Good, &[disks[0].control()]);
    let [odd_hooks, odd_agent] = [name(b"hooks\xff"), name(b"agent\xff")];
    std::os::unix::fs::symlink(&directory, &odd_hooks).unwrap();
    std::os::unix::fs::symlink(&agent.path, &odd_agent).unwrap();
    let mut command = snapshot(&[&disks[0]], "application", &["--to", "exec:true", "--json", "--hooks"]);
    command.arg(odd_hooks).arg("--qga").arg(odd_agent).env("PLACE", dir.path());
    assert_eq!(receipt(&command.output().unwrap())["level"], "application");
}

#[test]
fn a_command_that_fails_or_takes_too_long_makes_no_snapshot() {
    let scene = Scene::new(Mood::Good);
    scene.fails("filesystem", &["--to", "exec:exit 9"], &["'exit 9'", "exit status: 9"]);
    assert!(!err(&scene.run("filesystem", &["--to", "exec:exit 9"])).contains("--lease"), "it was not too late");
    let hangs = ["--lease", "5s", "--to", "exec:sleep 100 & echo $! > $PLACE/pid; wait"];
    scene.fails("filesystem", &hangs, &["was killed", "--lease"]);
    let child: i32 = fs::read_to_string(scene.path("pid")).unwrap().trim().parse().unwrap();
    let gone = || kill_process(Pid::from_raw(child).unwrap(), Signal::TERM).is_err();
    wait_until("what the command started is ended, too", gone);
}
