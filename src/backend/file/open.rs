//! Opens an image. Every mistake that a user can make is found here, before a guest waits, and reported with its fix.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, fstat, stat};

use super::geometry::{self, MediumLimits};
use super::qemu_locks::{LockError, lock_image};
use super::{FileOptions, Locking, image_ends};
use crate::backend::{image_format, uring};

/// Why an image cannot be served: what failed, why, and how to fix it, in one line.
#[derive(Debug)]
pub struct OpenError {
    thing: String,
    cause: String,
    fix: String,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.thing, self.cause, self.fix)
    }
}

impl std::error::Error for OpenError {}

impl OpenError {
    /// Adds that the image has another format than raw, if it has: then that is the cause.
    fn of_another_format(mut self, format: Option<&str>) -> OpenError {
        if let Some(format) = format {
            self.cause += &format!(", and {}", image_format::finding(format));
            self.fix = format!("{}; or {} if it is raw all the same", image_format::conversion(format), self.fix);
        }
        self
    }
}

/// An image that passed every check.
pub(super) struct OpenImage {
    pub(super) fd: OwnedFd,
    /// The flags with which it was opened, to open it again.
    pub(super) flags: OFlags,
    pub(super) is_device: bool,
    pub(super) medium: MediumLimits,
    pub(super) logical_block: u32,
}

/// Opens and checks an image. Takes its locks, which last as long as the descriptor returned.
pub(super) fn open(options: &FileOptions) -> Result<OpenImage, OpenError> {
    let path = options.path.as_path();
    // Before opening: opening a FIFO would wait for its other end.
    check_kind(path, stat(path).map_err(|error| cannot_open(options, error.into()))?.st_mode)?;
    let access = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let direct = if options.policy.opens_direct() { OFlags::DIRECT } else { OFlags::empty() };
    let flags = access | direct;
    let fd = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| cannot_open(options, error.into()))?;
    let no_limits =
        |error: io::Error| fail(path, format!("the kernel does not report its limits ({error})"), "check the storage");
    let is_device = check_kind(path, fstat(&fd).map_err(|error| no_limits(error.into()))?.st_mode)?;
    if options.locking == Locking::Auto && !options.lock_later {
        lock(path, fd.as_fd(), options.read_only)?;
    }
    let medium = if is_device { geometry::device_limits(fd.as_fd()) } else { geometry::file_limits(fd.as_fd()) };
    let medium = medium.map_err(no_limits)?;
    let logical_block = check_shape(options, &medium, is_device).map_err(|error| match options.is_raw {
        // An image of another format need not be whole blocks, and rounding it up would spoil it.
        false => error.of_another_format(image_ends::format_in_time(path, fd.as_fd(), medium.size)),
        true => error,
    })?;
    uring::probe().map_err(|error| fail(path, "the kernel provides no io_uring".into(), &error.to_string()))?;
    Ok(OpenImage { fd, flags, is_device, medium, logical_block })
}

fn fail(path: &Path, cause: String, fix: &str) -> OpenError {
    OpenError { thing: path.display().to_string(), cause, fix: fix.into() }
}

/// Returns whether the image is a block device. Fails unless it is that or a regular file.
fn check_kind(path: &Path, mode: u32) -> Result<bool, OpenError> {
    let what = match FileType::from_raw_mode(mode) {
        FileType::RegularFile => return Ok(false),
        FileType::BlockDevice => return Ok(true),
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        _ => "neither a file nor a device",
    };
    Err(fail(path, format!("this is {what}"), "name a raw image file or a block device"))
}

