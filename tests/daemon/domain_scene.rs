//! A libvirt domain in files, with a virsh of the test's own.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use kit::hook::DaemonsOf;
use kit::programs;

pub(crate) const UUID: &str = "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11";
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
    define) cp "$file" $STATE/defined ;;
    metadata)
        echo "$element" | sed "s/^<disks/<disks xmlns='urn:virtioblkd:libvirt:1'/" > $STATE/$which.metadata ;;
esac
"#;

/// A running domain in files, and our own XDG_RUNTIME_DIR. virtioblkctl and its daemons run as another user if we are root,
/// because root's disks are the host's.
pub(crate) struct Scene {
    /// Whatever a test that fails leaves: daemons of all its machines, QEMUs, other daemons of its images.
    _daemons: [DaemonsOf; 2],
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
        let (home, run) = (programs::disk_dir(), tempfile::tempdir().expect("room"));
        let _daemons = [home.path(), run.path()].map(|path| DaemonsOf(path.to_owned()));
        let scene = Scene { _daemons, home, run, user };
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

    pub(crate) fn remove(&self, name: &str) {
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
    pub(crate) fn of_all(&self, arguments: &[&str]) -> Output {
        self.command(&[&["--domain", "vm1"], arguments].concat()).output().expect("virtioblkctl")
    }

    pub(crate) fn domain(&self, arguments: &[&str]) -> Output {
        self.command(&[&["domain"], arguments].concat()).output().expect("virtioblkctl")
    }

    pub(crate) fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.domain(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    pub(crate) fn fails(&self, arguments: &[&str], words: &[&str]) -> String {
        let output = self.domain(arguments);
        let said = String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{arguments:?}: {words:?}: {said}");
        said
    }

    pub(crate) fn spawn(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(&[&["domain"], arguments].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("virtioblkctl")
    }

    /// Starts an attach, and returns when its virsh is busy.
    pub(crate) fn spawn_busy_attach(&self, arguments: &[&str]) -> Child {
        self.touch("state/busy", "");
        let child = self.spawn(&[&["attach"], arguments].concat());
        until("virsh attaches", || self.path("state/attaching").exists());
        self.remove("state/attaching");
        child
    }

    pub(crate) fn metadata(&self, which: &str) -> String {
        fs::read_to_string(self.path(&format!("state/{which}.metadata"))).unwrap_or_default()
    }

    /// Files of the disks' daemons.
    pub(crate) fn left(&self) -> Vec<String> {
        let entries = ["run/virtioblkd", "run/virtioblkd-libvirt"].map(|name| fs::read_dir(self.path(name)));
        let names = entries.into_iter().flatten().flatten().flatten().map(|entry| entry.file_name());
        names.filter_map(|name| name.into_string().ok()).filter(|name| !name.ends_with(".log")).collect()
    }

    pub(crate) fn status(&self, target: &str) -> serde_json::Value {
        let control = self.path(&format!("run/virtioblkd/{UUID}-{target}.ctl")).display().to_string();
        let output = self.command(&["--json", "--control", &control, "status"]).output().expect("virtioblkctl");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    pub(crate) fn of_hook(&self, name: &str) -> String {
        format!("run/virtioblkd-libvirt/{UUID}-{name}")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.path("state/busy"));
        let _ = fs::remove_file(self.path("state/stubborn"));
    }
}

pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn ended(child: Child) -> (bool, String) {
    let output = child.wait_with_output().expect("virtioblkctl");
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

pub(crate) fn words(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}
