//! PURE. What keeps a domain's disks from working with virtioblkd, each with what to do about it. `facts` collects what
//! the host says.

pub mod apparmor;
pub mod facts;

use std::path::Path;

use roxmltree::Node;

use super::domain::{self, Domain, QemuImage, VhostUserDisk, child};
use super::metadata::{self, DiskOptions};
use super::places::Places;
use facts::{Facts, ImageFact};

use crate::config;
use crate::engine::cache::{CacheMode, CachePolicy};

/// Bytes of a socket's path that fit into its address.
const MAX_SOCKET_PATH: usize = 107;

/// The descriptors of a queue where the description has no `queue_size` (`vhost_user_blk_properties`).
const QEMU_QUEUE_SIZE: u32 = 128;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grade {
    /// The domain will not start, or a disk of it will stop working.
    Problem,
    /// To be known.
    Note,
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub grade: Grade,
    /// A disk's target, `memory`, `host` or `domain`.
    pub about: String,
    /// What is so.
    pub what: String,
    /// What to do; empty where there is nothing to do.
    pub fix: String,
}

/// Collects findings.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn problem(&mut self, about: &str, what: impl Into<String>, fix: impl Into<String>) {
        self.0.push(Finding { grade: Grade::Problem, about: about.into(), what: what.into(), fix: fix.into() });
    }

    fn note(&mut self, about: &str, what: impl Into<String>, fix: impl Into<String>) {
        self.0.push(Finding { grade: Grade::Note, about: about.into(), what: what.into(), fix: fix.into() });
    }
}

/// Checks a domain's description, `virsh dumpxml --inactive`.
pub fn findings(xml: &str, facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::default();
    let parsed = domain::document(xml).and_then(|document| {
        let domain = Domain::of(&document)?;
        let described = metadata::read(&document)?;
        let node = domain::domain_node(&document)?;
        Ok((domain, described, domain::qemu_images(node), Machine::of(node, facts)))
    });
    match parsed {
        Err(error) => found.problem("domain", error.to_string(), "correct it with virsh edit"),
        Ok((domain, described, others, machine)) => {
            check_memory(&domain, &mut found);
            check_devices(&domain, &mut found);
            for disk in &described {
                check_described(&domain, disk, facts, machine, &mut found);
            }
            check_shared_images(&described, &others, facts, &mut found);
            check_undescribed(&domain, &described, facts, &mut found);
            check_host(&described, facts, &mut found);
        }
    }
    found.0
}

/// What the queues of a disk depend on.
#[derive(Clone, Copy)]
struct Machine {
    vcpus: u32,
    /// QEMU gives a disk without `queues` one for each virtual CPU.
    has_auto_queues: bool,
}

impl Machine {
    /// QEMU 5.2 began with it, and not for older machine types (`hw_compat_5_1`).
    fn of(domain: Node<'_, '_>, facts: &Facts) -> Self {
        let vcpus = domain::vcpus(domain);
        let kind = child(domain, "os").and_then(|os| child(os, "type")?.attribute("machine"));
        let is_new = |version: (u32, u32)| version >= (5, 2);
        let has_auto_queues = facts.qemu.is_none_or(is_new) && kind.and_then(machine_version).is_none_or(is_new);
        Machine { vcpus, has_auto_queues }
    }
}

