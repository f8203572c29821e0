//! What only files and block devices do: errors at open, image locks, space, failing media, read-modify-write.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kit::backend::{Driver, Loop, Prng, disk_dir, eventually, image, open, opened, options, skip};
use virtioblkd::backend::file::{FileBackend, FileOptions, Locking};
use virtioblkd::backend::{Backend, DurableWrite, Errno, IoBuf, Op, OpId};
use virtioblkd::engine::CacheMode;

const DIRECT: CacheMode = CacheMode::None;
const CACHED: CacheMode = CacheMode::Writeback;

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

/// A small tmpfs, unmounted when dropped. None, said loudly, for those who may not mount.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, mount_options: &str) -> Option<Tmpfs> {
        fs::create_dir_all(at).expect("a directory");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", mount_options, "none"]).arg(at).output();
        match mount {
            Ok(output) if output.status.success() => Some(Tmpfs(at.into())),
            Ok(output) => skip(&format!("no mount: {}", String::from_utf8_lossy(&output.stderr).trim())),
            Err(error) => skip(&format!("no mount: {error}")),
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a loop device on it lets go a moment later.
        let status = Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(thread::panicking() || status.is_ok_and(|status| status.success()), "umount failed");
    }
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
fn a_filesystem_without_o_direct_is_told_with_the_modes_that_work() {
    // procfs and sysfs know no O_DIRECT, and have regular files.
    let path = Path::new("/sys/kernel/notes");
    let read_only = FileOptions { read_only: true, locking: Locking::Off, ..options(path, DIRECT) };
    refused(&read_only, &["refuses O_DIRECT", "writeback", "writethrough", "unsafe"]);
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
fn qemu_respects_our_lock() {
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
fn we_respect_qemus_lock() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let Some(_qemu) = QemuIo::open(&path, &[]) else { return };
    let lock = format!(":{} 100 101", fs::metadata(&path).expect("the image").ino());
    eventually("qemu-io has its lock", || fs::read_to_string("/proc/locks").expect("procfs").contains(&lock));
    refused(&options(&path, DIRECT), &["another process", "write", "--locking off"]);
    refused(&FileOptions { read_only: true, ..options(&path, DIRECT) }, &["another process"]);
}

fn blocks(path: &Path) -> u64 {
    fs::metadata(path).expect("the image").blocks()
}

#[test]
fn discard_and_zeroes_with_unmap_free_blocks() {
    for mode in [DIRECT, CACHED] {
        let dir = disk_dir();
        let path = image(dir.path(), "disk.img", 4 << 20);
        let backend = open(&path, mode);
        assert!(backend.geometry().discard.is_some() && backend.geometry().zeroes_may_unmap);
        let mut driver = Driver::new(&backend, 4);
        let fill = |driver: &mut Driver| {
            driver.write(0, &[0xaa; 4 << 20]).expect("a write");
            driver.run(Op::Sync).expect("a sync");
        };
        fill(&mut driver);
        let full = blocks(&path);
        driver.run(Op::Discard { offset: 1 << 20, len: 1 << 20 }).expect("a discard");
        assert!(blocks(&path) <= full - 2048, "{mode}: a discard freed nothing");
        fill(&mut driver);
        driver.run(Op::WriteZeroes { offset: 1 << 20, len: 1 << 20, unmap: true }).expect("zeroes");
        assert!(blocks(&path) <= full - 2048, "{mode}: zeroes with unmap freed nothing");
        assert_eq!(driver.read(1 << 20, 1 << 20), Ok(vec![0; 1 << 20]));
        fill(&mut driver);
        driver.run(Op::WriteZeroes { offset: 1 << 20, len: 1 << 20, unmap: false }).expect("zeroes");
        assert!(blocks(&path) >= full, "{mode}: zeroes without unmap freed blocks");
        // Through this descriptor and any other.
        assert_eq!(driver.read(1 << 20, 1 << 20), Ok(vec![0; 1 << 20]));
        assert!(fs::read(&path).expect("the image")[1 << 20..2 << 20].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn discard_ignored_keeps_every_block() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let keeping = FileOptions { discard_unmap: false, ..options(&path, DIRECT) };
    let backend = opened(&keeping);
    assert!(backend.geometry().discard.is_none() && !backend.geometry().zeroes_may_unmap);
    let mut driver = Driver::new(&backend, 4);
    driver.write(0, &[0xaa; 1 << 20]).expect("a write");
    driver.run(Op::Sync).expect("a sync");
    let full = blocks(&path);
    driver.run(Op::WriteZeroes { offset: 0, len: 1 << 20, unmap: true }).expect("zeroes");
    assert!(blocks(&path) >= full);
    assert_eq!(driver.read(0, 1 << 20), Ok(vec![0; 1 << 20]));
}

#[test]
fn discard_on_a_device_frees_blocks_behind_it() {
    let dir = disk_dir();
    let file = image(dir.path(), "disk.img", 4 << 20);
    let Some(device) = Loop::attach(&file, 512) else { return };
    let backend = open(&device.0, DIRECT);
    let mut driver = Driver::new(&backend, 4);
    driver.write(0, &[0xaa; 4 << 20]).expect("a write");
    driver.run(Op::Sync).expect("a sync");
    let full = blocks(&file);
    // Two at once: one helper thread does them in turn.
    let ids = [1u64, 2].map(|at| driver.push(Op::Discard { offset: at << 20, len: 1 << 20 }));
    assert_eq!(ids.map(|id| driver.finish(id).result), [Ok(()); 2]);
    assert!(blocks(&file) <= full - 4096, "a discard freed nothing");
    assert_eq!(driver.read(0, 1 << 20), Ok(vec![0xaa; 1 << 20]));
}

#[test]
fn where_the_filesystem_cannot_zero_zeroes_are_written() {
    // tmpfs has no ZERO_RANGE.
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let path = image(dir.path(), "disk.img", 8 << 20);
    let backend = open(&path, CACHED);
    let mut driver = Driver::new(&backend, 4);
    driver.write(0, &[0xaa; 8 << 20]).expect("a write");
    for _ in 0..2 {
        driver.run(Op::WriteZeroes { offset: 512, len: 5 << 20, unmap: false }).expect("zeroes");
        let seen = driver.read(0, 8 << 20).expect("a read");
        assert!(seen[512..512 + (5 << 20)].iter().all(|&byte| byte == 0));
        assert_eq!((seen[511], seen[512 + (5 << 20)]), (0xaa, 0xaa));
        assert_eq!(blocks(&path), 16384);
        driver.write(0, &[0xaa; 8 << 20]).expect("a write");
    }
}

#[test]
fn a_full_filesystem_fails_exactly_the_writes_that_find_no_room() {
    let dir = disk_dir();
    let Some(tmpfs) = Tmpfs::mount(&dir.path().join("mnt"), "size=1m") else { return };
    let path = image(&tmpfs.0, "disk.img", 2 << 20);
    let backend = open(&path, CACHED);
    let mut driver = Driver::new(&backend, 8);
    driver.write(0, &[1; 4096]).expect("room");
    assert_eq!(driver.write(4096, &[1; 2 << 20][..(2 << 20) - 4096]), Err(Errno(libc::ENOSPC)));
    assert_eq!(driver.write(0, &[2; 4096]), Ok(()), "what is allocated can be written");
    assert_eq!(driver.read(0, 4096), Ok(vec![2; 4096]));
    assert_eq!(driver.run(Op::Sync), Ok(()), "nothing that was acknowledged was lost");
    driver.run(Op::Discard { offset: 65536, len: (2 << 20) - 65536 }).expect("a discard");
    assert_eq!(driver.write(65536, &[1; 65536]), Ok(()), "there is room again");
}

/// A block device over a sparse file on a filesystem that is full: reads work, writeback fails with EIO.
fn failing_device(dir: &Path) -> Option<(Tmpfs, Loop)> {
    let tmpfs = Tmpfs::mount(&dir.join("mnt"), "size=1m")?;
    let device = Loop::attach(&image(&tmpfs.0, "disk.img", 4 << 20), 512)?;
    fs::write(tmpfs.0.join("ballast"), vec![1; 2 << 20]).expect_err("a full filesystem");
    Some((tmpfs, device))
}

/// There is room again, at once: a file that is removed may still be open in a process that another test starts.
fn make_room(tmpfs: &Tmpfs) {
    fs::File::create(tmpfs.0.join("ballast")).expect("ours");
}

#[test]
fn a_failed_writeback_is_never_forgotten() {
    let dir = disk_dir();
    let Some((tmpfs, device)) = failing_device(dir.path()) else { return };
    let backend = open(&device.0, CACHED);
    let mut queues = [0; 3].map(|_| Driver::new(&backend, 4));
    assert_eq!(queues[0].run(Op::Sync), Ok(()));
    assert_eq!(queues[0].write(0, &[1; 65536]), Ok(()), "the cache takes it");
    let first = queues[1].run(Op::Sync).expect_err("writeback cannot succeed");
    // Now it could: the kernel would say so, and the data is gone.
    make_room(&tmpfs);
    let plain = fs::OpenOptions::new().write(true).open(&device.0).expect("the device");
    plain.sync_data().expect("whoever comes later sees no error");
    for queue in &mut queues {
        assert_eq!(queue.run(Op::Sync).map_err(|_| ()), Err(()));
        assert_eq!(queue.run(Op::Sync), Err(first));
    }
    let buf = IoBuf::owned(4096, 4096, 0);
    assert_eq!(queues[2].run(Op::Write { offset: 0, buf, durable: true }), Err(first));
    assert!(backend.sync().is_err());
    assert_eq!(backend.sync_failed(), Some(first));
    assert_eq!(Driver::new(&backend, 1).run(Op::Sync), Err(first), "a queue that comes later");
    drop((queues, backend, plain, device, tmpfs));
}

#[test]
fn a_failed_durable_write_is_never_forgotten_over_the_cache() {
    for (mode, latched) in [(CacheMode::Writethrough, true), (CacheMode::Directsync, false)] {
        let dir = disk_dir();
        let Some((tmpfs, device)) = failing_device(dir.path()) else { return };
        let backend = open(&device.0, mode);
        assert_eq!(backend.geometry().durable_write, DurableWrite::Native);
        let mut driver = Driver::new(&backend, 4);
        let durable = || Op::Write { offset: 0, buf: IoBuf::owned(65536, 4096, 0), durable: true };
        assert!(driver.run(durable()).is_err(), "{mode}");
        make_room(&tmpfs);
        // Past the cache the write failed and nothing else: it may be tried again.
        assert_eq!(driver.run(durable()).is_err(), latched, "{mode}");
        assert_eq!(driver.run(Op::Sync).is_err(), latched, "{mode}");
        drop((driver, backend, device, tmpfs));
    }
}

/// Tells the others to stop, also when its thread panics.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn read_modify_write_never_loses_a_neighbours_write() {
    let dir = disk_dir();
    let file = image(dir.path(), "disk.img", 1 << 20);
    let Some(device) = Loop::attach(&file, 4096) else { return };
    let options = FileOptions { logical_block_size: Some(512), ..options(&device.0, DIRECT) };
    let backend = opened(&options);
    // Two queues in two threads own the even and the odd sectors of the same 16 blocks; each sector holds a count that
    // only grows, so that a write lost shows as one that went back.
    let stop = AtomicBool::new(false);
    let counts = thread::scope(|scope| {
        let owners = [0, 1].map(|parity| {
            let (backend, stop) = (&backend, &stop);
            scope.spawn(move || {
                let mut driver = Driver::new(backend, 8);
                let mut prng = Prng::new(parity + 1);
                let mut counts = [0u8; 128];
                let _stop = StopAtEnd(stop);
                for _ in 0..1500 {
                    let sector = prng.below(64) * 2 + parity;
                    let seen = driver.read(sector * 512, 512).expect("a read");
                    assert_eq!(seen, [counts[sector as usize]; 512], "sector {sector} of thread {parity} went back");
                    let next = counts[sector as usize].wrapping_add(1);
                    counts[sector as usize] = next;
                    match prng.below(8) {
                        // Zeroes in the same block, of the kernel or written.
                        0 => {
                            driver
                                .run(Op::WriteZeroes { offset: sector * 512, len: 512, unmap: true })
                                .expect("zeroes");
                            counts[sector as usize] = 0;
                        }
                        _ => driver.write(sector * 512, &[next; 512]).expect("a write"),
                    }
                }
                counts
            })
        });
        // A third writes whole blocks behind them and must not be disturbed either.
        scope.spawn(|| {
            let mut driver = Driver::new(&backend, 8);
            let mut turn = 0u8;
            while !stop.load(Ordering::Relaxed) {
                turn = turn.wrapping_add(1);
                driver.write(65536, &[turn; 8192]).expect("a write");
                assert_eq!(driver.read(65536, 8192), Ok(vec![turn; 8192]));
            }
        });
        owners.map(|owner| owner.join().expect("an owner"))
    });
    let mut driver = Driver::new(&backend, 1);
    for sector in 0..128usize {
        let seen = driver.read(sector as u64 * 512, 512).expect("a read");
        assert_eq!(seen, [counts[sector % 2][sector]; 512], "sector {sector}");
    }
}

#[test]
fn a_queue_that_goes_leaves_no_lock_and_no_descriptor_behind() {
    let dir = disk_dir();
    let file = image(dir.path(), "disk.img", 1 << 20);
    let Some(device) = Loop::attach(&file, 4096) else { return };
    let options = FileOptions { logical_block_size: Some(512), ..options(&device.0, DIRECT) };
    let backend = opened(&options);
    let open_ones = || {
        let links =
            fs::read_dir("/proc/self/fd").expect("procfs").filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.filter(|link| *link == device.0).count()
    };
    let before = open_ones();
    for _ in 0..20 {
        let mut queue = backend.open_queue(16).expect("a queue");
        for turn in 0..15 {
            // All in one block: one runs, the others wait for it.
            let op = Op::Write { offset: turn % 8 * 512, buf: IoBuf::owned(512, 512, 0), durable: false };
            queue.push(op, OpId(turn)).expect("room");
        }
        queue.push(Op::Discard { offset: 8192, len: 65536 }, OpId(15)).expect("room");
        queue.submit().expect("submit");
        drop(queue);
        let mut next = Driver::new(&backend, 1);
        assert_eq!(next.write(0, &[7; 512]), Ok(()));
        assert_eq!(next.read(0, 512), Ok(vec![7; 512]), "an op outlived its queue");
        assert_eq!(next.write(8192, &[7; 65536]), Ok(()));
        assert_eq!(next.read(8192, 65536), Ok(vec![7; 65536]), "a discard outlived its queue");
    }
    assert_eq!(open_ones(), before);
}

#[test]
fn a_partial_block_write_fails_if_the_rest_of_its_block_cannot_be_read() {
    let dir = disk_dir();
    let file = image(dir.path(), "disk.img", 1 << 20);
    let Some(device) = Loop::attach(&file, 4096) else { return };
    let options = FileOptions { logical_block_size: Some(512), ..options(&device.0, DIRECT) };
    let backend = opened(&options);
    let mut driver = Driver::new(&backend, 4);
    driver.write(0, &[3; 1 << 20]).expect("a write");
    driver.run(Op::Sync).expect("a sync");
    // The medium behind the device ends early now: reads there fail.
    fs::OpenOptions::new().write(true).open(&file).and_then(|file| file.set_len(65536)).expect("cut");
    let result = driver.write(131072 + 512, &[4; 512]);
    let grown = fs::metadata(&file).expect("the file").len();
    match driver.read(131072, 4096) {
        // The loop driver reads zeroes past the end instead of failing: then there is nothing to show.
        Ok(_) => drop(skip::<()>("this kernel's loop device reads beyond its file")),
        Err(_) => {
            assert!(result.is_err());
            assert_eq!(grown, 65536, "something was stored");
        }
    }
}

#[test]
fn geometry_follows_the_medium_and_not_the_mode() {
    let dir = disk_dir();
    let path = image(dir.path(), "disk.img", 1 << 20);
    let geometries = CacheMode::ALL.map(|mode| open(&path, mode).geometry());
    assert!(geometries.windows(2).all(|pair| pair[0] == pair[1]), "{geometries:?}");
    assert_eq!(geometries[0].size, 1 << 20);
    assert!(geometries[0].physical_block >= geometries[0].logical_block);
    let Some(device) = Loop::attach(&path, 4096) else { return };
    let geometries = CacheMode::ALL.map(|mode| open(&device.0, mode).geometry());
    assert!(geometries.windows(2).all(|pair| pair[0] == pair[1]), "{geometries:?}");
    assert_eq!((geometries[0].logical_block, geometries[0].physical_block), (4096, 4096));
    let smaller = FileOptions { logical_block_size: Some(512), ..options(&device.0, DIRECT) };
    let backend = opened(&smaller);
    assert_eq!((backend.geometry().logical_block, backend.geometry().physical_block), (512, 4096));
    assert!(backend.describe().contains("read-modify-write"), "{}", backend.describe());
}
