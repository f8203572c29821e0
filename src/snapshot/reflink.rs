//! The way `reflink`: the snapshot shares the image's blocks (ioctl_ficlone(2)), at a cost that does not depend on the
//! image's size.
//!
//! Until it is complete and durable it is called PATH.partial; whatever fails removes it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::ioctl_ficlone;
use sha2::{Digest, Sha256};

use super::disks::{Disk, interrupted};
use super::wait::{Stop, Wake, wait};
use crate::client::Failure;
use crate::publish::publish;
use crate::sys;

/// What the probe clones: a multiple of every filesystem's block.
const PROBE: u64 = 64 * 1024;

/// A snapshot in the making.
pub struct Target {
    image: PathBuf,
    source: File,
    file: File,
    path: PathBuf,
    /// What is there now and goes when this is dropped.
    made: Option<PathBuf>,
}

impl Target {
    /// Makes PATH.partial and proves that it can share the image's blocks, by one of them. Nothing is held yet. The
    /// error names the ways that would work.
    pub fn prepare(disk: &Disk, path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let failed = |code: &str, text: String| Failure::new(code, text);
        let Some(image) = &disk.image_path else {
            let text =
                format!("'{}' ({}) has no file to share: give copy: or exec:", disk.control.display(), disk.image);
            return Err(failed("reflink", text));
        };
        let cannot =
            |error: io::Error| failed("image", format!("the image '{}' cannot be opened: {error}", image.display()));
        let source = File::open(image).map_err(cannot)?;
        let metadata = source.metadata().map_err(cannot)?;
        if metadata.file_type().is_block_device() {
            let text = format!("'{}' is a block device, which cannot be shared: give copy: or exec:", image.display());
            return Err(failed("reflink", text));
        }
        if is_served(disk.pid, &metadata) == Some(false) {
            let text = format!(
                "the file '{}' is not the one that the daemon has open: it was replaced since the daemon started",
                image.display()
            );
            return Err(failed("image", text));
        }
        if path.symlink_metadata().is_ok() {
            return Err(failed("target", format!("'{shown}' exists already: name a new file, or remove it")));
        }
        let partial = partial(path);
        let file = OpenOptions::new().write(true).read(true).create_new(true).mode(0o600).open(&partial);
        let file = file.map_err(|error| {
            let mend = match error.kind() {
                io::ErrorKind::AlreadyExists => {
                    ": another snapshot makes it, or one that was killed left it: remove it"
                }
                io::ErrorKind::NotFound => ": make its directory",
                _ => "",
            };
            failed("target", format!("'{}' cannot be made: {error}{mend}", partial.display()))
        })?;
        let target = Target { image: image.clone(), source, file, path: path.to_owned(), made: Some(partial) };
        target.probe(metadata.len())?;
        Ok(target)
    }

    fn probe(&self, size: u64) -> Result<(), Failure> {
        let len = if size > PROBE { PROBE } else { 0 };
        let probed = sys::clone_start(self.file.as_fd(), self.source.as_fd(), len);
        let (image, path) = (self.image.display(), self.path.display());
        probed.and_then(|()| self.file.set_len(0)).map_err(|error| {
            let why = match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::ENOSYS) => {
                    "the filesystem cannot share blocks (XFS and btrfs can): give copy:PATH, which works on any".into()
                }
                Some(libc::EXDEV) => {
                    "they are on different filesystems: give a path beside the image, or copy:PATH, which works anywhere"
                        .into()
                }
                _ => format!("{error}; copy:PATH may work"),
            };
            Failure::new("reflink", format!("'{image}' cannot be cloned to '{path}': {why}"))
        })
    }

    /// The instant: everything of the image, while the disk is held.
    pub fn share(&self) -> Result<(), Failure> {
        ioctl_ficlone(&self.file, &self.source).map_err(|errno| {
            let error = io::Error::from(errno);
            let (image, path) = (self.image.display(), self.path.display());
            Failure::new("reflink", format!("cloning '{image}' to '{path}' failed: {error}"))
        })
    }

    /// Makes it durable and gives it its name, replacing nothing. It still goes when dropped, until [`Target::keep`].
    pub fn finish(&mut self) -> Result<(), Failure> {
        let path = self.path.clone();
        let failed =
            |what: &str, error: io::Error| Failure::new("target", format!("'{}' {what}: {error}", path.display()));
        self.file.sync_all().map_err(|error| failed("cannot be made durable", error))?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = File::open(directory).map_err(|error| failed("cannot be given its name", error))?;
        if let Some((partial, name)) =
            self.made.as_deref().and_then(|partial| Some((partial.file_name()?, path.file_name()?)))
        {
            let left = publish(self.file.as_fd(), directory.as_fd(), partial, name)
                .map_err(|error| failed("cannot be given its name", error))?;
            if let Some(error) = left {
                eprintln!("virtioblkctl: '{}.partial' is left behind: {error}; remove it", path.display());
            }
        }
        self.made = Some(path.clone());
        directory.sync_all().map_err(|error| failed("cannot be given its name durably", error))
    }

    /// SHA-256 of all of it, in hexadecimal.
    pub fn digest(&mut self, stop: Stop<'_>) -> Result<String, Failure> {
        let failed =
            |error: io::Error| Failure::new("target", format!("'{}' cannot be read: {error}", self.path.display()));
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut file = &self.file;
        io::Seek::rewind(&mut file).map_err(failed)?;
        loop {
            if stop.is_some() && wait(&[], stop, Instant::now()).map_err(failed)? == Wake::Stopped {
                return Err(interrupted());
            }
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => hash.update(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// It is complete; it stays.
    pub fn keep(&mut self) {
        self.made = None;
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(made) = self.made.take()
            && let Err(error) = fs::remove_file(&made)
        {
            eprintln!("virtioblkctl: '{}', which is no snapshot, cannot be removed: {error}", made.display());
        }
    }
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Whether the process has this file open; `None` if we may not know, or it is another process of that number (the
/// daemon's, in a namespace of its own).
fn is_served(pid: u64, image: &fs::Metadata) -> Option<bool> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    if name.trim_end() != "virtioblkd" {
        return None;
    }
    let mut open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    // A link that is gone was closed meanwhile.
    Some(open.any(|link| {
        let metadata = link.and_then(|link| fs::metadata(link.path()));
        metadata.is_ok_and(|file| (file.dev(), file.ino()) == (image.dev(), image.ino()))
    }))
}
