//! `virtioblkctl snapshot` as a process, with real daemons and an agent that does what the test tells it: every level,
//! and whatever fails or dies at whatever step, every disk goes on and every guest is thawed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use kit::snapshot;
use kit::snapshot::{Agent, Daemon, Mood, ctl, err, hooks, out, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// One disk, a guest, and a place.
pub(super) struct Scene {
    pub(super) disk: Daemon,
    pub(super) agent: Agent,
    pub(super) dir: tempfile::TempDir,
}

impl Scene {
    pub(super) fn new(mood: Mood) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let disk = Daemon::with_image(dir.path(), "a.raw", 1 << 20);
        let agent = Agent::start(mood, &[disk.control()]);
        Scene { disk, agent, dir }
    }

    /// The command with the disk, the level and the agent.
    pub(super) fn command(&self, level: &str, more: &[&str]) -> Command {
        let mut command = snapshot(&[&self.disk], level, more);
        if level != "crash" {
            command.arg("--qga").arg(&self.agent.path);
        }
        command.env("JOURNAL", self.agent.journal()).env("CTL", env!("CARGO_BIN_EXE_virtioblkctl"));
        command.env("PLACE", self.dir.path());
        command
    }

    pub(super) fn run(&self, level: &str, more: &[&str]) -> Output {
        self.command(level, more).output().unwrap()
    }

    /// It fails with status 1 and says all of this; nothing is held, frozen or left behind.
    pub(super) fn fails(&self, level: &str, more: &[&str], words: &[&str]) {
        let output = self.run(level, more);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        contains(&err(&output), words);
        self.is_over();
    }

    pub(super) fn is_over(&self) {
        wait_until("the disk goes on", || !self.disk.is_held());
        wait_until("the guest is thawed", || !self.agent.is_frozen());
        assert!(!self.agent.held_at_thaw(), "a thaw came while the disk was held: it would hang in a real guest");
        assert!(!self.path("target").exists() && !self.path("target.partial").exists(), "something is left behind");
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

pub(super) fn snapshot(disks: &[&Daemon], level: &str, more: &[&str]) -> Command {
    let mut command = ctl();
    command.args(["snapshot", "--level", level]);
    for disk in disks {
        command.arg("--disk").arg(disk.control());
    }
    command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(super) fn receipt(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

pub(super) fn contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "'{word}' is not in:\n{text}");
    }
}

pub(super) fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Waits for a file that a hook or a command makes.
pub(super) fn wait_for(path: &Path) {
    wait_until(&path.display().to_string(), || path.exists());
}

/// What is in a directory, sorted.
pub(super) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

// Levels.

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
    let words = ["filesystem consistent", "2 filesystem(s)", "writes waited at most", "exec: true", "vda15 (vfat)"];
    contains(&out(&output), &words);
    scene.is_over();
}

#[test]
fn guest_hooks_are_verified_or_the_level_is_not_reached() {
    let scene = Scene::new(Mood::Good);
    // The file commands are blocked: nobody knows.
    scene.fails("application", &["--to", "exec:true"], &["--hooks DIR", "--fsfreeze-hook", "not allowed"]);
    assert_eq!(scene.agent.asked("guest-fsfreeze-freeze"), 0, "found out before the freeze");
    let weaker = receipt(&scene.run("application", &["--json", "--or-weaker", "--to", "exec:true"]));
    assert_eq!((&weaker["level"], &weaker["hooks"]), (&"filesystem".into(), &Value::Array(vec![])));
    scene.agent.set_cmdline("/usr/sbin/qemu-ga\0-m\0virtio-serial\0");
    scene.fails("application", &["--to", "exec:true"], &["--fsfreeze-hook"]);
    scene.agent.set_cmdline("/usr/sbin/qemu-ga\0-F/etc/qemu/fsfreeze-hook\0");
    let reached = receipt(&scene.run("application", &["--json", "--to", "exec:true"]));
    assert_eq!(
        (&reached["level"], &reached["hooks"][0]),
        (&"application".into(), &"guest:/etc/qemu/fsfreeze-hook".into())
    );
    contains(&reached["trusted"].to_string(), &["/etc/qemu/fsfreeze-hook"]);
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

// The guest's agent.

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
    missing.fails("filesystem", target, &["cannot be reached", "does the guest run"]);
    let fewer = Scene::new(Mood::Good);
    fewer.agent.set_count(1);
    fewer.fails("filesystem", target, &["froze 1 filesystem(s) of 2"]);
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
        contains(&receipt["verified"].to_string(), &[&format!("{count} filesystem(s) frozen of {count}")]);
        contains(&receipt["trusted"].to_string(), &[open]);
    }
    scene.agent.set_count(0);
    scene.fails("filesystem", &["--to", "exec:true"], &["froze 0 filesystem(s) of 1"]);
}

