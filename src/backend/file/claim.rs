//! Which process may use an image: the image locks when a guest comes and goes, and in an upgrade in place.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::Advice;

use super::{FileBackend, FileOptions, Locking, open, qemu_locks, resize};
use crate::backend::{ImageClaim, ImageUpgrade};

/// The image locks of an open image.
pub(super) struct ImageLocks {
    mode: Locking,
    /// The locks of [`Locking::Auto`] are released for another process, or that process still has them.
    released: AtomicBool,
}

impl ImageLocks {
    pub(super) fn new(options: &FileOptions) -> Self {
        ImageLocks { mode: options.locking, released: AtomicBool::new(options.lock_later) }
    }
}

impl ImageUpgrade for FileBackend {
    fn identity(&self) -> Option<String> {
        // By its numbers, because a device or a file may have many paths.
        let found = rustix::fs::fstat(&self.image.file.fd).ok()?;
        Some(match self.image.file.is_device {
            true => format!("device {}", found.st_rdev),
            false => format!("file {}:{}", found.st_dev, found.st_ino),
        })
    }

    fn hand_over(&self) {
        if self.image.image_locks.mode == Locking::Auto {
            self.image.image_locks.released.store(true, Ordering::Release);
            qemu_locks::unlock_image(self.image.file.fd.as_fd());
        }
    }

    fn take_over(&self) -> io::Result<()> {
        let image = &self.image;
        if image.image_locks.mode == Locking::Auto && image.image_locks.released.load(Ordering::Acquire) {
            open::lock(&image.file.path, image.file.fd.as_fd(), image.geometry.read_only)
                .map_err(|error| io::Error::other(error.to_string()))?;
            image.image_locks.released.store(false, Ordering::Release);
        }
        Ok(())
    }
}

impl ImageClaim for FileBackend {
    fn activate(&self) -> io::Result<()> {
        // If the locks could not be taken back after a failed hand-over, this retries before a guest's virtqueues run.
        self.take_over()?;
        let image = &self.image;
        if image.image_locks.mode == Locking::InUse {
            open::lock(&image.file.path, image.file.fd.as_fd(), image.geometry.read_only)
                .map_err(|error| io::Error::other(error.to_string()))?;
            // Another host may have written the image since, so clean cached data must be read again.
            if let Err(error) = rustix::fs::fadvise(&image.file.fd, 0, None, Advice::DontNeed) {
                log::debug!("{}: cannot drop its cached data: {error}", image.file.name);
            }
        }
        resize::notice_growth(image);
        Ok(())
    }

    fn activate_for_hold(&self) -> io::Result<bool> {
        match self.image.image_locks.mode {
            Locking::InUse => self.activate().map(|()| true),
            // If another process was to take over and did not, and the locks could not be taken back at once.
            Locking::Auto => self.take_over().map(|()| false),
            Locking::Off => Ok(false),
        }
    }

    fn gives_way(&self) -> bool {
        self.image.image_locks.mode == Locking::InUse
    }

    fn deactivate(&self) {
        if self.image.image_locks.mode == Locking::InUse {
            qemu_locks::unlock_image(self.image.file.fd.as_fd());
        }
    }
}
