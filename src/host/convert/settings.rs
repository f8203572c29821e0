//! The settings of a disk that both QEMU's own disk and virtioblkd have, in libvirt's words.

use roxmltree::Node;

use super::super::domain::{DomainError, child, content, refuse, vcpus};
use super::super::edits::{attributes, escape};
use super::super::metadata::DiskOptions;
use super::{DEVICE_ELEMENTS, is_device_attribute};
use crate::config;

/// The queues of a daemon whose element does not limit them, and the most that a limit can be.
const MAX_QUEUES: u32 = config::DEFAULT_NUM_QUEUES as u32;

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
    /// Limits: the names of `<iotune>`'s elements and their values.
    pub(super) iotune: Vec<(String, String)>,
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
        if let Some(driver) = child(disk, "driver") {
            check_driver(driver)?;
        }
        let Some(source) = child(disk, "source") else { return refuse("it has no <source>") };
        check_source(kind(disk), source)?;
        Settings::read(disk)
    }

    /// [`Settings::of_qemu_disk`] for a disk that was converted: refuses nothing that can be read.
    pub(super) fn read(disk: Node<'_, '_>) -> Result<Self, DomainError> {
        let driver = child(disk, "driver");
        let of_driver = |name: &str| driver.and_then(|driver| driver.attribute(name)).map(str::to_owned);
        // libvirt's default is to say nothing to QEMU, which then has writeback, ignore, enospc for writes.
        let or = |value: Option<String>, default: &str| value.filter(|v| v != "default").unwrap_or(default.to_owned());
        let blockio = child(disk, "blockio");
        let of_blockio = |name: &str| blockio.and_then(|blockio| blockio.attribute(name)).map(str::to_owned);
        Ok(Settings {
            image: image(disk)?,
            cache: or(of_driver("cache"), "writeback"),
            discard: or(of_driver("discard"), "ignore"),
            error_policy: or(of_driver("error_policy"), "enospace"),
            serial: child(disk, "serial").map(content).filter(|serial| !serial.is_empty()),
            readonly: child(disk, "readonly").is_some(),
            logical_block_size: of_blockio("logical_block_size"),
            discard_granularity: of_blockio("discard_granularity"),
            iotune: child(disk, "iotune").map(iotune).unwrap_or_default(),
        })
    }

    /// Those that our element gives, and the names of others that QEMU's own disk has no place for.
    pub(super) fn of_options(disk: &DiskOptions) -> (Self, Vec<String>) {
        let value = |key: &str| disk.options.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
        // The last one counts, as with Ceph.
        let monitors = disk.options.iter().rev().find_map(|(name, value)| match name.as_str() {
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
            iotune: limits(&disk.options),
        };
        const CARRIED: [&str; 12] = [
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
            "throttle",
        ];
        let is_carried = |(name, value): &&(String, String)| {
            CARRIED.contains(&name.as_str()) || name == "rbd-option" && value.starts_with("mon_host=")
        };
        let others = disk.options.iter().filter(|option| !is_carried(option)).map(|(name, _)| name.replace('-', "_"));
        (settings, others.collect())
    }

    /// `<iotune>` as text; empty without limits. `prefix`: what stands before its names.
    pub(super) fn iotune_text(&self, prefix: &str) -> String {
        if self.iotune.is_empty() {
            return String::new();
        }
        let limits =
            self.iotune.iter().map(|(name, value)| format!("<{prefix}{name}>{}</{prefix}{name}>", escape(value)));
        format!("<{prefix}iotune>{}</{prefix}iotune>", limits.collect::<String>())
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

/// The limits of an `<iotune>` of libvirt's.
fn iotune(element: Node<'_, '_>) -> Vec<(String, String)> {
    let limits = element.children().filter(Node::is_element);
    limits.map(|limit| (limit.tag_name().name().to_owned(), content(limit).trim().to_owned())).collect()
}

/// The same from options.
fn limits(options: &[(String, String)]) -> Vec<(String, String)> {
    let limits = options.iter().filter(|(name, _)| name == "throttle").filter_map(|(_, value)| value.split_once('='));
    limits.map(|(name, value)| (name.replace('-', "_"), value.to_owned())).collect()
}

/// The sentence for a setting that virtioblkd cannot have.
fn no_equivalent<T>(what: &str) -> Result<T, DomainError> {
    refuse(format!(
        "virtioblkd has no equivalent of {what}. If the guest can do without it, delete it with virsh edit and convert again"
    ))
}

/// Refuses every attribute that is not named here.
fn check_attributes(node: Node<'_, '_>, known: &[&str]) -> Result<(), DomainError> {
    let name = node.tag_name().name();
    match node.attributes().find(|attribute| !known.contains(&attribute.name())) {
        Some(other) => no_equivalent(&format!("<{name} {}='{}'>", other.name(), other.value())),
        None => Ok(()),
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
            (name, value) => return no_equivalent(&format!("<disk {name}='{value}'>")),
        }
    }
    check_bus(disk)?;
    for element in disk.children().filter(Node::is_element) {
        let name = element.tag_name().name();
        match name {
            "driver" | "source" | "serial" | "readonly" | "auth" => {}
            "blockio" => check_attributes(element, &["logical_block_size", "discard_granularity"])?,
            "backingStore" if element.children().all(|node| !node.is_element()) => {}
            "shareable" => {
                return no_equivalent("<shareable/>, because it gives an image to one guest");
            }
            "iotune" if element.children().filter(Node::is_element).all(|limit| limit.attributes().len() == 0) => {}
            "throttlefilters" => {
                return refuse(
                    "<throttlefilters>: virtioblkd has one set of limits for a disk: give the disk an <iotune> instead, with virsh \
                     edit, and convert again",
                );
            }
            _ if DEVICE_ELEMENTS.contains(&name) => {}
            _ => return no_equivalent(&format!("<{name}>")),
        }
    }
    Ok(())
}

/// libvirt takes the bus from the target's name where none is given (`virDomainDiskDefPostParse`).
fn check_bus(disk: Node<'_, '_>) -> Result<(), DomainError> {
    // What `<qemu_disk>` keeps has no target.
    let Some(target) = child(disk, "target") else { return Ok(()) };
    let name = target.attribute("dev").unwrap_or_default();
    let fix = "virtioblkd serves virtio disks; change the bus first, and see that the guest has the driver";
    match target.attribute("bus") {
        Some("virtio") => Ok(()),
        Some(bus) => refuse(format!("its bus is '{bus}': {fix}")),
        None if name.starts_with("vd") => Ok(()),
        None => refuse(format!("its <target> has no bus='virtio', and '{name}' stands for another bus: {fix}")),
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
            ("queues", queues) if queues.parse::<u32>().is_ok_and(|queues| queues > MAX_QUEUES) => {
                return refuse(format!(
                    "queues='{queues}': virtioblkd has at most {MAX_QUEUES}; lower it with virsh edit and convert again"
                ));
            }
            // libvirt and QEMU refuse the first for vhost-user-blk, and lose the second without a word.
            ("iommu" | "packed", "on") => {
                return no_equivalent(&format!("<driver {}='on'>", attribute.name()));
            }
            // How QEMU does it, which the guest cannot see. `<qemu_disk>` keeps them.
            ("io" | "iothread" | "ioeventfd" | "cache" | "discard" | "error_policy" | "rerror_policy", _) => {}
            ("detect_zeroes" | "copy_on_read", "off") => {}
            (name, _) if is_device_attribute(name) => {}
            (name, value) => return no_equivalent(&format!("<driver {name}='{value}'>")),
        }
    }
    check_error_policies(driver)?;
    match driver.children().find(|node| node.is_element() && !node.has_tag_name("iothreads")) {
        Some(other) => no_equivalent(&format!("<driver><{}>", other.tag_name().name())),
        None => Ok(()),
    }
}

