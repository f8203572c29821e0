//! Where the files of a host's disks are. Root's are below /run and /var/log; another user's, as libvirt's session daemon
//! has them, below `XDG_RUNTIME_DIR`.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::domain::Domain;

/// A directory for all disks that the hook starts, and one for their logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Configuration files and pid files. Nobody but our user may write here: what runs as root is read from here.
    pub run: PathBuf,
    /// Sockets. The daemons' user may write here.
    pub sockets: PathBuf,
    /// The daemons' logs.
    pub log: PathBuf,
}

/// The files of one disk of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlaces {
    /// `UUID-TARGET`: the stem of its files.
    pub name: String,
    /// The daemon's configuration file. It exists from the start of the daemon to its end.
    pub configuration: PathBuf,
    /// The daemon's pid file; the daemon that runs holds its lock.
    pub pid_file: PathBuf,
    /// A file whose lock the daemon holds from the moment of its start.
    pub lock: PathBuf,
    /// A file that exists where the daemon is a unit of systemd. It has the unit's name.
    pub unit: PathBuf,
    /// What the daemon was started with, while `apply` replaces its configuration file.
    pub applying: PathBuf,
    /// A file with the domain's name, which other users may read.
    pub domain_name: PathBuf,
    /// One of these files while it is written.
    pub new: PathBuf,
    /// The control socket.
    pub control: PathBuf,
    /// The log.
    pub log: PathBuf,
}

/// The extension of a file while it is written.
pub(super) const NEW: &str = "new";
/// The extensions of a disk's files in [`Places::run`]; see [`DiskPlaces`].
const EXTENSIONS: [&str; 7] = ["toml", "pid", "lock", "unit", "applying", "domain", NEW];

impl DiskPlaces {
    /// Removes all files but the vhost-user socket and the log.
    pub(super) fn remove_files(&self) -> Result<(), String> {
        let DiskPlaces { applying, unit, configuration, pid_file, control, domain_name, lock, new, .. } = self;
        [new, applying, unit, configuration, pid_file, control, domain_name, lock]
            .into_iter()
            .try_for_each(|path| remove(path).map_err(|error| format!("cannot remove {}: {error}", path.display())))
    }

    /// The disk's target.
    pub(super) fn target(&self) -> &str {
        self.name.rsplit('-').next().unwrap_or_default()
    }
}

/// Removes a file that may not exist.
pub(super) fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes a file that is whole whenever it exists, even after a crash of the host. Configuration files are for our eyes only
/// (`mode`): an option of librbd may be a secret.
pub(super) fn write_atomically(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let new = path.with_extension(NEW);
    let _ = std::fs::remove_file(&new);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    file.write_all(text.as_bytes())?;
    // /run is in memory almost everywhere; elsewhere a file could be renamed before it has its text.
    file.sync_all()?;
    std::fs::rename(&new, path)
}

impl Places {
    /// Those of our user. The error: there is no directory that lasts as long as a guest.
    pub fn of_this_user() -> Result<Self, String> {
        if rustix::process::geteuid().is_root() {
            return Ok(Places {
                run: "/run/virtioblkd-libvirt".into(),
                sockets: "/run/virtioblkd".into(),
                log: "/var/log/virtioblkd".into(),
            });
        }
        // libvirt's session daemon does not give its hooks the variable.
        let usual = || PathBuf::from(format!("/run/user/{}", rustix::process::geteuid().as_raw()));
        let named = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
        let directory = named.unwrap_or_else(usual);
        if !directory.is_dir() {
            return Err(format!(
                "there is no {}, so there is no place for sockets: log in by pam_systemd",
                directory.display()
            ));
        }
        let (run, sockets) = (directory.join("virtioblkd-libvirt"), directory.join("virtioblkd"));
        Ok(Places { log: run.clone(), run, sockets })
    }

    /// The files of the disk with this target.
    pub fn disk(&self, domain: &Domain, target: &str) -> DiskPlaces {
        self.named(&format!("{}-{target}", domain.uuid), &log_name(domain, target))
    }

