//! What the medium is like: alignment of O_DIRECT, block sizes, topology, discard limits.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags, statx};

use super::super::RangeLimits;
use crate::base::syscalls;

/// Longest range offered for discard: long enough, and no single op keeps the ring busy for ever.
const MAX_DISCARD: u64 = 1 << 30;

/// Longest range offered for write-zeroes where the filesystem does it. Shorter than a discard: if it does not, zeroes
/// are written.
const MAX_ZEROES: u64 = 64 << 20;

/// Longest range offered for write-zeroes where the kernel writes zeroes to the device.
const MAX_WRITTEN_ZEROES: u64 = 16 << 20;

/// What O_DIRECT asks for, in bytes, powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of a buffer's address.
    pub(super) memory: u32,
    /// Of offsets and lengths.
    pub(super) offset: u32,
}

/// The host's view of the medium, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct MediumLimits {
    pub(super) size: u64,
    /// The sector of the disk below: what the guest is shown unless told otherwise. Not what O_DIRECT asks of this
    /// file today: XFS asks more of a file once it was reflinked, and a guest must not see its disk's sectors change
    /// because somebody took a snapshot.
    pub(super) sector: u32,
    /// Asked by O_DIRECT, also when the image is opened without.
    pub(super) alignment: Alignment,
    /// What discard and write-zeroes of the kernel ask of offsets and lengths.
    pub(super) range_unit: u32,
    pub(super) physical_block: u32,
    pub(super) alignment_offset: u32,
    pub(super) min_io: u32,
    pub(super) opt_io: u32,
    pub(super) discard: Option<RangeLimits>,
    pub(super) write_zeroes: RangeLimits,
    pub(super) zeroes_may_unmap: bool,
    pub(super) storage: Storage,
}

/// What a transfer of a file waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    /// Nothing, unless it was swapped out.
    Memory,
    /// A device of this host, by a file system that does not wait where it is asked not to.
    Local,
    /// Another process or host (FUSE, NFS and others), or a file system that is not known: it may wait for that at any
    /// call, also where it is asked not to.
    ForeignSnapshot,
}

/// Asks the kernel about a regular file.
pub(super) fn of_file(fd: BorrowedFd<'_>) -> io::Result<MediumLimits> {
    let stat = stat(fd)?;
    let alignment = match told(&stat) {
        Some(alignment) => alignment,
        None => probe(fd)?,
    };
    // NFS and others report transfer sizes as their block; beyond a page it is no block of a medium.
    let block = stat.stx_blksize.clamp(512, 4096);
    let block = if block.is_power_of_two() { block } else { 4096 };
    Ok(MediumLimits {
        size: stat.stx_size,
        // Filesystems without one disk below (btrfs, tmpfs, NFS) always ask for the same.
        sector: u32::try_from(Sysfs::below(&stat).read("logical_block_size"))
            .ok()
            .filter(|sector| *sector != 0)
            .unwrap_or(alignment.offset),
        alignment,
        range_unit: 1,
        physical_block: block,
        alignment_offset: 0,
        min_io: block,
        opt_io: 0,
        discard: Some(RangeLimits { max_bytes: MAX_DISCARD, granularity: block }),
        write_zeroes: RangeLimits { max_bytes: MAX_ZEROES, granularity: block },
        zeroes_may_unmap: true,
        storage: storage_of(fd)?,
    })
}

/// Asks the kernel about a block device.
pub(super) fn of_device(fd: BorrowedFd<'_>) -> io::Result<MediumLimits> {
    let stat = stat(fd)?;
    let sector = rustix::fs::ioctl_blksszget(fd)?;
    // The memory alignment is known since Linux 6.1; before, a sector's was the rule.
    let alignment = told(&stat).unwrap_or(Alignment { memory: sector.max(512), offset: sector });
    let alignment = Alignment { offset: alignment.offset.max(sector), ..alignment };
    let queue = Sysfs::of(&stat);
    let most_discard = queue.read("discard_max_bytes");
    let granularity = u32::try_from(queue.read("discard_granularity")).unwrap_or(sector).max(sector);
    let native_zeroes = queue.read("write_zeroes_max_bytes") / u64::from(sector) * u64::from(sector);
    let most_zeroes = if native_zeroes == 0 { MAX_WRITTEN_ZEROES } else { native_zeroes.min(MAX_ZEROES) };
    Ok(MediumLimits {
        size: rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0))?,
        sector: alignment.offset,
        alignment,
        range_unit: sector,
        physical_block: rustix::fs::ioctl_blkpbszget(fd)?,
        alignment_offset: syscalls::alignment_offset(fd)?,
        min_io: syscalls::min_io(fd)?,
        opt_io: syscalls::opt_io(fd)?,
        discard: (most_discard > 0).then_some(RangeLimits { max_bytes: MAX_DISCARD, granularity }),
        write_zeroes: RangeLimits { max_bytes: most_zeroes, granularity: sector },
        zeroes_may_unmap: most_discard > 0 && native_zeroes > 0,
        storage: Storage::Local,
    })
}