/// The version in a machine type, such as `pc-q35-4.2`.
fn machine_version(kind: &str) -> Option<(u32, u32)> {
    let (major, minor) = kind.rsplit('-').next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A word of a command line, quoted where a shell would take it for more than itself.
fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_./:@%+=,-".contains(&byte);
    match !word.is_empty() && word.bytes().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// The command that converts a disk.
fn convert_command(domain: &str, target: &str) -> String {
    // A name that begins with a dash is no option.
    let end_of_options = if domain.starts_with('-') { "-- " } else { "" };
    format!("virtioblkctl domain convert {end_of_options}{} {}", quoted(domain), quoted(target))
}

fn check_memory(domain: &Domain, found: &mut Findings) {
    if domain.disks.is_empty() {
        let some = domain.other_targets.first().map_or("TARGET", String::as_str);
        found.note("domain", "no disk of it is of type vhostuser", convert_command(&domain.name, some));
    } else if !domain.has_shared_memory {
        found.problem(
            "memory",
            "the guest's memory is not shared, so no vhost-user disk works",
            "add <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        );
    }
}

/// What is wrong with `<disk type='vhostuser'>`, whether our metadata describes it or not.
fn check_devices(domain: &Domain, found: &mut Findings) {
    for (at, disk) in domain.disks.iter().enumerate() {
        for setting in &disk.impossible {
            found.problem(
                &disk.target,
                format!("<driver {setting}='on'> is impossible for a vhost-user disk of virtioblkd"),
                format!("remove {setting}='on' from its <driver>"),
            );
        }
        if let Some(other) = domain.disks[..at].iter().find(|other| other.socket == disk.socket) {
            found.problem(
                &disk.target,
                format!("it has the socket of the disk {}: {}", other.target, disk.socket),
                "give each disk another path= in its <source>",
            );
        }
    }
}

/// The daemon of the second disk would wait for the image for ever.
fn check_shared_images(described: &[DiskOptions], others: &[QemuImage], facts: &Facts, found: &mut Findings) {
    let ours = described.iter().filter_map(|disk| {
        Some(QemuImage {
            target: disk.target.clone(),
            name: option(disk, "blk-file").or(option(disk, "rbd"))?.to_owned(),
            is_read_only: option(disk, "read-only") == Some("true"),
        })
    });
    // An element for a disk that is QEMU's is a finding of its own.
    let others = others.iter().filter(|other| described.iter().all(|disk| disk.target != other.target));
    let all: Vec<QemuImage> = others.cloned().chain(ours).collect();
    let image = |disk: &QemuImage| {
        let identity = facts.identities.iter().find(|(target, _)| *target == disk.target);
        identity.map_or(disk.name.clone(), |(_, identity)| identity.clone())
    };
    for (at, disk) in all.iter().enumerate() {
        let has_it = |other: &&QemuImage| image(other) == image(disk) && !(other.is_read_only && disk.is_read_only);
        // Two disks that are QEMU's are no matter of ours.
        if described.iter().all(|ours| ours.target != disk.target) {
            continue;
        }
        if let Some(other) = all[..at].iter().find(has_it) {
            found.problem(
                &disk.target,
                format!(
                    "its image is the one of the disk {}, too, and a guest that writes to one destroys the other",
                    other.target
                ),
                "give each disk an image of its own, or both readonly='yes'",
            );
        }
    }
}

fn option<'a>(disk: &'a DiskOptions, key: &str) -> Option<&'a str> {
    disk.options.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
}

fn check_described(domain: &Domain, disk: &DiskOptions, facts: &Facts, machine: Machine, found: &mut Findings) {
    let target = disk.target.as_str();
    let Some(device) = domain.disk(target) else {
        let fix = match domain.other_targets.iter().any(|other| other == target) {
            true => convert_command(&domain.name, target),
            false => "add the <disk type='vhostuser'>, or remove the element from <metadata>".to_owned(),
        };
        return found.problem(target, "<metadata> describes it, and it is no vhostuser disk", fix);
    };
    if !device.reconnects {
        found.problem(
            target,
            "QEMU does not connect again when the daemon is restarted: the guest's requests then wait for ever",
            "put <reconnect enabled='yes' timeout='1'/> into its <source>",
        );
    }
    check_socket(device, facts, found);
    check_queues(device, disk, machine, found);
    check_image(target, facts, found);
    let mode = option(disk, "cache").and_then(|mode| mode.parse::<CacheMode>().ok()).unwrap_or_default();
    found.note(target, format!("cache mode {mode}: {}", what_the_guest_sees(mode)), "");
}

