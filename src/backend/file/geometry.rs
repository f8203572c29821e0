//! The limits of the medium: alignment of O_DIRECT, block sizes, topology, discard limits.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags, statx};

use super::super::RangeLimits;
use crate::base::syscalls;

/// Longest range offered for a discard, in bytes, so that no single op takes very long.
const MAX_DISCARD: u64 = 1 << 30;

/// Longest range offered for a write-zeroes where the filesystem zeroes ranges. It is shorter than a discard, because
/// zeroes are written if the filesystem turns out not to.
const MAX_ZEROES: u64 = 64 << 20;

/// Longest range offered for a write-zeroes where the kernel writes the zeroes to the device.
const MAX_WRITTEN_ZEROES: u64 = 16 << 20;

/// The alignment that O_DIRECT requires, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// The alignment of a buffer's address.
    pub(super) memory: u32,
    /// The alignment of offsets and lengths.
    pub(super) offset: u32,
}

/// The medium as the host sees it. All sizes are in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct MediumLimits {
    pub(super) size: u64,
    /// The sector of the disk below, which the guest sees unless it is configured otherwise. This is not the alignment
    /// that O_DIRECT requires of the file today: XFS requires more once a file was reflinked, and the sectors of the
    /// guest's disk must not change because an operator took a snapshot.
    pub(super) sector: u32,
    /// What O_DIRECT requires, also when the image is opened without it.
    pub(super) alignment: Alignment,
    /// The alignment of offsets and lengths that the kernel's discard and write-zeroes require.
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

/// What a transfer of the image waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    /// Nothing, unless the memory was swapped out.
    Memory,
    /// A device of this host, by a filesystem that honours a request not to wait.
    Local,
    /// Another process or host (FUSE, NFS and others), or an unknown filesystem. Any call may wait for it, even one
    /// that asks not to wait.
    Remote,
}

/// Asks the kernel for the limits of a regular file.
pub(super) fn file_limits(fd: BorrowedFd<'_>) -> io::Result<MediumLimits> {
    let stat = stat(fd)?;
    let alignment = match reported_alignment(&stat) {
        Some(alignment) => alignment,
        None => probe(fd)?,
    };
    // NFS and others report their transfer size here: above a page it is no block of a medium.
    let block = stat.stx_blksize.clamp(512, 4096);
    let block = if block.is_power_of_two() { block } else { 4096 };
    Ok(MediumLimits {
        size: stat.stx_size,
        // Filesystems without a single disk below (btrfs, tmpfs, NFS) always require the same.
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

/// Asks the kernel for the limits of a block device.
pub(super) fn device_limits(fd: BorrowedFd<'_>) -> io::Result<MediumLimits> {
    let stat = stat(fd)?;
    let sector = rustix::fs::ioctl_blksszget(fd)?;
    // Linux reports the memory alignment since 6.1; before that it was a sector.
    let alignment = reported_alignment(&stat).unwrap_or(Alignment { memory: sector.max(512), offset: sector });
    let alignment = Alignment { offset: alignment.offset.max(sector), ..alignment };
    let queue = Sysfs::of(&stat);
    let max_discard = queue.read("discard_max_bytes");
    let granularity = u32::try_from(queue.read("discard_granularity")).unwrap_or(sector).max(sector);
    let native_zeroes = queue.read("write_zeroes_max_bytes") / u64::from(sector) * u64::from(sector);
    let max_zeroes = if native_zeroes == 0 { MAX_WRITTEN_ZEROES } else { native_zeroes.min(MAX_ZEROES) };
    Ok(MediumLimits {
        size: rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0))?,
        sector: alignment.offset,
        alignment,
        range_unit: sector,
        physical_block: rustix::fs::ioctl_blkpbszget(fd)?,
        alignment_offset: syscalls::alignment_offset(fd)?,
        min_io: syscalls::min_io(fd)?,
        opt_io: syscalls::opt_io(fd)?,
        discard: (max_discard > 0).then_some(RangeLimits { max_bytes: MAX_DISCARD, granularity }),
        write_zeroes: RangeLimits { max_bytes: max_zeroes, granularity: sector },
        zeroes_may_unmap: max_discard > 0 && native_zeroes > 0,
        storage: Storage::Local,
    })
}

/// Returns what a file waits for, by its filesystem.
fn storage_of(fd: BorrowedFd<'_>) -> io::Result<Storage> {
    use rustix::fs::FsWord;
    // From linux/magic.h, and the headers of ZFS and bcachefs.
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
        _ => Storage::Remote,
    })
}

