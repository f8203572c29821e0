//! The options that choose disks: by name or socket, or all of a libvirt domain.

use std::path::{Path, PathBuf};

use clap::Args;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::shown;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::host::listing::{self, Directories};
use virtioblkd::internal::host::members;
use virtioblkd::internal::snapshot::USAGE;

/// The environment variable that replaces a missing --control.
pub(crate) const VARIABLE: &str = "VIRTIOBLK_CONTROL";

#[derive(Args)]
pub(crate) struct Chosen {
    /// The disk: its name (`virtioblkctl list` shows it) or its control socket (virtioblkd --control-path) [env:
    /// VIRTIOBLK_CONTROL]
    #[arg(long, value_name = "DISK", global = true)]
    control: Option<PathBuf>,
    /// All disks of this libvirt domain, at one instant
    #[arg(long = "domain", id = "of_domain", value_name = "DOMAIN", global = true, conflicts_with = "control")]
    domain: Option<String>,
    /// The directory of the control sockets, NAME.ctl for the disk NAME [default: those of libvirt's hook and of the shipped
    /// unit, /run/virtioblkd]
    #[arg(long, value_name = "DIR", global = true)]
    control_dir: Option<PathBuf>,
}

/// The disks that a command is for.
pub(crate) struct Disks {
    /// The domain of --domain.
    pub(crate) domain: Option<String>,
    /// The disks' names, or the paths that were given instead, and their control sockets.
    pub(crate) disks: Vec<(String, PathBuf)>,
}

impl Disks {
    /// The control sockets.
    pub(crate) fn controls(&self) -> Vec<PathBuf> {
        self.disks.iter().map(|(_, control)| control.clone()).collect()
    }
}

impl Chosen {
    /// Refuses a --control-dir that does not exist: it would count as one without disks.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        let Some(directory) = &self.control_dir else { return Ok(()) };
        let why = match std::fs::metadata(directory) {
            Ok(found) if found.is_dir() => return Ok(()),
            Ok(_) => "it is not a directory".to_owned(),
            Err(error) => error.to_string(),
        };
        Err(Failure::new(
            USAGE,
            format!("--control-dir '{}': {why}; give the directory that has the control sockets", path(directory)),
        ))
    }

    pub(crate) fn directories(&self) -> Directories {
        self.control_dir.as_deref().map_or_else(Directories::of_this_user, Directories::sockets)
    }

    /// The disks of this libvirt domain.
    pub(crate) fn of_domain(&self, domain: &str) -> Result<Disks, Failure> {
        of_domain(domain, &self.directories())
    }

    /// The disks of --domain; else those of --disk (`named`); else the one of --control or of the environment. Returns no
    /// disks if none of these is given.
    pub(crate) fn several(&self, named: &[PathBuf]) -> Result<Disks, Failure> {
        let directories = self.directories();
        if let Some(domain) = &self.domain {
            if self.control.is_some() || !named.is_empty() {
                return Err(Failure::new(
                    USAGE,
                    "--domain chooses all disks of a domain: leave out --control and --disk",
                ));
            }
            return of_domain(domain, &directories);
        }
        let from_environment = || std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        let texts = match (named, &self.control) {
            ([], Some(control)) => vec![control.clone()],
            ([], None) => from_environment().into_iter().collect(),
            (named, _) => named.to_vec(),
        };
        let resolve = |text: &PathBuf| Ok((shown(text.display()), listing::resolve(text, &directories)?));
        Ok(Disks { domain: None, disks: texts.iter().map(resolve).collect::<Result<_, Failure>>()? })
    }
}

fn of_domain(domain: &str, directories: &Directories) -> Result<Disks, Failure> {
    let members = members::find(domain, directories).map_err(|error| Failure::new("no-daemon", error))?;
    if let Some(why) = &members.unknown {
        logging::message(format_args!(
            "{why}; only the disks that libvirt's hook started for {} are known",
            members.domain
        ));
    }
    if !members.others.is_empty() {
        logging::message(format_args!(
            "the domain {} has disks that virtioblkd does not serve, to which this command does nothing: {}",
            members.domain,
            members.others.join(", ")
        ));
    }
    let disks = members.disks.into_iter().map(|disk| (disk.name, disk.control)).collect();
    Ok(Disks { domain: Some(members.domain), disks })
}

/// The target in a disk's name `DOMAIN:TARGET`.
pub(crate) fn target(name: &str) -> &str {
    name.rsplit(':').next().unwrap_or(name)
}

/// Formats a path for messages.
pub(crate) fn path(path: &Path) -> String {
    shown(path.display())
}
