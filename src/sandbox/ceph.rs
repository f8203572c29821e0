//! What librados and librbd open, at first and when they connect anew: configuration, keyrings, name resolution, parts
//! of themselves; and where they write: their log and their admin socket.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::backend::rbd::RbdOptions;

/// The paths that Ceph reads everywhere.
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
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/sys/kernel",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/dev/urandom",
    "/dev/random",
    "/dev/null",
];
/// The directories that Ceph writes to everywhere: logs, admin sockets.
const WRITTEN: &[&str] = &["/var/log/ceph", "/run/ceph"];

/// Paths to read, and directories to create files and sockets in. Those that do not exist are left out.
pub(super) fn paths(options: &RbdOptions) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let mut read: Vec<PathBuf> = READ.iter().map(PathBuf::from).collect();
    let mut written: Vec<PathBuf> = WRITTEN.iter().map(PathBuf::from).collect();
    let confs = configurations(options, |name| env::var_os(name));
    // Ceph itself reports what it cannot read. It reads the first file that exists.
    let text = confs.iter().find_map(|conf| fs::read_to_string(conf).ok()).unwrap_or_default();
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
    read.extend(confs);
    read.extend(options.library_path.clone());
    read.extend(options.encryption.as_ref().map(|(_, passphrase)| passphrase.clone()));
    for paths in [&mut read, &mut written] {
        paths.retain(|path| path.exists());
    }
    (read, written)
}

/// The files that librados takes its configuration from, the first of them that exists (conf_files and `home` in its
/// common/config.cc).
fn configurations(options: &RbdOptions, environment: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    if let Some(conf) = &options.conf {
        return vec![conf.clone()];
    }
    if let Some(conf) = environment("CEPH_CONF") {
        return vec![conf.into()];
    }
    let home = environment("HOME").map(|home| Path::new(&home).join(".ceph/ceph.conf"));
    [Some("/etc/ceph/ceph.conf".into()), home, Some("ceph.conf".into())].into_iter().flatten().collect()
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
    use crate::engine::CacheMode;

    #[test]
    fn the_configuration_is_where_ceph_looks_for_it() {
        let mut options = RbdOptions::new("p/i".parse().unwrap(), CacheMode::None);
        let none = |_: &str| None;
        let home = |name: &str| (name == "HOME").then(|| "/h".into());
        let both = |name: &str| Some(if name == "HOME" { "/h".into() } else { "/c".into() });
        assert_eq!(configurations(&options, none), [Path::new("/etc/ceph/ceph.conf"), Path::new("ceph.conf")]);
        assert_eq!(configurations(&options, home)[1], Path::new("/h/.ceph/ceph.conf"));
        assert_eq!(configurations(&options, both), [Path::new("/c")]);
        options.conf = Some("/o".into());
        assert_eq!(configurations(&options, both), [Path::new("/o")]);
    }

    #[test]
    fn the_directory_in_front_of_what_ceph_puts_in() {
        assert_eq!(directory("/x/run/$name.$pid.asok"), Some("/x/run".into()));
        assert_eq!(directory("/x/$cluster/keyring"), Some("/x".into()));
        assert_eq!(directory("/x/keyring"), Some("/x".into()));
        assert_eq!(directory("/$name"), None);
    }
}
