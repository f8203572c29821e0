//! What `qemu-configs/snapshot` ships does what it says, under the shell that Debian has as /bin/sh. Databases, LVM and
//! ZFS are stood in for by scripts that write down how they are called.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kit::snapshot::wait_until;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu-configs/snapshot").join(name)
}

/// A directory with programs of the test's own.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A program `name` that writes its name and words into the journal, then does `body`.
    fn program(&self, name: &str, body: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let text = format!("#!/bin/sh\necho \"${{0##*/}} $*\" >> \"{}\"\n{body}\n", self.path("journal").display());
        kit::programs::make_script(&path, &text);
    }

    /// Runs a shipped script under dash, with our programs first.
    fn run(&self, script: &str, word: &str) -> Output {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        self.run_with(script, word, &path, &["/dev/vg/one", "/dev/zvol/p/two"])
    }

    fn run_with(&self, script: &str, word: &str, path: &str, disks: &[&str]) -> Output {
        let mut command = Command::new(if Path::new("/bin/dash").exists() { "/bin/dash" } else { "/bin/sh" });
        command.arg(shipped(script)).arg(word).env("PATH", path);
        command.env("FSFREEZE_HOOK_D", self.path("d")).env("MYSQL", "mysql").env("RUN", self.path("run"));
        command.env("PSQL", "psql").env("VIRTIOBLK_DISKS", disks.join(" ")).env("ZVOL_ID", self.path("bin/zvol_id"));
        command.env("VIRTIOBLK_DISK_COUNT", disks.len().to_string());
        for (at, disk) in disks.iter().enumerate() {
            command.env(format!("VIRTIOBLK_DISK_{}", at + 1), disk);
        }
        command.output().unwrap()
    }

    /// What was called since the last time.
    fn journal(&self) -> Vec<String> {
        let lines = fs::read_to_string(self.path("journal")).unwrap_or_default();
        fs::write(self.path("journal"), "").unwrap();
        lines.lines().map(str::to_owned).collect()
    }
}

#[track_caller]
fn succeeds(output: &Output) {
    assert!(output.status.success(), "{output:?}");
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_guest_s_hook_calls_all_and_thaws_in_the_opposite_order() {
    let place = Place::new();
    for name in ["d/10-a", "d/20 b", "d/30-c"] {
        place.program(name, "true");
    }
    fs::write(place.path("d/40-readme"), "not executable").unwrap();
    succeeds(&place.run("guest/fsfreeze-hook", "freeze"));
    assert_eq!(place.journal(), ["10-a freeze", "20 b freeze", "30-c freeze"]);
    succeeds(&place.run("guest/fsfreeze-hook", "thaw"));
    assert_eq!(place.journal(), ["30-c thaw", "20 b thaw", "10-a thaw"]);
    // One that refuses: what was called is thawed, and the agent is told.
    place.program("d/20 b", "[ $1 = thaw ]");
    let refused = place.run("guest/fsfreeze-hook", "freeze");
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("20 b freeze' failed"), "{refused:?}");
    assert_eq!(place.journal(), ["10-a freeze", "20 b freeze", "20 b thaw", "10-a thaw"]);
    // A thaw that fails keeps no other from being thawed.
    place.program("d/30-c", "exit 1");
    assert!(said(&place.run("guest/fsfreeze-hook", "thaw")).contains("30-c thaw' failed"));
    assert_eq!(place.journal(), ["30-c thaw", "20 b thaw", "10-a thaw"]);
    // No directory is no reason to fail.
    fs::remove_dir_all(place.path("d")).unwrap();
    succeeds(&place.run("guest/fsfreeze-hook", "freeze"));
    assert_eq!(place.run("guest/fsfreeze-hook", "thing").status.code(), Some(2));
}

#[test]
fn mysql_s_lock_is_held_from_freeze_to_thaw() {
    let place = Place::new();
    let script = "guest/fsfreeze-hook.d/10-mysql";
    // A client answers and lives as long as its input does.
    let ended = place.path("ended");
    let client = format!("read -r line; echo \"$line\" > {0}.sql; echo locked; cat; touch {0}", ended.display());
    place.program("bin/mysql", &client);
    succeeds(&place.run(script, "freeze"));
    assert!(fs::read_to_string(ended.with_extension("sql")).unwrap().contains("FLUSH TABLES WITH READ LOCK"));
    assert!(!ended.exists(), "the session is open");
    succeeds(&place.run(script, "thaw"));
    wait_until("the session ends", || ended.exists());
    assert!(!place.path("run").exists());
    // A server that is down refuses.
    place.program("bin/mysql", "echo 'Can not connect'; exit 1");
    let refused = place.run(script, "freeze");
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("Can not connect"), "{refused:?}");
    succeeds(&place.run(script, "thaw"));
}

