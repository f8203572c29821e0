//! The method `reflink`: the snapshot shares the image's blocks (ioctl_ficlone(2)). Its time grows with the number of
//! the image's extents, which are counted before any disk is held ([`ReflinkTarget::prepare`]).
//!
//! Until the snapshot is complete and durable its name is PATH.partial. Any failure removes it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use sha2::{Digest, Sha256};

use super::cloner::{self, CloneOutcome, Cloner};
use super::disks::{Daemon, Disk, interrupted};
use super::wait::{CancelFd, WaitEnd, wait};
use crate::base::publish::{left_behind, publish};
use crate::base::syscalls;
use crate::control::client::Failure;

/// How many bytes the probe clones: a multiple of every filesystem's block size.
const PROBE_BYTES: u64 = 64 * 1024;
/// An image with fewer extents is cloned quickly on any filesystem.
const MIN_COSTLY_EXTENTS: u64 = 2000;
/// The number of extents that are cloned, while no disk is held, to measure the time for one extent.
const SAMPLE_EXTENTS: u64 = 500;
/// A clone that would take longer than this causes a warning.
const WARN_CLONE_TIME: Duration = Duration::from_secs(1);

/// A snapshot that is being made.
pub struct ReflinkTarget {
    image: PathBuf,
    source: File,
    file: File,
    path: PathBuf,
    /// The file that exists now and is removed when this is dropped. `None`: no file is removed.
    made: Option<PathBuf>,
    /// The number of the image's extents when it was prepared. `None`: the filesystem does not report it.
    extents: Option<u64>,
    cloner: Cloner,
    /// The cloner was killed before it had finished, and may hang in the kernel.
    abandoned: bool,
}

