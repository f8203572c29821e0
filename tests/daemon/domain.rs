//! `virtioblkctl domain attach`, `detach` and `apply` with real daemons and a virsh of our own, which keeps a domain in files:
//! commands that are interrupted, that run at the same time, and that reach a part of the disks. tests/guest has the real
//! libvirt.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use kit::programs;

const UUID: &str = "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11";
/// No users of any host. The daemon takes 65534 for a user that its namespace does not have.
const OTHER_USERS: u32 = 540_000;

/// virsh, for the commands and options that virtioblkctl gives. `$STATE/busy`: attach-device waits while it exists.
/// `$STATE/stubborn`: the guest releases no disk. `$STATE/ended`: the domain does not run any more. `$STATE/uri`: what virsh is connected to.
const VIRSH: &str = r#"#!/bin/sh
shift
command=$1
which=live
config=
shift
while [ $# -gt 0 ]; do
    case $1 in
        --domain|--uri|--key) shift ;;
        --target) target=$2; shift ;;
        --file) file=$2; shift ;;
        --set) element=$2; shift ;;
        --config) config=1; [ $command = metadata ] && which=config ;;
        --inactive) which=config ;;
    esac
    shift
done
case $command in
    uri) cat $STATE/uri 2>/dev/null || echo qemu:///session ;;
    dumpxml)
        [ $which = live ] && [ ! -e $STATE/ended ] && id=" id='1'"
        echo "<domain type='kvm'$id><name>vm1</name><uuid>$(cat $STATE/uuid)</uuid>
            <metadata>$(cat $STATE/$which.metadata 2>/dev/null)</metadata>
            <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
            <devices>$(cat $STATE/$which/* 2>/dev/null)</devices></domain>" ;;
    attach-device)
        cp "$file" $STATE/device.xml
        echo $$ > $STATE/virsh.pid
        touch $STATE/attaching
        tries=0
        while [ -e $STATE/busy ] && [ $tries -lt 600 ]; do sleep 0.1; tries=$((tries + 1)); done
        if [ -e $STATE/ended ]; then echo "error: domain is not running" >&2; exit 1; fi
        target=$(sed -n "s/.*target dev='\([^']*\)'.*/\1/p" $STATE/device.xml)
        cp $STATE/device.xml $STATE/live/$target
        [ -z "$config" ] || cp $STATE/device.xml $STATE/config/$target ;;
    detach-disk)
        [ -e $STATE/stubborn ] || rm $STATE/live/$target
        [ ! -e $STATE/stubborn ] || touch $STATE/detaching
        [ -z "$config" ] || rm $STATE/config/$target ;;
    metadata)
        echo "$element" | sed "s/^<disks/<disks xmlns='urn:virtioblkd:libvirt:1'/" > $STATE/$which.metadata ;;
esac
"#;

/// A running domain in files, and our own XDG_RUNTIME_DIR. virtioblkctl and its daemons run as another user if we are root,
/// because root's disks are the host's.
pub(crate) struct Scene {
    home: tempfile::TempDir,
    /// For XDG_RUNTIME_DIR: a socket's path has at most 107 bytes.
    run: tempfile::TempDir,
    /// Each has a user of its own: the daemons of one share a limit of locked memory.
    user: u32,
}

impl Scene {
    /// `None`: another user may not use here what was built.
    pub(crate) fn new() -> Option<Self> {
        static SCENES: AtomicU32 = AtomicU32::new(0);
        let user = OTHER_USERS + std::process::id() % 1000 * 100 + SCENES.fetch_add(1, Relaxed) % 100;
        let scene = Scene { home: programs::disk_dir(), run: tempfile::tempdir().expect("room"), user };
        for directory in ["", "bin", "run", "state", "state/live", "state/config"] {
            fs::create_dir_all(scene.path(directory)).expect("room");
            scene.give(directory);
        }
        programs::make_script(&scene.path("bin/virsh"), VIRSH);
        fs::write(scene.path("state/uuid"), UUID).expect("room");
        if let Err(error) = scene.command(&["--version"]).output() {
            eprintln!("SKIPPED: another user cannot run virtioblkctl here: {error}");
            return None;
        }
        Some(scene)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        match name.strip_prefix("run") {
            Some(rest) => self.run.path().join(rest.trim_start_matches('/')),
            None => self.home.path().join(name),
        }
    }

