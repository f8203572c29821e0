//! What only files and block devices do: errors at open, and image locks.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use kit::backend::{Driver, disk_dir, eventually, image, open, opened, options, skip};
use virtioblkd::backend::file::{FileBackend, FileOptions, Locking};
use virtioblkd::backend::{Backend, Errno, Op};

use super::tmpfs::*;

/// The message that a user gets; it must name all of `words`.
fn refused(options: &FileOptions, words: &[&str]) {
    let Err(error) = FileBackend::open(options) else { panic!("{options:?} was opened") };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "'{message}' lacks '{word}'");
    }
    let path = options.path.display().to_string();
    assert!(message.starts_with(&path), "'{message}' does not start with the thing");
}

#[test]
fn a_file_that_is_no_image_is_refused_with_a_fix() {
    let dir = disk_dir();
    refused(&options(&dir.path().join("missing"), DIRECT), &["no such file", "truncate"]);
    refused(&options(&dir.path().join("missing/disk"), DIRECT), &["no such file"]);
    refused(&options(dir.path(), DIRECT), &["a directory", "name a raw image"]);
    refused(&options(Path::new("/dev/null"), DIRECT), &["a character device", "name a raw image"]);
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
    refused(&options(&fifo, DIRECT), &["a FIFO"]);
    refused(&options(&image(dir.path(), "empty", 0), CACHED), &["empty", "truncate"]);
    refused(&options(&image(dir.path(), "odd", 1000), CACHED), &["1000 bytes", "512-byte", "truncate -s %512"]);
    let odd =
        FileOptions { logical_block_size: Some(4096), ..options(&image(dir.path(), "8.5", 4096 * 8 + 512), CACHED) };
    refused(&odd, &["33280 bytes", "4096-byte logical", "truncate -s %4096", "--logical-block-size 512"]);
    let unusual = FileOptions { logical_block_size: Some(1024), ..options(&image(dir.path(), "good", 8192), CACHED) };
    refused(&unusual, &["1024", "--logical-block-size 512 or 4096"]);
}

#[test]
fn a_file_that_cannot_be_written_is_served_read_only_alone() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).expect("chmod");
    // Root may write to it all the same: go without that capability, which is a thread's own.
    let denied = thread::spawn(move || {
        use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
        let mut sets = capabilities(None).expect("capabilities");
        sets.effective.remove(CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH);
        set_capabilities(None, sets).expect("fewer capabilities");
        refused(&options(&path, DIRECT), &["permission denied", "--read-only"]);
        let backend = opened(&FileOptions { read_only: true, ..options(&path, DIRECT) });
        let geometry = backend.geometry();
        assert!(geometry.read_only && geometry.discard.is_none() && geometry.write_zeroes.is_none());
        let mut driver = Driver::new(&backend, 4);
        assert_eq!(driver.read(0, 4096), Ok(vec![0; 4096]));
        assert_eq!(driver.write(0, &[1; 4096]), Err(Errno(libc::EROFS)));
        assert_eq!(driver.run(Op::Sync), Ok(()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).expect("chmod");
        let read_only = FileOptions { read_only: true, ..options(&path, DIRECT) };
        refused(&read_only, &["permission denied", "let the user"]);
    });
    denied.join().expect("the thread");
}

#[test]
fn a_read_only_filesystem_is_named() {
    let dir = disk_dir();
    let Some(tmpfs) = Tmpfs::mount(&dir.path().join("mnt"), "size=2m") else { return };
    let path = image(&tmpfs.0, "disk.img", 1 << 20);
    assert!(Command::new("mount").args(["-o", "remount,ro"]).arg(&tmpfs.0).status().expect("mount").success());
    refused(&options(&path, CACHED), &["read-only", "--read-only"]);
    opened(&FileOptions { read_only: true, ..options(&path, CACHED) });
}

