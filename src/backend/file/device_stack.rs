//! Finds out whether the storage below an image reads the buffer of an O_DIRECT write more than once.
//!
//! The kernel reports it of a block device in `queue/stable_writes` (md's parity RAID, iSCSI and NVMe/TCP with data
//! digests, krbd, zram), but not of every one that does it: md's mirrors never set it, DRBD did not for some years
//! (fixed in Linux 7.0), and a filesystem has no such attribute. So this module walks the stack of devices, from the
//! image down through partitions, md and device-mapper, and holds what is known of each kind, with the reason.

use std::fs;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{IFlags, fstatfs, fstatvfs, ioctl_getflags};

use super::super::BufferUse;
use super::geometry;

/// The most levels of devices to walk: more than any stack that was built on purpose.
const MAX_DEPTH: usize = 16;

// From linux/magic.h, and from the headers of filesystems that are not in it.
const BTRFS: u32 = 0x9123_683e;
const BCACHEFS: u32 = 0xca45_1a4e;
const ZFS: u32 = 0x2fc1_2fc1;
const NFS: u32 = 0x6969;
const CIFS: u32 = 0xff53_4d42;
const SMB2: u32 = 0xfe53_4d42;
const CEPH: u32 = 0x00c3_6400;
const FUSE: u32 = 0x6573_5546;

/// Returns how the storage below an image that is opened with O_DIRECT uses buffers. `sysfs` is where sysfs is mounted.
/// Reads attributes, no data. Where something cannot be found out, the text of the result says so.
pub(super) fn buffer_use(fd: BorrowedFd<'_>, is_device: bool, sysfs: &Path) -> BufferUse {
    let stat = match geometry::stat(fd) {
        Ok(stat) => stat,
        Err(error) => return BufferUse::ReadsOnce(format!("the storage below cannot be found out ({error})")),
    };
    if is_device {
        return device(sysfs, DeviceNumber { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor }, MAX_DEPTH);
    }
    let magic = fstatfs(fd).map_or(0, |found| found.f_type as u32);
    let nocow = || ioctl_getflags(fd).is_ok_and(|flags| flags.contains(IFlags::NOCOW));
    // The first word of a btrfs's identity; the second one contains the subvolume's number.
    let id = || fstatvfs(fd).map_or(0, |found| found.f_fsid as u32);
    let below = DeviceNumber { major: stat.stx_dev_major, minor: stat.stx_dev_minor };
    match magic {
        BTRFS if nocow() => btrfs_without_checksums(sysfs, id()),
        _ => filesystem(magic).unwrap_or_else(|| device(sysfs, below, MAX_DEPTH)),
    }
}

/// The number of a block device.
#[derive(Clone, Copy)]
struct DeviceNumber {
    major: u32,
    minor: u32,
}

fn twice(why: impl Into<String>) -> BufferUse {
    BufferUse::ReadsTwice(why.into())
}

/// Returns what is known of a filesystem on any device. `None`: it depends on the device.
fn filesystem(magic: u32) -> Option<BufferUse> {
    let text = match magic {
        // Since Linux 6.14 (and stable kernels of early 2025) btrfs copies such writes into memory of its own.
        BTRFS => "btrfs computes a checksum of each write and then stores it",
        BCACHEFS => "bcachefs writes each replica from the same buffer unless it checksums the data",
        // OpenZFS 2.3 on Linux: zfs_vdev_direct_write_verify fails such a write with EIO.
        ZFS => "ZFS computes a checksum of each write and then stores it",
        NFS => "NFS sends a write again from the same buffer, and may sign it or have several servers",
        CIFS | SMB2 => "SMB may sign a write and then send it",
        CEPH => "the Ceph messenger computes a checksum of each write and then sends it",
        FUSE => return Some(BufferUse::ReadsOnce("FUSE gives its server each write once".into())),
        _ => return None,
    };
    Some(twice(text))
}

