//! The options of a Ceph RBD image.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::values::{self, Switch};
use super::{BackendKind, ConfigError, refuse};
use crate::backend::rbd::{Encryption, RbdLock, RbdName, RbdOptions, RbdQuiesce};
use crate::engine::CacheMode;

/// The heading of these options in `--help`.
const HEADING: &str = "Ceph RBD";

/// The default of `--rbd-quiesce-timeout`, in seconds.
const DEFAULT_QUIESCE_TIMEOUT: u64 = 30;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = HEADING)]
pub(super) struct RbdArgs {
    /// The RBD image to serve instead of --blk-file: POOL/IMAGE or POOL/NAMESPACE/IMAGE; append @SNAP to serve a snapshot
    #[arg(long, value_name = "NAME", value_parser = values::rbd_name)]
    pub(super) rbd: Option<RbdName>,

    /// The cluster's configuration file [default: as for the rbd command, /etc/ceph/ceph.conf]
    #[arg(long, value_name = "FILE")]
    pub(super) ceph_conf: Option<PathBuf>,

    /// The Ceph user, without "client." [default: admin]
    #[arg(long, value_name = "ID", value_parser = values::ceph_user)]
    ceph_user: Option<String>,

    /// An option of librbd or librados, such as `rbd_cache_size=67108864`; may be given several times
    #[arg(long, value_name = "OPTION=VALUE", value_parser = values::rbd_option)]
    rbd_option: Vec<(String, String)>,

    /// Only warn, instead of refusing to start, if options stored in the pool or the image contradict --cache
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = values::truth)]
    rbd_allow_override: Option<Switch>,

    /// Whether to take the image's lock while a guest uses it: auto (if the image has the feature), exclusive (always), none
    /// (clients take turns) [default: auto]
    #[arg(long, value_name = "auto|exclusive|none", value_parser = values::rbd_lock)]
    rbd_lock: Option<RbdLock>,

    /// Write to this file which client has the lock, so that a restart after a crash need not wait for the dead owner
    #[arg(long, value_name = "PATH")]
    pub(super) rbd_state_file: Option<PathBuf>,

    /// The format of the image's encryption: luks, luks1 or luks2
    #[arg(long, value_name = "FORMAT", value_parser = values::rbd_encryption)]
    rbd_encryption: Option<Encryption>,

    /// The file with the passphrase of an encrypted image; a newline at its end is ignored
    #[arg(long, value_name = "FILE")]
    pub(super) rbd_passphrase_file: Option<PathBuf>,

    /// Whether to quiesce the disk for snapshots of the image that other clients take: on, attended (and refuse them while no
    /// virtioblkctl attend is connected) or off [default: on]
    #[arg(long, value_name = "on|attended|off", value_parser = values::rbd_quiesce)]
    rbd_quiesce: Option<RbdQuiesce>,

    /// How long such a snapshot may wait for the quiesce, 1 to 45 seconds [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = values::quiesce_timeout)]
    rbd_quiesce_timeout: Option<u64>,

    /// The directory of librados.so.2 and librbd.so.1 [default: the system's library path]
    #[arg(long, value_name = "DIR")]
    ceph_library_path: Option<PathBuf>,
}

/// The other options that concern the image.
pub(super) struct Common {
    pub mode: CacheMode,
    pub read_only: bool,
    pub logical_block_size: Option<u32>,
    pub discard_unmap: bool,
    /// There is a control socket.
    pub has_control: bool,
}

impl RbdArgs {
    /// The options whose values are paths.
    pub(super) fn paths(&self) -> [(&'static str, Option<&Path>); 3] {
        [
            ("--ceph-conf", self.ceph_conf.as_deref()),
            ("--rbd-state-file", self.rbd_state_file.as_deref()),
            ("--rbd-passphrase-file", self.rbd_passphrase_file.as_deref()),
        ]
    }

    /// Refuses the other options of this group, which need `--rbd`.
    pub(super) fn refuse_without_image(&self) -> Result<(), ConfigError> {
        let given = [
            ("--ceph-conf", self.ceph_conf.is_some()),
            ("--ceph-user", self.ceph_user.is_some()),
            ("--rbd-option", !self.rbd_option.is_empty()),
            ("--rbd-allow-override", self.rbd_allow_override.is_some()),
            ("--rbd-lock", self.rbd_lock.is_some()),
            ("--rbd-state-file", self.rbd_state_file.is_some()),
            ("--rbd-encryption", self.rbd_encryption.is_some()),
            ("--rbd-passphrase-file", self.rbd_passphrase_file.is_some()),
            ("--rbd-quiesce", self.rbd_quiesce.is_some()),
            ("--rbd-quiesce-timeout", self.rbd_quiesce_timeout.is_some()),
            ("--ceph-library-path", self.ceph_library_path.is_some()),
        ];
        match given.into_iter().find(|(_, is_given)| *is_given) {
            Some((option, _)) => refuse(format!("{option} is an option for Ceph RBD: it needs --rbd POOL/IMAGE")),
            None => Ok(()),
        }
    }

    /// The options of the image `name`.
    pub(super) fn backend(&self, name: &RbdName, common: Common) -> Result<BackendKind, ConfigError> {
        let encryption = match (self.rbd_encryption, &self.rbd_passphrase_file) {
            (Some(format), Some(path)) => Some((format, path.clone())),
            (None, None) => None,
            (Some(_), None) => return refuse("--rbd-encryption needs --rbd-passphrase-file FILE"),
            (None, Some(_)) => return refuse("--rbd-passphrase-file needs --rbd-encryption luks, luks1 or luks2"),
        };
        if self.rbd_state_file.is_some() && self.rbd_lock == Some(RbdLock::None) {
            return refuse("--rbd-state-file concerns the image's lock: leave out --rbd-lock none");
        }
        if self.rbd_quiesce == Some(RbdQuiesce::Attended) && !common.has_control {
            return refuse("--rbd-quiesce attended needs --control-path PATH, to which virtioblkctl attend connects");
        }
        let defaults = RbdOptions::new(name.clone(), common.mode);
        Ok(BackendKind::Rbd(Box::new(RbdOptions {
            conf: self.ceph_conf.clone(),
            user: self.ceph_user.clone().unwrap_or_else(|| defaults.user.clone()),
            options: self.rbd_option.clone(),
            allow_override: self.rbd_allow_override.is_some_and(|switch| switch.0),
            read_only: common.read_only,
            logical_block_size: common.logical_block_size.unwrap_or(defaults.logical_block_size),
            discard_unmap: common.discard_unmap,
            lock: self.rbd_lock.unwrap_or_default(),
            state_file: self.rbd_state_file.clone(),
            encryption,
            quiesce: self.rbd_quiesce.unwrap_or_default(),
            quiesce_timeout: Duration::from_secs(self.rbd_quiesce_timeout.unwrap_or(DEFAULT_QUIESCE_TIMEOUT)),
            library_path: self.ceph_library_path.clone(),
            ..defaults
        })))
    }
}