#[test]
fn what_somebody_else_froze_after_our_check_is_left_frozen() {
    let scene = Scene::new(Mood::FrozenMeanwhile);
    let output = scene.run("filesystem", &["--to", "exec:touch \"$PLACE/target\""]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &["the agent is in frozen state", "another program"]);
    assert_eq!(scene.agent.asked("guest-fsfreeze-thaw"), 0, "it is not ours to thaw");
    assert!(scene.agent.is_frozen() && !scene.path("target").exists());
}

#[test]
fn a_weaker_level_is_taken_only_if_asked_and_said() {
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
    contains(&err(&output), &["does not answer", "MAY BE FROZEN", "goes on trying"]);
    wait_until("the freeze came", || scene.agent.journaled().contains(&"freeze".to_owned()));
    scene.agent.wait_thawed();
    scene.is_over();
}

// Hooks.

#[test]
fn a_hook_that_fails_or_hangs_is_followed_by_its_thaw() {
    for (freeze, timeout, word) in
        [("exit 3", "30s", "failed (exit status: 3)"), ("sleep 100", "4s", "did not end within 4s")]
    {
        let scene = Scene::new(Mood::Good);
        let directory = hooks(scene.dir.path(), freeze, "echo thawed >> $JOURNAL");
        let base = ["--hooks", directory.to_str().unwrap(), "--freeze-timeout", timeout, "--to", "exec:true"];
        scene.fails("application", &base, &[word, directory.join("freeze").to_str().unwrap()]);
        assert_eq!(scene.agent.journaled(), ["thawed"], "{freeze}");
        let weaker = receipt(&scene.run("application", &[&base[..], &["--json", "--or-weaker"]].concat()));
        assert_eq!((&weaker["level"], &weaker["hooks"]), (&"filesystem".into(), &Value::Array(vec![])));
        assert_eq!(scene.agent.journaled(), ["thawed", "thawed", "freeze", "thaw"], "{freeze}");
        scene.is_over();
    }
    // The snapshot is good, but somebody should look.
    let scene = Scene::new(Mood::Good);
    let directory = hooks(scene.dir.path(), "true", "exit 4");
    let output = scene.run("application", &["--json", "--hooks", directory.to_str().unwrap(), "--to", "exec:true"]);
    contains(&receipt(&output)["warnings"].to_string(), &["MAY BE FROZEN", "exit status: 4"]);
    // A hook that is none.
    fs::remove_file(directory.join("thaw")).unwrap();
    let base = ["--hooks", directory.to_str().unwrap(), "--to", "exec:true"];
    scene.fails("crash", &base, &["DIR/freeze and DIR/thaw"]);
}

