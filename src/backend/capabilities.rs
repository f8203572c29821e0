//! What some images can do besides what every [`Backend`](super::Backend) does. Each trait is one capability; its
//! defaults are those of an image that does not have it (`NONE`).

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{BufferUse, ImageEnds, Notices};
use crate::disk::{ImageSnapshots, ImageStatus};

/// What is known of an image besides its geometry.
pub trait ImageInfo {
    /// The absolute path of the file or block device, if there is one. For the status, and for snapshots by other
    /// programs.
    fn path(&self) -> Option<&Path> {
        None
    }

    /// The image's first and last bytes, which show whether it has another format than raw; empty when the back-end
    /// cannot read them. Reads a few KiB, and may block for as long as the image's storage hangs. Called by a thread of
    /// its own.
    fn ends(&self) -> io::Result<ImageEnds> {
        Ok(ImageEnds::default())
    }

    /// How the medium reads the buffer of a write. Called once, when the server is put together.
    fn buffer_use(&self) -> BufferUse {
        BufferUse::ReadsOnce("nothing is below that would read a write's buffer twice".into())
    }

    /// What the status says of the image besides its geometry. Called by the control thread; does not block on I/O.
    fn image_status(&self) -> ImageStatus {
        ImageStatus::default()
    }
}

/// Which process may use an image that several processes or hosts can open.
pub trait ImageClaim {
    /// Claims the image for a guest: the first virtqueue is about to start. An error keeps it from running. Called
    /// again before [`ImageClaim::deactivate`] when a hold or a copy has kept the image meanwhile. Called by the
    /// vhost-user thread; may block.
    fn activate(&self) -> io::Result<()> {
        Ok(())
    }

    /// Claims the image for an operator's hold while no virtqueue runs, if only a claim keeps other hosts from changing it.
    /// Returns `false` when there was nothing to do; then no [`ImageClaim::deactivate`] follows. An error: another
    /// process has the image. Called by a thread of the hold; may block.
    fn activate_for_hold(&self) -> io::Result<bool> {
        Ok(false)
    }

    /// Whether other hosts can change the image after [`ImageClaim::deactivate`], and could not before. Called by any
    /// thread.
    fn gives_way(&self) -> bool {
        false
    }

    /// Releases the image. The last virtqueue has stopped, everything that it acknowledged was synced as its mode promises,
    /// and no hold is on. Called by the vhost-user thread, or by a thread of a hold or a copy, after
    /// [`ImageClaim::activate`] and not during it; may block.
    fn deactivate(&self) {}
}

/// The image's part in an upgrade in place, in which another process continues with it.
pub trait ImageUpgrade {
    /// Names the image, by whatever path it was opened, so that two processes can tell whether they have the same one.
    /// `None`: no other process can open it. Called by any thread.
    fn identity(&self) -> Option<String> {
        None
    }

    /// Returns when [`ImageClaim::deactivate`] will be quick. The guest still runs. Blocks for seconds at most. Called
    /// by the thread that hands over.
    fn wait_until_releasable(&self) {}

    /// Releases what excludes other processes even without a guest. Comes after [`ImageClaim::deactivate`] and a good
    /// sync. If the other process gives up, [`ImageUpgrade::take_over`] follows before any I/O. Called by the thread
    /// that hands over.
    fn hand_over(&self) {}

    /// Takes what the other process released by [`ImageUpgrade::hand_over`], or takes it back. An error: a third
    /// process was faster. Called by the thread that hands over or takes over.
    fn take_over(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What the image's own store does: it reports changes that other clients make, and takes snapshots.
pub trait ImageStore {
    /// Reports to `notices` what happens from now on. Called once, when the server is put together, before the first
    /// queue is opened. The back-end drops `notices` in [`ImageStore::stop_notices`].
    fn start_notices(&self, notices: Arc<dyn Notices>) {
        drop(notices);
    }

    /// Ends the reports: none comes after this returns, and every quiesce has got its consent or refusal. May block for
    /// a moment. Called by main when the daemon ends.
    fn stop_notices(&self) {}

    /// Snapshots that the store takes, if it can. Called by the control thread.
    fn snapshots(&self) -> Option<Arc<dyn ImageSnapshots>> {
        None
    }
}

/// The capabilities of an image that has none.
pub(super) struct NoCapabilities;

/// The only value of [`NoCapabilities`].
pub(super) static NONE: NoCapabilities = NoCapabilities;

impl ImageInfo for NoCapabilities {}
impl ImageClaim for NoCapabilities {}
impl ImageUpgrade for NoCapabilities {}
impl ImageStore for NoCapabilities {}