#[test]
fn postgresql_makes_a_checkpoint_or_refuses() {
    let place = Place::new();
    place.program("bin/psql", "true");
    succeeds(&place.run("guest/fsfreeze-hook.d/20-postgresql", "freeze"));
    succeeds(&place.run("guest/fsfreeze-hook.d/20-postgresql", "thaw"));
    assert_eq!(place.journal(), ["psql --no-psqlrc --quiet --command CHECKPOINT"]);
    place.program("bin/psql", "exit 2");
    assert!(!place.run("guest/fsfreeze-hook.d/20-postgresql", "freeze").status.success());
}

#[test]
fn lvm_takes_all_or_none() {
    let place = Place::new();
    place.program("bin/lvs", "for last; do :; done; echo \"  vg ${last##*/} pool \"");
    place.program("bin/lvcreate", "true");
    place.program("bin/lvremove", "true");
    succeeds(&place.run("lvm-thin.sh", "nightly"));
    let made: Vec<String> = place.journal().into_iter().filter(|line| line.starts_with("lvcreate")).collect();
    let create = "lvcreate --quiet --snapshot --setactivationskip n --name";
    assert_eq!(made, [format!("{create} one-nightly vg/one"), format!("{create} two-nightly vg/two")]);
    // The second one fails: the first one goes.
    place.program("bin/lvcreate", "case $* in *two*) exit 5 ;; esac");
    assert!(!place.run("lvm-thin.sh", "nightly").status.success());
    assert_eq!(place.journal().last().unwrap(), "lvremove --yes --quiet vg/one-nightly");
    // Not thin.
    place.program("bin/lvs", "echo '  vg one '");
    let refused = place.run("lvm-thin.sh", "nightly");
    assert!(!refused.status.success() && said(&refused).contains("not a thin volume"), "{refused:?}");
    // Not LVM's.
    place.program("bin/lvs", "exit 5");
    let refused = place.run("lvm-thin.sh", "nightly");
    assert!(!refused.status.success() && said(&refused).contains("not an LVM volume"), "{refused:?}");
    // No LVM.
    let empty = place.path("empty");
    let refused = place.run_with("lvm-thin.sh", "nightly", &empty.display().to_string(), &["/dev/vg/one"]);
    assert!(!refused.status.success() && said(&refused).contains("install lvm2"), "{refused:?}");
}

#[test]
fn zfs_takes_all_by_one_command() {
    let place = Place::new();
    place.program("bin/zfs", "[ $1 = list ] && echo pool/files; true");
    succeeds(&place.run("zfs.sh", "nightly"));
    assert_eq!(place.journal().last().unwrap(), "zfs snapshot pool/files@nightly p/two@nightly");
    // Names with spaces, of files and of datasets; two files in one.
    place.program(
        "bin/zfs",
        "[ $1 = list ] && echo 'pool/my files'; for word; do printf '%s|' \"$word\"; done >> \"$0.words\"",
    );
    let path = format!("{}:{}", place.path("bin").display(), std::env::var("PATH").unwrap());
    // udev's link of the volume 'pool/d e', and zvol_id of 'pool/f g', have a '+' for the space.
    place.program("bin/zvol_id", "[ \"$1\" = /dev/zd16 ] && echo pool/f+g");
    let disks = ["/pool/my files/a b.raw", "/pool/my files/c", "/dev/zvol/pool/d+e", "/dev/zd16"];
    succeeds(&place.run_with("zfs.sh", "nightly", &path, &disks));
    let words = fs::read_to_string(place.path("bin/zfs.words")).unwrap();
    assert!(words.starts_with("list|-H|-o|name|/pool/my files/a b.raw|list|"), "{words}");
    assert!(words.ends_with("|snapshot|pool/my files@nightly|pool/d e@nightly|pool/f g@nightly|"), "{words}");
    // A volume that has no name makes no snapshot of the others.
    place.program("bin/zvol_id", "exit 1");
    assert!(!place.run_with("zfs.sh", "nightly", &path, &disks).status.success());
    assert_eq!(fs::read_to_string(place.path("bin/zfs.words")).unwrap().matches("|snapshot|").count(), 1);
}

#[test]
fn the_examples_are_programs_that_a_shell_can_read() {
    for name in ["host-hooks/freeze", "host-hooks/thaw", "lvm-thin.sh", "zfs.sh", "guest/fsfreeze-hook"] {
        let path = shipped(name);
        assert_ne!(path.metadata().unwrap().permissions().mode() & 0o111, 0, "{name} is not executable");
        succeeds(&Command::new("/bin/sh").arg("-n").arg(&path).output().unwrap());
    }
}
