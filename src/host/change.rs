//! A change of a running domain's disks: the domain's lock, its description as libvirt has it, and our element in it.

use super::connection;
use super::domain::{Domain, child, document, domain_node};
use super::domain_lock::DomainLock;
use super::edits::{attributes, plain};
use super::hook::{self, Host};
use super::metadata::NAMESPACE;
use super::virsh::{self, VirshError};

/// A running domain of which this process alone changes disks.
pub(super) struct Change<'a> {
    /// What the domain is called in the commands to virsh: its name or its UUID.
    name: &'a str,
    lock: DomainLock,
    pub(super) domain: Domain,
    /// The description of the domain that runs.
    pub(super) xml: String,
}

/// A domain as libvirt has it now.
struct Current {
    domain: Domain,
    xml: String,
    is_running: bool,
}

fn current(name: &str) -> Result<Current, String> {
    let xml = virsh::describe(name, false)?;
    let document = document(&xml).map_err(|error| error.to_string())?;
    let domain = Domain::of(&document).map_err(|error| error.to_string())?;
    // libvirt numbers the domains that run.
    let is_running = domain_node(&document).is_ok_and(|node| node.has_attribute("id"));
    drop(document);
    Ok(Current { domain, xml, is_running })
}

/// Returns the domain that runs, and its description.
fn running(name: &str) -> Result<(Domain, String), String> {
    match current(name)? {
        Current { domain, is_running: false, .. } => {
            Err(format!("the domain {} does not run: virsh edit changes its next start", domain.name))
        }
        Current { domain, xml, .. } => Ok((domain, xml)),
    }
}

impl<'a> Change<'a> {
    /// Takes the domain's lock, and then reads its description.
    pub(super) fn begin(host: &Host, name: &'a str) -> Result<Self, String> {
        connection::check_ours()?;
        let (domain, _) = running(name)?;
        hook::make_directories(&host.places)?;
        let lock = DomainLock::take(&host.places.changes(&domain), &domain.name)?;
        // Another change may have ended while we waited.
        let (domain, xml) = running(name)?;
        Ok(Change { name, lock, domain, xml })
    }

    /// Changes the domain with virsh.
    pub(super) fn virsh(&self, arguments: &[&str]) -> Result<String, String> {
        self.attempt(arguments).map_err(|error| error.message)
    }

    /// The same, for callers that must know whether an error is libvirt's answer.
    pub(super) fn attempt(&self, arguments: &[&str]) -> Result<String, VirshError> {
        self.lock.shared_with_children(|| virsh::attempt(arguments, virsh::CHANGE_TIMEOUT))
    }

    /// Whether libvirt says that no QEMU has a vhost-user disk with this target: the domain runs without it, or has ended. An
    /// error is no such answer.
    pub(super) fn lacks(&self, target: &str) -> bool {
        current(self.name).is_ok_and(|current| !current.is_running || current.domain.disk(target).is_none())
    }

    /// The description of the domain's next start.
    pub(super) fn next(&self) -> Result<String, String> {
        virsh::describe(self.name, true)
    }

    /// Changes our element in the running domain, and in its next start if `config`. Returns what failed.
    pub(super) fn describe_again(&self, config: bool, change: impl Fn(&mut Element)) -> Vec<String> {
        let mut failed = Vec::new();
        let both = [(false, "--live"), (true, "--config")];
        for (inactive, flag) in both.into_iter().filter(|(inactive, _)| !inactive || config) {
            let changed = virsh::describe(self.name, inactive).and_then(|xml| {
                let old = Element::of(&xml)?;
                let mut new = old.clone();
                change(&mut new);
                if new == old { Ok(String::new()) } else { self.set(&new, flag) }
            });
            failed.extend(changed.err().map(|error| {
                format!(
                    "<metadata> could not be changed ({flag}): {error}; a migration or a restart of libvirtd needs it: run the \
                     same command again, or use virsh metadata"
                )
            }));
        }
        failed
    }

    /// Replaces our element. `flag`: `--live`, or `--config` for the next start.
    pub(super) fn set(&self, element: &Element, flag: &str) -> Result<String, String> {
        let text = element.text();
        let mut arguments = vec!["metadata", "--domain", self.name, "--uri", NAMESPACE, flag];
        match element.disks.is_empty() {
            true => arguments.push("--remove"),
            false => arguments.extend(["--key", "v", "--set", &text]),
        }
        self.virsh(&arguments)
    }
}

/// Our element in a domain's `<metadata>`, without prefixes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Element {
    /// Each disk's target and its `<disk>`.
    pub(super) disks: Vec<(String, String)>,
    /// The attributes of `<disks>`.
    pub(super) attributes: String,
}

impl Element {
    /// The element of this description; without disks where there is none.
    pub(super) fn of(xml: &str) -> Result<Self, String> {
        let document = document(xml).map_err(|error| error.to_string())?;
        let domain = domain_node(&document).map_err(|error| error.to_string())?;
        let ours = child(domain, "metadata")
            .and_then(|metadata| metadata.children().find(|node| node.tag_name().namespace() == Some(NAMESPACE)));
        let Some(ours) = ours else { return Ok(Element::default()) };
        let elements = ours.children().filter(|node| node.is_element());
        Ok(Element {
            disks: elements
                .map(|node| (node.attribute("target").unwrap_or_default().to_owned(), plain(node)))
                .collect(),
            attributes: attributes(ours.attributes().map(|one| (one.name(), one.value()))),
        })
    }

    fn text(&self) -> String {
        let disks: String = self.disks.iter().map(|(_, disk)| disk.as_str()).collect();
        format!("<disks{}>{disks}</disks>", self.attributes)
    }

    /// The `<disk>` of this target.
    pub(super) fn disk(&self, target: &str) -> Option<&str> {
        self.disks.iter().find(|(other, _)| other == target).map(|(_, disk)| disk.as_str())
    }

    /// Puts `disk` in the place of the one with this target, or behind all others.
    pub(super) fn put(&mut self, target: &str, disk: &str) {
        match self.disks.iter_mut().find(|(other, _)| other == target) {
            Some((_, old)) => disk.clone_into(old),
            None => self.disks.push((target.to_owned(), disk.to_owned())),
        }
    }
}
