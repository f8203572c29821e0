//! One instant over two disks: a writer writes i to disk A, waits until that is acknowledged, writes i to disk B, waits,
//! and so on. In no snapshot may B hold an i that A lacks, nor A be more than one ahead. The same reader, with copies
//! made without holding the disks, must find torn pairs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kit::driver::pairs::{PairWriter, USED, are_of_one_instant, newest};
use kit::snapshot::{Daemon, Mounted, ctl, err, tell, wait_until};

/// Snapshots in each mode and way.
const ROUNDS: usize = 200;
const MODES: [&str; 5] = ["none", "directsync", "writeback", "writethrough", "unsafe"];

/// Two disks and a writer on both.
struct Pair {
    /// First, so that it ends before what it writes to.
    writer: PairWriter,
    disks: [Daemon; 2],
}

impl Pair {
    fn start(dir: &Path, mode: &str) -> Pair {
        let disks = ["a", "b"].map(|name| {
            let image = dir.join(format!("{name}-{mode}"));
            fs::write(&image, vec![0; USED]).unwrap();
            Daemon::start(&image, mode)
        });
        let writer = PairWriter::start(disks.each_ref().map(Daemon::socket));
        let pair = Pair { writer, disks };
        wait_until("the writer writes", || pair.written() > 100);
        pair
    }

    fn written(&self) -> u64 {
        self.writer.written()
    }

    /// Takes a snapshot; which i are in it.
    fn snapshot(&self, to: &str, targets: &[PathBuf; 2]) -> [u64; 2] {
        let mut command = ctl();
        command.args(["snapshot", "--level", "crash", "--to", to]);
        for disk in &self.disks {
            command.arg("--disk").arg(disk.control());
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", err(&output));
        read_and_remove(targets)
    }
}

/// The largest i of each image. A block that holds two is torn in itself.
fn read_and_remove(targets: &[PathBuf; 2]) -> [u64; 2] {
    targets.each_ref().map(|target| {
        let bytes = fs::read(target).unwrap_or_else(|error| panic!("{}: {error}", target.display()));
        fs::remove_file(target).unwrap();
        assert_eq!(bytes.len(), USED);
        newest(&bytes)
    })
}

/// Takes `count` snapshots. The writer goes on between any two of them.
fn take(pair: &Pair, mode: &str, count: usize, to: &str, targets: &[PathBuf; 2]) {
    for _ in 0..count {
        let (before, [a, b]) = (pair.written(), pair.snapshot(to, targets));
        assert!(are_of_one_instant([a, b]), "{mode}, {to}: A has {a}, B has {b}");
        assert!(b >= before, "{mode}, {to}: {before} was acknowledged before the snapshot, B has {b}");
        wait_until("the writer goes on", || pair.written() > a);
    }
}

#[test]
fn no_pair_is_torn_by_exec_in_any_mode() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for mode in MODES {
        let pair = Pair::start(dir.path(), mode);
        let targets = ["a", "b"].map(|name| dir.path().join(name));
        let to = format!(
            "exec:cp \"$VIRTIOBLK_DISK_1\" {0}/a && sleep 0.01 && cp \"$VIRTIOBLK_DISK_2\" {0}/b",
            dir.path().display()
        );
        take(&pair, mode, ROUNDS, &to, &targets);
    }
}

#[test]
fn no_pair_is_torn_by_reflink_in_any_mode() {
    let Some(xfs) = Mounted::xfs() else { return };
    for mode in MODES {
        let pair = Pair::start(&xfs.path(), mode);
        let targets = ["a", "b"].map(|name| xfs.path().join(format!("snap-{name}-{mode}")));
        let to = format!("reflink:{}/snap-{{}}", xfs.path().display());
        take(&pair, mode, ROUNDS, &to, &targets);
    }
}

#[test]
fn no_pair_is_torn_by_copy_in_any_mode() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for mode in MODES {
        let pair = Pair::start(dir.path(), mode);
        let targets = ["a", "b"].map(|name| dir.path().join(format!("snap-{name}-{mode}")));
        let to = format!("copy:{}/snap-{{}}", dir.path().display());
        take(&pair, mode, ROUNDS, &to, &targets);
    }
}

#[test]
fn without_holding_the_disks_pairs_are_torn() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let pair = Pair::start(dir.path(), "writeback");
    let targets = ["a", "b"].map(|name| dir.path().join(name));
    let mut torn = 0;
    for _ in 0..40 {
        for (disk, target) in pair.disks.iter().zip(&targets) {
            assert!(Command::new("cp").arg(&disk.image).arg(target).status().unwrap().success());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let [a, b] = read_maybe_torn(&targets);
        torn += usize::from(b > a);
    }
    tell(&format!("copied without holding the disks, {torn} pairs of 40 were torn"));
    assert!(torn > 0, "the reader would not notice a torn pair");
}

/// As [`read_and_remove`], but a block may be torn: nobody held the disk.
fn read_maybe_torn(targets: &[PathBuf; 2]) -> [u64; 2] {
    targets.each_ref().map(|target| {
        let bytes = fs::read(target).unwrap();
        bytes.chunks(8).map(|eight| u64::from_le_bytes(eight.try_into().unwrap())).max().unwrap()
    })
}
