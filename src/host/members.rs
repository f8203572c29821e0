//! The disks of one libvirt domain that virtioblkd serves: what libvirt says of the domain, joined with the disks that this
//! host has.

use std::path::{Path, PathBuf};

use super::connection;
use super::domain::Domain;
use super::listing::{self, Directories, Listed};
use super::virsh;

/// One disk of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// `DOMAIN:TARGET`.
    pub name: String,
    /// Its target, such as `vda`.
    pub target: String,
    /// Its control socket.
    pub control: PathBuf,
}

/// A domain's disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// The domain's name; where libvirt does not answer, what it was asked for.
    pub domain: String,
    /// In the order of the domain's description.
    pub disks: Vec<Member>,
    /// Targets of disks that virtioblkd does not serve.
    pub others: Vec<String>,
    /// Why libvirt could not be asked. Then the hook's disks are all that is known.
    pub unknown: Option<String>,
}

/// Finds the disks of the domain with this name or UUID. Errors: it has none here, or a vhost-user disk of it has no control
/// socket that is known here.
pub fn find(domain: &str, directories: &Directories) -> Result<Members, String> {
    let listed = listing::find(directories).map_err(|error| format!("cannot look for this host's disks: {error}"))?;
    let members = match virsh::describe(domain, false) {
        Ok(xml) => {
            // Another host's domain may have the same socket paths.
            connection::check_local()?;
            joined(&Domain::parse(&xml).map_err(|error| error.to_string())?, &listed)?
        }
        Err(error) => of_hooks(domain, &listed, error)?,
    };
    match members.disks.is_empty() {
        true => Err(format!(
            "virtioblkd serves no disk of the domain {domain} on this host: does the domain run? 'virtioblkctl list' shows \
             the disks"
        )),
        false => Ok(members),
    }
}

/// The domain's disks that the hook knows, where libvirt could not be asked (`error`).
fn of_hooks(domain: &str, listed: &[Listed], error: String) -> Result<Members, String> {
    let ours: Vec<(&(String, String), Member)> = listed.iter().filter_map(|disk| of_hook(disk, domain)).collect();
    let Some(((name, uuid), _)) = ours.first() else { return Err(error) };
    if ours.iter().any(|((_, other), _)| other != uuid) {
        return Err(format!("{error}; several domains of this host are called {domain}: give the domain's UUID"));
    }
    let domain = name.clone();
    let disks = ours.into_iter().map(|(_, member)| member).collect();
    Ok(Members { domain, disks, others: Vec::new(), unknown: Some(error) })
}

/// A disk of the hook's and its domain's name and UUID, if it is this domain's.
fn of_hook<'a>(disk: &'a Listed, domain: &str) -> Option<(&'a (String, String), Member)> {
    let of = disk.domain.as_ref()?;
    let (name, uuid) = of;
    let target = disk.target.clone()?;
    (name == domain || *uuid == domain.to_lowercase()).then_some(())?;
    Some((of, Member { name: format!("{name}:{target}"), target, control: disk.control.clone()? }))
}

fn joined(domain: &Domain, listed: &[Listed]) -> Result<Members, String> {
    let mut disks = Vec::new();
    for disk in &domain.disks {
        let ours = |found: &&Listed| {
            found.target.as_deref() == Some(&disk.target)
                && found.domain.as_ref().is_some_and(|(_, uuid)| *uuid == domain.uuid)
        };
        let found = listed.iter().find(ours).or_else(|| by_socket(Path::new(&disk.socket), listed));
        let control = found.and_then(|found| found.control.clone()).ok_or_else(|| {
            format!(
                "domain {}: the disk {} (socket {}) has no control socket that is known here: does the domain run? \
                 'virtioblkctl list' shows the disks that are known",
                domain.name, disk.target, disk.socket
            )
        })?;
        let name = format!("{}:{}", domain.name, disk.target);
        disks.push(Member { name, target: disk.target.clone(), control });
    }
    Ok(Members { domain: domain.name.clone(), disks, others: domain.other_targets.clone(), unknown: None })
}

/// The disk that listens on this vhost-user socket: by its configuration file, else by its own word.
fn by_socket<'a>(socket: &Path, listed: &'a [Listed]) -> Option<&'a Listed> {
    if let Some(known) = listed.iter().find(|disk| disk.socket.as_deref() == Some(socket)) {
        return Some(known);
    }
    let unknown: Vec<Listed> = listed.iter().filter(|disk| disk.socket.is_none()).cloned().collect();
    let states = listing::states(&unknown);
    let at = states.iter().position(|state| state.vhost_socket() == Some(socket))?;
    listed.iter().find(|disk| disk.control == unknown[at].control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disks_of_the_hook_and_of_a_unit_are_joined_in_the_domains_order() {
        let uuid = "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11";
        let disk = |target: &str| {
            format!(
                "<disk type='vhostuser'><source type='unix' path='/run/{target}.sock'/><target dev='{target}'/></disk>"
            )
        };
        let xml = format!(
            "<domain><name>vm1</name><uuid>{uuid}</uuid><devices>{}{}<disk type='file'><target dev='sda'/></disk>\
             </devices></domain>",
            disk("vdb"),
            disk("vda")
        );
        let domain = Domain::parse(&xml).unwrap();
        let hooks = Listed {
            name: "vm1:vda".into(),
            domain: Some(("vm1".into(), uuid.into())),
            target: Some("vda".into()),
            control: Some("/run/a.ctl".into()),
            socket: None,
        };
        let unit = Listed {
            name: "db".into(),
            domain: None,
            target: None,
            control: Some("/run/b.ctl".into()),
            socket: Some("/run/vdb.sock".into()),
        };
        let members = joined(&domain, &[hooks.clone(), unit]).unwrap();
        let names: Vec<(&str, &Path)> = members.disks.iter().map(|d| (d.name.as_str(), d.control.as_path())).collect();
        assert_eq!(names, [("vm1:vdb", Path::new("/run/b.ctl")), ("vm1:vda", Path::new("/run/a.ctl"))]);
        assert_eq!(members.others, ["sda"]);
        let error = joined(&domain, std::slice::from_ref(&hooks)).unwrap_err();
        assert!(error.contains("vdb") && error.contains("virtioblkctl list"), "{error}");
        assert!(of_hook(&hooks, "vm1").is_some() && of_hook(&hooks, uuid).is_some() && of_hook(&hooks, "vm").is_none());
    }

    #[test]
    fn a_domain_that_libvirt_does_not_describe_keeps_its_whole_name() {
        let [one, other] = ["6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11", "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b12"];
        let disk = |name: &str, uuid: &str| Listed {
            name: format!("{name}:vda"),
            domain: Some((name.into(), uuid.into())),
            target: Some("vda".into()),
            control: Some(format!("/run/{uuid}-vda.ctl").into()),
            socket: None,
        };
        let of = |domain: &str, listed: &[Listed]| of_hooks(domain, listed, "libvirt: no".into());
        let members = of("a:b", &[disk("a", other), disk("a:b", one)]).unwrap();
        assert_eq!((members.domain.as_str(), members.disks.len()), ("a:b", 1), "the agent of this domain is asked");
        assert_eq!(of(one, &[disk("a:b", one)]).unwrap().domain, "a:b");
        let twice = of("a", &[disk("a", one), disk("a", other)]).unwrap_err();
        assert!(twice.contains("give the domain's UUID"), "{twice}");
        assert_eq!(of("c", &[disk("a", one)]), Err("libvirt: no".into()));
    }
}
