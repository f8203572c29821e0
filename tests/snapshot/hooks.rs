//! Hooks of the host and of the guest's agent.

use std::fs::{self};
use std::path::Path;

use kit::snapshot;
use kit::snapshot::{Mood, hooks};
use serde_json::Value;

use super::scene::*;

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