fn check_socket(device: &VhostUserDisk, facts: &Facts, found: &mut Findings) {
    let (target, socket) = (device.target.as_str(), device.socket.as_str());
    let directory = Path::new(socket).parent().filter(|path| facts.missing_directories.iter().any(|one| one == path));
    if !socket.starts_with('/') {
        found.problem(
            target,
            format!("the socket '{socket}' is no absolute path"),
            "let path= of its <source> begin with /, such as /run/virtioblkd/NAME.sock",
        );
    } else if socket.len() > MAX_SOCKET_PATH {
        found.problem(
            target,
            format!("the socket '{socket}' has more than {MAX_SOCKET_PATH} bytes"),
            "shorten path= of its <source>",
        );
    } else if let Some(directory) = directory {
        found.problem(
            target,
            format!("the directory of its socket does not exist: {}", directory.display()),
            format!(
                "put path= of its <source> into the directory that the hook makes, /run/virtioblkd, or make this one: mkdir -p {}",
                quoted(&directory.display().to_string())
            ),
        );
    }
}

fn check_queues(device: &VhostUserDisk, disk: &DiskOptions, machine: Machine, found: &mut Findings) {
    let target = device.target.as_str();
    let limit =
        |key: &str, default: u16| option(disk, key).and_then(|text| text.parse().ok()).unwrap_or(default.into());
    let queues: u32 = limit("num-queues", config::DEFAULT_NUM_QUEUES);
    match device.queues {
        Some(asked) if asked > queues => found.problem(
            target,
            format!("<driver queues='{asked}'> asks for more queues than the daemon has ({queues}): QEMU will not start"),
            match asked <= config::DEFAULT_NUM_QUEUES.into() {
                true => format!("set queues='{asked}' in <metadata>, or queues='{queues}' in <driver>"),
                false => format!("set queues='{queues}' in <driver>"),
            },
        ),
        None if machine.has_auto_queues && machine.vcpus > queues => found.problem(
            target,
            format!(
                "QEMU asks for a queue for each of the {} virtual CPUs, and the daemon has {queues}: QEMU will not start",
                machine.vcpus
            ),
            format!("set queues='{queues}' in <driver>"),
        ),
        None if !machine.has_auto_queues && machine.vcpus > 1 => found.note(
            target,
            format!("its {} virtual CPUs share one queue", machine.vcpus),
            format!("<driver queues='{}'> gives each its own", machine.vcpus.min(queues)),
        ),
        _ => {}
    }
    let (size, asked) = (limit("queue-size", config::DEFAULT_QUEUE_SIZE), device.queue_size.unwrap_or(QEMU_QUEUE_SIZE));
    if asked > size {
        found.problem(
            target,
            format!("QEMU gives it queues of {asked} descriptors, and the daemon takes at most {size}: the disk will not work"),
            format!("set queue_size='{asked}' in <metadata>, or queue_size='{size}' in <driver>"),
        );
    }
}

/// What a mode means for the guest.
pub fn what_the_guest_sees(mode: CacheMode) -> String {
    let policy = CachePolicy::from(mode);
    let sees = if policy.guest_sees_write_cache() { "write back" } else { "write through" };
    let acknowledged = match (policy.syncs_each_write(true), policy.opens_direct()) {
        (true, _) => "when it is durable",
        (false, true) => "when the host's device has it",
        (false, false) => "when the host's cache has it",
    };
    let flush = match (policy.ignores_flush(), policy.guest_sees_write_cache()) {
        (true, _) => "its flushes are ignored",
        (false, true) => "its flush makes writes durable",
        (false, false) => "it has no need to flush",
    };
    format!("the guest sees {sees}, a write is acknowledged {acknowledged}, {flush}")
}

fn check_image(target: &str, facts: &Facts, found: &mut Findings) {
    let Some((_, image)) = facts.images.iter().find(|(of, _)| of == target) else { return };
    match image {
        ImageFact::Usable => {}
        ImageFact::Missing(path) => found.problem(
            target,
            format!("there is no image {}", path.display()),
            "create it (truncate -s SIZE), or correct file= in <metadata>",
        ),
        ImageFact::NotUsable { path, user } => found.problem(
            target,
            format!("the user {user}, which its daemon runs as, cannot open the image {}", path.display()),
            format!(
                "setfacl -m u:{}:rw {}, and x on its directories; or user='...' in <metadata>",
                quoted(user),
                quoted(&path.display().to_string())
            ),
        ),
        ImageFact::OfAnotherFormat { path, format } => found.problem(
            target,
            format!("the image {} has the format {format}, and is served as raw", path.display()),
            "convert it with qemu-img convert -O raw",
        ),
        ImageFact::NoUser(user) => found.problem(
            target,
            format!("there is no user '{user}', which its daemon is to run as"),
            "correct user= in <metadata>, or leave it out",
        ),
        ImageFact::Unsuitable { path, why, fix } => {
            found.problem(target, format!("the image {} cannot be served: it {why}", path.display()), fix)
        }
        ImageFact::Unchecked(why) => {
            found.note(target, format!("whether its image can be opened was not checked: {why}"), "")
        }
    }
}

