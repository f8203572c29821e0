//! The settings of a disk that both QEMU's own disk and virtioblkd have, in libvirt's words.

use roxmltree::Node;

use super::super::domain::{DomainError, child, refuse};
use super::super::metadata::DiskOptions;
use super::{DEVICE_ELEMENTS, is_device_attribute};

/// What both kinds of disk can be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) image: Image,
    pub(super) cache: String,
    pub(super) discard: String,
    pub(super) error_policy: String,
    pub(super) serial: Option<String>,
    pub(super) readonly: bool,
    pub(super) logical_block_size: Option<String>,
    pub(super) discard_granularity: Option<String>,
}

/// Where the data is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Image {
    /// A file or a block device.
    Path(String),
    Rbd {
        name: String,
        user: Option<String>,
        conf: Option<String>,
        /// Monitors, as Ceph's option `mon_host` has them.
        monitors: Option<String>,
    },
}

impl Settings {
    /// Those of a disk that QEMU serves. Refuses by name what virtioblkd would not do.
    pub(super) fn of_qemu_disk(disk: Node<'_, '_>) -> Result<Self, DomainError> {
        check_disk(disk)?;
        let driver = child(disk, "driver");
        let of_driver = |name: &str| driver.and_then(|driver| driver.attribute(name)).map(str::to_owned);
        if let Some(driver) = driver {
            check_driver(driver)?;
        }
        // libvirt's default is to say nothing to QEMU, which then has writeback, ignore, enospc for writes.
        let or = |value: Option<String>, default: &str| value.filter(|v| v != "default").unwrap_or(default.to_owned());
        let error_policy = or(of_driver("error_policy"), "enospace");
        let reads = of_driver("rerror_policy").filter(|policy| policy != "default");
        let expected = if error_policy == "enospace" { "report" } else { &error_policy };
        if reads.as_deref().is_some_and(|policy| policy != expected) {
            return refuse(format!(
                "rerror_policy='{}' with error_policy='{error_policy}': virtioblkd has one policy for reads and writes",
                reads.unwrap_or_default()
            ));
        }
        let blockio = child(disk, "blockio");
        let of_blockio = |name: &str| blockio.and_then(|blockio| blockio.attribute(name)).map(str::to_owned);
        Ok(Settings {
            image: image(disk)?,
            cache: or(of_driver("cache"), "writeback"),
            discard: or(of_driver("discard"), "ignore"),
            error_policy,
            serial: child(disk, "serial").and_then(|serial| serial.text()).map(|serial| serial.trim().to_owned()),
            readonly: child(disk, "readonly").is_some(),
            logical_block_size: of_blockio("logical_block_size"),
            discard_granularity: of_blockio("discard_granularity"),
        })
    }

    /// Those that our element gives, and the names of others that QEMU's own disk has no place for.
    pub(super) fn of_options(disk: &DiskOptions) -> (Self, Vec<String>) {
        let value = |key: &str| disk.options.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
        let monitors = disk.options.iter().find_map(|(name, value)| match name.as_str() {
            "rbd-option" => value.strip_prefix("mon_host=").map(str::to_owned),
            _ => None,
        });
        let image = match value("rbd") {
            Some(name) => Image::Rbd { name, user: value("ceph-user"), conf: value("ceph-conf"), monitors },
            None => Image::Path(value("blk-file").unwrap_or_default()),
        };
        let settings = Settings {
            image,
            cache: value("cache").unwrap_or("none".into()),
            discard: value("discard").unwrap_or("unmap".into()),
            error_policy: match value("on-error").as_deref() {
                None | Some("enospc") => "enospace".into(),
                Some(other) => other.to_owned(),
            },
            serial: value("serial"),
            readonly: value("read-only").as_deref() == Some("true"),
            logical_block_size: value("logical-block-size"),
            discard_granularity: value("discard-granularity"),
        };
        const CARRIED: [&str; 11] = [
            "blk-file",
            "rbd",
            "ceph-user",
            "ceph-conf",
            "cache",
            "discard",
            "on-error",
            "serial",
            "read-only",
            "logical-block-size",
            "discard-granularity",
        ];
        let is_carried = |(name, value): &&(String, String)| {
            CARRIED.contains(&name.as_str()) || name == "rbd-option" && value.starts_with("mon_host=")
        };
        let others = disk.options.iter().filter(|option| !is_carried(option)).map(|(name, _)| name.replace('-', "_"));
        (settings, others.collect())
    }

