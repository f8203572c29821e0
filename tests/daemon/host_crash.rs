//! What a crash of the host leaves where /run outlives it: files that are whole, cut or missing, sockets without a server, and
//! pid files of processes that are gone or are others now. The hook's next call recognises them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use kit::hook::DaemonsOf;
use kit::programs;
use kit::wait::wait_until;
use virtioblkd::internal::host::hook::{self, Call, Host, Launcher};
use virtioblkd::internal::host::listing::{self, Directories};
use virtioblkd::internal::host::places::Places;

const UUID: &str = "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11";

/// A host in a directory, and a domain with one disk.
pub(crate) struct World {
    pub(crate) host: Host,
    image: PathBuf,
    _daemons: DaemonsOf,
    _directory: tempfile::TempDir,
    _images: tempfile::TempDir,
}

impl World {
    pub(crate) fn new() -> World {
        let (directory, images) = (tempfile::tempdir().expect("room"), programs::disk_dir());
        let path = |name: &str| directory.path().join(name);
        let places = Places { run: path("run"), sockets: path("sockets"), log: path("log") };
        for directory in [&places.run, &places.sockets, &places.log] {
            fs::create_dir(directory).expect("room");
        }
        let image = images.path().join("a.raw");
        fs::write(&image, vec![0; 1 << 20]).expect("room");
        let launcher = Launcher { program: programs::virtioblkd(), has_systemd: false };
        let host = Host { places, launcher, qemu_group: None, daemon_user: None };
        World { host, image, _daemons: DaemonsOf(directory.path().to_owned()), _directory: directory, _images: images }
    }

    fn socket(&self) -> PathBuf {
        self.host.places.sockets.join("vm1-vda.sock")
    }

    fn xml(&self) -> String {
        format!(
            "<domain type='kvm'><name>vm1</name><uuid>{UUID}</uuid>
             <metadata><disks xmlns='urn:virtioblkd:libvirt:1'><disk target='vda' file='{}' queues='1'/></disks></metadata>
             <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
             <devices><disk type='vhostuser'><source type='unix' path='{}'/><target dev='vda'/></disk></devices></domain>",
            self.image.display(),
            self.socket().display()
        )
    }

    pub(crate) fn call(&self, operation: &str, sub_operation: &str) -> Result<(), String> {
        let [operation, sub_operation, reason] = [operation, sub_operation, "-"].map(str::to_owned);
        let call = Call { operation, sub_operation, reason };
        let mut printed = Vec::new();
        hook::run(&call, &self.host, self.xml().as_bytes(), &mut printed).inspect(|()| assert_eq!(printed, b""))
    }

    fn succeeds(&self, operation: [&str; 2], case: &str) {
        self.call(operation[0], operation[1]).unwrap_or_else(|error| panic!("{operation:?}: {case}: {error}"));
    }

    fn run(&self, kind: &str) -> PathBuf {
        self.host.places.run.join(format!("{UUID}{kind}"))
    }

    /// The names of all files but logs.
    pub(crate) fn left(&self) -> Vec<String> {
        let Places { run, sockets, .. } = &self.host.places;
        let entries = [run, sockets].into_iter().flat_map(|path| fs::read_dir(path).expect("ours"));
        entries.map(|entry| entry.expect("ours").file_name().to_string_lossy().into_owned()).collect()
    }

    /// What `list` and `domain status` say of the domain's disk.
    fn state(&self) -> &'static str {
        let Places { run, sockets, .. } = self.host.places.clone();
        let found = listing::find(&Directories { hook: Some(run), units: None, sockets: Some(sockets) });
        let found = found.expect("the directories are ours");
        listing::states(&found).first().map_or("none", |state| state.word)
    }

    /// The files of a disk whose daemon has died with the host.
    fn after_a_crash(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        self.succeeds(["prepare", "begin"], "the first start");
        let kinds = ["-vda.toml", "-vda.domain", "-vda.pid", "-vda.lock"];
        let mut files: BTreeMap<PathBuf, Vec<u8>> =
            kinds.iter().map(|kind| (self.run(kind), fs::read(self.run(kind)).expect("the daemon runs"))).collect();
        let (pid, toml) = (files[&self.run("-vda.pid")].clone(), files[&self.run("-vda.toml")].clone());
        let pid = String::from_utf8(pid).expect("a number").trim().to_owned();
        assert!(Command::new("kill").args(["-9", &pid]).status().expect("kill runs").success());
        // Interrupted: an apply, the writing of a file, an attach, a restore.
        files.insert(self.run("-vda.applying"), [pid.as_bytes(), b"\n", &toml].concat());
        files.insert(self.run("-vda.new"), toml);
        files.insert(self.run("-vda.unit"), format!("virtioblkd-hook-{UUID}-vda.service").into());
        for kind in [".changes", ".arrival", ".new"] {
            files.insert(self.run(kind), Vec::new());
        }
        wait_until("the daemon has ended", || self.state() == "stale");
        files
    }

    /// The host comes up with these files and with sockets of servers that are gone.
    fn boots_with(&self, files: &BTreeMap<PathBuf, Vec<u8>>) {
        for (path, content) in files {
            fs::write(path, content).expect("room");
        }
        for socket in [self.host.places.sockets.join(format!("{UUID}-vda.ctl")), self.socket()] {
            let _ = fs::remove_file(&socket);
            drop(UnixListener::bind(&socket).expect("room"));
            // A program that another test starts has a copy of the listener until its exec.
            wait_until("no process listens any more", || UnixStream::connect(&socket).is_err());
        }
    }
}

