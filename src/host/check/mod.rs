//! PURE. What keeps a domain's disks from working with virtioblkd, each with what to do about it. `facts` collects what
//! the host says.

pub mod facts;

use roxmltree::Node;

use super::domain::{self, Domain, child};
use super::metadata::{self, DiskOptions};
use super::places::Places;
use facts::{Facts, ImageFact};

use crate::engine::cache::{CacheMode, CachePolicy};

/// Bytes of a socket's path that fit into its address.
const MAX_SOCKET_PATH: usize = 107;

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
        let vcpus = child(domain::domain_node(&document)?, "vcpu").and_then(vcpus).unwrap_or(1);
        Ok((domain, described, vcpus))
    });
    match parsed {
        Err(error) => found.problem("domain", error.to_string(), "correct it with virsh edit"),
        Ok((domain, described, vcpus)) => {
            check_memory(&domain, &mut found);
            for disk in &described {
                check_described(&domain, disk, facts, vcpus, &mut found);
            }
            check_undescribed(&domain, &described, facts, &mut found);
            check_host(&described, facts, &mut found);
        }
    }
    found.0
}

fn vcpus(node: Node<'_, '_>) -> Option<u32> {
    node.text()?.trim().parse().ok()
}

fn check_memory(domain: &Domain, found: &mut Findings) {
    if domain.disks.is_empty() {
        let some = domain.other_targets.first().map_or("TARGET", String::as_str);
        found.note(
            "domain",
            "no disk of it is of type vhostuser",
            format!("virtioblkctl domain convert {} {some}", domain.name),
        );
    } else if !domain.has_shared_memory {
        found.problem(
            "memory",
            "the guest's memory is not shared, so no vhost-user disk works",
            "add <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        );
    }
}

fn check_described(domain: &Domain, disk: &DiskOptions, facts: &Facts, vcpus: u32, found: &mut Findings) {
    let target = disk.target.as_str();
    let option = |key: &str| disk.options.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
    let Some(device) = domain.disk(target) else {
        let fix = match domain.other_targets.iter().any(|other| other == target) {
            true => format!("virtioblkctl domain convert {} {target}", domain.name),
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
    if device.socket.len() > MAX_SOCKET_PATH || !device.socket.starts_with('/') {
        found.problem(
            target,
            format!("the socket '{}' is no absolute path of at most {MAX_SOCKET_PATH} bytes", device.socket),
            "shorten path= of its <source>",
        );
    }
    let most = option("num-queues").and_then(|queues| queues.parse::<u32>().ok()).unwrap_or(u32::MAX);
    match device.queues {
        Some(queues) if queues > most => found.problem(
            target,
            format!(
                "<driver queues='{queues}'> asks for more queues than the daemon has ({most}): QEMU will not start"
            ),
            format!("raise queues='{most}' in <metadata>, or lower the other"),
        ),
        None if vcpus > 1 => found.note(
            target,
            format!("its {vcpus} virtual CPUs share one queue"),
            format!("<driver queues='{}'> gives each its own", vcpus.min(most)),
        ),
        _ => {}
    }
    check_image(target, facts, found);
    let mode = option("cache").and_then(|mode| mode.parse::<CacheMode>().ok()).unwrap_or_default();
    found.note(target, format!("cache mode {mode}: {}", what_the_guest_sees(mode)), "");
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
                "setfacl -m u:{user}:rw {0}, and x on its directories; or user='...' in <metadata>",
                path.display()
            ),
        ),
        ImageFact::OfAnotherFormat { path, format } => found.problem(
            target,
            format!("the image {} has the format {format}, and is served as raw", path.display()),
            "convert it with qemu-img convert -O raw",
        ),
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
            "libvirt's hook is not installed, so nothing starts the daemons",
            "ln -s /usr/local/bin/virtioblkctl /etc/libvirt/hooks/qemu.d/50-virtioblkd, then restart libvirtd",
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
    if let Some(label) = &facts.selinux_label {
        let places = Places::of_this_user().map(|places| places.sockets.display().to_string()).unwrap_or_default();
        match label.contains("svirt") {
            true => found.note("host", format!("SELinux is on; {places} has the label {label}"), ""),
            false => found.problem(
                "host",
                format!("SELinux is on, and {places} has the label {label}, which QEMU may not connect to"),
                format!("semanage fcontext -a -t svirt_image_t '{places}(/.*)?'; restorecon -R {places}"),
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
