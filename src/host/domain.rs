//! PURE. What a domain's XML says that concerns its vhost-user disks. The XML is libvirt's (`virDomainDefFormat`), as a
//! hook reads it on its standard input and `virsh dumpxml` prints it.

use std::fmt;
use std::io::Read;
use std::ops::Range;

use roxmltree::{Document, Node};

/// The largest description that is read. libvirt itself refuses more than 100 MiB; descriptions of 1,000 disks take less
/// than 1 MiB.
const MAX_BYTES: u64 = 16 << 20;

/// Reads a whole description. The error is the end of a sentence that begins with the description's name.
pub fn read_description(input: impl Read) -> Result<String, String> {
    let mut bytes = Vec::new();
    input.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| format!("cannot be read: {error}"))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("is larger than {} MiB, which no domain's description is", MAX_BYTES >> 20));
    }
    let text = String::from_utf8(bytes);
    text.map_err(|error| format!("is not UTF-8 text: see its byte {}", error.utf8_error().valid_up_to()))
}

/// A domain's description that cannot be used. Its text says what is wrong and what to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainError(pub(super) String);

impl fmt::Display for DomainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for DomainError {}

pub(super) fn refuse<T>(message: impl Into<String>) -> Result<T, DomainError> {
    Err(DomainError(message.into()))
}

/// What we need to know of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name; unique on a host.
    pub name: String,
    /// Its UUID, in lower case with dashes.
    pub uuid: String,
    /// QEMU maps the guest's memory so that another process can share it. Without this no vhost-user disk works.
    pub has_shared_memory: bool,
    /// Its disks that a vhost-user server serves, in the order of the description.
    pub disks: Vec<VhostUserDisk>,
    /// The targets of all its other disks, such as `sda`.
    pub other_targets: Vec<String>,
}

/// A `<disk type='vhostuser'>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostUserDisk {
    /// `<target dev='...'>`, such as `vda`.
    pub target: String,
    /// `<source path='...'>`: the socket that QEMU connects to.
    pub socket: String,
    /// The bytes of that path in the description, between its quotes.
    pub socket_range: Range<usize>,
    /// `<driver queues='...'>`.
    pub queues: Option<u32>,
    /// `<driver queue_size='...'>`.
    pub queue_size: Option<u32>,
    /// Settings of `<driver>` that are on and that no vhost-user disk of ours has: `iommu`, `packed`.
    pub impossible: Vec<String>,
    /// `<reconnect enabled='yes'>`: QEMU connects again after the server was restarted.
    pub reconnects: bool,
}

impl Domain {
    /// Reads a whole `<domain>`. Also finds it inside the `<domstatus>` or the migration cookie that libvirt wraps around it.
    pub fn parse(xml: &str) -> Result<Self, DomainError> {
        Self::of(&document(xml)?)
    }

    pub(super) fn of(document: &Document<'_>) -> Result<Self, DomainError> {
        let domain = domain_node(document)?;
        let text = |name: &str| child(domain, name).map(|node| content(node).trim().to_owned());
        let Some(name) = text("name").filter(|name| !name.is_empty()) else {
            return refuse("the domain's description has no <name>");
        };
        let uuid = match text("uuid").filter(|uuid| !uuid.is_empty()) {
            Some(text) => match uuid(&text) {
                Some(uuid) => uuid,
                None => return refuse(format!("domain {name}: <uuid> is '{text}', which is no UUID")),
            },
            None => return refuse(format!("domain {name}: its description has no <uuid>")),
        };
        let (mut disks, mut other_targets) = (Vec::new(), Vec::new());
        let devices = child(domain, "devices");
        for disk in devices.iter().flat_map(|devices| children(*devices, "disk")) {
            let Some(target) = child(disk, "target").and_then(|target| target.attribute("dev")) else { continue };
            if disk.attribute("type") == Some("vhostuser") {
                disks.push(vhost_user_disk(&name, target, disk)?);
            } else {
                other_targets.push(target.to_owned());
            }
        }
        Ok(Domain { name, uuid, has_shared_memory: has_shared_memory(domain), disks, other_targets })
    }

    /// The vhost-user disk with this target.
    pub fn disk(&self, target: &str) -> Option<&VhostUserDisk> {
        self.disks.iter().find(|disk| disk.target == target)
    }
}

pub(super) fn document(xml: &str) -> Result<Document<'_>, DomainError> {
    Document::parse(xml).map_err(|error| DomainError(format!("the domain's description is not XML: {error}")))
}