/// statx(2) of an open file.
pub(super) fn stat(fd: BorrowedFd<'_>) -> io::Result<Statx> {
    Ok(statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN)?)
}

/// Returns the alignment that statx(2) reports, which it does since Linux 6.1 and on some filesystems.
fn reported_alignment(stat: &Statx) -> Option<Alignment> {
    let known = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && stat.stx_dio_offset_align != 0;
    known.then(|| Alignment {
        memory: bounded_alignment(stat.stx_dio_mem_align),
        // A read may require less than a write; this one suffices for both.
        offset: bounded_alignment(stat.stx_dio_offset_align),
    })
}

/// Returns a reported alignment as a power of two of 64 KiB at most.
fn bounded_alignment(align: u32) -> u32 {
    if align.is_power_of_two() { align.min(64 << 10) } else { 4096 }
}

/// Finds the alignment by trial where the kernel does not report it: the smallest read that is not refused. On some
/// filesystems a hole can be read with less alignment than data; a transfer that is refused later is bounced.
fn probe(fd: BorrowedFd<'_>) -> io::Result<Alignment> {
    const NONE: Alignment = Alignment { memory: 1, offset: 512 };
    let Ok(direct) = reopen(fd, OFlags::RDONLY | OFlags::DIRECT) else {
        // The filesystem has no O_DIRECT, so there is no requirement.
        return Ok(NONE);
    };
    let mut memory = vec![0u8; 2 * 4096];
    let start = memory.as_ptr().align_offset(4096);
    for offset in [512u32, 1024, 2048, 4096] {
        match rustix::io::pread(&direct, &mut memory[start..start + offset as usize], 0) {
            Ok(_) => return Ok(Alignment { memory: offset, offset }),
            Err(rustix::io::Errno::INVAL) => {}
            // Accepted, but this block cannot be read. The guest gets that error when it reads the block.
            Err(rustix::io::Errno::IO) => return Ok(Alignment { memory: offset, offset }),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Alignment { memory: 4096, offset: 4096 })
}

/// Opens the same file again, as a description with its own flags, to which the kernel reports writeback errors
/// separately.
pub(super) fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    rustix::fs::open(path.as_str(), flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| io::Error::new(io::Error::from(error).kind(), format!("cannot open {path} again: {error}")))
}

/// The block layer's attributes of a device, or of the disk of which it is a partition.
struct Sysfs(Option<PathBuf>);

impl Sysfs {
    /// The attributes of a block device.
    fn of(stat: &Statx) -> Self {
        Self::at(stat.stx_rdev_major, stat.stx_rdev_minor)
    }

    /// The attributes of the disk below a file's filesystem, if there is a single one.
    fn below(stat: &Statx) -> Self {
        Self::at(stat.stx_dev_major, stat.stx_dev_minor)
    }

    fn at(major: u32, minor: u32) -> Self {
        let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        Sysfs([device.join("queue"), device.join("../queue")].into_iter().find(|path| path.is_dir()))
    }

    /// Reads a number. Returns 0, which means "unsupported", where the kernel has no such attribute.
    fn read(&self, name: &str) -> u64 {
        let text = self.0.as_ref().and_then(|queue| fs::read_to_string(queue.join(name)).ok());
        text.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }
}
