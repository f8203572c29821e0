//! What becomes of data that is stored twice, or with a checksum, when a guest changes a buffer while its write is under
//! way. A guest runs virtioblkd inside, on what reads each buffer more than once: an md RAID1, DRBD (two resources in
//! one kernel, each the other's peer), btrfs, dm-integrity. A front-end, this very program, writes the whole disk while
//! a thread of it changes the buffers. Then the kernel compares the replicas, or checks what it reads, in every cache
//! mode. docs/stable-writes.md has the tables and says what they mean.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kit::driver::{ALL, Driver};
use kit::guest::qemu::{Qemu, Vm};
use kit::guest::server::program;
use kit::guest::{accelerator, scratch, sparse_image, tell};
use serde_json::Value;
use virtioblkd::engine::cache::CacheMode;
use vm_memory::{Bytes, VolatileMemory};

/// What the layers have below them: btrfs would not do with less.
const HOST_DISK: u64 = 256 << 20;
/// What the front-end writes, all of it once.
const DISK: usize = 16 << 20;
/// Bytes of one write, and how many are under way at once, no two of them for the same place: what differs in the end
/// comes from changed buffers alone.
const WRITE: usize = 64 << 10;
const DEPTH: usize = 8;
const WRITES: usize = DISK / WRITE;
const SECTOR: usize = 512;

/// The front-end. The guest starts it by this name.
#[test]
#[ignore = "no test by itself: the guests of the other tests run it (front_end in guest/replicas.sh)"]
fn front_end() {
    let socket = std::env::var("SOCKET").expect("SOCKET is where virtioblkd listens");
    let scribbles = std::env::var("SCRIBBLES").expect("SCRIBBLES is yes or no");
    let mut driver = Driver::connect_soon(Path::new(&socket), 1, 64, DEPTH * WRITE, ALL);
    let scribbler = (scribbles == "yes").then(|| Scribbler::start(&driver));

    let mut offsets = (0..DISK).step_by(WRITE).zip(1_u64..).peekable();
    let mut idle: Vec<usize> = (0..DEPTH).collect();
    while offsets.peek().is_some() || idle.len() < DEPTH {
        while let Some(slot) = idle.pop_if(|_| offsets.peek().is_some()) {
            let (offset, count) = offsets.next().expect("there is one more");
            if scribbler.is_none() {
                driver.fill(slot * WRITE, &count.to_ne_bytes().repeat(WRITE / 8));
            }
            driver.write(0, offset as u64, slot * WRITE, WRITE, slot as u64);
        }
        driver.kick(0);
        for (slot, result) in driver.wait(0) {
            assert_eq!(result, 0, "a write failed");
            idle.push(usize::try_from(slot).expect("one of ours"));
        }
    }
    if let Some(scribbler) = scribbler {
        scribbler.stop();
    }
}