pub(super) fn domain_node<'a>(document: &'a Document<'_>) -> Result<Node<'a, 'a>, DomainError> {
    let found = document.descendants().find(|node| node.has_tag_name("domain"));
    found.ok_or_else(|| DomainError("the description has no <domain>".into()))
}

pub(super) fn child<'a>(node: Node<'a, 'a>, name: &str) -> Option<Node<'a, 'a>> {
    node.children().find(|node| node.has_tag_name(name))
}

/// The whole text of an element, which comments may cut into several nodes.
pub(super) fn content(node: Node<'_, '_>) -> String {
    node.descendants().filter(Node::is_text).filter_map(|text| text.text()).collect()
}

fn children<'a>(node: Node<'a, 'a>, name: &'static str) -> impl Iterator<Item = Node<'a, 'a>> {
    node.children().filter(move |node| node.has_tag_name(name))
}

fn vhost_user_disk(domain: &str, target: &str, disk: Node<'_, '_>) -> Result<VhostUserDisk, DomainError> {
    let source = child(disk, "source");
    let Some(path) = source.and_then(|source| source.attribute_node("path")) else {
        return refuse(format!(
            "domain {domain}: the vhostuser disk {target} has no <source type='unix' path='...'>: add the path of the \
             socket that QEMU connects to"
        ));
    };
    let driver = child(disk, "driver");
    let of_driver = |name: &str| driver.and_then(|driver| driver.attribute(name));
    let is_on = |name: &&str| of_driver(name) == Some("on");
    let reconnect = source.and_then(|source| child(source, "reconnect"));
    Ok(VhostUserDisk {
        target: target.to_owned(),
        socket: path.value().to_owned(),
        socket_range: path.range_value(),
        queues: of_driver("queues").and_then(|queues| queues.parse().ok()),
        queue_size: of_driver("queue_size").and_then(|size| size.parse().ok()),
        impossible: ["iommu", "packed"].into_iter().filter(is_on).map(str::to_owned).collect(),
        reconnects: reconnect.is_some_and(|reconnect| reconnect.attribute("enabled") == Some("yes")),
    })
}

/// libvirt's rule: `<access mode='shared'/>` for the whole guest, which each NUMA cell may override (`memAccess`).
fn has_shared_memory(domain: Node<'_, '_>) -> bool {
    let backing = child(domain, "memoryBacking");
    let access = backing.and_then(|backing| child(backing, "access")?.attribute("mode"));
    let numa = child(domain, "cpu").and_then(|cpu| child(cpu, "numa"));
    let mut cells = numa.iter().flat_map(|numa| children(*numa, "cell")).peekable();
    if cells.peek().is_none() {
        return access == Some("shared");
    }
    cells.all(|cell| cell.attribute("memAccess").or(access) == Some("shared"))
}

/// The virtual CPUs that the guest begins with.
pub(super) fn vcpus(domain: Node<'_, '_>) -> u32 {
    let vcpu = child(domain, "vcpu");
    let current = vcpu.and_then(|vcpu| vcpu.attribute("current")?.parse().ok());
    current.or_else(|| content(vcpu?).trim().parse().ok()).unwrap_or(1)
}

/// The image of a disk that QEMU serves itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QemuImage {
    /// The disk's target.
    pub(super) target: String,
    /// The path of a file or device, or POOL/IMAGE.
    pub(super) name: String,
    pub(super) is_read_only: bool,
}

/// The images of the domain's disks of type file, block and network (rbd).
pub(super) fn qemu_images(domain: Node<'_, '_>) -> Vec<QemuImage> {
    let image = |disk: Node<'_, '_>| {
        let source = child(disk, "source")?;
        let name = match disk.attribute("type").unwrap_or("file") {
            "file" => source.attribute("file"),
            "block" => source.attribute("dev"),
            "network" if source.attribute("protocol") == Some("rbd") => source.attribute("name"),
            _ => None,
        };
        Some(QemuImage {
            target: child(disk, "target")?.attribute("dev")?.to_owned(),
            name: name?.to_owned(),
            is_read_only: child(disk, "readonly").is_some() || disk.attribute("device") == Some("cdrom"),
        })
    };
    let devices = child(domain, "devices");
    devices.iter().flat_map(|devices| children(*devices, "disk")).filter_map(image).collect()
}

