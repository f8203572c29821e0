//! The paths that librados and librbd open, at the start and when they reconnect: configuration, keyrings, name
//! resolution and their own plugins; and the directories of their log and their admin socket, which they write.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::backend::rbd::RbdOptions;

/// The paths that Ceph reads on every host.
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
/// The directories that Ceph writes to on every host, for logs and admin sockets.
const WRITTEN: &[&str] = &["/var/log/ceph", "/run/ceph"];

/// Returns the paths to read, and the directories in which to create files and sockets, as far as they exist.
pub(super) fn paths(options: &RbdOptions) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let mut read: Vec<PathBuf> = READ.iter().map(PathBuf::from).collect();
    let mut written: Vec<PathBuf> = WRITTEN.iter().map(PathBuf::from).collect();
    let confs = configurations(options, |name| env::var_os(name));
    // Ceph itself reports a file that it cannot read. It reads the first file that exists.
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

/// Returns the files of which librados reads the first that exists as its configuration (conf_files and `home` in its
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

/// Returns the directory in an option's value, before the first variable that Ceph replaces (`$name`).
fn directory(value: &str) -> Option<PathBuf> {
    let fixed = value.split('$').next()?;
    let directory = match fixed.ends_with('/') {
        true => Path::new(fixed),
        false => Path::new(fixed).parent()?,
    };
    // A rule for the root directory would permit everything.
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
