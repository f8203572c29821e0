//! Gives a finished file its name. Snapshots and copies are written as PATH.partial; this makes them PATH.
//!
//! The directory may belong to another user, who may put something else under the name PATH.partial at any time. So the
//! file is linked from its open descriptor, never by that name. So what appears as PATH is what was written and hashed.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, CWD, RenameFlags, fstat, linkat, renameat_with, statat, unlinkat};
use rustix::io::Errno;

/// Gives the open `file`, which `directory` has as `partial`, the name `name` there, and removes the name `partial`.
/// Replaces no file. Returns why the name `partial` is left behind, if it is. Errors: EEXIST if something has that
/// name; ENOENT if `file` has no name any more; an error without a number if the filesystem has no hard links and
/// another file is called `partial`.
pub(crate) fn publish(
    file: BorrowedFd<'_>,
    directory: BorrowedFd<'_>,
    partial: &OsStr,
    name: &OsStr,
) -> io::Result<Option<io::Error>> {
    // thread-self: a thread may have a descriptor table of its own.
    let itself = format!("/proc/thread-self/fd/{}", file.as_raw_fd());
    match linkat(CWD, itself, directory, name, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => Ok(remove(file, directory, partial).err()),
        Err(Errno::EXIST) => Err(Errno::EXIST.into()),
        Err(_) if fstat(file)?.st_nlink == 0 => Err(Errno::NOENT.into()),
        // No hard links (FAT, some FUSE filesystems), or no /proc.
        Err(_) => rename(file, directory, partial, name).map(|()| None),
    }
}

/// Renames the file by its name, and checks afterwards that the name was this file's.
fn rename(file: BorrowedFd<'_>, directory: BorrowedFd<'_>, partial: &OsStr, name: &OsStr) -> io::Result<()> {
    if !names(file, directory, partial)? {
        return Err(other_file());
    }
    renameat_with(directory, partial, directory, name, RenameFlags::NOREPLACE)?;
    if names(file, directory, name)? { Ok(()) } else { Err(other_file()) }
}

/// Returns the operator's text for a name `partial` that [`publish`] left behind. If another file has that name, it is not
/// ours and may be a disk's image, so the text does not advise removal.
pub(crate) fn left_behind(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(_) => format!("is left behind ({error}); remove it by hand"),
        None => format!("was left alone: {error}"),
    }
}

/// Removes the name `partial`, if it is still a name of `file`.
fn remove(file: BorrowedFd<'_>, directory: BorrowedFd<'_>, partial: &OsStr) -> io::Result<()> {
    if names(file, directory, partial)? {
        Ok(unlinkat(directory, partial, AtFlags::empty())?)
    } else {
        Err(other_file())
    }
}

fn other_file() -> io::Error {
    io::Error::other("another file has this name now")
}

/// Whether `name` in `directory` is a name of `file`.
fn names(file: BorrowedFd<'_>, directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<bool> {
    let (file, named) = (fstat(file.as_fd())?, statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?);
    Ok((file.st_dev, file.st_ino) == (named.st_dev, named.st_ino))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    /// A directory with `a.partial`, open.
    fn place() -> (tempfile::TempDir, File, File) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.partial"), "ours").unwrap();
        let file = File::open(dir.path().join("a.partial")).unwrap();
        let directory = File::open(dir.path()).unwrap();
        (dir, file, directory)
    }

    fn publish_a(file: &File, directory: &File) -> Result<(), Option<i32>> {
        let result = publish(file.as_fd(), directory.as_fd(), OsStr::new("a.partial"), OsStr::new("a"));
        result.map(drop).map_err(|error| error.raw_os_error())
    }

    #[test]
    fn a_published_file_has_only_its_final_name() {
        let (dir, file, directory) = place();
        assert_eq!(publish_a(&file, &directory), Ok(()));
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"ours");
        assert!(!dir.path().join("a.partial").exists());
    }

    #[test]
    fn another_file_under_the_partial_name_is_not_published() {
        let (dir, file, directory) = place();
        fs::rename(dir.path().join("a.partial"), dir.path().join("moved")).unwrap();
        fs::write(dir.path().join("a.partial"), "theirs").unwrap();
        assert_eq!(publish_a(&file, &directory), Ok(()));
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"ours");
        assert_eq!(fs::read(dir.path().join("a.partial")).unwrap(), b"theirs", "not ours to remove");
        // The fallback for filesystems without hard links.
        fs::remove_file(dir.path().join("a")).unwrap();
        let renamed = rename(file.as_fd(), directory.as_fd(), OsStr::new("a.partial"), OsStr::new("a"));
        assert!(renamed.unwrap_err().to_string().contains("another file"));
        assert!(!dir.path().join("a").exists());
    }

    #[test]
    fn nothing_is_replaced_and_a_removed_file_is_not_published() {
        let (dir, file, directory) = place();
        fs::write(dir.path().join("a"), "there").unwrap();
        assert_eq!(publish_a(&file, &directory), Err(Some(libc::EEXIST)));
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"there");
        fs::remove_file(dir.path().join("a")).unwrap();
        fs::remove_file(dir.path().join("a.partial")).unwrap();
        fs::write(dir.path().join("a.partial"), "theirs").unwrap();
        assert_eq!(publish_a(&file, &directory), Err(Some(libc::ENOENT)));
        assert!(!dir.path().join("a").exists());
    }
}
