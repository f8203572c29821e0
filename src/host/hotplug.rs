//! Disks of a running domain: attached and detached. libvirt runs no hook for these, so the
//! daemon is started before libvirt is asked to attach its disk, and ended after QEMU has let go of it.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

pub use super::apply::{Applied, apply};
use super::change::{Change, Element};
use super::daemons;
use super::domain::Domain;
use super::edits::{attributes, escape};
use super::hook::{self, Disk, END_TIMEOUT, Host};
use super::metadata::{self, DiskOptions, NAMESPACE};
use super::virsh::{self, VirshError};

/// How long a guest may take to release a disk. Windows asks its user's programs first.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often libvirt is asked whether it has.
const RELEASE_INTERVAL: Duration = Duration::from_millis(500);

/// What a change concerns.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    /// The domain's next start, too.
    pub config: bool,
}

/// The disk that these attributes of our element describe. The error is the element's own.
fn described(domain: &Domain, target: &str, words: &[(String, String)]) -> Result<(DiskOptions, String), String> {
    check_words(words)?;
    let (mut list, mut elements) = (vec![("target", target)], String::new());
    for (name, value) in words {
        match metadata::element(name, value) {
            Some(element) => elements += &element?,
            None => list.push((name, value)),
        }
    }
    let element = format!("<disk{}>{elements}</disk>", attributes(list));
    let xml = format!(
        "<domain><name>{}</name><metadata><disks xmlns='{NAMESPACE}'>{element}</disks></metadata></domain>",
        escape(&domain.name)
    );
    let read = metadata::of_xml(&xml).map_err(|error| error.to_string())?;
    let options = read.into_iter().next().ok_or("the disk is not described")?;
    Ok((options, element))
}

/// What the element's own check cannot say well: these words would not become one XML element.
fn check_words(words: &[(String, String)]) -> Result<(), String> {
    let is_name = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    for (at, (name, value)) in words.iter().enumerate() {
        if name == "target" {
            return Err("target= is given twice: the disk's target is the word after the domain's name".into());
        }
        if !is_name(name) {
            return Err(format!("'{name}' is no attribute's name: give attributes as NAME=VALUE, such as cache=none"));
        }
        if words[..at].iter().any(|(other, _)| other == name) && metadata::element(name, value).is_none() {
            return Err(format!("{name}= is given twice: keep one"));
        }
        // XML has no way to write the others (Char of XML 1.0).
        if let Some(one) =
            value.chars().find(|one| one.is_ascii_control() && !matches!(one, '\t' | '\n' | '\r' | '\x7f'))
        {
            return Err(format!(
                "{name}= has the control character {one:?}, which a description cannot have: remove it"
            ));
        }
    }
    Ok(())
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
    let change = Change::begin(host, name)?;
    let domain = &change.domain;
    let (options, element) = described(domain, target, words)?;
    let places = host.places.disk(domain, target);
    let socket = host.places.socket(domain, target);
    let disk = Disk { domain: domain.name.clone(), target: target.to_owned(), socket, options, places };
    if domain.disk(target).is_some() || domain.other_targets.iter().any(|other| other == target) {
        if !lacks_metadata_only(host, &change, &disk, scope)? {
            return Err(format!("the domain {} has a disk {target} already: choose another target", domain.name));
        }
        return Ok(change.describe_again(scope.config, |described| described.put(target, &element)));
    }
    if !domain.has_shared_memory {
        return Err(format!(
            "the memory of the domain {} is not shared, so no vhost-user disk can be attached: 'virtioblkctl domain check' \
             says what to add before its next start",
            domain.name
        ));
    }
    hook::start_one(host, &disk)?;
    let queues = disk.options.options.iter().find(|(key, _)| key == "num-queues").map(|(_, value)| value.as_str());
    let attached = virsh::with_file(&device(target, &disk.socket, queues), |file| {
        let mut arguments = vec!["attach-device", "--domain", name, "--file", file, "--live"];
        arguments.extend(scope.config.then_some("--config"));
        // libvirt's answer, or none: then the outer error has virsh's.
        Ok(change.attempt(&arguments))
    });
    if let Err(VirshError { message: error, is_answer }) =
        attached.unwrap_or_else(|error| Err(VirshError::answer(error)))
    {
        // If virsh was given up or killed, libvirt may attach the disk yet, and QEMU, with its whole guest, would wait for a
        // daemon that has ended.
        if !is_answer || !change.lacks(target) {
            return Err(format!(
                "{error}; whether the guest has the disk {target} is not known, so its daemon serves on: see 'virtioblkctl \
                 domain status {name}', and detach it"
            ));
        }
        let ended = daemons::end(&disk.places, Instant::now() + END_TIMEOUT);
        return Err(ended.err().map_or(error.clone(), |why| format!("{error}; {why}")));
    }
    Ok(change.describe_again(scope.config, |described| described.put(target, &element)))
}