/// QEMU asks for a queue for each virtual CPU of a vhost-user disk without `queues`.
pub(super) fn check_vcpus(domain: Node<'_, '_>, disk: Node<'_, '_>) -> Result<(), DomainError> {
    let (vcpus, queues) = (vcpus(domain), child(disk, "driver").and_then(|driver| driver.attribute("queues")));
    match queues {
        None if vcpus > MAX_QUEUES => refuse(format!(
            "QEMU would ask for a queue for each of the {vcpus} virtual CPUs, and virtioblkd has at most {MAX_QUEUES}: put \
             queues='{MAX_QUEUES}' into its <driver> with virsh edit and convert again"
        )),
        _ => Ok(()),
    }
}

fn check_error_policies(driver: Node<'_, '_>) -> Result<(), DomainError> {
    let policy = |name: &str| driver.attribute(name).filter(|policy| *policy != "default");
    let writes = policy("error_policy").unwrap_or("enospace");
    let expected = if writes == "enospace" { "report" } else { writes };
    match policy("rerror_policy") {
        Some(reads) if reads != expected => refuse(format!(
            "rerror_policy='{reads}' with error_policy='{writes}': virtioblkd has one policy for reads and writes"
        )),
        _ => Ok(()),
    }
}

/// The disk's type; libvirt's default is a file.
fn kind<'a>(disk: Node<'a, 'a>) -> &'a str {
    disk.attribute("type").unwrap_or("file")
}

