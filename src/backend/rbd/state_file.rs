//! The state file, which names the owner of the image's lock. The cluster releases the lock of a daemon that was killed only
//! after half a minute. Its successor need not wait if it knows for certain that the owner is dead.
//!
//! It knows that if three conditions hold. The file names the owner as the cluster prints it (an address and a random number
//! of that one connection). The cluster still names the same owner. And we have the file's lock (flock(2)), which the owner
//! held until it died. The cluster shuts the dead owner out before it does anything else.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::base::rate_limit::{IMAGE_LOG, log_limited};

/// The largest state file, which has room for a name and an address. A larger file is not a state file.
const MAX_FILE_BYTES: u64 = 8 << 10;

/// The open state file, locked for as long as this process lives.
pub(super) struct StateFile {
    file: File,
    path: PathBuf,
    image: String,
}

impl StateFile {
    /// Opens or creates the file and locks it. The error says what failed, why and how to fix it.
    pub(super) fn open(path: &Path, image: &str) -> Result<Self, String> {
        let file = StateFile::open_unlocked(path, image)?;
        file.lock()?;
        Ok(file)
    }

    /// Opens or creates the file without locking it, for a process that takes over from the one that has the lock.
    /// [`StateFile::lock`] follows later.
    pub(super) fn open_unlocked(path: &Path, image: &str) -> Result<Self, String> {
        let failed = |error: io::Error| format!("--rbd-state-file {}: {error}", path.display());
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.len() > MAX_FILE_BYTES {
            return Err(format!(
                "--rbd-state-file {}: it is another kind of file; name a file of its own",
                path.display()
            ));
        }
        Ok(StateFile { file, path: path.to_path_buf(), image: image.to_string() })
    }

    /// Locks the file, or keeps it locked. Fails if another process has locked it.
    pub(super) fn lock(&self) -> Result<(), String> {
        let path = self.path.display();
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(format!(
                "--rbd-state-file {path}: another virtioblkd uses it: end that one, or give each disk a file of its own"
            )),
            Err(errno) => Err(format!("--rbd-state-file {path}: {}", io::Error::from(errno))),
        }
    }

    /// Unlocks the file for a process that takes over from this one.
    pub(super) fn unlock(&self) {
        if let Err(errno) = flock(&self.file, FlockOperation::Unlock) {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "--rbd-state-file {}: {errno}: no other process can have it",
                self.path.display()
            );
        }
    }

    /// Returns the owner that the file names. It is a client of this image that is dead, because its file lock is ours.
    pub(super) fn dead_owner(&self) -> Option<String> {
        let mut text = String::new();
        let read = (&self.file).rewind().and_then(|()| (&self.file).take(MAX_FILE_BYTES).read_to_string(&mut text));
        if let Err(error) = read {
            log_limited!(IMAGE_LOG, Warn, "{}: {error}: a dead owner of the lock is waited for", self.path.display());
            return None;
        }
        let (image, owner) = text.strip_suffix('\n')?.split_once('\n')?;
        (image == self.image && !owner.is_empty() && !owner.contains('\n')).then(|| owner.to_string())
    }

    /// Writes our own name as owner; `None`: this process is no longer the owner. A failure is harmless: the successor
    /// waits for the lock.
    pub(super) fn write(&self, owner: Option<&str>) {
        let text = owner.map_or(String::new(), |owner| format!("{}\n{owner}\n", self.image));
        let written = self.file.set_len(0).and_then(|()| {
            (&self.file).rewind()?;
            (&self.file).write_all(text.as_bytes())
        });
        if let Err(error) = written {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: {error}: a restart after a crash will wait for the lock",
                self.path.display()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// Opens the file when its lock is free: a program that another test starts shares the lock until its exec.
    fn open_soon(path: &Path, image: &str) -> StateFile {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            match StateFile::open(path, image) {
                Err(error) if error.contains("another virtioblkd") && Instant::now() < end => {}
                opened => return opened.unwrap(),
            }
        }
    }

    #[test]
    fn the_state_file_names_the_dead_owner_of_the_same_image_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let state = StateFile::open(&path, "p/i").unwrap();
        assert_eq!(state.dead_owner(), None);
        state.write(Some("10.0.0.1:0/4711"));
        let Err(error) = StateFile::open(&path, "p/i") else { panic!("two processes have the lock") };
        assert!(error.contains("another virtioblkd"), "{error}");
        // A process that takes over gets the lock after this one has unlocked the file.
        let next = StateFile::open_unlocked(&path, "p/i").unwrap();
        assert!(next.lock().is_err());
        state.unlock();
        next.lock().unwrap();
        assert!(state.lock().is_err());
        drop((state, next));
        assert_eq!(open_soon(&path, "p/i").dead_owner().as_deref(), Some("10.0.0.1:0/4711"));
        assert_eq!(open_soon(&path, "p/j").dead_owner(), None);
        let state = open_soon(&path, "p/i");
        state.write(None);
        assert_eq!(state.dead_owner(), None);
    }

    #[test]
    fn a_half_written_or_foreign_file_names_no_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        for text in ["", "p/i", "p/i\n", "p/i\n10.0.0.1:0/47", "p/i\n\n", "p/i\na\nb\n", "\u{fffd}\n1\n"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(open_soon(&path, "p/i").dead_owner(), None, "{text:?}");
        }
        std::fs::write(&path, [b'\n'; 10000]).unwrap();
        assert!(StateFile::open(&path, "p/i").is_err());
        assert!(StateFile::open(dir.path(), "p/i").is_err());
    }
}
