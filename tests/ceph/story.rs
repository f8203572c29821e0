//! The story of a cloud's disks: a guest writes a file and syncs nothing, somebody takes a snapshot from outside with
//! Ceph's own command, and the file is in it, because the guest was frozen first. A real guest with its agent, disks of
//! a real cluster, each with its own server, and one `virtioblkctl attend` for all of them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use kit::ceph::{Cluster, Image, POOL, serve};
use kit::guest::ext4::{e2fsprogs, read_file, recover};
use kit::guest::qemu::Vm;
use kit::guest::server::program;
use kit::guest::{Server, mortal, qemu, run, scratch, wait_until};
use serde_json::Value;

/// Writes to every disk and waits until it is durable, without end: a freeze that came after a disk is held would wait
/// for that for ever.
const BUSY: &str = "for d in alone data log; do ( while :; do dd if=/dev/zero of=/$d/busy bs=4k count=4 conv=fsync \
                    2>/dev/null; done ) & done";

/// An image with an empty ext4 filesystem.
fn formatted<'a>(cluster: &'a Cluster, dir: &Path, name: &str) -> Image<'a> {
    let file = dir.join(name);
    fs::File::create(&file).and_then(|file| file.set_len(64 << 20)).expect("a sparse file");
    run(e2fsprogs("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&file));
    let image = Image { cluster, spec: format!("{POOL}/{name}") };
    cluster.rbd(&["import", "--no-progress", file.to_str().expect("a plain path"), &image.spec]);
    image
}

/// `virtioblkctl attend`, killed when dropped.
struct Attendant {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Attendant {
    fn start(servers: &[Server], vm: &Vm) -> Attendant {
        let mut command = mortal(program("virtioblkctl"));
        command.args(["--json", "attend", "--level", "filesystem", "--qga"]).arg(vm.agent_socket());
        // A freeze of a guest that writes to three disks, on a machine that does other things.
        command.args(["--freeze-timeout", "9s"]);
        command.args(servers.iter().flat_map(|server| ["--disk".into(), server.control()]));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("virtioblkctl");
        let lines = BufReader::new(child.stdout.take().expect("piped"));
        wait_until("the disks are attended", || {
            servers.iter().all(|server| server.status()["attendant"]["present"] == true)
        });
        Attendant { child, lines }
    }

    /// What it says of the freeze that ended.
    fn receipt(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        // Both fail only if it is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A snapshot as a file of ours.
struct Taken {
    path: PathBuf,
    was_frozen: bool,
}

impl Taken {
    fn new(dir: &Path, name: &str, bytes: &[u8]) -> Taken {
        let path = dir.join(name);
        fs::write(&path, bytes).expect("space for a copy");
        // A frozen filesystem has an empty journal; one cut off in the middle has not.
        let was_frozen = !run(e2fsprogs("dumpe2fs").arg("-h").arg(&path)).contains("needs_recovery");
        recover(&path);
        Taken { path, was_frozen }
    }

    fn has(&self, file: &str, text: &str) -> bool {
        read_file(&self.path, file).is_some_and(|bytes| bytes == format!("{text}\n").as_bytes())
    }
}

#[test]
fn what_a_guest_wrote_and_never_synced_is_in_a_snapshot_that_others_take() {
    let cluster = Cluster::shared();
    let dir = scratch();
    // One that its server locks, and two in a group, which it does not.
    let images = ["alone", "data", "log"].map(|name| formatted(cluster, dir.path(), name));
    let group = format!("{POOL}/guest");
    cluster.rbd(&["group", "create", &group]);
    for image in &images[1..] {
        cluster.rbd(&["group", "image", "add", &group, &image.spec]);
    }
    let servers = [(0, "writeback"), (1, "none"), (2, "writeback")]
        .map(|(at, mode)| serve(&images[at], mode, &["--serial", images[at].name()]));
    let machine = qemu::linux_with_agent("");
    let machine = servers.iter().fold(machine, |machine, server| machine.vhost_user_disk(&server.socket(), ""));
    let mut vm = machine.start_shell();
    vm.sh("mount_disk alone /alone && mount_disk data /data && mount_disk log /log && start_agent");

    vm.sh("echo hello >/alone/f");
    let taken = images[0].take_snapshot("crash", &[]);
    assert!(taken.status.success(), "{taken:?}");
    let crash = Taken::new(dir.path(), "crash", &images[0].snapshot("crash"));
    assert!(!crash.was_frozen && !crash.has("f", "hello"), "nobody attended: this shows that the rest is no accident");

    let mut attendant = Attendant::start(&servers, &vm);
    let taken = images[0].take_snapshot("frozen", &[]);
    assert!(taken.status.success(), "{taken:?}");
    assert_eq!(attendant.receipt()["level"], "filesystem");
    let frozen = Taken::new(dir.path(), "frozen", &images[0].snapshot("frozen"));
    assert!(frozen.was_frozen && frozen.has("f", "hello"));

    vm.sh(BUSY);
    for round in 0..2 {
        // A snapshot of both disks, by their group.
        let text = format!("round {round}");
        vm.sh(&format!("echo {text} >/data/f && echo {text} >/log/f"));
        let name = format!("group-{round}");
        cluster.rbd(&["group", "snap", "create", &format!("{group}@{name}")]);
        let receipt = attendant.receipt();
        assert_eq!((&receipt["level"], receipt["filesystems-frozen"].as_u64()), (&"filesystem".into(), Some(3)));
        for image in &images[1..] {
            let taken = Taken::new(dir.path(), &name, &image.snapshot_of_group(&name));
            assert!(taken.was_frozen && taken.has("f", &text), "{}: {text}", image.spec);
        }
    }
    // Of all three, each by a command of its own, at the same time: they share freezes, or follow one another.
    for round in 0..2 {
        let (text, name) = (format!("again {round}"), format!("single-{round}"));
        vm.sh(&format!("for d in alone data log; do echo {text} >/$d/f || exit; done"));
        let commands = images.each_ref().map(|image| {
            let mut command: Command = cluster.rbd_command(&["snap", "create", "--no-progress", &image.at(&name)]);
            command.spawn().expect("rbd")
        });
        for mut command in commands {
            assert!(command.wait().expect("our own child").success(), "{name}");
        }
        for image in &images {
            let taken = Taken::new(dir.path(), &name, &image.snapshot(&name));
            assert!(taken.was_frozen && taken.has("f", &text), "{}: {text}", image.spec);
        }
        wait_until("every disk goes on", || servers.iter().all(|it| it.status()["quiesce"]["closed-ms"].is_null()));
    }
    wait_until("the guest is thawed", || !vm.agent().is_frozen());
    vm.sh("for d in alone data log; do echo on | dd of=/$d/on conv=fsync 2>/dev/null || exit; done");
}
