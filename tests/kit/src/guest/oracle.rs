//! UNSAFE. What the host knows of an image without asking the server: dirty pages in its page cache (cachestat(2)),
//! flushes that reached the block device below it (/sys/block/*/stat), its content, its allocated blocks.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{output, run, tell};

/// Pages of the image that the host's page cache holds and has not written back, or `None` on a kernel before 6.5
/// (said aloud). Pages under write-back count too: they are not durable yet.
pub fn dirty_pages(image: &Path) -> Option<u64> {
    // include/uapi/linux/mman.h; the number is the same on every architecture.
    const SYS_CACHESTAT: libc::c_long = 451;
    #[repr(C)]
    struct Range {
        off: u64,
        len: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct CacheStat {
        cache: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let file = File::open(image).expect("the image can be read");
    // Length 0 means to the end.
    let range = Range { off: 0, len: 0 };
    let mut stat = CacheStat::default();
    // SAFETY: `range` and `stat` are this frame's, laid out as the kernel's structs, and outlive the call; the kernel
    // keeps neither.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0 as libc::c_uint) };
    if result == 0 {
        return Some(stat.dirty + stat.writeback);
    }
    let error = io::Error::last_os_error();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "cachestat: {error}");
    tell("SKIPPED: no cachestat(2) in this kernel (6.5 has it): dirty pages were not checked");
    None
}

/// A digest of the whole image as any other program would read it.
pub fn digest(image: &Path) -> String {
    run(Command::new("sha256sum").arg(image)).split_whitespace().next().expect("a digest").to_owned()
}

/// The bytes `offset..offset + len`.
pub fn read_at(image: &Path, offset: u64, len: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; len];
    File::open(image).and_then(|file| file.read_exact_at(&mut bytes, offset)).expect("inside the image");
    bytes
}

/// Bytes that the filesystem has allocated for the image.
pub fn allocated(image: &Path) -> u64 {
    fs::metadata(image).expect("the image is there").blocks() * 512
}

/// A loop device over a file: a block device with a volatile cache of its own, whose flushes the kernel counts.
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Attaches `image`. `None` (said aloud) where that is not allowed, as in most containers.
    pub fn attach(image: &Path) -> Option<LoopDevice> {
        let output = output(Command::new("losetup").args(["--find", "--show"]).arg(image));
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            tell(&format!("SKIPPED: no loop device here ({why}): flushes at the device were not counted"));
            return None;
        }
        let path = PathBuf::from(String::from_utf8(output.stdout).expect("a path").trim());
        assert!(fs::metadata(&path).is_ok_and(|found| found.file_type().is_block_device()), "{path:?}");
        Some(LoopDevice { path })
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes done so far (the 16th figure of Documentation/block/stat.rst).
    pub fn flushes(&self) -> u64 {
        let name = self.path.file_name().expect("a device").to_str().expect("plain");
        let stat = fs::read_to_string(format!("/sys/block/{name}/stat")).expect("a block device has figures");
        stat.split_whitespace().nth(15).expect("Linux 5.5 or later").parse().expect("a number")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = output(Command::new("losetup").arg("--detach").arg(&self.path));
        if !detached.status.success() {
            tell(&format!("{} could not be detached", self.path.display()));
        }
    }
}