#[test]
fn a_filesystem_without_o_direct_is_refused_naming_the_modes_that_work() {
    // procfs and sysfs know no O_DIRECT, and have regular files.
    let path = Path::new("/sys/kernel/notes");
    let read_only = FileOptions { read_only: true, locking: Locking::Off, ..options(path, DIRECT) };
    refused(&read_only, &["refuses O_DIRECT", "writeback", "writethrough", "unsafe"]);
}

/// As docs/troubleshooting.md says.
#[test]
fn tmpfs_has_o_direct_since_linux_6_6() {
    let dir = disk_dir();
    let Some(tmpfs) = Tmpfs::mount(&dir.path().join("mnt"), "size=2m") else { return };
    let direct = options(&image(&tmpfs.0, "disk.img", 1 << 20), DIRECT);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc is mounted");
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match version >= (6, 6) {
        true => drop(opened(&direct)),
        false => refused(&direct, &["refuses O_DIRECT", "writeback"]),
    }
}

#[test]
fn two_writers_refuse_each_other_and_two_readers_do_not() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let reading = FileOptions { read_only: true, ..options(&path, DIRECT) };
    let writer = open(&path, DIRECT);
    let words = ["another process", "lock", "fuser", "--locking off"];
    refused(&options(&path, CACHED), &words);
    refused(&reading, &words);
    opened(&FileOptions { locking: Locking::Off, ..options(&path, CACHED) });
    drop(writer);
    let readers = [opened(&reading), opened(&reading)];
    refused(&options(&path, CACHED), &words);
    drop(readers);
    open(&path, CACHED);
}

/// A qemu-io that holds the image open until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    fn open(path: &Path, extra: &[&str]) -> Option<QemuIo> {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(extra).arg(path);
        match command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn() {
            Ok(child) => Some(QemuIo(child)),
            Err(error) => skip(&format!("no qemu-io: {error}")),
        }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        self.0.wait().expect("qemu-io");
    }
}

/// Whether it succeeded, and what it complained of.
fn run(program: &str, args: &[&str]) -> Option<(bool, String)> {
    match Command::new(program).args(args).output() {
        Ok(output) => Some((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())),
        Err(error) => skip(&format!("no {program}: {error}")),
    }
}

#[test]
fn qemu_respects_virtioblkds_lock() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let (name, copy) = (path.to_str().expect("a name"), dir.path().join("copy"));
    let write = ["-f", "raw", "-c", "write 0 512", name];
    let resize = ["resize", "-f", "raw", name, "2M"];
    let convert = ["convert", "-f", "raw", "-O", "raw", name, copy.to_str().expect("a name")];
    // The very words that they have for an image that QEMU itself has open.
    let cases = [
        ("qemu-io", &write[..], "Failed to get \"write\" lock"),
        ("qemu-img", &resize, "Failed to get \"write\" lock"),
        ("qemu-img", &convert, "Failed to get shared \"write\" lock"),
    ];
    let writer = open(&path, DIRECT);
    for (program, args, words) in cases {
        let Some((ok, message)) = run(program, args) else { return };
        assert!(!ok && message.contains(words), "{program} {args:?}: {message}");
    }
    drop(writer);
    for (program, args, _) in cases {
        eventually("the image is free", || run(program, args).expect("it ran before").0);
    }
    let _reader = opened(&FileOptions { read_only: true, ..options(&path, DIRECT) });
    let (ok, message) = run("qemu-io", &write).expect("it ran before");
    assert!(!ok && message.contains("Failed to get"), "{message}");
    eventually("readers go together", || run("qemu-img", &convert).expect("it ran before").0);
}

#[test]
fn virtioblkd_respects_qemus_lock() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let Some(_qemu) = QemuIo::open(&path, &[]) else { return };
    let lock = format!(":{} 100 101", fs::metadata(&path).expect("the image").ino());
    eventually("qemu-io has its lock", || fs::read_to_string("/proc/locks").expect("procfs").contains(&lock));
    refused(&options(&path, DIRECT), &["another process", "write", "--locking off"]);
    refused(&FileOptions { read_only: true, ..options(&path, DIRECT) }, &["another process"]);
}