    pub(crate) fn give(&self, name: &str) {
        if rustix::process::geteuid().is_root() {
            chown(self.path(name), Some(self.user), Some(self.user)).expect("we are root");
        }
    }

    pub(crate) fn touch(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("room");
        self.give(name);
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).expect("it is there");
    }

    /// `file=` of a new image.
    pub(crate) fn image(&self, name: &str) -> String {
        fs::write(self.path(name), vec![0; 1 << 20]).expect("room");
        self.give(name);
        format!("file={}", self.path(name).display())
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        self.program(programs::virtioblkctl().as_os_str(), arguments)
    }

    /// A script of a shell, as our user.
    pub(crate) fn shell(&self, script: &str) -> Command {
        self.program("sh".as_ref(), &["-ec", script])
    }

    /// The user of the daemons, if we are root.
    pub(crate) fn user(&self) -> u32 {
        self.user
    }

    fn program(&self, program: &std::ffi::OsStr, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir("/")
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("STATE", self.path("state"));
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.path("bin").display()));
        command.env_remove("LIBVIRT_DEFAULT_URI").env_remove("VIRTIOBLK_CONTROL").stdin(Stdio::null());
        if rustix::process::geteuid().is_root() {
            command.uid(self.user).gid(self.user);
        }
        command
    }

    /// Runs a command for all disks of the domain.
    fn of_all(&self, arguments: &[&str]) -> Output {
        self.command(&[&["--domain", "vm1"], arguments].concat()).output().expect("virtioblkctl")
    }

    fn domain(&self, arguments: &[&str]) -> Output {
        self.command(&[&["domain"], arguments].concat()).output().expect("virtioblkctl")
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.domain(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    fn fails(&self, arguments: &[&str], words: &[&str]) -> String {
        let output = self.domain(arguments);
        let said = String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{arguments:?}: {words:?}: {said}");
        said
    }

    fn spawn(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(&[&["domain"], arguments].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("virtioblkctl")
    }

    /// Starts an attach, and returns when its virsh is busy.
    fn spawn_busy_attach(&self, arguments: &[&str]) -> Child {
        self.touch("state/busy", "");
        let child = self.spawn(&[&["attach"], arguments].concat());
        until("virsh attaches", || self.path("state/attaching").exists());
        self.remove("state/attaching");
        child
    }

    fn metadata(&self, which: &str) -> String {
        fs::read_to_string(self.path(&format!("state/{which}.metadata"))).unwrap_or_default()
    }

    /// Files of the disks' daemons.
    pub(crate) fn left(&self) -> Vec<String> {
        let entries = ["run/virtioblkd", "run/virtioblkd-libvirt"].map(|name| fs::read_dir(self.path(name)));
        let names = entries.into_iter().flatten().flatten().flatten().map(|entry| entry.file_name());
        names.filter_map(|name| name.into_string().ok()).filter(|name| !name.ends_with(".log")).collect()
    }

    fn status(&self, target: &str) -> serde_json::Value {
        let control = self.path(&format!("run/virtioblkd/{UUID}-{target}.ctl")).display().to_string();
        let output = self.command(&["--json", "--control", &control, "status"]).output().expect("virtioblkctl");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    fn of_hook(&self, name: &str) -> String {
        format!("run/virtioblkd-libvirt/{UUID}-{name}")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.path("state/busy"));
        let _ = fs::remove_file(self.path("state/stubborn"));
        for target in ["vda", "vdb", "vdc"] {
            let pid = fs::read_to_string(self.path(&self.of_hook(&format!("{target}.pid")))).unwrap_or_default();
            if !pid.trim().is_empty() {
                let _ = Command::new("kill").args(["-9", pid.trim()]).status();
            }
        }
    }
}

pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn ended(child: Child) -> (bool, String) {
    let output = child.wait_with_output().expect("virtioblkctl");
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn two_attaches_of_one_target_leave_the_first_ones_disk() {
    let Some(scene) = Scene::new() else { return };
    let (a, b) = (scene.image("a.raw"), scene.image("b.raw"));
    let first = scene.spawn_busy_attach(&["vm1", "vdc", &a, "serial=A", "queues=1"]);
    let second = scene.spawn(&["attach", "vm1", "vdc", &b, "serial=B"]);
    // Whatever the second one does, it does now.
    thread::sleep(Duration::from_millis(500));
    scene.remove("state/busy");
    let (first, second) = (ended(first), ended(second));
    assert!(first.0, "{first:?}");
    assert!(!second.0 && second.1.contains("has a disk vdc already"), "{second:?}");
    assert!(scene.metadata("live").contains("a.raw"));
    assert!(scene.status("vdc")["image"].to_string().contains("a.raw"));
    assert!(!scene.left().iter().any(|name| name.ends_with(".changes")), "{:?}", scene.left());

    scene.succeeds(&["detach", "vm1", "vdc"]);
    assert_eq!(scene.left(), Vec::<String>::new());
}

#[test]
fn a_killed_attach_is_finished_by_another_with_the_same_words_and_by_no_other() {
    let Some(scene) = Scene::new() else { return };
    let (a, b) = (scene.image("a.raw"), scene.image("b.raw"));
    let mut killed = scene.spawn_busy_attach(&["vm1", "vdc", &a, "queues=1", "--config"]);
    killed.kill().expect("ours");
    killed.wait().expect("ours");
    // The virsh that it started lives on.
    let other = scene.spawn(&["attach", "vm1", "vdc", &b]);
    thread::sleep(Duration::from_millis(500));
    scene.remove("state/busy");
    let other = ended(other);
    assert!(!other.0 && other.1.contains("has a disk vdc already"), "{other:?}");
    assert_eq!((scene.metadata("live"), scene.metadata("config")), (String::new(), String::new()));
    scene.succeeds(&["attach", "vm1", "vdc", &a, "queues=1", "--config"]);
    assert!(scene.metadata("live").contains("a.raw") && scene.metadata("config").contains("a.raw"));
    scene.fails(&["attach", "vm1", "vdc", &a, "queues=1", "--config"], &["has a disk vdc already"]);

    // As if attach and its virsh were killed before libvirt had attached the disk, or as if the guest released it late.
    scene.remove("state/live/vdc");
    scene.fails(&["attach", "vm1", "vdc", &b], &["runs already", "virtioblkctl domain detach vm1 vdc"]);
    assert!(scene.status("vdc")["image"].to_string().contains("a.raw"));
    scene.succeeds(&["detach", "vm1", "vdc", "--config"]);
    assert_eq!(scene.left(), Vec::<String>::new());
    assert!(!scene.metadata("live").contains("vdc") && !scene.metadata("config").contains("vdc"));
    assert!(!scene.path("state/config/vdc").exists());
    scene.fails(&["detach", "vm1", "vdc"], &["has no vhostuser disk vdc"]);
    // One that was killed before its last step, when the daemon had ended.
    scene.touch(
        "state/config.metadata",
        "<disks xmlns='urn:virtioblkd:libvirt:1'><disk target='vdc' file='/a'/></disks>",
    );
    scene.succeeds(&["detach", "vm1", "vdc", "--config"]);
    assert!(!scene.metadata("config").contains("vdc"));
}

#[test]
fn a_domain_that_ends_meanwhile_leaves_no_daemon() {
    let Some(scene) = Scene::new() else { return };
    let image = scene.image("a.raw");
    let attach = scene.spawn_busy_attach(&["vm1", "vdc", &image, "queues=1"]);
    scene.touch("state/ended", "");
    scene.remove("state/busy");
    let attach = ended(attach);
    assert!(!attach.0 && attach.1.contains("domain is not running"), "{attach:?}");
    assert_eq!(scene.left(), Vec::<String>::new());

    scene.remove("state/ended");
    scene.succeeds(&["attach", "vm1", "vdc", &image, "queues=1"]);
    scene.touch("state/stubborn", "");
    let began = Instant::now();
    let detach = scene.spawn(&["detach", "vm1", "vdc"]);
    until("virsh detaches", || scene.path("state/detaching").exists());
    thread::sleep(Duration::from_millis(700));
    assert!(scene.status("vdc")["daemon"].is_object(), "its daemon serves on while the guest has the disk");
    scene.touch("state/ended", "");
    let detach = ended(detach);
    assert!(detach.0 && began.elapsed() < Duration::from_secs(50), "{detach:?}");
    assert_eq!(scene.left(), Vec::<String>::new());
}

/// The configuration's metadata for vda and vdb.
fn configure(scene: &Scene, vda: &str, vdb: &str) {
    let path = |name: &str| scene.path(name).display().to_string();
    let disks = format!(
        "<disk target='vda' file='{}' {vda} queues='1'/><disk target='vdb' file='{}' {vdb} queues='1'/>",
        path("a.raw"),
        path("b.raw")
    );
    scene.touch("state/config.metadata", &format!("<disks xmlns='urn:virtioblkd:libvirt:1'>{disks}</disks>"));
}

#[test]
fn apply_changes_each_disk_by_itself_and_the_metadata_of_no_other() {
    let Some(scene) = Scene::new() else { return };
    let images = [("vda", "a.raw"), ("vdb", "b.raw"), ("vdc", "c.raw")];
    for (target, name) in images {
        scene.succeeds(&["attach", "vm1", target, &scene.image(name), "cache=writeback", "queues=1"]);
    }
    // vda changes, vdb cannot, vdc is of the running domain alone, and vdd does not run.
    configure(&scene, "cache='directsync'", "cache='directsync' readonly='yes'");
    let with_more = scene.metadata("config").replace("</disks>", "<disk target='vdd' file='/d'/></disks>");
    scene.touch("state/config.metadata", &with_more);
    let said = scene.fails(&["apply", "vm1"], &["vda: has its new options\n", "vdb: failed: ", "vdd: left as it is"]);
    assert!(said.contains("vdc: left as it is"), "{said}");
    assert_eq!(
        (&scene.status("vda")["cache-mode"], &scene.status("vdb")["cache-mode"]),
        (&"directsync".into(), &"writeback".into())
    );
    let live = scene.metadata("live");
    assert_eq!(live.matches("directsync").count(), 1, "of vda alone: {live}");
    assert!(live.contains("c.raw") && !live.contains("vdd") && !live.contains("readonly"), "{live}");

    // A refused upgrade leaves no trace: another apply finds nothing to do.
    configure(&scene, "cache='directsync'", "cache='writeback'");
    let said = scene.succeeds(&["apply", "vm1"]);
    assert!(said.starts_with("vda: unchanged\nvdb: unchanged\n"), "{said}");
}

#[test]
fn an_interrupted_apply_is_carried_out_by_the_next() {
    let Some(scene) = Scene::new() else { return };
    for (target, name) in [("vda", "a.raw"), ("vdb", "b.raw")] {
        scene.succeeds(&["attach", "vm1", target, &scene.image(name), "cache=writeback", "queues=1"]);
    }
    configure(&scene, "cache='directsync'", "cache='writeback'");
    // As a kill leaves it between the new configuration file and the upgrade.
    let (file, pid) = (scene.of_hook("vda.toml"), scene.status("vda")["daemon"]["pid"].clone());
    let old = fs::read_to_string(scene.path(&file)).expect("written by attach");
    scene.touch(&scene.of_hook("vda.applying"), &format!("{pid}\n{old}"));
    scene.touch(&file, &old.replace("writeback", "directsync"));
    let said = scene.succeeds(&["apply", "vm1"]);
    assert_eq!(said, "vda: has its new options\nvdb: unchanged\n");
    assert_eq!(scene.status("vda")["cache-mode"], "directsync");
    assert!(!scene.path(&scene.of_hook("vda.applying")).exists());

    // Interrupted after the upgrade: the file has the options of a daemon that has ended.
    scene.touch(&scene.of_hook("vda.applying"), &format!("{pid}\n{old}"));
    assert_eq!(scene.succeeds(&["apply", "vm1"]), "vda: unchanged\nvdb: unchanged\n");
    assert!(!scene.path(&scene.of_hook("vda.applying")).exists());
    // Interrupted, and then the change was taken back.
    let (now, new) =
        (scene.status("vda")["daemon"]["pid"].clone(), fs::read_to_string(scene.path(&file)).expect("ours"));
    scene.touch(&scene.of_hook("vda.applying"), &format!("{now}\n{new}"));
    scene.touch(&file, &old);
    assert_eq!(scene.succeeds(&["apply", "vm1"]), "vda: unchanged\nvdb: unchanged\n");
    assert_eq!(fs::read_to_string(scene.path(&file)).expect("ours"), new, "what the daemon was started with");
}

#[test]
fn a_libvirt_of_another_host_or_user_is_refused() {
    let Some(scene) = Scene::new() else { return };
    let image = scene.image("a.raw");
    scene.touch("state/uri", "qemu+ssh://root@other/session\n");
    scene.fails(&["attach", "vm1", "vdc", &image], &["is on another host"]);
    scene.fails(&["status", "vm1"], &["is on another host"]);
    scene.touch("state/uri", "qemu:///system\n");
    for command in
        [&["attach", "vm1", "vdc", &image][..], &["apply", "vm1"], &["convert", "vm1", "vda"], &["check", "vm1"]]
    {
        scene.fails(command, &["is not this user's libvirt"]);
    }
    assert_eq!(scene.left(), Vec::<String>::new());
}

#[test]
fn words_that_are_no_attributes_are_named() {
    let Some(scene) = Scene::new() else { return };
    let image = scene.image("a.raw");
    let refused = |words: &[&str], said: &[&str]| {
        scene.fails(&[&["attach", "vm1", "vdc"], words].concat(), said);
    };
    refused(&[&image, "target=vdd"], &["target= is given twice"]);
    refused(&[&image, "file=/b"], &["file= is given twice"]);
    refused(&["fi le=/x"], &["'fi le' is no attribute's name"]);
    refused(&[&image, "rbd_option=rbd_cache"], &["give rbd_option=NAME=VALUE"]);
    refused(&[&image, "total_iops_sec=9"], &["does not limit rates yet"]);
    refused(&[&image, "cahce=none"], &["nearest known one is 'cache'"]);
    assert_eq!(scene.left(), Vec::<String>::new());
}

#[test]
fn a_disk_that_libvirt_may_attach_yet_keeps_its_daemon() {
    let Some(scene) = Scene::new() else { return };
    let image = scene.image("a.raw");
    let attach = scene.spawn_busy_attach(&["vm1", "vdc", &image, "queues=1"]);
    // libvirt carries out what a virsh that was killed had asked for.
    let virsh = fs::read_to_string(scene.path("state/virsh.pid")).expect("virsh says");
    assert!(Command::new("kill").args(["-9", virsh.trim()]).status().expect("kill runs").success());
    let (is_success, said) = ended(attach);
    assert!(!is_success && said.contains("is not known, so its daemon serves on"), "{said}");
    assert!(scene.status("vdc")["daemon"].is_object());
    scene.succeeds(&["detach", "vm1", "vdc"]);
    assert_eq!(scene.left(), Vec::<String>::new());
}

#[test]
fn an_attached_disk_may_be_copied_into_its_directories() {
    let Some(scene) = Scene::new() else { return };
    let image = scene.image("a.raw");
    let directories = ["one", "two words"].map(|name| {
        fs::create_dir(scene.path(name)).expect("room");
        scene.give(name);
        scene.path(name)
    });
    let [one, two] = directories.each_ref().map(|path| format!("copy_dir={}", path.display()));
    scene.succeeds(&["attach", "vm1", "vdc", &image, "queues=1", &one, &two]);
    assert_eq!(scene.metadata("live").matches("<copy_dir path=").count(), 2, "{}", scene.metadata("live"));
    for directory in directories {
        let to = format!("copy:{}/{{}}", directory.display());
        let copied = scene.of_all(&["snapshot", "--level", "crash", "--to", &to]);
        assert!(copied.status.success() && directory.join("a.raw").exists(), "{copied:?}");
    }
}

pub(crate) fn words(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

/// Attaches two disks, which may be copied into `copies`.
fn attach_two(scene: &Scene) {
    fs::create_dir(scene.path("copies")).expect("room");
    scene.give("copies");
    let directory = format!("copy_dir={}", scene.path("copies").display());
    for (target, name) in [("vda", "a.raw"), ("vdb", "b.raw")] {
        scene.succeeds(&["attach", "vm1", target, &scene.image(name), "cache=writeback", "queues=1", &directory]);
    }
}

#[test]
fn resize_and_copies_reach_all_disks_of_a_domain() {
    let Some(scene) = Scene::new() else { return };
    attach_two(&scene);
    for (name, size) in [("a.raw", 2 << 20), ("b.raw", 3 << 20)] {
        fs::File::options().write(true).open(scene.path(name)).and_then(|file| file.set_len(size)).expect("room");
    }
    let resized = scene.of_all(&["resize"]);
    let said = words(&resized);
    assert!(resized.status.success(), "{said}");
    assert!(said.contains("vm1:vda:\n") && said.contains("2.0 MiB") && said.contains("3.0 MiB"), "{said}");
    for arguments in [&["resize", "4M"][..], &["resize", "--force"]] {
        let refused = scene.of_all(arguments);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(words(&refused).contains("give --control with one of vm1:vda, vm1:vdb"), "{refused:?}");
    }

    // Slow enough to be there.
    let to = format!("copy:{}/{{}}", scene.path("copies").display());
    let snapshot = ["snapshot", "--level", "crash", "--background", "--bandwidth", "1K", "--to", &to];
    let taken = scene.of_all(&snapshot);
    assert!(taken.status.success(), "{taken:?}");
    let states = || {
        let all: serde_json::Value =
            serde_json::from_slice(&scene.of_all(&["--json", "copies"]).stdout).expect("JSON of all disks");
        ["vm1:vda", "vm1:vdb"].map(|name| all[name][0]["state"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(states(), ["running", "running"]);
    let name = "copy-1";
    let refused = scene.of_all(&["copies", "cancel", name]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(words(&refused).contains("as in vda=copy-1,vdb=copy-1"), "{refused:?}");
    let unknown = scene.of_all(&["copies", "limit", "copy-9", "1M"]);
    assert!(unknown.status.code() == Some(1) && words(&unknown).contains("no disk has a copy 'copy-9'"), "{unknown:?}");
    let wrong = scene.of_all(&["copies", "cancel", "vdx=copy-1"]);
    assert!(wrong.status.code() == Some(2) && words(&wrong).contains("no disk 'vdx'"), "{wrong:?}");
    let limited = scene.of_all(&["copies", "limit", "vda=copy-1,vdb=copy-1", "2K"]);
    assert!(limited.status.success(), "{limited:?}");
    let cancelled = scene.of_all(&["copies", "cancel", "vda=copy-1"]);
    assert!(cancelled.status.success(), "{cancelled:?}");
    until("one copy is cancelled", || states() == ["cancelled", "running"]);
    let both = scene.of_all(&["copies", "cancel", "vda=copy-1,vdb=copy-1"]);
    assert!(both.status.code() == Some(1) && words(&both).contains("vm1:vda: "), "{both:?}");
    until("the other copy is cancelled, too", || states() == ["cancelled", "cancelled"]);
}

#[test]
fn watch_shows_the_events_of_all_disks_of_a_domain() {
    let Some(scene) = Scene::new() else { return };
    attach_two(&scene);
    let file = scene.path("events");
    let out = fs::File::create(&file).expect("room");
    let mut watch = scene.command(&["--domain", "vm1", "--json", "watch"]);
    let mut watch = watch.stdout(out).stderr(Stdio::null()).spawn().expect("virtioblkctl");
    let events = || fs::read_to_string(&file).unwrap_or_default();
    let has = |disk: &str, name: &str| {
        let lines: Vec<serde_json::Value> =
            events().lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        lines.iter().any(|event| event["disk"] == format!("vm1:{disk}") && event["event"] == name)
    };
    until("both disks' events are shown", || {
        let resized = scene.of_all(&["quiesce", "--", "true"]);
        assert!(resized.status.success(), "{resized:?}");
        has("vda", "RESUMED") && has("vdb", "RESUMED")
    });
    // One disk's end does not end the others' events.
    scene.succeeds(&["detach", "vm1", "vda"]);
    until("the end is shown", || has("vda", "SHUTDOWN"));
    let lines = events().lines().count();
    let held = scene.of_all(&["quiesce", "--", "true"]);
    assert!(held.status.success(), "{held:?}");
    until("the other disk's events go on", || events().lines().count() >= lines + 2);
    assert!(watch.try_wait().expect("ours").is_none());
    watch.kill().and_then(|()| watch.wait()).expect("ours");

    // A reader that has ended ends it, whichever disk's event comes next.
    let mut readable = scene.command(&["--domain", "vm1", "watch"]);
    let mut readable = readable.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("virtioblkctl");
    drop(readable.stdout.take());
    until("it ends with its reader", || {
        let _ = scene.of_all(&["quiesce", "--", "true"]);
        readable.try_wait().expect("ours").is_some()
    });
}

#[test]
fn a_snapshot_asks_no_agent_of_another_host() {
    let Some(scene) = Scene::new() else { return };
    scene.succeeds(&["attach", "vm1", "vda", &scene.image("a.raw"), "queues=1"]);
    let disk = scene.path(&format!("run/virtioblkd/{UUID}-vda.ctl")).display().to_string();
    let snapshot =
        ["snapshot", "--disk", &disk, "--libvirt", "vm1", "--level", "filesystem", "--or-weaker", "--to", "exec:true"];
    let attend = ["attend", "--disk", &disk, "--libvirt", "vm1", "--level", "filesystem"];
    let run = |arguments: &[&str]| scene.command(arguments).output().expect("virtioblkctl");
    scene.touch("state/uri", "qemu+ssh://root@other/system\n");
    for arguments in [&snapshot[..], &attend] {
        let refused = run(arguments);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(words(&refused).contains("is on another host"), "{refused:?}");
    }
    // A libvirt that says nothing is no other host's: the agent's absence is what counts.
    programs::make_script(&scene.path("bin/virsh"), "#!/bin/sh\nexit 1\n");
    let weaker = run(&snapshot);
    assert!(weaker.status.success() && words(&weaker).contains("WEAKER"), "{weaker:?}");
}

#[test]
fn commands_of_virsh_have_twins_with_its_output() {
    let Some(scene) = Scene::new() else { return };
    attach_two(&scene);
    let run = |arguments: &[&str]| scene.command(arguments).output().expect("virtioblkctl");
    let said = |arguments: &[&str]| {
        let output = run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    let none = "vda rd_req 0\nvda rd_bytes 0\nvda wr_req 0\nvda wr_bytes 0\nvda errs 0\nvda flush_operations 0\n";
    assert_eq!(said(&["domblkstat", "vm1", "vda"]), none);
    assert_eq!(said(&["domblkstat", "vm1"]), none.replace("vda", ""));
    assert!(
        said(&["domblkstat", "vm1", "vda", "--human"]).starts_with("Device: vda\n number of read operations:      0\n")
    );
    let image = scene.path("a.raw").display().to_string();
    // The image has been written once, with zeroes.
    let info = said(&["domblkinfo", "vm1", &image]);
    assert!(
        info.starts_with("Capacity:       1048576\nAllocation:     ") && info.ends_with("Physical:       1048576\n"),
        "{info}"
    );
    let all = said(&["domblkinfo", "vm1", "--all", "--human"]);
    let rows: Vec<Vec<&str>> = all.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["Target", "Capacity", "Allocation", "Physical"]);
    assert_eq!((rows[2][..3].join(" "), rows[3][0]), ("vda 1.000 MiB".into(), "vdb"));
    let json: serde_json::Value = serde_json::from_str(&said(&["--json", "domblkinfo", "vm1", "vdb"])).expect("JSON");
    assert_eq!(json["vdb"]["capacity"], 1 << 20);

    // KiB, as virsh takes it.
    assert_eq!(said(&["blockresize", "vm1", "vda", "2048"]), "Block device 'vda' is resized\n");
    assert_eq!(
        (scene.status("vda")["size"].as_u64(), scene.status("vdb")["size"].as_u64()),
        (Some(2 << 20), Some(1 << 20))
    );
    fs::File::options().write(true).open(&image).and_then(|file| file.set_len(3 << 20)).expect("room");
    assert_eq!(said(&["blockresize", "vm1", &image, "--capacity"]), format!("Block device '{image}' is resized\n"));
    assert_eq!(scene.status("vda")["size"], 3 << 20);
    let smaller = run(&["blockresize", "vm1", "vda", "1M"]);
    assert_eq!(smaller.status.code(), Some(1), "{smaller:?}");
    let unknown = run(&["domblkinfo", "vm1", "sda"]);
    assert!(unknown.status.code() == Some(1) && words(&unknown).contains("for others use virsh"), "{unknown:?}");
    assert_eq!(run(&["domblkinfo", "vm1"]).status.code(), Some(2));
}