#[test]
fn hooks_that_others_may_change_are_not_run() {
    let scene = Scene::new(Mood::Good);
    let directory = hooks(scene.dir.path(), "touch $PLACE/ran", "touch $PLACE/ran");
    let base = ["--hooks", directory.to_str().unwrap(), "--to", "exec:true"];
    let mode =
        |path: &Path, mode| fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    for path in [directory.join("thaw"), directory.clone()] {
        mode(&path, 0o777);
        scene.fails("application", &base, &["is not run", "everybody", &format!("chmod go-w '{}'", path.display())]);
        mode(&path, 0o755);
    }
    if std::os::unix::fs::chown(directory.join("freeze"), Some(65534), None).is_ok() {
        scene.fails("application", &base, &["is not run", "belongs to user 65534"]);
        std::os::unix::fs::chown(directory.join("freeze"), Some(0), None).unwrap();
    } else {
        snapshot::tell("SKIPPED: not root: no hook that belongs to somebody else");
    }
    assert!(!scene.path("ran").exists());
    assert_eq!(receipt(&scene.run("application", &[&base[..], &["--json"]].concat()))["level"], "application");
}

// exec:

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

#[test]
fn a_hold_that_is_lost_makes_no_snapshot() {
    let scene = Scene::new(Mood::Good);
    let resumes = r#"exec:"$CTL" --control "$VIRTIOBLK_CONTROLS" resume --all >&2"#;
    scene.fails("filesystem", &["--to", resumes], &["was not held", "resumed already"]);
    // We sleep longer than the lease, and nobody notices but the daemon.
    let exec = "exec:touch $PLACE/here; while [ ! -e $PLACE/over ]; do sleep 0.02; done";
    let mut child = scene.command("crash", &["--lease", "5s", "--to", exec]).spawn().unwrap();
    wait_for(&scene.path("here"));
    signal(&child, Signal::STOP);
    wait_until("the lease ran out", || !scene.disk.is_held());
    File::create(scene.path("over")).unwrap();
    signal(&child, Signal::CONT);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    scene.is_over();
}

// Several disks.

#[test]
fn a_disk_that_misses_the_deadline_releases_all_disks() {
    let dir = tempfile::tempdir().unwrap();
    let disks = ["a", "b", "c"].map(|name| Daemon::with_image(dir.path(), name, 1 << 20));
    let all: Vec<&Daemon> = disks.iter().collect();
    let target = dir.path().join("target");
    let exec = format!("exec:echo $VIRTIOBLK_DISKS > {0}; echo $VIRTIOBLK_DISK_3 >> {0}", target.display());
    // Stopped once all have answered the first question: a hook is the place.
    let stop = format!("kill -STOP {}", disks[1].child.id());
    let directory = hooks(dir.path(), &stop, "true");
    let late = ["--timeout", "5s", "--to", &exec, "--hooks", directory.to_str().unwrap()];
    let output = snapshot(&all, "crash", &late).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &[disks[1].control().to_str().unwrap(), "does not answer in time"]);
    assert!(!disks[0].is_held() && !disks[2].is_held(), "released");
    assert!(!target.exists());
    signal(&disks[1].child, Signal::CONT);
    wait_until("the late one goes on, too", || !disks[1].is_held());
    // And now well.
    let receipt = receipt(&snapshot(&all, "crash", &["--json", "--to", &exec]).output().unwrap());
    let images: Vec<String> = disks.iter().map(|disk| disk.image.display().to_string()).collect();
    assert_eq!(fs::read_to_string(&target).unwrap(), format!("{}\n{}\n", images.join(" "), images[2]));
    assert_eq!(receipt["disks"].as_array().unwrap().len(), 3);
}

// Death.

/// Kills the client with `how` once `marker` is there; then everything goes on and is thawed. What it printed.
pub(super) fn killed(scene: &Scene, mut command: Command, marker: &Path, how: Signal) -> Output {
    let child = command.spawn().unwrap();
    wait_for(marker);
    signal(&child, how);
    let output = child.wait_with_output().unwrap();
    assert_ne!(output.status.code(), Some(0), "{output:?}");
    scene.is_over();
    output
}

