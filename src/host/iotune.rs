//! Changes the limits (`<iotune>`) in our element of a domain's description.

use roxmltree::Node;

use super::change::Change;
use super::domain::document;
use super::edits::{Edits, end_of_content, escape};
use super::hook::Host;
use super::metadata::{self, DiskOptions, NAMESPACE};
use super::redefine::redefine;
use super::virsh;
use crate::engine::throttle::{Limits, Words};

/// Whether the domain runs, as libvirt says (the domain's `id`: `virDomainDefFormatInternal`).
pub fn runs(name: &str) -> Result<bool, String> {
    let xml = virsh::describe(name, false)?;
    Ok(document(&xml).map_err(|error| error.to_string())?.root_element().has_attribute("id"))
}

/// The limits that the description of the domain's next start gives to the disk.
/// `device`: its target or its image.
pub fn of_next_start(name: &str, device: &str) -> Result<Limits, String> {
    limits_of(&described(&virsh::describe(name, true)?, device)?)
}

/// The disk with this target; else the one with this image.
fn described(xml: &str, device: &str) -> Result<DiskOptions, String> {
    let mut disks = metadata::of_xml(xml).map_err(|error| error.to_string())?;
    if let Some(at) = disks.iter().position(|disk| disk.target == device) {
        return Ok(disks.swap_remove(at));
    }
    disks.retain(|disk| disk.options.iter().any(|(key, value)| is_image(key, value, device)));
    match (disks.pop(), disks.is_empty()) {
        (Some(disk), true) => Ok(disk),
        (Some(_), false) => Err(format!("several disks have the image '{device}': give a target")),
        (None, _) => Err(not_described(device)),
    }
}

/// Whether an option names this image, as the metadata or as the daemon's status does.
fn is_image(key: &str, value: &str, image: &str) -> bool {
    match key {
        "blk-file" => value == image,
        "rbd" => image.strip_prefix("rbd:").unwrap_or(image) == value,
        _ => false,
    }
}

fn limits_of(disk: &DiskOptions) -> Result<Limits, String> {
    let mut limits = Limits::default();
    for (_, value) in disk.options.iter().filter(|(key, _)| key == "throttle") {
        let (name, value) = value.split_once('=').unwrap_or((value, ""));
        limits.set(Words::Libvirt, name, crate::config::limit(name, value)?);
    }
    Ok(limits)
}

fn not_described(device: &str) -> String {
    format!("<metadata> does not describe the disk {device}: its daemon keeps its limits elsewhere")
}

/// Changes the limits in the description of the domain's next start. `device`: the disk's target or its image.
pub fn change_next_start(
    host: &Host,
    name: &str,
    device: &str,
    change: impl Fn(Limits) -> Result<Limits, String>,
) -> Result<(), String> {
    redefine(&host.places, name, |xml| {
        let disk = described(xml, device)?;
        Ok((with_limits(xml, &disk.target, &change(limits_of(&disk)?)?)?, ()))
    })
}

/// Notes the limits in the description of the domain that runs, for a migration and a restart of libvirtd. Returns what
/// failed. A disk that the description lacks is left out.
pub fn note_live(host: &Host, name: &str, target: &str, limits: &Limits) -> Result<Vec<String>, String> {
    let change = Change::begin(host, name)?;
    Ok(change.describe_again(false, |element| {
        if let Some(disk) = element.disk(target).and_then(|disk| with_limits(disk, target, limits).ok()) {
            element.put(target, &disk);
        }
    }))
}