/// Whether an attach with the same words was interrupted before it changed `<metadata>`, and all else is done.
fn lacks_metadata_only(host: &Host, change: &Change<'_>, disk: &Disk, scope: Scope) -> Result<bool, String> {
    let target = disk.target.as_str();
    let has_socket =
        |domain: &Domain| domain.disk(target).is_some_and(|device| Path::new(&device.socket) == disk.socket);
    let written = fs::read_to_string(&disk.places.configuration).unwrap_or_default();
    if !has_socket(&change.domain) || written != hook::configuration(host, disk) {
        return Ok(false);
    }
    let mut lacks = Element::of(&change.xml)?.disk(target).is_none();
    if scope.config {
        let next = change.next()?;
        if !has_socket(&Domain::parse(&next).map_err(|error| error.to_string())?) {
            return Ok(false);
        }
        lacks |= Element::of(&next)?.disk(target).is_none();
    }
    Ok(lacks)
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

/// Lets libvirt detach a disk of a running domain, and ends its daemon when the guest has released it. Finishes a detach
/// that was interrupted, or that the guest carried out late.
pub fn detach(host: &Host, name: &str, target: &str, scope: Scope) -> Result<Vec<String>, String> {
    let change = Change::begin(host, name)?;
    let places = host.places.disk(&change.domain, target);
    let next = scope.config.then(|| change.next()).transpose()?;
    match change.domain.disk(target) {
        None if !is_left(&change, target, places.configuration.exists(), next.as_deref())? => {
            return Err(format!("the domain {} has no vhostuser disk {target}", change.domain.name));
        }
        None => detach_from_next_start(&change, target, next.as_deref())?,
        Some(_) if !places.configuration.exists() => {
            return Err(format!(
                "the daemon of the disk {target} was not started by libvirt's hook or by attach: use virsh detach-disk, and \
                 end it as it was started"
            ));
        }
        Some(_) => {
            let mut arguments = vec!["detach-disk", "--domain", name, "--target", target, "--live"];
            let has_next = next.as_deref().is_some_and(|xml| has_disk(xml, target));
            arguments.extend(has_next.then_some("--config"));
            change.virsh(&arguments)?;
            wait_for_release(&change, target)?;
        }
    }
    daemons::end(&places, Instant::now() + END_TIMEOUT)?;
    Ok(change.describe_again(scope.config, |described| described.disks.retain(|(other, _)| other != target)))
}

/// Whether a disk that the running domain does not have has left a daemon here, or an element in `<metadata>`.
fn is_left(change: &Change<'_>, target: &str, has_daemon: bool, next: Option<&str>) -> Result<bool, String> {
    if change.domain.other_targets.iter().any(|other| other == target) {
        return Ok(false);
    }
    let mut described = Element::of(&change.xml)?.disk(target).is_some();
    if let Some(next) = next {
        described |= Element::of(next)?.disk(target).is_some();
    }
    Ok(described || has_daemon)
}

fn has_disk(xml: &str, target: &str) -> bool {
    Domain::parse(xml).is_ok_and(|domain| domain.disk(target).is_some())
}

fn detach_from_next_start(change: &Change<'_>, target: &str, next: Option<&str>) -> Result<(), String> {
    if !next.is_some_and(|xml| has_disk(xml, target)) {
        return Ok(());
    }
    change.virsh(&["detach-disk", "--domain", &change.domain.uuid, "--target", target, "--config"]).map(drop)
}

fn wait_for_release(change: &Change<'_>, target: &str) -> Result<(), String> {
    let deadline = Instant::now() + RELEASE_TIMEOUT;
    // A libvirt that does not answer may still have the disk, whose daemon must not end under the guest.
    while !change.lacks(target) {
        if Instant::now() >= deadline {
            return Err(format!(
                "the guest has not released the disk {target} within {} s, and its daemon serves on: unmount the disk in the \
                 guest, then run the same command again",
                RELEASE_TIMEOUT.as_secs()
            ));
        }
        thread::sleep(RELEASE_INTERVAL);
    }
    Ok(())
}
