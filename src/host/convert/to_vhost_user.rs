//! The way there: `<disk type='file'>`, `block` or `network` (rbd) becomes `<disk type='vhostuser'>` and our metadata.

use std::path::Path;

use roxmltree::Node;

use super::super::domain::{Domain, DomainError, child, document, domain_node, refuse};
use super::super::edits::{Edits, attributes, end_of_content, escape, indentation};
use super::super::metadata::{self, NAMESPACE};
use super::settings::{self, Image, Settings};
use super::{Converted, DEVICE_ELEMENTS, KEPT, disk, is_device_attribute, memory};

/// Converts the disk with this target. `cache`: a mode in the place of the one that it has. `sockets`: the directory of its
/// socket.
pub fn to_vhost_user(xml: &str, target: &str, cache: Option<&str>, sockets: &Path) -> Result<Converted, DomainError> {
    let named = |error: DomainError| DomainError(format!("disk {target}: {error}"));
    let document = document(xml)?;
    let domain = Domain::of(&document)?;
    let root = domain_node(&document)?;
    if domain.disk(target).is_some() {
        return refuse(format!("disk {target}: it is a vhostuser disk already"));
    }
    let disk = disk(root, target)?;
    let mut settings = Settings::of_qemu_disk(disk).map_err(named)?;
    settings::check_vcpus(root, disk).map_err(named)?;
    let mut notes = Vec::new();
    if let Some(cache) = cache {
        settings.cache = cache.to_owned();
    }
    if let Image::Rbd { user: Some(user), .. } = &settings.image {
        notes.push(format!(
            "libvirt gives QEMU the key of Ceph's client.{user} from its secret; virtioblkd reads a keyring, such as \
             /etc/ceph/ceph.client.{user}.keyring: see that it is there"
        ));
    }
    let mut edits = Edits::default();
    let added = if domain.has_shared_memory { None } else { Some(memory::share(xml, root, &mut edits)?) };
    let socket = sockets.join(format!("{}-{target}.sock", domain.uuid));
    edit_disk(xml, disk, &socket.display().to_string(), &mut edits);
    describe(xml, root, |prefix| element(xml, disk, target, &settings, prefix), added, &mut edits);
    let xml = edits.apply(xml);
    check(&xml, target)?;
    Ok(Converted { xml, notes })
}

/// What the hook will read must be what it accepts.
pub(super) fn check(xml: &str, target: &str) -> Result<(), DomainError> {
    let document = document(xml)?;
    let domain = Domain::of(&document)?;
    let described = metadata::read(&document)?;
    match domain.disk(target).is_some() && described.iter().any(|disk| disk.target == target) {
        true => Ok(()),
        false => refuse(format!("disk {target}: the converted description lacks it")),
    }
}

/// Makes the `<disk>` a vhostuser disk.
fn edit_disk(xml: &str, disk: Node<'_, '_>, socket: &str, edits: &mut Edits) {
    if disk.attribute("type").is_none() {
        edits.insert(disk.range().start + "<disk".len(), " type='vhostuser'");
    }
    for attribute in disk.attributes() {
        match attribute.name() {
            "type" => edits.replace(attribute.range_value(), "vhostuser"),
            "snapshot" => edits.remove(xml, attribute.range()),
            _ => {}
        }
    }
    let driver = child(disk, "driver");
    let device = driver.iter().flat_map(|driver| driver.attributes()).filter(|one| is_device_attribute(one.name()));
    let device: Vec<(&str, &str)> = device.map(|one| (one.name(), one.value())).collect();
    let driver_text = format!("<driver{}/>", attributes(device));
    let source_text =
        format!("<source type='unix' path='{}'><reconnect enabled='yes' timeout='1'/></source>", escape(socket));
    for element in disk.children().filter(Node::is_element) {
        match element.tag_name().name() {
            "driver" => edits.replace(element.range(), driver_text.clone()),
            "source" => edits.replace(element.range(), source_text.clone()),
            name if DEVICE_ELEMENTS.contains(&name) => {}
            _ => edits.remove(xml, element.range()),
        }
    }
}