/// By the file system of a file.
fn storage_of(fd: BorrowedFd<'_>) -> io::Result<Storage> {
    use rustix::fs::FsWord;
    // linux/magic.h; ZFS and bcachefs have theirs in their own headers.
    const TMPFS_MAGIC: FsWord = 0x0102_1994;
    const RAMFS_MAGIC: FsWord = 0x8584_58f6;
    const EXT4_SUPER_MAGIC: FsWord = 0xef53;
    const XFS_SUPER_MAGIC: FsWord = 0x5846_5342;
    const BTRFS_SUPER_MAGIC: FsWord = 0x9123_683e;
    const F2FS_SUPER_MAGIC: FsWord = 0xf2f5_2010;
    const BCACHEFS_SUPER_MAGIC: FsWord = 0xca45_1a4e;
    const ZFS_SUPER_MAGIC: FsWord = 0x2fc1_2fc1;
    Ok(match rustix::fs::fstatfs(fd)?.f_type {
        TMPFS_MAGIC | RAMFS_MAGIC => Storage::Memory,
        EXT4_SUPER_MAGIC | XFS_SUPER_MAGIC | BTRFS_SUPER_MAGIC | F2FS_SUPER_MAGIC | BCACHEFS_SUPER_MAGIC
        | ZFS_SUPER_MAGIC => Storage::Local,
        _ => Storage::ForeignSnapshot,
    })
}

/// statx(2) of an open file.
pub(super) fn stat(fd: BorrowedFd<'_>) -> io::Result<Statx> {
    Ok(statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN)?)
}

/// The alignment that statx(2) reports, since Linux 6.1 and on some filesystems.
fn told(stat: &Statx) -> Option<Alignment> {
    let known = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && stat.stx_dio_offset_align != 0;
    known.then(|| Alignment {
        memory: sane(stat.stx_dio_mem_align),
        // A read may allow less than a write asks for; the stricter one serves both.
        offset: sane(stat.stx_dio_offset_align),
    })
}

/// A power of two between 1 byte and 64 KiB.
fn sane(align: u32) -> u32 {
    if align.is_power_of_two() { align.min(64 << 10) } else { 4096 }
}

/// Finds the alignment by trying, where the kernel does not tell: the smallest read that is not refused. A hole may be
/// read with less than data asks for on some filesystems; a transfer that is refused later is bounced.
fn probe(fd: BorrowedFd<'_>) -> io::Result<Alignment> {
    const NONE: Alignment = Alignment { memory: 1, offset: 512 };
    let Ok(direct) = reopen(fd, OFlags::RDONLY | OFlags::DIRECT) else {
        // No O_DIRECT here: nothing will be asked of anybody.
        return Ok(NONE);
    };
    let mut memory = vec![0u8; 2 * 4096];
    let start = memory.as_ptr().align_offset(4096);
    for offset in [512u32, 1024, 2048, 4096] {
        match rustix::io::pread(&direct, &mut memory[start..start + offset as usize], 0) {
            Ok(_) => return Ok(Alignment { memory: offset, offset }),
            Err(rustix::io::Errno::INVAL) => {}
            // Accepted, but this block cannot be read. The guest's business, when it reads it.
            Err(rustix::io::Errno::IO) => return Ok(Alignment { memory: offset, offset }),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Alignment { memory: 4096, offset: 4096 })
}

/// A new open file description of the same file: with its own memory of writeback errors, and its own flags.
pub(super) fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    rustix::fs::open(path.as_str(), flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| io::Error::new(io::Error::from(error).kind(), format!("cannot open {path} again: {error}")))
}

/// The block layer's attributes of a device, or of the disk that it is a partition of.
struct Sysfs(Option<PathBuf>);

impl Sysfs {
    /// Of a block device.
    fn of(stat: &Statx) -> Self {
        Self::at(stat.stx_rdev_major, stat.stx_rdev_minor)
    }

    /// Of the disk that a file's filesystem is on, if it is on one.
    fn below(stat: &Statx) -> Self {
        Self::at(stat.stx_dev_major, stat.stx_dev_minor)
    }

    fn at(major: u32, minor: u32) -> Self {
        let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        Sysfs([device.join("queue"), device.join("../queue")].into_iter().find(|path| path.is_dir()))
    }

    /// 0 where the kernel has no such attribute, which means "cannot".
    fn read(&self, name: &str) -> u64 {
        let text = self.0.as_ref().and_then(|queue| fs::read_to_string(queue.join(name)).ok());
        text.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }
}