    /// The attributes of our `<disk>` element, and its children (monitors).
    pub(super) fn attributes(&self) -> (Vec<(&'static str, String)>, Option<String>) {
        let mut list: Vec<(&'static str, Option<String>)> = Vec::new();
        let mut option = None;
        match &self.image {
            Image::Path(path) => list.push(("file", Some(path.clone()))),
            Image::Rbd { name, user, conf, monitors } => {
                list.push(("rbd", Some(name.clone())));
                list.push(("ceph_user", user.clone()));
                list.push(("ceph_conf", conf.clone()));
                option = monitors.clone();
            }
        }
        list.push(("cache", Some(self.cache.clone())));
        list.push(("discard", Some(self.discard.clone())));
        list.push(("error_policy", Some(self.error_policy.clone()).filter(|policy| policy != "enospace")));
        list.push(("serial", self.serial.clone()));
        list.push(("readonly", self.readonly.then(|| "yes".to_owned())));
        list.push(("logical_block_size", self.logical_block_size.clone()));
        list.push(("discard_granularity", self.discard_granularity.clone()));
        (list.into_iter().filter_map(|(name, value)| Some((name, value?))).collect(), option)
    }
}

fn check_disk(disk: Node<'_, '_>) -> Result<(), DomainError> {
    for attribute in disk.attributes() {
        match (attribute.name(), attribute.value()) {
            ("type", "file" | "block" | "network") | ("device", "disk") | ("snapshot" | "model", _) => {}
            ("type", other) => {
                return refuse(format!("its type is '{other}': file, block and network (rbd) can be converted"));
            }
            ("device", other) => return refuse(format!("it is a {other}: only disks can be converted")),
            (name, value) => return refuse(format!("{name}='{value}' cannot be carried over: remove it first")),
        }
    }
    let bus = child(disk, "target").and_then(|target| target.attribute("bus"));
    if bus.is_some_and(|bus| bus != "virtio") {
        return refuse(format!(
            "its bus is '{}': virtioblkd serves virtio disks; change the bus first, and see that the guest has the driver",
            bus.unwrap_or_default()
        ));
    }
    for element in disk.children().filter(Node::is_element) {
        let name = element.tag_name().name();
        match name {
            "driver" | "source" | "serial" | "readonly" | "blockio" | "auth" => {}
            "backingStore" if element.children().all(|node| !node.is_element()) => {}
            "shareable" => return refuse("<shareable/>: virtioblkd gives an image to one guest; remove it first"),
            _ if DEVICE_ELEMENTS.contains(&name) => {}
            _ => return refuse(format!("<{name}> cannot be carried over: remove it first")),
        }
    }
    let unknown = child(disk, "blockio").and_then(|blockio| {
        let known = ["logical_block_size", "discard_granularity"];
        blockio.attributes().find(|attribute| !known.contains(&attribute.name()))
    });
    match unknown {
        Some(other) => refuse(format!("<blockio {}='{}'> cannot be carried over", other.name(), other.value())),
        None => Ok(()),
    }
}

fn check_driver(driver: Node<'_, '_>) -> Result<(), DomainError> {
    for attribute in driver.attributes() {
        match (attribute.name(), attribute.value()) {
            ("type", "raw") => {}
            ("type", other) => {
                return refuse(format!(
                    "its image has the format {other}, and virtioblkd serves raw images: convert it with qemu-img first"
                ));
            }
            ("error_policy", "ignore") => {
                return refuse(
                    "error_policy='ignore' lets the guest take failed writes for done; virtioblkd refuses it",
                );
            }
            // How QEMU does it, which the guest cannot see. `<qemu_disk>` keeps them.
            ("io" | "iothread" | "ioeventfd" | "cache" | "discard" | "error_policy" | "rerror_policy", _) => {}
            ("detect_zeroes" | "copy_on_read", "off") => {}
            (name, _) if is_device_attribute(name) => {}
            (name, value) => return refuse(format!("{name}='{value}' cannot be carried over: remove it first")),
        }
    }
    match driver.children().find(|node| node.is_element() && !node.has_tag_name("iothreads")) {
        Some(other) => refuse(format!("<driver><{}> cannot be carried over: remove it first", other.tag_name().name())),
        None => Ok(()),
    }
}

fn image(disk: Node<'_, '_>) -> Result<Image, DomainError> {
    let Some(source) = child(disk, "source") else { return refuse("it has no <source>") };
    if let Some(policy) = source.attribute("startupPolicy").filter(|policy| *policy != "mandatory") {
        return refuse(format!("startupPolicy='{policy}' cannot be carried over: the image must exist"));
    }
    let is_network = disk.attribute("type") == Some("network");
    for element in source.children().filter(Node::is_element) {
        match element.tag_name().name() {
            "seclabel" if !is_network => {}
            "host" | "auth" | "config" if is_network => {}
            name => return refuse(format!("<source><{name}> cannot be carried over: remove it first")),
        }
    }
    if !is_network {
        let path = source.attribute("file").or(source.attribute("dev"));
        return match path {
            Some(path) => Ok(Image::Path(path.to_owned())),
            None => refuse("its <source> names no file and no device"),
        };
    }
    match source.attribute("protocol") {
        Some("rbd") => {}
        other => return refuse(format!("its protocol is '{}': only rbd can be converted", other.unwrap_or_default())),
    }
    let Some(name) = source.attribute("name") else { return refuse("its <source> names no image") };
    let hosts: Result<Vec<String>, DomainError> =
        source.children().filter(|node| node.has_tag_name("host")).map(monitor).collect();
    let auth = child(source, "auth").or(child(disk, "auth"));
    Ok(Image::Rbd {
        name: name.to_owned(),
        user: auth.and_then(|auth| auth.attribute("username")).map(str::to_owned),
        conf: child(source, "config").and_then(|config| config.attribute("file")).map(str::to_owned),
        monitors: Some(hosts?.join(",")).filter(|hosts| !hosts.is_empty()),
    })
}

fn monitor(host: Node<'_, '_>) -> Result<String, DomainError> {
    let Some(name) = host.attribute("name") else { return refuse("a <host> of its <source> has no name") };
    let name = if name.contains(':') && !name.starts_with('[') { format!("[{name}]") } else { name.to_owned() };
    Ok(host.attribute("port").map_or(name.clone(), |port| format!("{name}:{port}")))
}