/// Replaces the limits of our `<disk>` with this target. `xml`: a domain's description, or the element alone.
fn with_limits(xml: &str, target: &str, limits: &Limits) -> Result<String, String> {
    let document = document(xml).map_err(|error| error.to_string())?;
    // Another program's metadata may have a <disk>, too. Our element alone may have no namespace.
    let is_namespace = |node: &Node<'_, '_>| match node.tag_name().namespace() {
        Some(namespace) => namespace == NAMESPACE,
        None => *node == document.root_element(),
    };
    let is_ours = |node: &Node<'_, '_>| {
        node.tag_name().name() == "disk" && node.attribute("target") == Some(target) && is_namespace(node)
    };
    let disk = document.descendants().find(is_ours).ok_or_else(|| not_described(target))?;
    let tag = &xml[disk.range()][1..];
    let tag = &tag[..tag.find([' ', '\t', '\n', '\r', '/', '>']).unwrap_or(tag.len())];
    let prefix = &tag[..tag.find(':').map_or(0, |colon| colon + 1)];
    let mut edits = Edits::default();
    for old in disk.children().filter(|node| node.tag_name().name() == "iotune") {
        edits.remove(xml, old.range());
    }
    let values = limits.values(Words::Libvirt).into_iter().map(|(name, value)| {
        let name = name.replace('-', "_");
        format!("<{prefix}{name}>{}</{prefix}{name}>", escape(&value.to_string()))
    });
    let values: String = values.collect();
    if !values.is_empty() {
        let iotune = format!("<{prefix}iotune>{values}</{prefix}iotune>");
        match end_of_content(xml, disk) {
            Ok(at) => edits.insert(at, iotune),
            Err(range) => edits.replace(range.end - "/>".len()..range.end, format!(">{iotune}</{tag}>")),
        }
    }
    Ok(edits.apply(xml))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_xml(xml: &str, device: &str) -> Result<Limits, String> {
        limits_of(&described(xml, device)?)
    }

    #[test]
    fn a_disk_is_found_by_its_target_or_its_image_in_our_metadata_only() {
        let disk = |target: &str, image: &str| format!("<disk target='{target}' {image}/>");
        let ours = disk("vda", "file='/a'")
            + &disk("vdb", "rbd='p/b'")
            + &disk("vdc", "file='/c'")
            + &disk("vdd", "file='/c'");
        let foreign = disk("vda", "").replace("/>", " xmlns='urn:other'/>");
        let xml = format!(
            "<domain><name>a</name><metadata>{foreign}<disks xmlns='{NAMESPACE}'>{ours}</disks></metadata></domain>"
        );
        let target = |device: &str| described(&xml, device).map(|disk| disk.target);
        for (device, found) in [("vda", "vda"), ("/a", "vda"), ("p/b", "vdb"), ("rbd:p/b", "vdb"), ("vdd", "vdd")] {
            assert_eq!(target(device).as_deref(), Ok(found), "{device}");
        }
        assert!(target("/c").unwrap_err().contains("several disks have the image '/c'"));
        assert!(target("/x").unwrap_err().contains("does not describe the disk /x"));
        let mut one = Limits::default();
        assert!(one.set(Words::Libvirt, "read-iops-sec", 5));
        let with = with_limits(&xml, "vda", &one).unwrap();
        assert!(with.contains(&foreign), "{with}");
        assert_eq!(of_xml(&with, "/a"), Ok(one));
    }

    #[test]
    fn limits_are_put_replaced_and_removed_and_all_else_stays() {
        let limits = |values: &[(&str, u64)]| {
            let mut limits = Limits::default();
            values.iter().for_each(|(name, value)| assert!(limits.set(Words::Libvirt, name, *value)));
            limits
        };
        let before = format!(
            "<domain><name>a</name><metadata><v:disks xmlns:v='{}'>\n  <v:disk target='vda' file='/a'/>\n  <v:disk \
             target='vdb' file='/b'>\n    <v:copy_dir path='/c'/>\n  </v:disk></v:disks></metadata></domain>",
            NAMESPACE
        );
        let one = limits(&[("total-iops-sec", 5), ("size-iops-sec", 4096)]);
        for target in ["vda", "vdb"] {
            let with = with_limits(&before, target, &one).unwrap();
            assert_eq!(of_xml(&with, target), Ok(one));
            let other = limits(&[("read-bytes-sec", 7)]);
            let changed = with_limits(&with, target, &other).unwrap();
            assert_eq!(of_xml(&changed, target), Ok(other), "{changed}");
            let without = with_limits(&changed, target, &Limits::default()).unwrap();
            assert_eq!(without.replace("></v:disk>\n  <v:disk", "/>\n  <v:disk"), before);
        }
        let alone = with_limits("<disk target='vda' file='/a'/>", "vda", &one).unwrap();
        assert!(alone.ends_with("<size_iops_sec>4096</size_iops_sec></iotune></disk>"), "{alone}");
        assert!(with_limits(&before, "vdc", &one).unwrap_err().contains("vdc"));
    }
}