/// A thread that changes every sector of the driver's buffers, again and again.
struct Scribbler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Scribbler {
    fn start(driver: &Driver) -> Scribbler {
        let (memory, stop) = (driver.memory(), Arc::new(AtomicBool::new(false)));
        let stop_asked = stop.clone();
        let thread = std::thread::spawn(move || {
            let memory = memory.as_volatile_slice();
            for count in 0_u64.. {
                for sector in (0..memory.len()).step_by(SECTOR) {
                    memory.store(count, sector, Ordering::Relaxed).expect("inside the memory");
                }
                if stop_asked.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        Scribbler { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the scribbler");
    }
}

/// What reads a buffer more than once. The names are those of the functions in guest/replicas.sh.
#[derive(Clone, Copy)]
enum Layer {
    Raid1,
    Drbd,
    Btrfs,
    Integrity,
}

impl Layer {
    fn name(self) -> &'static str {
        match self {
            Layer::Raid1 => "raid1",
            Layer::Drbd => "drbd",
            Layer::Btrfs => "btrfs",
            Layer::Integrity => "integrity",
        }
    }

    /// What virtioblkd serves.
    fn image(self) -> &'static str {
        match self {
            Layer::Raid1 => "/dev/md0",
            Layer::Drbd => "/dev/drbd0",
            Layer::Btrfs => "/mnt/disk.img",
            Layer::Integrity => "/dev/dm-0",
        }
    }

    /// What the kernel counts. md counts all 64 KiB of a comparison in which anything differs.
    fn unit(self) -> String {
        match self {
            Layer::Raid1 => format!("sectors that differ, of {}", DISK / SECTOR),
            Layer::Drbd => format!("KiB that differ, of {}", DISK >> 10),
            Layer::Btrfs => format!("blocks that cannot be read, of {}", DISK >> 12),
            Layer::Integrity => format!("pieces of 64 KiB that cannot be read, of {}", DISK >> 16),
        }
    }
}

/// A guest with two empty disks, and one device over both.
struct Laboratory {
    vm: Vm,
    layer: Layer,
    _disks: tempfile::TempDir,
}

impl Laboratory {
    fn new(layer: Layer) -> Laboratory {
        let job = [include_str!("serve.sh"), include_str!("replicas.sh"), kit::guest::qemu::SHELL].concat();
        let own = std::env::current_exe().expect("a running program's path");
        let programs =
            [("virtioblkd", program("virtioblkd")), ("virtioblkctl", program("virtioblkctl")), ("replicas", own)];
        let mut qemu = Qemu::new(accelerator(), 512, 2).linux_with_programs(&job, "initramfs-replicas.cpio", &programs);
        let disks = scratch();
        for name in ["vda", "vdb"] {
            let dir = disks.path().join(name);
            std::fs::create_dir(&dir).expect("room");
            qemu = qemu.own_disk(&sparse_image(&dir, HOST_DISK), CacheMode::Unsafe);
        }
        let mut vm = qemu.start_shell();
        vm.sh(&format!("make_{} {}", layer.name(), DISK >> 10));
        Laboratory { vm, layer, _disks: disks }
    }

    /// Serves the image, lets the front-end write all of it, and ends the server, which syncs. Returns what the server
    /// said of stable writes before it ended.
    fn write_all(&mut self, mode: CacheMode, stable_writes: &str, front_end: FrontEnd) -> Value {
        self.vm.sh(&format!("serve {} {mode} --stable-writes {stable_writes}", self.layer.image()));
        self.vm.sh(&format!("front_end {}", if front_end == FrontEnd::Scribbles { "yes" } else { "no" }));
        let said = self.vm.sh("virtioblkctl --control /tmp/control --json status").concat();
        let status: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        self.vm.sh("stop_serving");
        status["stable-writes"].clone()
    }

    /// What went wrong by the kernel's own account, in the layer's unit. The next comparison begins anew.
    fn compare(&mut self) -> u64 {
        self.ask(&format!("compare_{}", self.layer.name()), "differ: ")
    }

    /// Runs a command that prints a number after `name`.
    fn ask(&mut self, command: &str, name: &str) -> u64 {
        let said = self.vm.sh(command);
        let number = said.iter().find_map(|line| line.strip_prefix(name)?.parse().ok());
        number.unwrap_or_else(|| panic!("{command} said {said:?}"))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum FrontEnd {
    Behaves,
    Scribbles,
}

/// A number for each cache mode, in the order of [`CacheMode::ALL`].
struct Column {
    title: String,
    figures: [u64; 5],
}

impl Column {
    fn measure(title: impl Into<String>, figure: impl FnMut(CacheMode) -> u64) -> Column {
        Column { title: title.into(), figures: CacheMode::ALL.map(figure) }
    }
}

struct Table {
    title: String,
    columns: Vec<Column>,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}:", self.title)?;
        write!(f, "{:14}", "")?;
        self.columns.iter().try_for_each(|column| write!(f, "{:>16}", column.title))?;
        for (row, mode) in CacheMode::ALL.iter().enumerate() {
            write!(f, "\n{:14}", mode.name())?;
            self.columns.iter().try_for_each(|column| write!(f, "{:>16}", column.figures[row]))?;
        }
        writeln!(f)
    }
}

/// Whether the mode has the data copied into the host's page cache before anything below reads it.
fn copies_into_page_cache(mode: CacheMode) -> bool {
    !matches!(mode, CacheMode::None | CacheMode::Directsync)
}

/// The columns of every table: the server's `--stable-writes`, and what the front-end does.
const COLUMNS: [(&str, &str, FrontEnd); 4] = [
    ("buffers kept", "off", FrontEnd::Behaves),
    ("off", "off", FrontEnd::Scribbles),
    ("auto", "auto", FrontEnd::Scribbles),
    ("copy", "copy", FrontEnd::Scribbles),
];

/// Measures `damage` in every column, tells the table, and holds it against what is promised: damage where buffers
/// change and neither we nor the page cache copy them, and nowhere else.
fn only_off_does_damage(laboratory: &mut Laboratory, title: &str, mut damage: impl FnMut(&mut Laboratory) -> u64) {
    let columns = COLUMNS.map(|(title, stable_writes, front_end)| {
        Column::measure(title, |mode| {
            let said = laboratory.write_all(mode, stable_writes, front_end);
            let copies = stable_writes != "off" && !copies_into_page_cache(mode);
            assert_eq!(said["in-effect"] == "copy", copies, "{mode}, {stable_writes}: {said}");
            assert_eq!(said["copied-writes"] == WRITES as u64, copies, "{mode}, {stable_writes}: {said}");
            damage(laboratory)
        })
    });
    let table = Table { title: title.into(), columns: columns.into() };
    tell(&table.to_string());
    // Since Linux 6.14, and in some longterm kernels, btrfs has such a file go through the page cache.
    let harm_is_certain = !matches!(laboratory.layer, Layer::Btrfs);
    for (row, mode) in CacheMode::ALL.into_iter().enumerate() {
        for (column, (_, stable_writes, front_end)) in table.columns.iter().zip(COLUMNS) {
            let harmful = stable_writes == "off" && front_end == FrontEnd::Scribbles && !copies_into_page_cache(mode);
            let harmed = column.figures[row] > 0;
            assert!(harmed == harmful || harmful && !harm_is_certain, "{mode}, {}\n{table}", column.title);
        }
    }
}

fn layer_keeps_what_it_was_given(layer: Layer) {
    let title = format!("{}, {}", layer.image(), layer.unit());
    only_off_does_damage(&mut Laboratory::new(layer), &title, Laboratory::compare);
}

#[test]
fn both_halves_of_an_md_raid1_stay_equal() {
    layer_keeps_what_it_was_given(Layer::Raid1);
}

#[test]
fn both_replicas_of_a_drbd_stay_equal() {
    layer_keeps_what_it_was_given(Layer::Drbd);
}

#[test]
fn a_btrfs_can_read_what_it_stored() {
    layer_keeps_what_it_was_given(Layer::Btrfs);

    // Without checksums there is nothing to protect, and `auto` knows such a file.
    let mut laboratory = Laboratory::new(Layer::Btrfs);
    laboratory.vm.sh(&format!("make_image {} nodatacow", DISK >> 10));
    let said = laboratory.write_all(CacheMode::None, "auto", FrontEnd::Scribbles);
    assert_eq!((&said["in-effect"], laboratory.compare()), (&Value::from("off"), 0), "{said}");
}

#[test]
fn a_dm_integrity_can_read_what_it_stored() {
    layer_keeps_what_it_was_given(Layer::Integrity);
}

/// With data-integrity-alg DRBD sends a checksum with the data, and finds that the data has changed meanwhile. It then
/// breaks the connection and synchronizes anew.
#[test]
fn drbds_own_checksums_hold() {
    let mut laboratory = Laboratory::new(Layer::Drbd);
    laboratory.vm.sh("reconnect_drbd --data-integrity-alg=crc32c");
    let title = "/dev/drbd0, \"buffer modified by upper layers\"";
    only_off_does_damage(&mut laboratory, title, |laboratory| laboratory.ask("drbd_changed_buffers", "changed: "));
}

/// Counts what a guest does, whether it does harm below or not.
#[test]
fn detect_tells_who_changes_buffers() {
    let mut laboratory = Laboratory::new(Layer::Raid1);
    let mut column = |title: &str, front_end| {
        Column::measure(title, |mode| {
            let said = laboratory.write_all(mode, "detect", front_end);
            assert_eq!(said["checked-writes"], WRITES as u64, "{mode}: {said}");
            said["changed-writes"].as_u64().expect("a number")
        })
    };
    let columns = vec![column("buffers kept", FrontEnd::Behaves), column("buffers change", FrontEnd::Scribbles)];
    let title = format!("/dev/md0, writes that --stable-writes detect found changed, of {WRITES}");
    let table = Table { title, columns };
    tell(&table.to_string());
    assert_eq!(table.columns[0].figures, [0; 5], "nobody changed a buffer\n{table}");
    assert!(table.columns[1].figures.iter().all(|changed| *changed > 0), "{table}");
}
