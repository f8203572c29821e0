//! Brings the metadata of a domain's next start to the daemons that run, by an upgrade in place.

use std::fs;
use std::io;
use std::path::Path;

use super::change::{Change, Element};
use super::daemons;
use super::hook::{self, Disk, Host};
use super::metadata::{self, DiskOptions};
use super::places::{DiskPlaces, remove, write_atomically};
use super::units;

/// What `apply` did to one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Its daemon has the options of the metadata.
    Unchanged,
    /// Its daemon was upgraded to them.
    Upgraded,
    /// Why it was left as it is.
    Left(String),
    /// Why its daemon could not be upgraded.
    Failed(String),
}

/// What [`apply`] did.
#[derive(Debug)]
pub struct Results {
    /// Each disk by its target.
    pub disks: Vec<(String, Applied)>,
    /// Why the running domain's metadata does not have what was applied.
    pub incomplete: Option<String>,
}

/// Brings the metadata of the domain's next start to the daemons that run, and to the running domain's metadata; each disk
/// by itself. `upgrade` replaces the daemon behind a control socket by one with this configuration file.
pub fn apply(host: &Host, name: &str, upgrade: impl Fn(&Path, &Path) -> Result<(), String>) -> Result<Results, String> {
    let change = Change::begin(host, name)?;
    let next = change.next()?;
    let (old, wanted) = (Element::of(&change.xml)?, Element::of(&next)?);
    let (mut new, mut disks) = (old.clone(), Vec::new());
    if new.attributes.is_empty() {
        new.attributes.clone_from(&wanted.attributes);
    }
    for options in metadata::of_xml(&next).map_err(|error| error.to_string())? {
        let target = options.target.clone();
        let applied = apply_to(host, &change, options, &upgrade);
        if let (Applied::Unchanged | Applied::Upgraded, Some(disk)) = (&applied, wanted.disk(&target)) {
            new.put(&target, disk);
        }
        disks.push((target, applied));
    }
    for (target, _) in old.disks.iter().filter(|(target, _)| wanted.disk(target).is_none()) {
        let why = "the next start's metadata does not describe it: attach it again with --config to have it then";
        disks.push((target.clone(), Applied::Left(why.into())));
    }
    let described = if new.disks == old.disks { Ok(String::new()) } else { change.set(&new, "--live") };
    let incomplete = described.err().map(|error| {
        format!("the running domain's <metadata> could not be changed: {error}; a migration or a restart of libvirtd needs it: \
                 run the same command again")
    });
    Ok(Results { disks, incomplete })
}

fn apply_to(
    host: &Host,
    change: &Change<'_>,
    options: DiskOptions,
    upgrade: impl Fn(&Path, &Path) -> Result<(), String>,
) -> Applied {
    let target = options.target.clone();
    let places = host.places.disk(&change.domain, &target);
    let Some(device) = change.domain.disk(&target) else {
        return Applied::Left("the running domain has no such disk: it starts with the domain's next start".into());
    };
    if !places.configuration.exists() {
        return Applied::Left("libvirt's hook did not start its daemon".into());
    }
    let disk =
        Disk { domain: change.domain.name.clone(), target, socket: device.socket.clone().into(), options, places };
    replace_options(&disk.places, &hook::configuration(host, &disk), |pid| {
        match units::has_process(&disk.places, pid) {
            true => units::reload(&disk.places),
            false => upgrade(&disk.places.control, &disk.places.configuration),
        }
    })
    .unwrap_or_else(Applied::Failed)
}

/// Gives the disk's daemon this configuration. It may be interrupted at any point: the next call finds what the daemon that
/// runs was started with.
fn replace_options(
    places: &DiskPlaces,
    new: &str,
    upgrade: impl FnOnce(u64) -> Result<(), String>,
) -> Result<Applied, String> {
    let path = &places.configuration;
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    let old = served(places)?;
    if old == new {
        restore(places, &old).map_err(failed)?;
        return Ok(Applied::Unchanged);
    }
    let pid = daemons::pid(places)?;
    write_atomically(&places.applying, &format!("{pid}\n{old}"), 0o600)
        .and_then(|()| write_atomically(path, new, 0o600))
        .map_err(failed)?;
    let Err(error) = upgrade(pid) else {
        // A file that stays names a process that has ended.
        let _ = fs::remove_file(&places.applying);
        return Ok(Applied::Upgraded);
    };
    // Where no daemon answers, it is not known which of the two serves: the next call asks again.
    match daemons::pid(places) {
        Ok(now) if now == pid => restore(places, &old).map_err(|why| format!("{error}; {}", failed(why)))?,
        _ => {}
    }
    Err(error)
}

/// The configuration that the daemon which runs was started with: the configuration file, unless an `apply` was
/// interrupted before its upgrade.
fn served(places: &DiskPlaces) -> Result<String, String> {
    let read = |path: &Path| fs::read_to_string(path);
    match read(&places.applying) {
        Ok(interrupted) => {
            let (pid, old) = interrupted.split_once('\n').unwrap_or_default();
            if pid == daemons::pid(places)?.to_string() {
                return Ok(old.to_owned());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(format!("{}: {error}", places.applying.display())),
    }
    read(&places.configuration).map_err(|error| format!("{}: {error}", places.configuration.display()))
}

/// Leaves `text` as the configuration file, and no trace of an interrupted `apply`.
fn restore(places: &DiskPlaces, text: &str) -> io::Result<()> {
    if fs::read_to_string(&places.configuration)? != text {
        write_atomically(&places.configuration, text, 0o600)?;
    }
    remove(&places.applying)
}
