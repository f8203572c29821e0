//! What librados and librbd open, at first and when they connect anew: configuration, keyrings, name resolution, parts of
//! themselves; and where they write: their log and their admin socket.

use std::fs;
use std::path::{Path, PathBuf};

use crate::backend::rbd::RbdOptions;

/// Read wherever Ceph runs.
const READ: &[&str] = &[
    "/etc/ceph",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/localtime",
    "/etc/ssl",
    "/etc/ld.so.cache",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/lib",
    "/lib64",
    "/proc",
    "/dev/urandom",
    "/dev/random",
    "/dev/null",
];
/// Written wherever Ceph runs: logs, admin sockets.
const WRITTEN: &[&str] = &["/var/log/ceph", "/run/ceph"];

/// Paths to read, and directories to create files and sockets in. Those that do not exist are left out.
pub(super) fn paths(options: &RbdOptions) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let mut read: Vec<PathBuf> = READ.iter().map(PathBuf::from).collect();
    let mut written: Vec<PathBuf> = WRITTEN.iter().map(PathBuf::from).collect();
    let conf = options.conf.clone().unwrap_or_else(|| "/etc/ceph/ceph.conf".into());
    // What Ceph's own reader cannot read is its to complain of.
    let text = fs::read_to_string(&conf).unwrap_or_default();
    let given = options.options.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in text.lines().filter_map(|line| line.split_once('=')).chain(given) {
        let value = value.trim().trim_matches('"');
        if !value.starts_with('/') {
            continue;
        }
        match name.trim().replace([' ', '-'], "_").as_str() {
            "log_file" | "admin_socket" => written.extend(directory(value)),
            _ => read.extend(directory(value)),
        }
    }
    read.push(conf);
    read.extend(options.library_path.clone());
    read.extend(options.encryption.as_ref().map(|(_, passphrase)| passphrase.clone()));
    for paths in [&mut read, &mut written] {
        paths.retain(|path| path.exists());
    }
    (read, written)
}

/// The directory of a value, in front of what Ceph puts in (`$name` and its like).
fn directory(value: &str) -> Option<PathBuf> {
    let fixed = value.split('$').next()?;
    let directory = match fixed.ends_with('/') {
        true => Path::new(fixed),
        false => Path::new(fixed).parent()?,
    };
    // A value at the root would open everything.
    (directory != Path::new("/")).then(|| directory.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_in_front_of_what_ceph_puts_in() {
        assert_eq!(directory("/x/run/$name.$pid.asok"), Some("/x/run".into()));
        assert_eq!(directory("/x/$cluster/keyring"), Some("/x".into()));
        assert_eq!(directory("/x/keyring"), Some("/x".into()));
        assert_eq!(directory("/$name"), None);
    }
}