/// Returns how a btrfs uses the buffers of a file with the attribute C (no copy on write, and so no checksums): it
/// reads them once, unless its data is mirrored, or one of its devices reads twice. `id` is the first word of the
/// btrfs's identity.
fn btrfs_without_checksums(sysfs: &Path, id: u32) -> BufferUse {
    let Some(found) = entries(&sysfs.join("fs/btrfs")).into_iter().find(|dir| btrfs_id(&name_of(dir)) == Some(id))
    else {
        return twice("sysfs does not tell whether this btrfs stores several copies of data");
    };
    let profiles: Vec<String> = entries(&found.join("allocation/data")).iter().map(|dir| name_of(dir)).collect();
    if let Some(profile) = profiles
        .iter()
        .find(|name| name.starts_with("raid1") || name.contains("raid5") || name.contains("raid6") || *name == "dup")
    {
        return twice(format!("btrfs stores data as {profile}, each copy from the same buffer"));
    }
    let disks = entries(&found.join("devices"));
    all(disks.iter().map(|disk| disk_of(sysfs, disk, MAX_DEPTH)), "a btrfs file without checksums, stored once")
}

/// Returns the first word that statfs(2) shows for a btrfs with this UUID: the UUID's first and third words, by XOR.
fn btrfs_id(uuid: &str) -> Option<u32> {
    let digits: String = uuid.chars().filter(|c| *c != '-').collect();
    let word = |at: usize| u32::from_str_radix(digits.get(at..at + 8)?, 16).ok();
    Some(word(0)? ^ word(16)?)
}

/// Returns how a block device uses buffers, by its number.
fn device(sysfs: &Path, DeviceNumber { major, minor }: DeviceNumber, depth_left: usize) -> BufferUse {
    let link = sysfs.join(format!("dev/block/{major}:{minor}"));
    match fs::canonicalize(&link) {
        Ok(dir) => disk_of(sysfs, &dir, depth_left),
        Err(_) => {
            BufferUse::ReadsOnce("no block device is below, and nothing else is known to read a buffer twice".into())
        }
    }
}

/// Returns how a device uses buffers, by its directory in sysfs: a disk, or a partition inside the directory of its
/// disk.
fn disk_of(sysfs: &Path, dir: &Path, depth_left: usize) -> BufferUse {
    let Ok(dir) = fs::canonicalize(dir) else { return BufferUse::ReadsOnce("a device that was removed".into()) };
    let disk = match dir.parent() {
        Some(parent) if dir.join("partition").exists() => parent.to_path_buf(),
        _ => dir,
    };
    let name = name_of(&disk);
    if let Some(known) = kind(&disk, &name) {
        return known;
    }
    if let Some(file) = text(&disk.join("loop/backing_file")) {
        return loop_device(sysfs, &disk, Path::new(&file), depth_left);
    }
    let flag = text(&disk.join("queue/stable_writes")).or_else(|| text(&disk.join("bdi/stable_pages_required")));
    if flag.as_deref() == Some("1") {
        return twice(format!("the host device {name} needs unchanged buffers (queue/stable_writes)"));
    }
    let slaves = entries(&disk.join("slaves"));
    if depth_left == 0 || slaves.is_empty() {
        return BufferUse::ReadsOnce(format!("the host device {name} does not need unchanged buffers"));
    }
    let why = format!("neither the host device {name} nor the devices below it need unchanged buffers");
    all(slaves.iter().map(|slave| disk_of(sysfs, slave, depth_left - 1)), &why)
}

/// Returns what is known of a kind of device, whatever the kernel reports of it.
fn kind(disk: &Path, name: &str) -> Option<BufferUse> {
    if name.starts_with("drbd") {
        return Some(twice(format!("{name} (DRBD) writes locally and sends to its peer from the same buffer")));
    }
    if name.starts_with("bcache") {
        return Some(twice(format!("{name} (bcache) may write to its cache and to its disk from the same buffer")));
    }
    if let Some(level) = text(&disk.join("md/level")).filter(|level| !["raid0", "linear"].contains(&level.as_str())) {
        return Some(twice(format!("{name} (md {level}) reads the buffer for each copy or parity")));
    }
    let uuid = text(&disk.join("dm/uuid")).unwrap_or_default();
    // dm-integrity reads twice unless it has a journal, and the kernel reports that.
    if uuid.starts_with("CRYPT-") && !uuid.starts_with("CRYPT-INTEGRITY") {
        return Some(BufferUse::Copies(format!("{name} (dm-crypt) encrypts each write into memory of its own")));
    }
    // LVM's mirrors and caches: sysfs has the names of the parts, but not the target.
    let parts = entries(&disk.join("slaves")).into_iter().filter_map(|slave| text(&slave.join("dm/name")));
    let part =
        parts.into_iter().find(|part| ["_rimage_", "_mimage_", "_corig"].iter().any(|mark| part.contains(mark)))?;
    Some(twice(format!("{name} (LVM, of {part} and others) writes the same buffer to several of its parts")))
}