/// Calls `try_with` with each file missing and cut at each of some bytes, and with what was done. All bytes in a long run.
fn with_each_file_cut(
    files: &BTreeMap<PathBuf, Vec<u8>>,
    few: bool,
    mut try_with: impl FnMut(&BTreeMap<PathBuf, Vec<u8>>, &str),
) {
    let few = few && std::env::var_os("VIRTIOBLKD_LIBVIRT").is_none_or(|value| value != "long");
    for (path, whole) in files {
        let mut damaged = files.clone();
        damaged.remove(path);
        try_with(&damaged, &format!("{} is missing", path.display()));
        for length in 0..whole.len() {
            if few && ![0, whole.len() / 2].contains(&length) {
                continue;
            }
            damaged.insert(path.clone(), whole[..length].to_vec());
            try_with(&damaged, &format!("{} has {length} bytes", path.display()));
        }
    }
}

#[test]
fn the_domains_end_removes_all_that_a_crash_of_the_host_left() {
    let world = World::new();
    let files = world.after_a_crash();
    with_each_file_cut(&files, false, |damaged, case| {
        world.boots_with(damaged);
        let state = world.state();
        assert!(["stale", "not-running"].contains(&state), "{case}: {state}");
        world.succeeds(["release", "end"], case);
        assert_eq!(world.left(), Vec::<String>::new(), "{case}");
    });
}

#[test]
fn the_domains_start_succeeds_whatever_a_crash_of_the_host_left() {
    let world = World::new();
    let files = world.after_a_crash();
    with_each_file_cut(&files, true, |damaged, case| {
        world.boots_with(damaged);
        world.succeeds(["reconnect", "begin"], case);
        world.succeeds(["release", "end"], case);
        world.boots_with(damaged);
        world.succeeds(["prepare", "begin"], case);
        assert_eq!(world.state(), "idle", "{case}");
        world.succeeds(["release", "end"], case);
        assert_eq!(world.left(), Vec::<String>::new(), "{case}");
    });
}

#[test]
fn a_process_that_has_the_number_of_a_daemon_that_died_is_left_alone() {
    let world = World::new();
    let mut files = world.after_a_crash();
    let mut other = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().expect("sleep runs");
    let pid = other.id().to_string();
    files.insert(world.run("-vda.pid"), format!("{pid}\n").into());
    files.insert(world.run("-vda.applying"), format!("{pid}\nlocking = 'off'\n").into());
    world.boots_with(&files);
    world.succeeds(["release", "end"], "of the crash");
    world.boots_with(&files);
    world.succeeds(["prepare", "begin"], "of the crash");
    let text = fs::read_to_string(world.run("-vda.pid")).expect("the daemon runs");
    assert_ne!(text.trim(), pid);
    world.succeeds(["release", "end"], "of the new daemon");
    assert!(other.try_wait().expect("ours").is_none(), "the hook ended a process that is not its daemon");
    other.kill().and_then(|()| other.wait()).expect("ours");
    assert_eq!(world.left(), Vec::<String>::new());
}

#[test]
fn another_domain_and_an_operators_disk_keep_their_files() {
    let world = World::new();
    let files = world.after_a_crash();
    let others =
        ["11111111-4c0b-4e0f-8a65-1a3c0d2e9b11-vda.toml", "notes.txt"].map(|name| world.host.places.run.join(name));
    let sockets = ["db.ctl", "db.sock"].map(|name| world.host.places.sockets.join(name));
    for other in &others {
        fs::write(other, "").expect("room");
    }
    for socket in &sockets {
        drop(UnixListener::bind(socket).expect("room"));
    }
    world.boots_with(&files);
    world.succeeds(["release", "end"], "of the crash");
    assert_eq!(world.left().len(), 4, "{:?}", world.left());
    assert!(others.iter().chain(&sockets).all(|path| path.exists()));
}
