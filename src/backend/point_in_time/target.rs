//! The file that a copy is written to: PATH.partial until it is complete, then PATH. It never replaces an existing file.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::CopyDirectory;
use crate::base::publish::{left_behind, publish};
use crate::disk::CopyError;

/// The suffix of the name of a copy that is not complete.
const PARTIAL: &str = ".partial";

/// The target's names, in a directory that stays open, so that renaming the directory does not matter.
pub(super) struct Target {
    /// The path as the operator wrote it.
    path: PathBuf,
    directory: OwnedFd,
    name: OsString,
    partial: OsString,
    /// Device and inode of the file that was created, to recognize it.
    created: (u64, u64),
}

impl Target {
    /// Creates the partial file as a hole of `size` bytes. `image`: the disk's image file, if it has one. Fails, with code
    /// `target`, when the path exists already, the directory cannot be written, or the filesystem cannot hold a file of
    /// this size.
    pub(super) fn create(
        path: &Path,
        size: u64,
        image: Option<&Path>,
        directories: &[CopyDirectory],
    ) -> Result<(Target, File), CopyError> {
        let Some(name) = path.file_name().filter(|_| path.is_absolute()) else {
            return Err(refused(path, "this is not the absolute path of a file", "give the new file's absolute path"));
        };
        // A write beyond the limit would not fail but kill the daemon (SIGXFSZ).
        if let Some(limit) = getrlimit(Resource::Fsize).current.filter(|&limit| limit < size) {
            let cause = format!("this daemon may write no file larger than {limit} bytes, and the image has {size}");
            return Err(refused(path, &cause, "raise RLIMIT_FSIZE (ulimit -f, or LimitFSIZE= in the systemd unit)"));
        }
        let parent = path.parent().unwrap_or(Path::new("/"));
        let directory = rustix::fs::open(parent, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| denied(path, error, directories))?;
        let mut partial = name.to_os_string();
        partial.push(PARTIAL);
        let mut target = Target { path: path.into(), directory, name: name.into(), partial, created: (0, 0) };
        match rustix::fs::statat(&target.directory, &target.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(error) => return Err(denied(path, error, directories)),
            Ok(_) => {
                let fix = "choose another path, or move the existing file away";
                return Err(refused(path, "this path exists already, and a copy replaces nothing", fix));
            }
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Mode 0600: the file holds the guest's data, which other users must not read.
        let file = rustix::fs::openat(&target.directory, &target.partial, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| target.cannot_open(error, image, directories))?;
        let file = File::from(file);
        let created = rustix::fs::fstat(&file).map_err(|error| denied(path, error, directories))?;
        target.created = (created.st_dev, created.st_ino);
        if let Err(error) = file.set_len(size) {
            let left = target.remove_partial().err().map_or(String::new(), |why| format!("; {why}"));
            let cause = format!("its filesystem refuses a file of {size} bytes ({error})");
            return Err(refused(path, &cause, &format!("use another filesystem{left}")));
        }
        Ok((target, file))
    }

    fn cannot_open(&self, error: Errno, image: Option<&Path>, directories: &[CopyDirectory]) -> CopyError {
        match error {
            Errno::EXIST if self.is_image(image) => refused(
                &self.partial_path(),
                "a copy has this name until it is complete, and it is the name of this disk's image",
                "choose another target, and keep the image",
            ),
            // The file may be another disk's image.
            Errno::EXIST => refused(
                &self.partial_path(),
                "a copy has this name until it is complete, and it exists already: it belongs to a running copy, was left \
                 by a daemon that was killed during a copy, or is another file",
                "choose another target, or remove it if you know that a daemon left it",
            ),
            Errno::NAMETOOLONG => refused(&self.path, "with .partial the name is too long", "use a shorter name"),
            error => denied(&self.path, error, directories),
        }
    }

    fn partial_path(&self) -> PathBuf {
        partial_path(&self.path)
    }

    /// Whether the partial file's name is a name of the disk's image.
    fn is_image(&self, image: Option<&Path>) -> bool {
        let there = rustix::fs::statat(&self.directory, &self.partial, AtFlags::empty());
        let image = image.map(rustix::fs::stat);
        matches!((there, image), (Ok(there), Some(Ok(image))) if (there.st_dev, there.st_ino) == (image.st_dev, image.st_ino))
    }

    /// Removes the partial file, unless its name now belongs to another file, which may be a disk's image. The error is a
    /// text for the operator.
    pub(super) fn remove_partial(&self) -> Result<(), String> {
        self.remove(&self.partial).map_err(|why| format!("{} {why}", self.partial_path().display()))
    }

    /// Removes a name of the file that was created.
    fn remove(&self, name: &OsStr) -> Result<(), String> {
        match rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) if (there.st_dev, there.st_ino) != self.created => {
                return Err("is another file than the one that this copy made, and was left alone".into());
            }
            _ => {}
        }
        rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())
            .map_err(|error| format!("cannot be removed ({error}); remove it by hand"))
    }

    /// Gives the open file its final name, unless that name exists. If the partial name could not be removed, it returns a
    /// text that says why.
    pub(super) fn publish(&self, file: &File) -> io::Result<Option<String>> {
        let left = publish(file.as_fd(), self.directory.as_fd(), &self.partial, &self.name)?;
        Ok(left.map(|error| format!("{} {}", self.partial_path().display(), left_behind(&error))))
    }

    /// Removes the file's final name again after `publish`. The error is a text for the operator.
    pub(super) fn unpublish(&self) -> Result<(), String> {
        self.remove(&self.name).map_err(|why| format!("{} {why}", self.path.display()))
    }

    /// Makes the final name durable.
    pub(super) fn sync_directory(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.directory)?)
    }
}