impl ReflinkTarget {
    /// Creates PATH.partial and checks that it can share one of the image's blocks. No disk is held yet. The error
    /// names the methods that would work.
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
        check_served(disk.daemon, image, &metadata)?;
        if path.symlink_metadata().is_ok() {
            return Err(failed("target", format!("'{shown}' exists already: name a new file, or remove it")));
        }
        let partial = partial(path);
        let file = OpenOptions::new().write(true).read(true).create_new(true).mode(0o600).open(&partial);
        let file = file.map_err(|error| {
            let fix = match error.kind() {
                io::ErrorKind::AlreadyExists => {
                    ": another snapshot makes it, one that was killed left it, or it is another file, such as a disk's \
                     image: choose another name, or remove it if you know that it is what a snapshot left"
                }
                io::ErrorKind::NotFound => ": make its directory",
                _ => "",
            };
            failed("target", format!("'{}' cannot be made: {error}{fix}", partial.display()))
        })?;
        let cloner = Cloner::start(&source, &file).map_err(|error| {
            // No other process has the file yet.
            let _ = cloner::remove_own(&partial, &file);
            failed("internal", format!("the process that clones cannot be started: {error}"))
        })?;
        let extents = syscalls::extents(source.as_fd(), u64::MAX).ok();
        let (image, path, made) = (image.clone(), path.to_owned(), Some(partial));
        let target = ReflinkTarget { image, source, file, path, made, extents, cloner, abandoned: false };
        target.probe(metadata.len())?;
        Ok(target)
    }

    /// Checks that the clone can be made while the disk is held for `lease`. Returns a warning if that takes long. The
    /// error names the methods that would work.
    pub fn check_cost(&self, lease: Duration) -> Result<Option<String>, Failure> {
        let Some((extents, time)) = self.cost() else { return Ok(None) };
        let (image, seconds) = (self.image.display(), time.as_secs_f64());
        let facts = format!("'{image}' is in {extents} extents, and sharing them takes about {seconds:.1} s");
        let fix = "give copy:PATH, which does not hold the guest up, or defragment the image (xfs_fsr, btrfs filesystem defragment)";
        if time > lease {
            let text = format!(
                "{facts}, but the disk is held for --lease ({lease:?}) at most: {fix}, or a longer --lease if the \
                 guest's writes may wait so long"
            );
            return Err(Failure::new("reflink", text));
        }
        Ok((time > WARN_CLONE_TIME)
            .then(|| format!("{facts}, while the guest's writes wait. If that is too long {fix}")))
    }

    /// Returns the number of the image's extents, and an estimate of the time to share them, from a sample. `None`:
    /// there are few extents, or it cannot be measured.
    fn cost(&self) -> Option<(u64, Duration)> {
        let extents = self.extents.filter(|extents| *extents > MIN_COSTLY_EXTENTS)?;
        let size = self.source.metadata().ok()?.len();
        // The sample is at the image's start; an image may begin with a hole.
        let mut len = (size / extents).saturating_mul(SAMPLE_EXTENTS).next_multiple_of(PROBE_BYTES);
        let count = loop {
            let count = syscalls::extents(self.source.as_fd(), len).ok()?;
            if count >= SAMPLE_EXTENTS / 5 || len >= size {
                break count;
            }
            len = len.saturating_mul(2);
        };
        let start = Instant::now();
        syscalls::clone_start(self.file.as_fd(), self.source.as_fd(), if len < size { len } else { 0 }).ok()?;
        let time = start.elapsed().mul_f64(extents as f64 / count.max(1) as f64);
        self.file.set_len(0).ok()?;
        Some((extents, time))
    }

    fn probe(&self, size: u64) -> Result<(), Failure> {
        let len = if size > PROBE_BYTES { PROBE_BYTES } else { 0 };
        let probed =
            self.copy_nocow_flag().and_then(|()| syscalls::clone_start(self.file.as_fd(), self.source.as_fd(), len));
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

    /// Makes the empty target NOCOW if and only if the image is NOCOW: btrfs shares no blocks between a file with
    /// checksums and one without (`btrfs_remap_file_range_prep`), and accepts the change for an empty file only.
    fn copy_nocow_flag(&self) -> io::Result<()> {
        // A filesystem without such flags needs no change.
        let (Ok(image), Ok(target)) = (ioctl_getflags(&self.source), ioctl_getflags(&self.file)) else { return Ok(()) };
        let wanted = (target & !IFlags::NOCOW) | (image & IFlags::NOCOW);
        if wanted != target {
            ioctl_setflags(&self.file, wanted)?;
        }
        Ok(())
    }

    /// Records the result of the clone, and converts it to a failure.
    fn record(&mut self, outcome: CloneOutcome) -> Result<(), Failure> {
        let (image, path) = (self.image.display(), self.path.display());
        let why = match outcome {
            CloneOutcome::Shared => return Ok(()),
            CloneOutcome::Failed(error) => {
                return Err(Failure::new("reflink", format!("cloning '{image}' to '{path}' failed: {error}")));
            }
            CloneOutcome::Cancelled => interrupted(),
            CloneOutcome::TimedOut => {
                let extents = self.extents.map(|count| format!(" ({count} extents)")).unwrap_or_default();
                let text = format!(
                    "cloning '{image}'{extents} to '{path}' did not end within --lease: it was given up, and the guest's \
                     writes continue. Give copy:PATH, a longer --lease, or defragment the image"
                );
                Failure::new("reflink", text)
            }
        };
        self.abandoned = true;
        Err(why)
    }

    /// Makes the snapshot durable and renames it to its final name, without replacing a file. Dropping this still
    /// removes the snapshot, until [`ReflinkTarget::keep`].
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
                crate::base::logging::message(format_args!("'{}.partial' {}", path.display(), left_behind(&error)));
            }
        }
        self.made = Some(path.clone());
        directory.sync_all().map_err(|error| failed("cannot be given its name durably", error))
    }

    /// Returns the SHA-256 of the snapshot in hexadecimal.
    pub fn digest(&mut self, cancel: CancelFd<'_>) -> Result<String, Failure> {
        let failed =
            |error: io::Error| Failure::new("target", format!("'{}' cannot be read: {error}", self.path.display()));
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut file = &self.file;
        io::Seek::rewind(&mut file).map_err(failed)?;
        loop {
            if cancel.is_some() && wait(&[], cancel, Instant::now()).map_err(failed)? == WaitEnd::Cancelled {
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

    /// Makes the snapshot stay when this is dropped, because it is complete.
    pub fn keep(&mut self) {
        self.made = None;
    }
}

/// Fixes the instant: shares all blocks of all images, while their disks are held. The clones run at the same time, so
/// that all of them take as long as the slowest one. A clone that has not finished at `deadline` is given up.
pub fn share_all(
    targets: &mut [(usize, ReflinkTarget)],
    deadline: Instant,
    cancel: CancelFd<'_>,
) -> Result<(), Failure> {
    for (_, target) in targets.iter() {
        let lost = |error| Failure::new("internal", format!("the process that clones is lost: {error}"));
        target.cloner.begin().map_err(lost)?;
    }
    let mut cloners: Vec<&mut Cloner> = targets.iter_mut().map(|(_, target)| &mut target.cloner).collect();
    let outcomes = cloner::wait_for(&mut cloners, deadline, cancel);
    let results = targets.iter_mut().zip(outcomes).map(|((_, target), outcome)| target.record(outcome));
    results.collect::<Vec<_>>().into_iter().collect()
}

impl Drop for ReflinkTarget {
    fn drop(&mut self) {
        let Some(made) = self.made.take() else { return };
        if self.abandoned {
            // The disks are resumed and the guest is thawed by now, so this may take time.
            let hangs = !self.cloner.has_ended();
            if let Err(failure) = cloner::remove(&made, &self.file) {
                crate::base::logging::message(failure);
            }
            if hangs {
                crate::base::logging::message(format_args!(
                    "the clone, process {}, still hangs in the kernel",
                    self.cloner.pid()
                ));
            }
        } else if let Err(error) = cloner::remove_own(&made, &self.file) {
            crate::base::logging::message(format_args!(
                "'{}', which is no snapshot, cannot be removed: {error}",
                made.display()
            ));
        }
    }
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Fails if the daemon does not have this file open: the file was replaced, or the daemon, which an intruder may
/// control, names a file that is not its own, such as the image of another guest. Where we cannot check it, we trust a
/// daemon that is root's or ours; as root we trust no other user's.
fn check_served(daemon: Daemon, image: &Path, metadata: &fs::Metadata) -> Result<(), Failure> {
    let shown = image.display();
    let why = match daemon.pid.and_then(|pid| is_open(pid, metadata)) {
        Some(true) => return Ok(()),
        Some(false) => format!(
            "the file '{shown}' is not the one that the daemon has open: it was replaced since the daemon started"
        ),
        None if daemon.is_trusted || !rustix::process::geteuid().is_root() => return Ok(()),
        None => format!(
            "whether the daemon, which is another user's, has '{shown}' open cannot be checked: run virtioblkctl in its \
             process namespace, or give copy:"
        ),
    };
    Err(Failure::new("image", why))
}

/// Whether the process has this file open. `None`: we may not list its descriptors.
fn is_open(pid: u32, file: &fs::Metadata) -> Option<bool> {
    let mut open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    // If a link does not exist any more, its descriptor was closed meanwhile.
    Some(open.any(|link| {
        let metadata = link.and_then(|link| fs::metadata(link.path()));
        metadata.is_ok_and(|found| (found.dev(), found.ino()) == (file.dev(), file.ino()))
    }))
}