#[test]
fn a_client_killed_at_any_step_leaves_nothing_held_or_frozen() {
    for how in [Signal::KILL, Signal::TERM, Signal::INT, Signal::HUP] {
        // In the host's hook: the guest was never frozen, the hook's thaw is called.
        let scene = Scene::new(Mood::Good);
        let thaw = "echo thawed >> $JOURNAL";
        let directory = hooks(scene.dir.path(), "touch $PLACE/here; sleep 100", thaw);
        let options = ["--hooks", directory.to_str().unwrap(), "--to", "exec:true"];
        killed(&scene, scene.command("application", &options), &scene.path("here"), how);
        wait_until("the hook thaws", || scene.agent.journaled() == ["thawed"]);
        // While the guest freezes.
        let scene = Scene::new(Mood::Late(Duration::from_secs(3)));
        let child = scene.command("filesystem", &["--to", "exec:true"]).spawn().unwrap();
        scene.agent.wait_for("guest-fsfreeze-freeze");
        signal(&child, how);
        let output = child.wait_with_output().unwrap();
        assert_ne!(output.status.code(), Some(0), "{output:?}");
        scene.agent.wait_thawed();
        assert_eq!(scene.agent.journaled(), ["freeze", "thaw"]);
        scene.is_over();
        // While the disks are held, with a command that would go on.
        let scene = Scene::new(Mood::Good);
        let directory = hooks(scene.dir.path(), "true", thaw);
        let exec = "exec:touch $PLACE/here; exec sleep 100";
        let options = ["--hooks", directory.to_str().unwrap(), "--to", exec];
        let output = killed(&scene, scene.command("application", &options), &scene.path("here"), how);
        wait_until("guest and hook are thawed", || scene.agent.journaled() == ["freeze", "thaw", "thawed"]);
        if how != Signal::KILL {
            assert_eq!(output.status.code(), Some(1));
            contains(&err(&output), &["interrupted by a signal"]);
        }
        // While the guest thaws.
        let scene = Scene::new(Mood::LateThaw(Duration::from_millis(500)));
        let child = scene.command("filesystem", &["--to", "exec:true"]).spawn().unwrap();
        scene.agent.wait_for("guest-fsfreeze-thaw");
        signal(&child, how);
        child.wait_with_output().unwrap();
        scene.agent.wait_thawed();
        scene.is_over();
    }
}

#[test]
fn a_guard_that_is_killed_is_replaced() {
    let scene = Scene::new(Mood::Good);
    let mut command = scene.command(
        "filesystem",
        &["--json", "--to", "exec:touch $PLACE/here; while [ -e $PLACE/here ]; do sleep 0.02; done"],
    );
    let child = command.spawn().unwrap();
    wait_for(&scene.path("here"));
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let guard = children
        .split_whitespace()
        .find(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().contains("snapshot-guard"));
    kill_process(Pid::from_raw(guard.expect("a guard").parse().unwrap()).unwrap(), Signal::KILL).unwrap();
    fs::remove_file(scene.path("here")).unwrap();
    let receipt = receipt(&child.wait_with_output().unwrap());
    assert_eq!(receipt["level"], "filesystem");
    scene.agent.wait_thawed();
    scene.is_over();
}

#[test]
fn a_client_that_stands_still_does_not_keep_the_guest_frozen() {
    let scene = Scene::new(Mood::Good);
    let exec = "exec:touch $PLACE/here; while [ ! -e $PLACE/over ]; do sleep 0.02; done";
    let short = ["--timeout", "5s", "--lease", "5s", "--to", exec];
    let mut child = scene.command("filesystem", &short).spawn().unwrap();
    wait_for(&scene.path("here"));
    signal(&child, Signal::STOP);
    scene.agent.wait_thawed();
    File::create(scene.path("over")).unwrap();
    signal(&child, Signal::CONT);
    assert_eq!(child.wait().unwrap().code(), Some(1), "the lease ran out");
    scene.is_over();
}

// libvirt, by a virsh that speaks to our agent.

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
    fs::write(bin.join("virsh"), virsh).unwrap();
    fs::set_permissions(bin.join("virsh"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
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