/// Our element for the disk. `prefix`: what stands before its names, such as `v:`.
fn element(xml: &str, disk: Node<'_, '_>, target: &str, settings: &Settings, prefix: &str) -> String {
    let (list, monitors) = settings.attributes();
    let list = std::iter::once(("target", target)).chain(list.iter().map(|(name, value)| (*name, value.as_str())));
    let list = attributes(list);
    let option = monitors.map(|monitors| {
        let option = attributes([("name", "mon_host"), ("value", monitors.as_str())]);
        format!("<{prefix}rbd_option{option}/>")
    });
    let option = option.unwrap_or_default() + &settings.iotune_text(prefix);
    let kept = disk.children().filter(|node| node.is_element() && !DEVICE_ELEMENTS.contains(&node.tag_name().name()));
    let kept: String = kept.map(|node| &xml[node.range()]).collect();
    let of_disk = disk.attributes().filter(|one| matches!(one.name(), "type" | "snapshot"));
    let of_disk = attributes(of_disk.map(|one| (one.name(), one.value())));
    format!("<{prefix}disk{list}>{option}<{prefix}{KEPT}{of_disk}>{kept}</{prefix}{KEPT}></{prefix}disk>")
}

/// The name of an element as its tag has it, with the prefix.
fn tag<'a>(xml: &'a str, node: Node<'_, '_>) -> &'a str {
    let name = &xml[node.range()][1..];
    &name[..name.find([' ', '\t', '\n', '\r', '/', '>']).unwrap_or(name.len())]
}

/// Puts our element into the domain's `<metadata>`. `element` has our names with this prefix.
fn describe(xml: &str, domain: Node<'_, '_>, element: impl Fn(&str) -> String, added: Option<&str>, edits: &mut Edits) {
    let flag = added.map(|added| format!(" {}='{added}'", memory::ADDED)).unwrap_or_default();
    let ours = child(domain, "metadata")
        .and_then(|metadata| metadata.children().find(|node| node.tag_name().namespace() == Some(NAMESPACE)));
    if let Some(ours) = ours {
        let tag = tag(xml, ours);
        let element = element(&tag[..tag.find(':').map_or(0, |colon| colon + 1)]);
        match (added, ours.attribute_node(memory::ADDED)) {
            // Of a time when the memory was shared; it no longer is.
            (Some(added), Some(old)) => edits.replace(old.range_value(), added),
            _ => edits.insert(ours.range().start + 1 + tag.len(), flag),
        }
        let before = ours.children().rfind(Node::is_element).map_or("", |last| indentation(xml, last));
        match end_of_content(xml, ours) {
            Ok(at) => edits.insert(at, format!("{before}{element}")),
            // `<v:disks .../>`
            Err(range) => edits.replace(range.end - 2..range.end, format!(">{element}</{tag}>")),
        }
        return;
    }
    let metadata = child(domain, "metadata");
    let first = domain.children().find(Node::is_element);
    let indent = first.map_or("", |first| indentation(xml, first));
    let step = if indent.is_empty() { "" } else { "  " };
    let disks = format!(
        "{indent}{step}<v:disks xmlns:v='{NAMESPACE}'{flag}>{indent}{step}{step}{}{indent}{step}</v:disks>",
        element("v:")
    );
    match metadata.map(|metadata| end_of_content(xml, metadata)) {
        Some(Ok(at)) => edits.insert(at, disks),
        Some(Err(range)) => edits.replace(range, format!("<metadata>{disks}{indent}</metadata>")),
        None => {
            let after = child(domain, "uuid").or(first).map_or(0, |node| node.range().end);
            edits.insert(after, format!("{indent}<metadata>{disks}{indent}</metadata>"));
        }
    }
}
