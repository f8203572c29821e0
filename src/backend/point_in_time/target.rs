//! The file that a copy goes to: PATH.partial until it is complete, then PATH, which never replaces anything.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::CopyDirectory;
use crate::base::publish::publish;
use crate::disk::CopyError;

/// Added to the name of a copy that is not complete.
const PARTIAL: &str = ".partial";

/// The names of the target, in a directory that is held open, so that its renaming does not matter.
pub(super) struct Target {
    /// As the operator wrote it.
    path: PathBuf,
    directory: OwnedFd,
    name: OsString,
    partial: OsString,
}

impl Target {
    /// Creates the partial file, `size` bytes of hole. Errors, code `target`: something is there already, the directory
    /// cannot be written, the filesystem cannot hold a file of this size.
    pub(super) fn create(path: &Path, size: u64, directories: &[CopyDirectory]) -> Result<(Target, File), CopyError> {
        let Some(name) = path.file_name().filter(|_| path.is_absolute()) else {
            return Err(refused(path, "this is not an absolute path of a file", "name the new file by its whole path"));
        };
        // Larger writes would not fail but kill the daemon (SIGXFSZ).
        if let Some(limit) = getrlimit(Resource::Fsize).current.filter(|&limit| limit < size) {
            let cause = format!("this daemon may write no file larger than {limit} bytes, and the image has {size}");
            return Err(refused(path, &cause, "raise RLIMIT_FSIZE (ulimit -f, or LimitFSIZE= in the systemd unit)"));
        }
        let parent = path.parent().unwrap_or(Path::new("/"));
        let directory = rustix::fs::open(parent, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| denied(path, error, directories))?;
        let mut partial = name.to_os_string();
        partial.push(PARTIAL);
        let target = Target { path: path.into(), directory, name: name.into(), partial };
        match rustix::fs::statat(&target.directory, &target.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(error) => return Err(denied(path, error, directories)),
            Ok(_) => {
                let mend = "choose another path, or move away what is there";
                return Err(refused(path, "something is there already, and a copy replaces nothing", mend));
            }
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // What is in it is the guest's and nobody else's.
        let file = rustix::fs::openat(&target.directory, &target.partial, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| target.cannot_open(error, directories))?;
        let file = File::from(file);
        if let Err(error) = file.set_len(size) {
            let left = target.remove_partial().err().map_or(String::new(), |why| format!("; {why}"));
            let cause = format!("its filesystem refuses a file of {size} bytes ({error})");
            return Err(refused(path, &cause, &format!("use another filesystem{left}")));
        }
        Ok((target, file))
    }

    fn cannot_open(&self, error: Errno, directories: &[CopyDirectory]) -> CopyError {
        match error {
            Errno::EXIST => refused(
                &self.partial_path(),
                "this is another copy under way, or what a daemon left that died while it copied",
                "remove it if no copy is writing to it, or choose another target",
            ),
            Errno::NAMETOOLONG => refused(&self.path, "with .partial the name is too long", "use a shorter one"),
            error => denied(&self.path, error, directories),
        }
    }

    fn partial_path(&self) -> PathBuf {
        partial_path(&self.path)
    }

    /// Removes the partial file. Errors: in words for the operator.
    pub(super) fn remove_partial(&self) -> Result<(), String> {
        rustix::fs::unlinkat(&self.directory, &self.partial, AtFlags::empty()).map_err(|error| {
            format!("{} cannot be removed ({error}); remove it by hand", self.partial_path().display())
        })
    }

    /// Gives the open file its name, if nothing has that name. Returns why the partial file's name is left, if it is.
    pub(super) fn publish(&self, file: &File) -> io::Result<Option<String>> {
        let left = publish(file.as_fd(), self.directory.as_fd(), &self.partial, &self.name)?;
        Ok(left.map(|error| format!("{} is left behind ({error}); remove it by hand", self.partial_path().display())))
    }

    /// Takes the file away again after `publish`. Errors: in words for the operator.
    pub(super) fn unpublish(&self) -> Result<(), String> {
        rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty())
            .map_err(|error| format!("{} cannot be removed either ({error}); remove it by hand", self.path.display()))
    }

    /// Makes the name durable.
    pub(super) fn sync_directory(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.directory)?)
    }
}

/// Where the copy to `path` is until it is complete.
pub(super) fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(PARTIAL);
    path.with_file_name(name)
}

fn refused(path: &Path, cause: &str, mend: &str) -> CopyError {
    CopyError { code: "target", message: format!("{}: {cause}; {mend}", path.display()) }
}

/// Why `path` cannot be created. Where the sandbox denies it although `--copy-dir` names its directory: what happened to
/// that directory.
fn denied(path: &Path, error: Errno, directories: &[CopyDirectory]) -> CopyError {
    let allowed = directories.iter().filter(|_| matches!(error, Errno::ACCESS | Errno::PERM));
    for CopyDirectory { path: directory, at_start } in allowed.filter(|directory| path.starts_with(&directory.path)) {
        let shown = directory.display();
        let opened = match at_start {
            Ok(identity) => identity,
            Err(why) => {
                let cause = format!("permission denied: --copy-dir '{shown}' {why} when virtioblkd started");
                let fix = "now that it can be opened, start virtioblkd anew or run virtioblkctl upgrade";
                return refused(path, &cause, fix);
            }
        };
        let now = rustix::fs::stat(directory).map(|stat| (stat.st_dev, stat.st_ino));
        if now.is_ok_and(|now| now != *opened) {
            let cause = format!(
                "permission denied: '{shown}' is not the directory any more that --copy-dir opened when virtioblkd \
                 started: another filesystem was mounted over it, or it was replaced"
            );
            let fix = "start virtioblkd anew or run virtioblkctl upgrade; or name a directory above the mount point with \
                       --copy-dir, for which mounting makes no difference";
            return refused(path, &cause, fix);
        }
    }
    cannot_create(path, error)
}

fn cannot_create(path: &Path, error: Errno) -> CopyError {
    let (cause, mend) = match error {
        Errno::NOENT => ("there is no such directory", "create it, or correct the path"),
        Errno::NOTDIR => ("a part of the path is not a directory", "correct the path"),
        Errno::ACCESS | Errno::PERM => (
            "permission denied",
            "start virtioblkd with --copy-dir for its directory, and let the user that runs it write there; or choose \
             another",
        ),
        Errno::ROFS => ("its filesystem is read-only", "choose another"),
        Errno::NOSPC | Errno::DQUOT => ("no space is left on its filesystem", "make room, or choose another"),
        Errno::NAMETOOLONG => ("the name is too long", "use a shorter one"),
        Errno::INVAL => ("the path holds a byte that no path can hold", "correct the path"),
        error => return refused(path, &format!("cannot be created ({error})"), "check its filesystem"),
    };
    refused(path, cause, mend)
}