/// A UUID in lower case with dashes. libvirt reads it with the dashes elsewhere or without any, too (`virUUIDParse`).
fn uuid(text: &str) -> Option<String> {
    let digits: String = text.chars().filter(|character| *character != '-').collect();
    if digits.len() != 32 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let digits = digits.to_lowercase();
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|range| &digits[range]);
    Some(parts.join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11";

    fn described(more: &str, devices: &str) -> String {
        format!("<domain type='kvm'><name>vm1</name><uuid>{UUID}</uuid>{more}<devices>{devices}</devices></domain>")
    }

    #[test]
    fn vhost_user_disks_are_found_among_others() {
        let xml = described(
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
            "<disk type='file' device='disk'><source file='/a'/><target dev='sda'/></disk>
             <disk type='vhostuser' device='disk'><driver name='qemu' type='raw' queues='4'/>
             <source type='unix' path='/run/a.sock'><reconnect enabled='yes' timeout='1'/></source>
             <target dev='vda' bus='virtio'/></disk>",
        );
        let domain = Domain::parse(&xml).unwrap();
        assert_eq!((domain.name.as_str(), domain.uuid.as_str()), ("vm1", UUID));
        assert!(domain.has_shared_memory);
        assert_eq!(domain.other_targets, ["sda"]);
        let disk = domain.disk("vda").unwrap();
        assert_eq!((disk.socket.as_str(), disk.queues, disk.reconnects), ("/run/a.sock", Some(4), true));
        assert_eq!(&xml[disk.socket_range.clone()], "/run/a.sock");
        assert_eq!(domain.disk("sda"), None);
    }

    #[test]
    fn memory_is_shared_only_if_every_numa_cell_is() {
        let shared = "<memoryBacking><access mode='shared'/></memoryBacking>";
        let cells = |one: &str, other: &str| format!("<cpu><numa><cell {one}/><cell {other}/></numa></cpu>");
        let cases = [
            (String::new(), false),
            (shared.to_owned(), true),
            (cells("memAccess='shared'", "memAccess='shared'"), true),
            (cells("memAccess='shared'", ""), false),
            (format!("{shared}{}", cells("", "memAccess='private'")), false),
            (format!("{shared}{}", cells("", "")), true),
        ];
        for (more, expected) in cases {
            let domain = Domain::parse(&described(&more, "")).unwrap();
            assert_eq!(domain.has_shared_memory, expected, "{more}");
        }
    }

    #[test]
    fn a_description_that_is_cut_inside_a_character_is_too_large_and_not_foreign() {
        let size = usize::try_from(MAX_BYTES).unwrap();
        let text = format!("{}é", "x".repeat(size));
        assert!(read_description(text.as_bytes()).unwrap_err().contains("larger than 16 MiB"));
        assert!(read_description(&b"<domain>\xff"[..]).unwrap_err().contains("not UTF-8 text: see its byte 8"));
        assert_eq!(read_description("é".as_bytes()), Ok("é".into()));
    }

    #[test]
    fn a_uuid_is_read_as_libvirt_reads_it() {
        let with = |uuid: &str| Domain::parse(&described("", "").replace(UUID, uuid)).map(|domain| domain.uuid);
        let without_dashes = UUID.replace('-', "");
        let cut = UUID.replacen('-', "<!-- x -->-", 1);
        for text in [&UUID.to_uppercase(), &without_dashes, &format!("\n {without_dashes} "), &cut] {
            assert_eq!(with(text).as_deref(), Ok(UUID), "{text}");
        }
        assert!(with(&without_dashes[1..]).is_err());
    }

    #[test]
    fn a_domain_is_found_inside_what_wraps_it() {
        let xml = format!("<domstatus state='running'>{}</domstatus>", described("", ""));
        assert_eq!(Domain::parse(&xml).unwrap().name, "vm1");
    }

    #[test]
    fn unusable_descriptions_are_refused_with_the_reason() {
        let cases = [
            ("not xml", "is not XML"),
            ("<network/>", "no <domain>"),
            ("<domain><uuid/></domain>", "no <name>"),
            ("<domain><name>a</name></domain>", "no <uuid>"),
            ("<domain><name>a</name><uuid>../../etc</uuid></domain>", "no UUID"),
            ("<!DOCTYPE d [<!ENTITY a 'b'>]><domain>&a;</domain>", "is not XML"),
        ];
        for (xml, reason) in cases {
            let error = Domain::parse(xml).unwrap_err().to_string();
            assert!(error.contains(reason), "{xml}: {error}");
        }
        let error = Domain::parse(&described("", "<disk type='vhostuser'><target dev='vda'/></disk>")).unwrap_err();
        assert!(error.to_string().contains("vda has no <source"), "{error}");
    }
}
