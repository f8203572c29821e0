//! Derives from the configuration what the sandbox must permit.

use std::path::Path;

use crate::config::{BackendKind, Config, Listen};
use crate::sandbox::permissions::{ImageNeeds, Permissions};

/// Returns the permissions that the daemon needs with this configuration.
pub fn of(config: &Config) -> Permissions {
    let (network, io_uring) = match &config.backend {
        BackendKind::File(_) | BackendKind::Slow { .. } => (false, true),
        BackendKind::Null(_) | BackendKind::Mem(_) => (false, false),
        BackendKind::Rbd(_) => (true, false),
    };
    let ceph = match &config.backend {
        BackendKind::Rbd(options) => Some(options.as_ref().clone()),
        _ => None,
    };
    let socket = match &config.listen {
        Listen::Path { path, .. } => Some(path),
        Listen::Fd(_) => None,
    };
    let control = config.control.as_ref().map(|control| &control.path);
    let removable = [("--socket-path", socket), ("--control-path", control), ("--pid-file", config.pid_file.as_ref())];
    Permissions {
        level: config.sandbox,
        user: config.user.clone(),
        image: config.backend.file().map(Path::to_path_buf),
        read_only: config.read_only,
        needs: ImageNeeds { network, io_uring },
        ceph,
        copy_dirs: config.copy_dirs.clone(),
        scratch: config.scratch.as_ref().map(|scratch| scratch.directory.clone()),
        is_take_over: config.take_over.is_some(),
        removable: removable.into_iter().filter_map(|(option, path)| Some((option, path?.clone()))).collect(),
    }
}
