//! One change of a domain's disks at a time. Each domain has a file whose lock an attach, detach, apply or convert
//! holds from its first look at the domain to its last change of the description.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, FdFlags, fcntl_setfd};

/// How long to wait for another change of the same domain. A detach may wait longer than that for its guest.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the lock is tried meanwhile.
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

/// The lock of one domain's changes. Dropping it removes the file and releases the lock.
pub(super) struct DomainLock {
    file: File,
    path: PathBuf,
}

impl DomainLock {
    /// Waits for the lock of the file at `path`, for at most [`LOCK_TIMEOUT`]. `domain`: the domain's name.
    pub(super) fn take(path: &Path, domain: &str) -> Result<Self, String> {
        Self::take_within(path, domain, LOCK_TIMEOUT)
    }

    fn take_within(path: &Path, domain: &str, timeout: Duration) -> Result<Self, String> {
        let deadline = Instant::now() + timeout;
        loop {
            let file = try_lock(path).map_err(|error| format!("cannot lock {}: {error}", path.display()))?;
            if let Some(file) = file {
                return Ok(DomainLock { file, path: path.to_owned() });
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "another attach, detach, apply or convert changes the disks of the domain {domain}, or the virsh of one that was \
                     killed still runs: run this command again when it has ended ('fuser {}' shows the process)",
                    path.display()
                ));
            }
            thread::sleep(LOCK_INTERVAL);
        }
    }

    /// Runs `act`. The lock lives as long as the processes that `act` starts, even if this process is killed meanwhile:
    /// a virsh that is left behind still changes the domain.
    pub(super) fn shared_with_children<T>(&self, act: impl FnOnce() -> T) -> T {
        // Without the flag's change only a virsh that outlives us is not seen.
        let _ = fcntl_setfd(&self.file, FdFlags::empty());
        let result = act();
        let _ = fcntl_setfd(&self.file, FdFlags::CLOEXEC);
        result
    }
}

impl Drop for DomainLock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the file of a change that was killed, unless a process still holds its lock.
pub(super) fn remove_unused(path: &Path) {
    if path.exists()
        && let Ok(Some(file)) = try_lock(path)
    {
        drop(DomainLock { file, path: path.to_owned() });
    }
}

/// Returns the locked file, or `None` while another process holds the lock.
fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    }
    // The holder before us removes the file before it releases the lock: its lock keeps nobody out any more.
    let (ours, current) = (file.metadata()?, fs::symlink_metadata(path));
    Ok(current.is_ok_and(|current| (current.dev(), current.ino()) == (ours.dev(), ours.ino())).then_some(file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const SHORT: Duration = Duration::from_millis(100);

    #[test]
    fn a_second_change_of_a_domain_is_refused_until_the_first_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("uuid.changes");
        let first = DomainLock::take(&path, "vm1").unwrap();
        let refused = DomainLock::take_within(&path, "vm1", SHORT).map(drop).unwrap_err();
        assert!(refused.contains("domain vm1") && refused.contains("run this command again"), "{refused}");
        remove_unused(&path);
        assert!(path.exists());
        drop(first);
        assert!(!path.exists());
        fs::write(&path, "").unwrap();
        remove_unused(&path);
        assert!(!path.exists());
        // A program that another test starts shares the lock until its exec.
        drop(DomainLock::take_within(&path, "vm1", Duration::from_secs(30)).unwrap());
    }

    #[test]
    fn the_lock_lives_as_long_as_a_child_that_shares_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("uuid.changes");
        let lock = DomainLock::take(&path, "vm1").unwrap();
        let mut child = lock.shared_with_children(|| Command::new("sleep").arg("1000").spawn().unwrap());
        let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
        // As if this process were killed: the descriptor is closed, and the file stays.
        let DomainLock { file, .. } = &lock;
        let _ = fcntl_setfd(file, FdFlags::CLOEXEC);
        let copy = directory.path().join("copy");
        fs::hard_link(&path, &copy).unwrap();
        drop(lock);
        fs::rename(&copy, &path).unwrap();
        assert!(DomainLock::take_within(&path, "vm1", SHORT).is_err());
        child.kill().and_then(|()| child.wait()).unwrap();
        let taken = DomainLock::take_within(&path, "vm1", Duration::from_secs(30));
        other.kill().and_then(|()| other.wait()).unwrap();
        assert!(taken.is_ok());
    }
}