/// Returns how a loop device uses buffers: with `dio` as its file does, and otherwise it copies into the page cache.
fn loop_device(sysfs: &Path, disk: &Path, file: &Path, depth_left: usize) -> BufferUse {
    let name = name_of(disk);
    if text(&disk.join("loop/dio")).as_deref() != Some("1") {
        return BufferUse::Copies(format!("{name} (a loop device) copies each write into the host's page cache"));
    }
    let magic = rustix::fs::statfs(file).map_or(0, |found| found.f_type as u32);
    let (Ok(found), 1..) = (rustix::fs::stat(file), depth_left) else {
        return BufferUse::ReadsOnce(format!("{name} is a loop device, and {} cannot be examined", file.display()));
    };
    let below = DeviceNumber { major: rustix::fs::major(found.st_dev), minor: rustix::fs::minor(found.st_dev) };
    filesystem(magic).unwrap_or_else(|| device(sysfs, below, depth_left - 1))
}

/// Returns how several devices side by side use buffers: as the worst of them.
fn all(parts: impl Iterator<Item = BufferUse>, otherwise: &str) -> BufferUse {
    let mut copies = None;
    let mut only_copies = true;
    for part in parts {
        match part {
            BufferUse::ReadsTwice(_) => return part,
            BufferUse::Copies(_) => copies = Some(part),
            BufferUse::ReadsOnce(_) => only_copies = false,
        }
    }
    copies.filter(|_| only_copies).unwrap_or_else(|| BufferUse::ReadsOnce(otherwise.into()))
}

fn name_of(dir: &Path) -> String {
    dir.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned())
}

