//! The rights that a daemon needs once it is in the sandbox. The server derives them from the configuration.

use std::path::PathBuf;

use super::SandboxLevel;
use crate::backend::rbd::RbdOptions;

/// The rights that the image and the options need in the sandbox.
#[derive(Debug)]
pub struct Permissions {
    /// How strict the sandbox is (`--sandbox`).
    pub level: SandboxLevel,
    /// The user to become (`--user`).
    pub user: Option<String>,
    /// The raw file or block device, which each virtqueue opens for itself.
    pub image: Option<PathBuf>,
    /// The image is not written to.
    pub read_only: bool,
    /// What this kind of image needs.
    pub needs: ImageNeeds,
    /// The options of an RBD image, from which follows what librbd reads and writes. `None`: the image is no RBD image.
    pub ceph: Option<RbdOptions>,
    /// Directories in which copies are created (`--copy-dir`).
    pub copy_dirs: Vec<PathBuf>,
    /// The directory for old data while a copy's target is slow (`--scratch`).
    pub scratch: Option<PathBuf>,
    /// The daemon takes a guest over from another one, which has warned of what the sandbox cannot do.
    pub is_take_over: bool,
    /// Files that are removed at the end, each with the option that names it.
    pub removable: Vec<(&'static str, PathBuf)>,
}

impl Permissions {
    /// Whether all io_urings that the daemon will need must be created before [`super::Sandbox::enter`], because the
    /// filter forbids to create one later.
    pub fn makes_io_urings_first(&self) -> bool {
        self.level == SandboxLevel::On && self.needs.io_uring
    }
}

/// The rights that a kind of image needs in the sandbox.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImageNeeds {
    /// The image is reached over a network.
    pub network: bool,
    /// The back-end's queues use io_urings.
    pub io_uring: bool,
}