/// The path of a copy to `path` that is not complete.
pub(super) fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(PARTIAL);
    path.with_file_name(name)
}

fn refused(path: &Path, cause: &str, fix: &str) -> CopyError {
    CopyError { code: "target", message: format!("{}: {cause}; {fix}", path.display()) }
}

/// The error that `path` cannot be created. If the sandbox denies it although `--copy-dir` names its directory, the error
/// says what happened to that directory.
fn denied(path: &Path, error: Errno, directories: &[CopyDirectory]) -> CopyError {
    let allowed = directories.iter().filter(|_| matches!(error, Errno::ACCESS | Errno::PERM));
    for CopyDirectory { path: directory, at_start } in allowed.filter(|directory| path.starts_with(&directory.path)) {
        let shown = directory.display();
        let opened = match at_start {
            Ok(identity) => identity,
            Err(why) => {
                let cause = format!("permission denied: --copy-dir '{shown}' {why} when virtioblkd started");
                let fix = "make sure that it can be opened now, and restart virtioblkd or run virtioblkctl upgrade";
                return refused(path, &cause, fix);
            }
        };
        let now = rustix::fs::stat(directory).map(|stat| (stat.st_dev, stat.st_ino));
        if now.is_ok_and(|now| now != *opened) {
            let cause = format!(
                "permission denied: '{shown}' is no longer the directory that --copy-dir opened when virtioblkd started: \
                 another filesystem was mounted over it, or it was replaced"
            );
            let fix = "restart virtioblkd or run virtioblkctl upgrade; or name a directory above the mount point with \
                       --copy-dir, for which mounting makes no difference";
            return refused(path, &cause, fix);
        }
    }
    cannot_create(path, error)
}

fn cannot_create(path: &Path, error: Errno) -> CopyError {
    let (cause, fix) = match error {
        Errno::NOENT => ("there is no such directory", "create it, or correct the path"),
        Errno::NOTDIR => ("a part of the path is not a directory", "correct the path"),
        Errno::ACCESS | Errno::PERM => (
            "permission denied",
            "allow copies in its directory ('virtioblkctl upgrade --add copy-dir=DIR' while the guest runs, or --copy-dir DIR \
             at the start), and let virtioblkd's user write there; or choose another directory",
        ),
        Errno::ROFS => ("its filesystem is read-only", "choose another path"),
        Errno::NOSPC | Errno::DQUOT => ("no space is left on its filesystem", "make room, or choose another path"),
        Errno::NAMETOOLONG => ("the name is too long", "use a shorter name"),
        Errno::INVAL => ("the path has a byte that a path cannot have", "correct the path"),
        error => return refused(path, &format!("cannot be created ({error})"), "check its filesystem"),
    };
    refused(path, cause, fix)
}