fn cannot_open(options: &FileOptions, error: io::Error) -> OpenError {
    let path = options.path.as_path();
    let (cause, fix) = match error.raw_os_error() {
        Some(libc::ENOENT) => ("there is no such file", "create it (truncate -s 10G FILE) or correct the path"),
        Some(libc::ENOTDIR) => ("a part of the path is not a directory", "correct the path"),
        Some(libc::ELOOP) => ("too many symbolic links", "correct the path"),
        Some(libc::ENAMETOOLONG) => ("the path is too long", "use a shorter one"),
        Some(libc::EACCES) if options.read_only => {
            ("permission denied", "let the user that runs virtioblkd read it and enter its directories")
        }
        Some(libc::EACCES) => (
            "permission denied",
            "let the user that runs virtioblkd read and write it and enter its directories, or serve it with --read-only",
        ),
        Some(libc::EPERM) => {
            ("operation not permitted", "remove the immutable attribute (chattr -i), or serve it with --read-only")
        }
        Some(libc::EROFS) => {
            // The mounts of a systemd unit also give EROFS, for a file that is writable elsewhere.
            (
                "the filesystem or the device is read-only",
                "make it writable (in a systemd unit ProtectHome= makes /home, /root and /run/user read-only, and \
                 ProtectSystem= others: give the unit ReadWritePaths= for the image's directory), or serve it with \
                 --read-only",
            )
        }
        Some(libc::EBUSY) => ("the device is in use", "stop or unmount what uses it"),
        Some(libc::ETXTBSY) => ("the file is in use as swap or as a running program", "stop what uses it"),
        Some(libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM) => {
            ("there is no device or no medium behind it", "attach it, or correct the path")
        }
        Some(libc::EMFILE | libc::ENFILE) => {
            ("no file descriptor is left", "raise RLIMIT_NOFILE (ulimit -n, or LimitNOFILE= in the systemd unit)")
        }
        Some(libc::EINVAL | libc::EOPNOTSUPP) if options.policy.opens_direct() => (
            "its filesystem refuses O_DIRECT, which the cache modes none and directsync need",
            "use --cache writeback, writethrough or unsafe, or move the image to another filesystem",
        ),
        _ => return fail(path, format!("cannot be opened ({error})"), "see the kernel's log"),
    };
    fail(path, cause.into(), fix)
}

/// Takes the image locks. Where the filesystem has none it logs a warning.
pub(super) fn lock(path: &Path, fd: BorrowedFd<'_>, read_only: bool) -> Result<(), OpenError> {
    match lock_image(fd, read_only) {
        Ok(()) => Ok(()),
        Err(LockError::InUse(permission)) => Err(fail(
            path,
            format!(
                "another process uses the image (QEMU, qemu-img or another virtioblkd holds its \"{permission}\" lock)"
            ),
            "stop it (fuser names it), open both with --read-only, start both with --locking in-use if the guest is to \
             migrate from one to the other, or, if you know that it is safe, use --locking off",
        )),
        Err(LockError::Failed(error)) => Err(fail(
            path,
            format!("it cannot be locked ({error})"),
            "repair the locks of the filesystem, or, if you know that no other process uses the image, use --locking off",
        )),
        Err(LockError::Unavailable(error)) => {
            log::warn!(
                "{}: image locks are not available here ({error}); nothing excludes a second writer; --locking \
                 off silences this",
                path.display()
            );
            Ok(())
        }
    }
}

/// Checks the size against the blocks and returns the logical block size.
fn check_shape(options: &FileOptions, medium: &MediumLimits, is_device: bool) -> Result<u32, OpenError> {
    let path = options.path.as_path();
    // The same in every mode, so that a change of mode does not change what the guest sees.
    let usual = medium.sector.clamp(512, 4096);
    let logical = options.logical_block_size.unwrap_or(usual);
    if logical != 512 && logical != 4096 {
        let cause = format!("a logical block size of {logical} bytes is not possible");
        return Err(fail(path, cause, "use --logical-block-size 512 or 4096"));
    }
    if medium.size == 0 {
        let fix = if is_device { "attach a medium" } else { "give it a size (truncate -s 10G FILE)" };
        return Err(fail(path, "it is empty".into(), fix));
    }
    // With O_DIRECT the last block must be whole for the kernel, too, whatever the guest sees.
    let (unit, unit_name) = match medium.alignment.offset {
        offset if options.policy.opens_direct() && offset > logical => (offset, "blocks that O_DIRECT needs here"),
        _ => (logical, "logical blocks"),
    };
    if medium.size.is_multiple_of(u64::from(unit)) {
        return Ok(logical);
    }
    let cause = format!("its size, {} bytes, is not a multiple of the {unit}-byte {unit_name}", medium.size);
    let fix = match (is_device, unit > 512 && medium.size.is_multiple_of(512)) {
        (false, false) => format!("round it up: truncate -s %{unit} FILE"),
        (false, true) if unit_name == "logical blocks" => {
            format!("round it up (truncate -s %{unit} FILE), or use --logical-block-size 512")
        }
        (false, true) => format!("round it up (truncate -s %{unit} FILE), or use a mode through the page cache"),
        (true, _) => "use --logical-block-size 512, or a device of another size".into(),
    };
    Err(fail(path, cause, &fix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{CacheMode, CachePolicy};

    #[test]
    fn a_read_only_filesystem_names_the_mounts_of_a_unit() {
        let options = FileOptions::new("/home/me/disk.img", CachePolicy::from(CacheMode::None));
        let text = cannot_open(&options, io::Error::from_raw_os_error(libc::EROFS)).to_string();
        for word in ["/home/me/disk.img", "read-only", "ProtectHome=", "ReadWritePaths="] {
            assert!(text.contains(word), "'{word}' is not in: {text}");
        }
    }
}