/// vhost-user disks that the hook does not start.
fn check_undescribed(domain: &Domain, described: &[DiskOptions], facts: &Facts, found: &mut Findings) {
    let is_described = |target: &str| described.iter().any(|disk| disk.target == target);
    for disk in domain.disks.iter().filter(|disk| !is_described(&disk.target)) {
        if facts.served.iter().any(|socket| socket.as_os_str() == disk.socket.as_str()) {
            continue;
        }
        found.problem(
            &disk.target,
            format!("<metadata> does not describe it, and no daemon of this host listens on {}", disk.socket),
            "describe it, or start its daemon before the domain: else virsh start hangs",
        );
    }
}

fn check_host(described: &[DiskOptions], facts: &Facts, found: &mut Findings) {
    if described.is_empty() {
        return;
    }
    if !facts.has_hook {
        found.problem(
            "host",
            "libvirt's hook is not installed, or its link leads to no program, so nothing starts the daemons",
            "ln -sf /usr/local/bin/virtioblkctl /etc/libvirt/hooks/qemu.d/50-virtioblkd, then restart libvirtd",
        );
    }
    let needs_user = described.iter().any(|disk| disk.options.iter().all(|(name, _)| name != "user"));
    if let (true, Some(user)) = (needs_user, &facts.missing_user) {
        found.problem(
            "host",
            format!("there is no user {user}, which the daemons run as"),
            "copy sysusers.d/virtioblkd.conf to /etc/sysusers.d and run systemd-sysusers, or give user='root'",
        );
    }
    if facts.apparmor_rule == Some(false) {
        found.problem(
            "host",
            "AppArmor is on, and its rules do not let QEMU connect to the disks' sockets",
            "copy qemu-configs/apparmor/libvirt-qemu.d/virtioblkd to /etc/apparmor.d/abstractions/libvirt-qemu.d/",
        );
    }
    if let Some(rule) = &facts.apparmor_hook {
        found.problem(
            "host",
            format!(
                "AppArmor does not let libvirt execute its hook, {}: no domain starts, whatever its disks are",
                rule.program.display()
            ),
            format!(
                "echo {} >> {} && apparmor_parser -r {}",
                quoted(&format!("  {} PUx,", rule.program.display())),
                quoted(&rule.local.display().to_string()),
                quoted(&rule.profile.display().to_string())
            ),
        );
    }
    if let Some(label) = &facts.selinux_label {
        let places = Places::of_this_user().map(|places| places.sockets.display().to_string()).unwrap_or_default();
        match label.contains("svirt") {
            true => found.note("host", format!("SELinux is on; {places} has the label {label}"), ""),
            false => found.problem(
                "host",
                format!("SELinux is on, and {places} has the label {label}, which QEMU may not connect to"),
                format!(
                    "semanage fcontext -a -t svirt_image_t {}; restorecon -R {}",
                    quoted(&format!("{places}(/.*)?")),
                    quoted(&places)
                ),
            ),
        }
    }
    match facts.qemu {
        Some(version) if version < (4, 2) => found.problem(
            "host",
            format!("QEMU {}.{} does not track requests in flight for this disk", version.0, version.1),
            "use QEMU 4.2 or later: a guest may hang when its daemon is killed",
        ),
        Some(version) => {
            found.note("host", format!("QEMU {}.{} reconnects and tracks requests in flight", version.0, version.1), "")
        }
        None => found.note("host", "QEMU's version is not known: libvirt did not say it", ""),
    }
}

#[cfg(test)]
mod tests;
