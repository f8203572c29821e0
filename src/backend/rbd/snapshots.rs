//! Snapshots that the daemon has the cluster take.

use std::sync::Arc;

use super::super::Errno;
use super::Shared;
use crate::disk::{CopyError, ImageSnapshots};

/// The snapshots of an image. The caller holds the disk, so our own quiesce watch gets no request.
pub(super) struct Snapshots(pub Arc<Shared>);

impl ImageSnapshots for Snapshots {
    fn create(&self, name: &str) -> Result<(), CopyError> {
        if name.is_empty() || name.contains(['@', '/', '\0']) {
            let message = format!("'{name}' is no name for a snapshot of {}: use text without @ and /", self.0.name);
            return Err(CopyError { code: "store", message });
        }
        self.0.image.create_snapshot(name).map_err(|errno| {
            self.0.record_result(Err(errno));
            let full = self.full_name(name);
            match errno {
                Errno(libc::EEXIST) => CopyError {
                    code: "exists",
                    message: format!(
                        "the snapshot {full} exists already: choose another name, or remove it (rbd snap rm)"
                    ),
                },
                Errno(libc::EBUSY) => CopyError {
                    code: "busy",
                    message: format!(
                        "the snapshot {full} cannot be made: another operation holds the image; try again"
                    ),
                },
                _ => {
                    CopyError { code: "store", message: failed(&format!("the snapshot {full} cannot be made"), errno) }
                }
            }
        })
    }

    fn remove(&self, name: &str) -> Result<(), CopyError> {
        self.0.image.remove_snapshot(name).map_err(|errno| {
            self.0.record_result(Err(errno));
            let what = format!("the snapshot {} cannot be removed", self.full_name(name));
            CopyError {
                code: if errno == Errno(libc::EBUSY) { "busy" } else { "store" },
                message: failed(&what, errno),
            }
        })
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}@{name}", self.0.name)
    }
}

fn failed(what: &str, errno: Errno) -> String {
    let fix = match errno.0 {
        libc::EPERM | libc::EACCES => "; the Ceph user may not: give it 'profile rbd' on the pool",
        libc::EROFS => "; another client has the image's lock (rbd lock ls)",
        libc::ESHUTDOWN => "; this client was fenced: see its status",
        libc::ENOSPC | libc::EDQUOT => "; the pool is full: make room (ceph df)",
        _ => "; see the state of the cluster (ceph status)",
    };
    format!("{what}: {}{fix}", super::io_error(errno))
}
