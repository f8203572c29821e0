//! Disks of a running domain: attached, detached, and told of changed metadata. libvirt runs no hook for these, so the
//! daemon is started before libvirt is asked to attach its disk, and ended after QEMU has let go of it.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::daemons;
use super::domain::{Domain, child, document, domain_node};
use super::edits::{attributes, escape, plain};
use super::hook::{self, Disk, END_TIMEOUT, Host};
use super::metadata::{self, DiskOptions, NAMESPACE};
use super::virsh;

/// How long a guest may take to let go of a disk. Windows asks its user's programs first.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often libvirt is asked whether it has.
const RELEASE_INTERVAL: Duration = Duration::from_millis(500);

/// What a change concerns.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    /// The domain's next start, too.
    pub config: bool,
}

/// A domain as libvirt has it now.
struct Running {
    domain: Domain,
    xml: String,
}

fn running(name: &str) -> Result<Running, String> {
    let xml = virsh::describe(name, false)?;
    let document = document(&xml).map_err(|error| error.to_string())?;
    let domain = Domain::of(&document).map_err(|error| error.to_string())?;
    // libvirt numbers the domains that run.
    if domain_node(&document).is_ok_and(|node| node.attribute("id").is_none()) {
        return Err(format!("the domain {} does not run: virsh edit changes its next start", domain.name));
    }
    drop(document);
    Ok(Running { domain, xml })
}

/// The disk that these attributes of our element describe. The error is the element's own.
fn described(domain: &Domain, target: &str, words: &[(String, String)]) -> Result<(DiskOptions, String), String> {
    let list =
        [("target", target)].into_iter().chain(words.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let element = format!("<disk{}/>", attributes(list));
    let xml = format!(
        "<domain><name>{}</name><metadata><disks xmlns='{NAMESPACE}'>{element}</disks></metadata></domain>",
        escape(&domain.name)
    );
    let read = metadata::of_xml(&xml).map_err(|error| error.to_string())?;
    let options = read.into_iter().next().ok_or("the disk is not described")?;
    Ok((options, element))
}

/// Starts a daemon for a new disk of a running domain, then lets libvirt attach it. `words`: attributes of our element.
/// Returns what was not reached after the guest had its disk.
pub fn attach(
    host: &Host,
    name: &str,
    target: &str,
    words: &[(String, String)],
    scope: Scope,
) -> Result<Vec<String>, String> {
    let Running { domain, .. } = running(name)?;
    if domain.disk(target).is_some() || domain.other_targets.iter().any(|other| other == target) {
        return Err(format!("the domain {} has a disk {target} already: choose another target", domain.name));
    }
    if !domain.has_shared_memory {
        return Err(format!(
            "the memory of the domain {} is not shared, so no vhost-user disk can be attached: 'virtioblkctl domain check' \
             says what to add before its next start",
            domain.name
        ));
    }
    let (options, element) = described(&domain, target, words)?;
    let socket = host.places.socket(&domain, target);
    let queues = options.options.iter().find(|(key, _)| key == "num-queues").map(|(_, value)| value.clone());
    let places = host.places.disk(&domain, target);
    let disk = Disk { domain: domain.name.clone(), target: target.to_owned(), socket: socket.clone(), options, places };
    hook::start_one(host, &disk)?;
    let device = device(target, &socket, queues.as_deref());
    let attached = virsh::with_file(&device, |file| {
        let mut arguments = vec!["attach-device", "--domain", name, "--file", file, "--live"];
        arguments.extend(scope.config.then_some("--config"));
        virsh::run(&arguments, virsh::CHANGE_TIMEOUT)
    });
    if let Err(error) = attached {
        // virsh may have been given up, and libvirt may attach the disk yet.
        if !running(name).is_ok_and(|running| running.domain.disk(target).is_none()) {
            return Err(format!(
                "{error}; whether the guest has the disk {target} is not known, so its daemon serves on: see 'virtioblkctl \
                 domain status {name}', and detach it"
            ));
        }
        let ended = daemons::end(&disk.places, Instant::now() + END_TIMEOUT);
        return Err(ended.err().map_or(error.clone(), |why| format!("{error}; {why}")));
    }
    Ok(describe_again(name, scope, |list| list.push(element.clone())))
}

fn device(target: &str, socket: &Path, queues: Option<&str>) -> String {
    let queues = queues.map(|queues| ("queues", queues));
    let driver = attributes([("name", "qemu"), ("type", "raw")].into_iter().chain(queues));
    format!(
        "<disk type='vhostuser' device='disk'><driver{driver}/><source{}><reconnect enabled='yes' timeout='1'/></source>\
         <target{}/></disk>",
        attributes([("type", "unix"), ("path", &socket.display().to_string())]),
        attributes([("dev", target), ("bus", "virtio")])
    )
}

/// Lets libvirt detach a disk of a running domain, and ends its daemon when the guest has let go of it.
pub fn detach(host: &Host, name: &str, target: &str, scope: Scope) -> Result<Vec<String>, String> {
    let Running { domain, .. } = running(name)?;
    let places = host.places.disk(&domain, target);
    if domain.disk(target).is_none() {
        return Err(format!("the domain {} has no vhostuser disk {target}", domain.name));
    }
    if !places.configuration.exists() {
        return Err(format!(
            "the daemon of the disk {target} was not started by libvirt's hook or by attach: use virsh detach-disk, and end \
             it as it was started"
        ));
    }
    let mut arguments = vec!["detach-disk", "--domain", name, "--target", target, "--live"];
    arguments.extend(scope.config.then_some("--config"));
    virsh::run(&arguments, virsh::CHANGE_TIMEOUT)?;
    let deadline = Instant::now() + RELEASE_TIMEOUT;
    // A libvirt that does not answer may still have the disk, whose daemon must not end under the guest.
    let is_gone = || running(name).is_ok_and(|running| running.domain.disk(target).is_none());
    while !is_gone() {
        if Instant::now() >= deadline {
            return Err(format!(
                "the guest has not let go of the disk {target} within {} s, and its daemon serves on: is the disk mounted? \
                 Ask again later",
                RELEASE_TIMEOUT.as_secs()
            ));
        }
        thread::sleep(RELEASE_INTERVAL);
    }
    daemons::end(&places, Instant::now() + END_TIMEOUT)?;
    let is_it =
        |element: &String| document(element).is_ok_and(|d| d.root_element().attribute("target") == Some(target));
    Ok(describe_again(name, scope, |list| list.retain(|element| !is_it(element))))
}

/// Changes our element in the running domain, and in its next start. Returns what failed.
fn describe_again(name: &str, scope: Scope, change: impl Fn(&mut Vec<String>)) -> Vec<String> {
    let mut failed = Vec::new();
    let both = [(false, "--live"), (true, "--config")];
    for (inactive, flag) in both.into_iter().filter(|(inactive, _)| !inactive || scope.config) {
        let changed = virsh::describe(name, inactive).and_then(|xml| {
            let (mut list, added) = elements(&xml)?;
            change(&mut list);
            set(name, &list, &added, flag)
        });
        failed.extend(changed.err().map(|error| {
            format!("<metadata> could not be changed ({flag}): {error}; a migration or a restart of libvirtd needs it: virsh metadata")
        }));
    }
    failed
}

/// The `<disk>` elements of our element, without prefixes, and the attributes of `<disks>`.
fn elements(xml: &str) -> Result<(Vec<String>, String), String> {
    let document = document(xml).map_err(|error| error.to_string())?;
    let domain = domain_node(&document).map_err(|error| error.to_string())?;
    let ours = child(domain, "metadata")
        .and_then(|metadata| metadata.children().find(|node| node.tag_name().namespace() == Some(NAMESPACE)));
    let Some(ours) = ours else { return Ok((Vec::new(), String::new())) };
    let list = ours.children().filter(|node| node.is_element()).map(plain).collect();
    Ok((list, attributes(ours.attributes().map(|one| (one.name(), one.value())))))
}

fn set(name: &str, list: &[String], added: &str, flag: &str) -> Result<String, String> {
    let element = format!("<disks{added}>{}</disks>", list.concat());
    let mut arguments = vec!["metadata", "--domain", name, "--uri", NAMESPACE, flag];
    match list {
        [] => arguments.push("--remove"),
        _ => arguments.extend(["--key", "v", "--set", &element]),
    }
    virsh::run(&arguments, virsh::CHANGE_TIMEOUT)
}

/// What `apply` did to one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Its daemon has the options of the metadata.
    Unchanged,
    /// Its daemon was upgraded to them.
    Upgraded,
    /// Why it was left as it is.
    Left(String),
}

