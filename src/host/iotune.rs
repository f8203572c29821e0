//! Changes the limits (`<iotune>`) in our element of a domain's description.

use roxmltree::Node;

use super::change::Change;
use super::domain::document;
use super::edits::{Edits, end_of_content, escape};
use super::hook::Host;
use super::metadata;
use super::redefine::redefine;
use super::virsh;
use crate::engine::throttle::{Limits, Words};

/// The limits that the description of the domain's next start gives to the disk.
pub fn of_next_start(name: &str, target: &str) -> Result<Limits, String> {
    of_xml(&virsh::describe(name, true)?, target)
}

fn of_xml(xml: &str, target: &str) -> Result<Limits, String> {
    let disks = metadata::of_xml(xml).map_err(|error| error.to_string())?;
    let disk = disks.iter().find(|disk| disk.target == target).ok_or_else(|| not_described(target))?;
    let mut limits = Limits::default();
    for (_, value) in disk.options.iter().filter(|(key, _)| key == "throttle") {
        let (name, value) = value.split_once('=').unwrap_or((value, ""));
        limits.set(Words::Libvirt, name, crate::config::limit(name, value)?);
    }
    Ok(limits)
}

fn not_described(target: &str) -> String {
    format!("<metadata> does not describe the disk {target}: its daemon keeps its limits elsewhere")
}

/// Changes the limits in the description of the domain's next start.
pub fn change_next_start(
    host: &Host,
    name: &str,
    target: &str,
    change: impl Fn(Limits) -> Result<Limits, String>,
) -> Result<(), String> {
    redefine(&host.places, name, |xml| Ok((with_limits(xml, target, &change(of_xml(xml, target)?)?)?, ())))
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
    let is_ours = |node: &Node<'_, '_>| node.tag_name().name() == "disk" && node.attribute("target") == Some(target);
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
            metadata::NAMESPACE
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