/// Reads an attribute. Returns `None` when it does not exist or is empty.
fn text(attribute: &Path) -> Option<String> {
    fs::read_to_string(attribute).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Returns the entries of a directory, in the order of their names.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs of our own: devices in `devices/NAME`, found by number in `dev/block`.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            Tree(tempfile::tempdir().unwrap())
        }

        fn put(&self, path: &str, text: &str) -> &Self {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        /// Gives `path` below `devices` the number 1:`minor`.
        fn number(&self, minor: u32, path: &str) -> &Self {
            let dir = self.0.path().join("dev/block");
            fs::create_dir_all(&dir).unwrap();
            symlink(self.0.path().join("devices").join(path), dir.join(format!("1:{minor}"))).unwrap();
            self
        }

        fn slave(&self, of: &str, slave: &str) -> &Self {
            let dir = self.0.path().join("devices").join(of).join("slaves");
            fs::create_dir_all(&dir).unwrap();
            symlink(self.0.path().join("devices").join(slave), dir.join(Path::new(slave).file_name().unwrap()))
                .unwrap();
            self
        }

        /// Adds a disk that asks for stable buffers or does not.
        fn disk(&self, name: &str, asks: bool) -> &Self {
            self.put(&format!("devices/{name}/queue/stable_writes"), if asks { "1\n" } else { "0\n" })
        }

        fn buffer_use(&self, minor: u32) -> BufferUse {
            device(self.0.path(), DeviceNumber { major: 1, minor }, MAX_DEPTH)
        }
    }

    fn word(used: &BufferUse) -> &'static str {
        match used {
            BufferUse::Copies(_) => "copies",
            BufferUse::ReadsTwice(_) => "twice",
            BufferUse::ReadsOnce(_) => "once",
        }
    }

    #[track_caller]
    fn check(used: &BufferUse, expected: &str, names: &str) {
        let (BufferUse::Copies(why) | BufferUse::ReadsTwice(why) | BufferUse::ReadsOnce(why)) = used;
        assert!(word(used) == expected && why.contains(names), "{used:?} is not {expected} because of {names}");
    }

    #[test]
    fn a_disk_has_its_attribute_and_a_partition_that_of_its_disk() {
        let tree = Tree::new();
        tree.disk("sda", false).number(0, "sda").put("devices/sda/sda1/partition", "1\n").number(1, "sda/sda1");
        tree.disk("nvme0n1", true).put("devices/nvme0n1/nvme0n1p2/partition", "2\n").number(2, "nvme0n1/nvme0n1p2");
        tree.put("devices/old/bdi/stable_pages_required", "1\n").number(3, "old");
        check(&tree.buffer_use(0), "once", "sda");
        check(&tree.buffer_use(1), "once", "sda");
        check(&tree.buffer_use(2), "twice", "the host device nvme0n1 needs");
        check(&tree.buffer_use(3), "twice", "old needs");
        check(&tree.buffer_use(9), "once", "no block device");
    }

    #[test]
    fn mirrors_and_parity_are_known_without_the_attribute() {
        let tree = Tree::new();
        tree.disk("sda", false).disk("sdb", false);
        for (minor, (level, expected)) in [
            ("raid1", "twice"),
            ("raid10", "twice"),
            ("raid5", "twice"),
            ("raid6", "twice"),
            ("raid0", "once"),
            ("linear", "once"),
        ]
        .into_iter()
        .enumerate()
        {
            let name = format!("md{minor}");
            tree.disk(&name, false).put(&format!("devices/{name}/md/level"), &format!("{level}\n"));
            tree.slave(&name, "sda").slave(&name, "sdb").number(minor as u32, &name);
            check(&tree.buffer_use(minor as u32), expected, &name);
        }
        // Newer DRBD asks again; all of them read twice.
        tree.disk("drbd0", false).number(20, "drbd0").disk("bcache0", false).number(21, "bcache0");
        check(&tree.buffer_use(20), "twice", "DRBD");
        check(&tree.buffer_use(21), "twice", "bcache");
    }

    #[test]
    fn device_mapper_is_as_the_worst_device_below_it() {
        let tree = Tree::new();
        tree.disk("sda", false).disk("drbd0", false).put("devices/drbd0/drbd0p1/partition", "1\n");
        // A volume in a volume group on a disk and a partition of a DRBD device.
        tree.disk("dm-0", false).slave("dm-0", "sda").slave("dm-0", "drbd0/drbd0p1").number(0, "dm-0");
        tree.disk("dm-1", false).slave("dm-1", "sda").number(1, "dm-1");
        check(&tree.buffer_use(0), "twice", "drbd0");
        check(&tree.buffer_use(1), "once", "neither the host device dm-1");
        // dm-crypt in front of DRBD: what DRBD reads twice is dm-crypt's.
        tree.disk("dm-2", true).slave("dm-2", "drbd0").put("devices/dm-2/dm/uuid", "CRYPT-LUKS2-12ab-name\n");
        check(&tree.number(2, "dm-2").buffer_use(2), "copies", "dm-crypt");
        // Both halves encrypted: the mirror reads twice all the same, the stripe gets copies only.
        tree.disk("dm-3", false).slave("dm-3", "dm-2").number(3, "dm-3");
        check(&tree.buffer_use(3), "copies", "dm-crypt");
        tree.slave("dm-3", "sda");
        check(&tree.buffer_use(3), "once", "neither the host device dm-3");
        tree.disk("md0", false).put("devices/md0/md/level", "raid1").slave("md0", "dm-2").number(4, "md0");
        check(&tree.buffer_use(4), "twice", "md raid1");
        tree.disk("dm-5", true).put("devices/dm-5/dm/uuid", "CRYPT-INTEGRITY-name").number(5, "dm-5");
        check(&tree.buffer_use(5), "twice", "dm-5");
        tree.disk("dm-6", false).put("devices/dm-6/dm/uuid", "CRYPT-INTEGRITY-name").number(6, "dm-6");
        check(&tree.buffer_use(6), "once", "dm-6");
    }

    #[test]
    fn lvm_mirrors_and_caches_are_known_by_their_parts() {
        let tree = Tree::new();
        for (minor, part) in ["vg-root_rimage_0", "vg-root_mimage_1", "vg-root_corig"].into_iter().enumerate() {
            let (top, low) = (format!("dm-{}", 2 * minor), format!("dm-{}", 2 * minor + 1));
            tree.disk(&top, false).disk(&low, false).put(&format!("devices/{low}/dm/name"), &format!("{part}\n"));
            tree.slave(&top, &low).number(minor as u32, &top);
            check(&tree.buffer_use(minor as u32), "twice", part);
        }
        tree.disk("dm-8", false).disk("dm-9", false).put("devices/dm-9/dm/name", "vg-pool_tdata\n");
        check(&tree.slave("dm-8", "dm-9").number(8, "dm-8").buffer_use(8), "once", "dm-8");
    }

    #[test]
    fn a_loop_device_copies_or_is_as_its_file() {
        let tree = Tree::new();
        let file = tempfile::NamedTempFile::new().unwrap();
        let found = rustix::fs::stat(file.path()).unwrap();
        let (major, minor) = (rustix::fs::major(found.st_dev), rustix::fs::minor(found.st_dev));
        tree.disk("loop0", false).number(0, "loop0").disk("drbd0", false);
        tree.put("devices/loop0/loop/backing_file", &format!("{}\n", file.path().display()));
        check(&tree.put("devices/loop0/loop/dio", "0\n").buffer_use(0), "copies", "loop0");
        let link = tree.0.path().join(format!("dev/block/{major}:{minor}"));
        symlink(tree.0.path().join("devices/drbd0"), link).unwrap();
        check(&tree.put("devices/loop0/loop/dio", "1\n").buffer_use(0), "twice", "drbd0");
        tree.put("devices/loop0/loop/backing_file", "/gone (deleted)\n");
        check(&tree.buffer_use(0), "once", "/gone (deleted) cannot");
    }

    #[test]
    fn a_device_stack_with_a_cycle_terminates() {
        let tree = Tree::new();
        tree.disk("dm-0", false).disk("dm-1", false).slave("dm-0", "dm-1").slave("dm-1", "dm-0").number(0, "dm-0");
        check(&tree.buffer_use(0), "once", "dm-0");
    }

    #[test]
    fn file_systems_that_read_twice_are_known() {
        for magic in [BTRFS, BCACHEFS, ZFS, NFS, CIFS, SMB2, CEPH] {
            assert_eq!(filesystem(magic).as_ref().map(word), Some("twice"), "{magic:x}");
        }
        assert_eq!(filesystem(FUSE).as_ref().map(word), Some("once"));
        // ext4, XFS, tmpfs.
        assert_eq!([0xef53, 0x5846_5342, 0x0102_1994].map(filesystem), [None, None, None]);
    }

    #[test]
    fn a_btrfs_file_without_checksums_counts_its_copies_and_its_devices() {
        let tree = Tree::new();
        let uuid = "01234567-89ab-cdef-1122-334455667788";
        let id = 0x0123_4567 ^ 0x1122_3344;
        let btrfs = |id| btrfs_without_checksums(tree.0.path(), id);
        check(&btrfs(id), "twice", "does not tell");
        tree.put(&format!("fs/btrfs/{uuid}/allocation/data/single/total_bytes"), "1\n");
        tree.put("fs/btrfs/features/raid1c34", "1\n").disk("sda", false).disk("drbd1", false);
        let devices = tree.0.path().join("fs/btrfs").join(uuid).join("devices");
        fs::create_dir_all(&devices).unwrap();
        symlink(tree.0.path().join("devices/sda"), devices.join("sda")).unwrap();
        check(&btrfs(id), "once", "stored once");
        check(&btrfs(id ^ 1), "twice", "does not tell");
        symlink(tree.0.path().join("devices/drbd1"), devices.join("drbd1")).unwrap();
        check(&btrfs(id), "twice", "drbd1");
        tree.put(&format!("fs/btrfs/{uuid}/allocation/data/raid1/total_bytes"), "1\n");
        check(&btrfs(id), "twice", "raid1");
    }
}
