//! PURE. Turns a disk that QEMU serves itself into one that virtioblkd serves, and back. Every byte of the description that
//! has nothing to do with the disk stays as it is.
//!
//! QEMU's disk has settings that virtioblkd has no use for, such as `io='native'`, or keeps elsewhere. On the way there they go
//! into an element `<qemu_disk>` of ours, on the way back they are taken from it. What means something else with
//! virtioblkd is refused by name, so that nothing is lost silently.

mod memory;
mod settings;
mod to_qemu;
mod to_vhost_user;

use roxmltree::Node;

use super::domain::{DomainError, child, refuse};

pub(super) use memory::ADDED;
pub use to_qemu::to_qemu;
pub use to_vhost_user::to_vhost_user;

/// Our element that holds what QEMU's own disk had and virtioblkd has no use for.
pub(super) const KEPT: &str = "qemu_disk";

/// Attributes of `<driver>` that are the device's, whoever serves it.
const DEVICE_ATTRIBUTES: [&str; 8] =
    ["name", "type", "queues", "queue_size", "packed", "event_idx", "iommu", "page_per_vq"];

/// Children of `<disk>` that are the device's, whoever serves it.
const DEVICE_ELEMENTS: [&str; 5] = ["target", "boot", "address", "alias", "acpi"];

/// A converted description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// The whole description.
    pub xml: String,
    /// What the user must know or do.
    pub notes: Vec<String>,
}

fn is_device_attribute(name: &str) -> bool {
    DEVICE_ATTRIBUTES.contains(&name) || name == "ats"
}

/// The `<disk>` with this target.
fn disk<'a>(domain: Node<'a, 'a>, target: &str) -> Result<Node<'a, 'a>, DomainError> {
    let devices = child(domain, "devices");
    let all = devices.iter().flat_map(|devices| devices.children().filter(|node| node.has_tag_name("disk")));
    let target_of = |disk: Node<'a, 'a>| child(disk, "target").and_then(|target| target.attribute("dev"));
    let mut known = Vec::new();
    for disk in all {
        match target_of(disk) {
            Some(found) if found == target => return Ok(disk),
            found => known.extend(found),
        }
    }
    refuse(format!("there is no disk {target}; the disks are {}", known.join(", ")))
}

#[cfg(test)]
mod tests;