    fn named(&self, name: &str, log: &str) -> DiskPlaces {
        let path = |extension: &str| self.run.join(format!("{name}.{extension}"));
        DiskPlaces {
            name: name.to_owned(),
            configuration: path("toml"),
            pid_file: path("pid"),
            lock: path("lock"),
            unit: path("unit"),
            applying: path("applying"),
            domain_name: path("domain"),
            new: path(NEW),
            control: self.sockets.join(format!("{name}.ctl")),
            log: self.log.join(format!("{log}.log")),
        }
    }

    /// The socket of a disk whose description leaves the choice to us, and of a domain that comes from another host.
    pub fn socket(&self, domain: &Domain, target: &str) -> PathBuf {
        self.sockets.join(format!("{}-{target}.sock", domain.uuid))
    }

    /// The disks of a domain that were started here and not ended yet. Any of its files stands for a disk: a hook may have
    /// been killed between two of them, or the host may have crashed.
    pub fn started(&self, domain: &Domain) -> std::io::Result<Vec<DiskPlaces>> {
        let entries = match std::fs::read_dir(&self.run) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let start = format!("{}-", domain.uuid);
        let mut targets = BTreeSet::new();
        for entry in entries {
            let name = entry?.file_name();
            let parts = name.to_str().and_then(|name| name.strip_prefix(&start)?.rsplit_once('.'));
            targets.extend(
                parts.filter(|(_, extension)| EXTENSIONS.contains(extension)).map(|(target, _)| target.to_owned()),
            );
        }
        Ok(targets.iter().map(|target| self.disk(domain, target)).collect())
    }

    /// A mark that the domain's next start is the arrival of a guest that runs elsewhere, or of one that was saved.
    pub fn arrival(&self, domain: &Domain) -> PathBuf {
        self.run.join(format!("{}.arrival", domain.uuid))
    }

    /// The file whose lock a change of the running domain's disks holds.
    pub fn changes(&self, domain: &Domain) -> PathBuf {
        self.run.join(format!("{}.changes", domain.uuid))
    }
}

/// A domain's name is what people look for. One that would make a strange file name is replaced by the UUID.
fn log_name(domain: &Domain, target: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'+');
    let name = &domain.name;
    let usable = name.len() <= 200 && !name.starts_with('.') && name.bytes().all(is_plain);
    format!("{}-{target}", if usable { name } else { &domain.uuid })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str, uuid: &str) -> Domain {
        let (name, uuid) = (name.to_owned(), uuid.to_owned());
        Domain { name, uuid, has_shared_memory: true, disks: Vec::new(), other_targets: Vec::new() }
    }

    #[test]
    fn started_disks_are_found_by_the_uuid_of_their_domain() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().to_owned();
        let places = Places { log: run.clone(), run: run.clone(), sockets: run.clone() };
        let (one, other) = (domain("vm1", "uuid-1"), domain("vm2", "uuid-2"));
        assert_eq!(places.started(&one).unwrap(), []);
        for name in ["1-vda.toml", "1-vda.pid", "1-vdb.lock", "1-vdc.ctl", "1-vdd.toml.old", "1.arrival", "2-vda.toml"]
        {
            std::fs::write(run.join(format!("uuid-{name}")), "").unwrap();
        }
        assert_eq!(places.started(&one).unwrap(), ["vda", "vdb"].map(|target| places.disk(&one, target)));
        assert_eq!(places.started(&other).unwrap()[0].name, "uuid-2-vda");
        let nowhere = Places { run: run.join("none"), ..places };
        assert_eq!(nowhere.started(&one).unwrap(), []);
    }

    #[test]
    fn a_log_is_named_after_the_domain_unless_that_would_be_a_strange_file() {
        assert_eq!(log_name(&domain("web-1.example", "u"), "vda"), "web-1.example-vda");
        for name in ["a b", "../x", ".hidden", "a\nb", "über"] {
            assert_eq!(log_name(&domain(name, "u"), "vda"), "u-vda");
        }
    }
}