/// Brings the metadata of the domain's next start to the daemons that run. `upgrade` replaces the daemon behind a control
/// socket by one with this configuration file.
pub fn apply(
    host: &Host,
    name: &str,
    upgrade: impl Fn(&Path, &Path) -> Result<(), String>,
) -> Result<Vec<(String, Applied)>, String> {
    let Running { domain, xml: live } = running(name)?;
    let next = virsh::describe(name, true)?;
    let mut results = Vec::new();
    for options in metadata::of_xml(&next).map_err(|error| error.to_string())? {
        let target = options.target.clone();
        let places = host.places.disk(&domain, &target);
        let applied = match domain.disk(&target) {
            None => Applied::Left("the running domain has no such disk: it starts with the domain's next start".into()),
            Some(_) if !places.configuration.exists() => {
                Applied::Left("libvirt's hook did not start its daemon".into())
            }
            Some(device) => {
                let socket = device.socket.clone().into();
                let disk = Disk { domain: domain.name.clone(), target: target.clone(), socket, options, places };
                apply_one(host, &disk, &upgrade)?
            }
        };
        results.push((target, applied));
    }
    if elements(&next)? != elements(&live)? {
        let (list, added) = elements(&next)?;
        set(name, &list, &added, "--live")?;
    }
    Ok(results)
}

fn apply_one(
    host: &Host,
    disk: &Disk,
    upgrade: impl Fn(&Path, &Path) -> Result<(), String>,
) -> Result<Applied, String> {
    let path = &disk.places.configuration;
    let failed = |error: std::io::Error| format!("disk {}: {}: {error}", disk.target, path.display());
    let old = fs::read_to_string(path).map_err(failed)?;
    let new = hook::configuration(host, disk);
    if old == new {
        return Ok(Applied::Unchanged);
    }
    hook::write_atomically(path, &new, 0o600).map_err(failed)?;
    upgrade(&disk.places.control, path).map(|()| Applied::Upgraded).map_err(|error| {
        // The old daemon serves on, with its own options.
        match hook::write_atomically(path, &old, 0o600) {
            Ok(()) => format!("disk {}: {error}", disk.target),
            Err(why) => format!("disk {}: {error}; and {} has the new options: {why}", disk.target, path.display()),
        }
    })
}
