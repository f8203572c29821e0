//! The cloud-disk story: guest A writes files the way programs do, its disk is snapshotted at each level, and guest B
//! boots with the snapshots and shows what is there. A power cut loses what nobody called fsync for; so does a snapshot
//! that is crash consistent, and nothing more; one that is filesystem consistent loses no file; one that is application
//! consistent has what a database held in its memory, too. `make demo-snapshot` shows this run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kit::guest::ext4::{self, e2fsprogs};
use kit::guest::qemu::Vm;
use kit::guest::xfs::Xfs;
use kit::guest::{Server, qemu, run, scratch, sparse_image, tell};
use serde_json::Value;
use virtioblkd::engine::cache::CacheMode;

const LEVELS: [&str; 3] = ["crash", "filesystem", "application"];

/// A file of guest A: its name, how it was written, and what guest B must find at each level.
type Row = (&'static str, &'static str, [&'static str; 3]);

const ROWS: [Row; 7] = [
    ("echo", "echo TEXT >FILE", ["lost", "there", "there"]),
    ("echo-then-fsync-of-others", "echo TEXT >FILE; another program's fsync", ["empty", "there", "there"]),
    ("python", "Python: write(), close()", ["lost", "there", "there"]),
    ("python-fsync", "Python: write(), os.fsync()", ["there", "there", "there"]),
    ("vim", "vim: new file, fsync", ["there", "there", "there"]),
    ("rename", "new file, fsync, renamed over the old one", ["old", "there", "there"]),
    ("database", "a row in a database's memory", ["lost", "lost", "there"]),
];

/// Both guests' servers get it: XFS reports a larger O_DIRECT alignment for a file as soon as it shares blocks with
/// another, and without it the disk's sectors would grow from 512 to 4096 bytes over the server's next start.
const SECTORS: [&str; 2] = ["--logical-block-size", "512"];

/// One snapshot of guest A's disk, taken.
struct Snapshot {
    way: &'static str,
    level: &'static str,
    path: PathBuf,
    receipt: Value,
    needed_recovery: bool,
}

impl Snapshot {
    /// The directory that guest A wrote for it, and the serial of its disk in guest B.
    fn name(&self) -> String {
        format!("{}-{}", self.way, self.level)
    }
}

/// For those who watch: `make demo-snapshot` asks for it.
fn narrate(text: &str) {
    if std::env::var_os("VIRTIOBLKD_NARRATE").is_some() {
        tell(text);
    }
}

#[test]
fn a_snapshot_holds_what_its_level_promises() {
    let dir = scratch();
    // Where blocks can be shared, both guests' disks live there; elsewhere any command stands in.
    let xfs = Xfs::mount(dir.path());
    let home = xfs.as_ref().map_or(dir.path(), Xfs::path).join("disks");
    std::fs::create_dir(&home).expect("room");
    let ways = ["copy", if xfs.is_some() { "reflink" } else { "exec" }];

    let snapshots = guest_a(&home, ways);
    snapshots.iter().for_each(check_filesystem);
    let found = guest_b(&snapshots);
    let table = table(&snapshots, &found);
    tell(&table);
    for (snapshot, found) in snapshots.iter().zip(&found) {
        let level = LEVELS.iter().position(|level| *level == snapshot.level).expect("one of them");
        let expected = ROWS.map(|(_, _, expected)| expected[level]);
        assert_eq!(found.as_slice(), expected, "{}\n{table}", snapshot.name());
        // A frozen filesystem has an empty journal; one cut off in the middle has not.
        assert_eq!(snapshot.needed_recovery, snapshot.level == "crash", "{}\n{table}", snapshot.name());
    }
}

/// What both guests know beside shell.sh.
fn functions() -> String {
    let hook = include_str!("../../qemu-configs/snapshot/guest/fsfreeze-hook");
    format!("HOOK=$(cat <<'END OF HOOK'\n{hook}END OF HOOK\n)\n{}", include_str!("story.sh"))
}

/// Guest A: for each way and level a fresh set of files, and a snapshot right after.
fn guest_a(home: &Path, ways: [&'static str; 2]) -> Vec<Snapshot> {
    let image = sparse_image(home, 64 << 20);
    run(e2fsprogs("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&image));
    let server = Server::start(&image, CacheMode::None, &[&["--serial", "data"], &SECTORS[..]].concat());
    narrate("guest | A boots: Debian's kernel, its guest agent, Python, an ext4 filesystem on a disk of virtioblkd's");
    let mut vm = qemu::linux_with_agent(&functions()).vhost_user_disk(&server.socket(), "").start_shell();
    vm.sh("mount_disk data /disk && start_database && start_agent");

    let mut snapshots = Vec::new();
    for way in ways {
        for level in LEVELS {
            if level == "application" {
                // Debian starts the agent without hooks: an administrator must ask for them.
                vm.sh("stop_agent && start_agent -F/etc/qemu/fsfreeze-hook");
            }
            let path = home.join(format!("{way}-{level}.img"));
            narrate("guest | A writes files: with echo, with Python, as vim does; and inserts a row into a database");
            vm.sh(&format!("work /disk/{way}-{level}"));
            let receipt = take(&server, &vm, way, level, &path);
            goes_on(&mut vm);
            snapshots.push(Snapshot { way, level, needed_recovery: false, receipt, path });
        }
        vm.sh("stop_agent && start_agent");
    }
    // It never lost power: all of its files are there.
    let files = ROWS.map(|(file, _, _)| file).join(" ");
    for snapshot in snapshots.iter().filter(|snapshot| snapshot.level == "application") {
        let said = vm.sh(&format!("show /disk/{} {files}", snapshot.name()));
        assert!(said.iter().all(|line| line.ends_with(&format!(": new in {}", snapshot.name()))), "{said:?}");
    }
    for snapshot in &mut snapshots {
        let features = run(e2fsprogs("dumpe2fs").arg("-h").arg(&snapshot.path));
        snapshot.needed_recovery = features.contains("needs_recovery");
    }
    snapshots
}

fn take(server: &Server, vm: &Vm, way: &str, level: &str, path: &Path) -> Value {
    let to = match way {
        "exec" => format!("exec:cp --sparse=always \"$VIRTIOBLK_DISK_1\" {}", path.display()),
        way => format!("{way}:{}", path.display()),
    };
    let socket = vm.agent_socket();
    let mut arguments = vec!["snapshot", "--level", level, "--to", &to, "--json"];
    if level != "crash" {
        arguments.extend(["--qga", socket.to_str().expect("a plain path")]);
    }
    let shown = arguments.join(" ").replace(&socket.display().to_string(), "qga.sock").replace(" --json", "");
    narrate(&format!(
        "host  | $ virtioblkctl --control vda.ctl {}",
        shown.replace(&path.display().to_string(), "FILE")
    ));
    let receipt: Value = serde_json::from_str(&server.ctl_ok(&arguments)).expect("a receipt");
    narrate(&format!("host  |   {level} consistent, writes held for {}", time(&receipt, "held-us")));
    assert_eq!(receipt["level"], level, "{receipt}");
    assert_eq!(receipt["filesystems-frozen"], if level == "crash" { 0 } else { 1 }, "{receipt}");
    receipt
}

/// The guest is thawed, its disk is not held, and its database takes orders.
fn goes_on(vm: &mut Vm) {
    assert!(!vm.agent().is_frozen());
    vm.sh("echo on | dd of=/disk/on conv=fsync 2>/dev/null && sync");
}

/// Replays the journal of a copy and checks the filesystem: it must be without fault, not mended.
fn check_filesystem(snapshot: &Snapshot) {
    let copy = snapshot.path.with_extension("checked");
    run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(&snapshot.path).arg(&copy));
    ext4::recover(&copy);
    std::fs::remove_file(copy).expect("ours");
}

/// Guest B, with a disk for each snapshot. For each, in their order: what became of every file of [`ROWS`].
fn guest_b(snapshots: &[Snapshot]) -> Vec<Vec<&'static str>> {
    narrate("guest | B boots with the snapshots");
    let servers = snapshots.iter().map(|snapshot| {
        Server::start(&snapshot.path, CacheMode::None, &[&["--serial", &snapshot.name()], &SECTORS[..]].concat())
    });
    let servers: Vec<Server> = servers.collect();
    let machine = servers
        .iter()
        .fold(qemu::linux_with_agent(&functions()), |machine, server| machine.vhost_user_disk(&server.socket(), ""));
    let mut vm = machine.start_shell();
    let files = ROWS.map(|(file, _, _)| file).join(" ");
    let mut found = Vec::new();
    for snapshot in snapshots {
        let name = snapshot.name();
        vm.sh(&format!("mount_disk {name} /disk"));
        let said = vm.sh(&format!("show /disk/{name} {files}"));
        assert_eq!(said.len(), ROWS.len(), "{said:?}");
        let fates = said.iter().zip(ROWS).map(|(line, (file, ..))| fate(line, file, &name));
        found.push(fates.collect());
        let log = vm.sh(&format!("umount /disk && kernel_says $(disk {name})"));
        let recovery = usize::from(snapshot.needed_recovery);
        assert_eq!(log.len(), recovery, "{name}: {log:?}");
        assert!(log.iter().all(|line| line.contains("recovery complete")), "{name}: {log:?}");
    }
    found
}

/// `lost`, `empty`, `old`, `there`; anything else would be damage.
fn fate(line: &str, file: &str, name: &str) -> &'static str {
    match line.strip_prefix(&format!("{file}: ")) {
        Some("lost") => "lost",
        Some("empty") => "empty",
        Some("old") => "old",
        Some(text) if text == format!("new in {name}") => "there",
        _ => panic!("{name}: the guest says '{line}' of the file '{file}'"),
    }
}

/// The page that a reader understands.
fn table(snapshots: &[Snapshot], found: &[Vec<&'static str>]) -> String {
    let mut page =
        "What guest B finds of guest A's files (lost: no such file; empty: a name without its content; old: what \
                    stood in it\nbefore, whole):\n\n"
            .to_owned();
    for (way, count) in snapshots.chunk_by(|a, b| a.way == b.way).map(|group| (group[0].way, group.len())) {
        let first = snapshots.iter().position(|snapshot| snapshot.way == way).expect("it is there");
        let group = &snapshots[first..first + count];
        let mut line = |title: &str, cells: Vec<String>| {
            page += &format!("{title:44}");
            page.extend(cells.iter().map(|cell| format!("  {cell:12}")));
            page.truncate(page.trim_end().len());
            page.push('\n');
        };
        line(&format!("snapshot by {way}, consistent:"), group.iter().map(|s| s.level.to_owned()).collect());
        for (row, (_, what, _)) in ROWS.iter().enumerate() {
            line(&format!("  {what}"), found[first..first + count].iter().map(|fates| fates[row].to_owned()).collect());
        }
        let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        line("  the journal had to be replayed", group.iter().map(|s| yes(s.needed_recovery)).collect());
        line("  faults that e2fsck found after that", group.iter().map(|_| "none".to_owned()).collect());
        line("  the guest's writes waited", group.iter().map(|s| time(&s.receipt, "held-us")).collect());
        line("  its filesystem was frozen", group.iter().map(|s| time(&s.receipt, "frozen-us")).collect());
        page.push('\n');
    }
    page
}

/// A figure of the receipt, in microseconds.
fn time(receipt: &Value, figure: &str) -> String {
    match receipt[figure].as_u64().expect("a receipt has it") {
        0 => "no time".to_owned(),
        time => format!("{:.1} ms", Duration::from_micros(time).as_secs_f64() * 1e3),
    }
}
