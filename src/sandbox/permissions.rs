//! What one daemon may do once the sandbox is entered. The server fills it in from the configuration.

use std::path::PathBuf;

use super::Level;
use crate::backend::rbd::RbdOptions;

/// What the image and the options ask of the sandbox.
#[derive(Debug)]
pub(crate) struct Permissions {
    /// How much is given up (`--sandbox`).
    pub(crate) level: Level,
    /// The user to become (`--user`).
    pub(crate) user: Option<String>,
    /// The raw file or block device, which each virtqueue opens for itself.
    pub(crate) image: Option<PathBuf>,
    /// The image is not written to.
    pub(crate) read_only: bool,
    /// What this kind of image needs.
    pub(crate) needs: Needs,
    /// An RBD image: what librbd reads and writes follows from its options.
    pub(crate) ceph: Option<RbdOptions>,
    /// Directories in which copies are created (`--copy-dir`).
    pub(crate) copy_dirs: Vec<PathBuf>,
    /// The directory for old data while a copy's target is slow (`--scratch`).
    pub(crate) scratch: Option<PathBuf>,
    /// Files that are removed at the end, each with the option that names it.
    pub(crate) removable: Vec<(&'static str, PathBuf)>,
}

impl Permissions {
    /// Whether all io_urings that the daemon will need must be made before [`super::Sandbox::enter`]: its filter lets none
    /// be made.
    pub(crate) fn makes_io_urings_first(&self) -> bool {
        self.level == Level::On && self.needs.io_uring
    }
}

/// What a kind of image asks of the sandbox.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Needs {
    /// The image is reached over a network.
    pub(crate) network: bool,
    /// Its virtqueues use io_urings.
    pub(crate) io_uring: bool,
}