/// The attribute of `<source>` that names the image.
fn image_attribute(kind: &str) -> &'static str {
    match kind {
        "network" => "name",
        "block" => "dev",
        _ => "file",
    }
}

fn check_source(kind: &str, source: Node<'_, '_>) -> Result<(), DomainError> {
    if let Some(policy) = source.attribute("startupPolicy").filter(|policy| *policy != "mandatory") {
        return no_equivalent(&format!("<source startupPolicy='{policy}'>, because the image must exist"));
    }
    let is_network = kind == "network";
    let protocol = source.attribute("protocol").unwrap_or_default();
    if is_network && protocol != "rbd" {
        return refuse(format!("its protocol is '{protocol}': only rbd can be converted"));
    }
    let known = [image_attribute(kind), "startupPolicy", "index", "protocol"];
    check_attributes(source, &known[..if is_network { 4 } else { 3 }])?;
    for element in source.children().filter(Node::is_element) {
        match element.tag_name().name() {
            "seclabel" if !is_network => {}
            "host" if is_network => match element.attribute("transport") {
                None | Some("tcp") => check_attributes(element, &["name", "port", "transport"])?,
                Some(other) => return no_equivalent(&format!("<host transport='{other}'>")),
            },
            "config" if is_network => check_attributes(element, &["file"])?,
            "auth" if is_network => {}
            name => return no_equivalent(&format!("<source><{name}>")),
        }
    }
    Ok(())
}

fn image(disk: Node<'_, '_>) -> Result<Image, DomainError> {
    let Some(source) = child(disk, "source") else { return refuse("it has no <source>") };
    let kind = kind(disk);
    let Some(name) = source.attribute(image_attribute(kind)) else {
        return refuse(format!("its <source> has no {}='...'", image_attribute(kind)));
    };
    if kind != "network" {
        return Ok(Image::Path(name.to_owned()));
    }
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

/// Ceph's `mon_host` as `<host>` elements; `None`: it is more than names and ports, such as `[v2:...,v1:...]`.
pub(super) fn hosts(monitors: &str) -> Option<String> {
    let list = monitors.split(',').map(|monitor| {
        let (name, port) = match monitor.strip_prefix('[') {
            Some(rest) => {
                let (name, after) = rest.split_once(']')?;
                (name, if after.is_empty() { None } else { Some(after.strip_prefix(':')?) })
            }
            None => monitor.split_once(':').map_or((monitor, None), |(name, port)| (name, Some(port))),
        };
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b".:-_%".contains(&byte);
        // `v1:` and `v2:` name a version of the protocol.
        let has_version = name.starts_with("v1:") || name.starts_with("v2:");
        let is_name = !name.is_empty() && !has_version && name.bytes().all(is_plain);
        let is_port = port.is_none_or(|port| port.parse::<u16>().is_ok());
        let list = [("name", Some(name)), ("port", port)];
        let list = list.into_iter().filter_map(|(key, value)| Some((key, value?)));
        (is_name && is_port).then(|| format!("<host{}/>", attributes(list)))
    });
    list.collect()
}
