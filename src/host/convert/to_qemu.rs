//! The way back: a disk of ours becomes one that QEMU serves itself.

use roxmltree::Node;

use super::super::domain::{DomainError, child, document, domain_node, refuse};
use super::super::edits::{Edits, attributes, escape, indentation, plain};
use super::super::metadata::{self, NAMESPACE};
use super::settings::{Image, Settings, hosts};
use super::{Converted, DEVICE_ELEMENTS, KEPT, disk, is_device_attribute, memory};

/// Converts the disk with this target, which our `<metadata>` describes.
pub fn to_qemu(xml: &str, target: &str) -> Result<Converted, DomainError> {
    let document = document(xml)?;
    let root = domain_node(&document)?;
    let disk = disk(root, target)?;
    if disk.attribute("type") != Some("vhostuser") {
        return refuse(format!("disk {target}: it is no vhostuser disk"));
    }
    let described = metadata::read(&document)?;
    let Some(options) = described.iter().find(|disk| disk.target == target) else {
        return refuse(format!(
            "disk {target}: <metadata> does not describe it, so its image is not known: it belongs to a daemon that \
             libvirt's hook does not start"
        ));
    };
    let (now, dropped) = Settings::of_options(options);
    let mut notes = Vec::new();
    if !dropped.is_empty() {
        notes.push(format!("QEMU's own disk has no place for these, which are left out: {}", dropped.join(", ")));
    }
    let ours = our_disks(root).ok_or_else(|| DomainError("the domain has no element of ours".into()))?;
    let element = ours.children().find(|node| node.attribute("target") == Some(target));
    let kept = element.and_then(|element| element.children().find(|node| node.tag_name().name() == KEPT));
    let mut edits = Edits::default();
    let kept = kept.map_or_else(|| Ok(Kept::nothing()), |kept| Kept::of(kept, target))?;
    edit_disk(xml, disk, &kept, &now, &mut edits, &mut notes);
    remove_element(xml, root, ours, element, &mut edits);
    Ok(Converted { xml: edits.apply(xml), notes })
}

fn our_disks<'a>(domain: Node<'a, 'a>) -> Option<Node<'a, 'a>> {
    let metadata = child(domain, "metadata")?;
    metadata.children().find(|node| node.tag_name().namespace() == Some(NAMESPACE))
}

/// What `<qemu_disk>` keeps.
struct Kept {
    /// The type of `<disk>`.
    kind: Option<String>,
    snapshot: Option<String>,
    /// Attributes of `<driver>`, and its children as text.
    driver: Vec<(String, String)>,
    driver_content: String,
    /// `<source>` as text, and its children, by name.
    source: Option<String>,
    source_content: Vec<(String, String)>,
    /// Other children, by name, as text.
    others: Vec<(String, String)>,
    /// What it was converted to.
    settings: Option<Settings>,
}

impl Kept {
    /// A disk that was never QEMU's.
    fn nothing() -> Self {
        let driver = [("name", "qemu"), ("type", "raw")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        Kept {
            kind: None,
            snapshot: None,
            driver: driver.to_vec(),
            driver_content: String::new(),
            source: None,
            source_content: Vec::new(),
            others: Vec::new(),
            settings: None,
        }
    }

    fn of(kept: Node<'_, '_>, target: &str) -> Result<Self, DomainError> {
        // Its children have our namespace if that is the default one, or once virsh metadata has set it.
        let of_disk = kept.attributes().map(|one| (one.name(), one.value()));
        let children: Vec<Node<'_, '_>> = kept.children().filter(Node::is_element).collect();
        let text: String = children.iter().map(|node| plain(*node)).collect();
        let alone = format!("<disk{}>{text}</disk>", attributes(of_disk));
        let document = document(&alone)?;
        let settings = Settings::read(document.root_element())
            .map_err(|error| DomainError(format!("disk {target}: <{KEPT}> in <metadata>: {error}")))?;
        let mut found = Kept { settings: Some(settings), driver: Vec::new(), ..Kept::nothing() };
        found.kind = kept.attribute("type").map(str::to_owned);
        found.snapshot = kept.attribute("snapshot").map(str::to_owned);
        for child in children {
            let text = plain(child);
            match child.tag_name().name() {
                "driver" => {
                    found.driver =
                        child.attributes().map(|one| (one.name().to_owned(), one.value().to_owned())).collect();
                    found.driver_content = child.children().filter(Node::is_element).map(plain).collect();
                }
                "source" => {
                    found.source = Some(text);
                    let content = child.children().filter(Node::is_element);
                    found.source_content = content.map(|one| (one.tag_name().name().to_owned(), plain(one))).collect();
                }
                name => found.others.push((name.to_owned(), text)),
            }
        }
        Ok(found)
    }

    /// Whether a setting is what it was at the conversion.
    fn has<T: PartialEq>(&self, now: &Settings, of: impl Fn(&Settings) -> &T) -> bool {
        self.settings.as_ref().is_some_and(|then| of(then) == of(now))
    }

    /// The image at the conversion.
    fn image(&self) -> Option<&Image> {
        self.settings.as_ref().map(|then| &then.image)
    }

    /// Whether Ceph's user is the one of the conversion, so that its `<auth>` holds.
    fn has_user(&self, now: &Settings) -> bool {
        match (self.image(), &now.image) {
            (Some(Image::Rbd { user: then, .. }), Image::Rbd { user: now, .. }) => then == now,
            _ => false,
        }
    }

    fn has_auth(&self) -> bool {
        let outside = self.others.iter().map(|(name, _)| name);
        outside.chain(self.source_content.iter().map(|(name, _)| name)).any(|name| name == "auth")
    }
}

fn edit_disk(xml: &str, disk: Node<'_, '_>, kept: &Kept, now: &Settings, edits: &mut Edits, notes: &mut Vec<String>) {
    let same_image = kept.has(now, |settings| &settings.image);
    let kind = match (&kept.kind, &now.image) {
        (Some(kind), _) if same_image => kind.as_str(),
        // libvirt's default.
        (None, _) if same_image => "file",
        (_, Image::Rbd { .. }) => "network",
        (_, Image::Path(path)) if path.starts_with("/dev/") => "block",
        (_, Image::Path(_)) => "file",
    };
    for attribute in disk.attributes() {
        match attribute.name() {
            "type" => {
                let snapshot = kept.snapshot.iter().map(|value| format!(" snapshot='{}'", escape(value)));
                edits.replace(attribute.range(), format!("type='{kind}'{}", snapshot.collect::<String>()));
            }
            "snapshot" => edits.remove(xml, attribute.range()),
            _ => {}
        }
    }
    let source = match kept.source.clone().filter(|_| same_image) {
        Some(source) => source,
        None => new_source(kept, now, kind, notes),
    };
    let driver = driver(disk, kept, now);
    let others = others(kept, now);
    let target = child(disk, "target");
    let indent = target.map_or("", |target| indentation(xml, target));
    let mut has_driver = false;
    for element in disk.children().filter(Node::is_element) {
        match element.tag_name().name() {
            "driver" => {
                has_driver = true;
                edits.replace(element.range(), driver.clone());
            }
            "source" => edits.replace(element.range(), source.clone()),
            name if DEVICE_ELEMENTS.contains(&name) => {}
            _ => edits.remove(xml, element.range()),
        }
    }
    if let Some(target) = target {
        if !has_driver && driver != "<driver/>" {
            edits.insert(target.range().start, format!("{driver}{indent}"));
        }
        let more: String = others.iter().map(|text| format!("{indent}{text}")).collect();
        edits.insert(target.range().end, more);
    }
}

/// `<driver>`: the kept attributes with those settings that changed since, and the device's from now.
fn driver(disk: Node<'_, '_>, kept: &Kept, now: &Settings) -> String {
    let mut list: Vec<(String, String)> = Vec::new();
    for (name, value) in &kept.driver {
        let is_same = match name.as_str() {
            "cache" => kept.has(now, |settings| &settings.cache),
            "discard" => kept.has(now, |settings| &settings.discard),
            "error_policy" | "rerror_policy" => kept.has(now, |settings| &settings.error_policy),
            name => !is_device_attribute(name) || kept.settings.is_none(),
        };
        if is_same {
            list.push((name.clone(), value.clone()));
        }
    }
    let device = child(disk, "driver");
    for one in device.iter().flat_map(|driver| driver.attributes()).filter(|one| is_device_attribute(one.name())) {
        list.retain(|(name, _)| name != one.name());
        list.push((one.name().to_owned(), one.value().to_owned()));
    }
    let mut change = |name: &str, value: &str, is_same: bool| {
        if !is_same {
            list.push((name.to_owned(), value.to_owned()));
        }
    };
    change("cache", &now.cache, kept.has(now, |settings| &settings.cache));
    change("discard", &now.discard, kept.has(now, |settings| &settings.discard));
    let default_policy = kept.settings.is_none() && now.error_policy == "enospace";
    change("error_policy", &now.error_policy, default_policy || kept.has(now, |settings| &settings.error_policy));
    let text = attributes(list.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    match kept.driver_content.as_str() {
        "" => format!("<driver{text}/>"),
        content => format!("<driver{text}>{content}</driver>"),
    }
}

/// The other children of `<disk>`: the kept ones, but for settings that changed since.
fn others(kept: &Kept, now: &Settings) -> Vec<String> {
    let same_serial = kept.has(now, |settings| &settings.serial);
    let same_readonly = kept.has(now, |settings| &settings.readonly);
    let same_blocks = kept.has(now, |settings| &settings.logical_block_size)
        && kept.has(now, |settings| &settings.discard_granularity);
    let same_limits = kept.has(now, |settings| &settings.iotune);
    let is_same = |name: &str| match name {
        "serial" => same_serial,
        "readonly" => same_readonly,
        "blockio" => same_blocks,
        "auth" => kept.has_user(now),
        "iotune" => same_limits,
        _ => true,
    };
    let mut list: Vec<String> =
        kept.others.iter().filter(|(name, _)| is_same(name)).map(|(_, text)| text.clone()).collect();
    if let (false, Some(serial)) = (same_serial, &now.serial) {
        list.push(format!("<serial>{}</serial>", escape(serial)));
    }
    if !same_limits {
        list.extend(Some(now.iotune_text("")).filter(|text| !text.is_empty()));
    }
    if !same_readonly && now.readonly {
        list.push("<readonly/>".into());
    }
    if !same_blocks {
        let sizes =
            [("logical_block_size", &now.logical_block_size), ("discard_granularity", &now.discard_granularity)];
        let sizes: Vec<(&str, &str)> =
            sizes.iter().filter_map(|(name, value)| Some((*name, value.as_deref()?))).collect();
        if !sizes.is_empty() {
            list.push(format!("<blockio{}/>", attributes(sizes)));
        }
    }
    list
}

/// `<source>` of an image that is not the one of the conversion. What it had besides the image's name is kept where it can
/// be; a note says what is left out.
fn new_source(kept: &Kept, now: &Settings, kind: &str, notes: &mut Vec<String>) -> String {
    let carried = |name: &str| match &now.image {
        Image::Path(_) => name == "seclabel",
        Image::Rbd { .. } => name == "auth" && kept.has_user(now),
    };
    let rewritten = |name: &str| matches!(name, "host" | "config") && matches!(now.image, Image::Rbd { .. });
    let mut content = String::new();
    for (name, text) in &kept.source_content {
        if carried(name) {
            content += text;
        } else if !rewritten(name) {
            notes.push(format!("<{name}> in its <source> was for the old image, and is left out: {text}"));
        }
        if name == "seclabel" && carried(name) {
            notes.push(format!(
                "<seclabel> in its <source> was for the old image; see that it suits the new one: {text}"
            ));
        }
    }
    match &now.image {
        Image::Path(path) => {
            let name = attributes([(if kind == "block" { "dev" } else { "file" }, path.as_str())]);
            match content.as_str() {
                "" => format!("<source{name}/>"),
                content => format!("<source{name}>{content}</source>"),
            }
        }
        Image::Rbd { name, user, conf, monitors } => {
            if let (Some(user), false) = (user, kept.has_user(now) && kept.has_auth()) {
                notes.push(format!("libvirt needs <auth> with the secret that holds the key of Ceph's client.{user}"));
            }
            let hosts = monitors.as_deref().and_then(|monitors| {
                let hosts = hosts(monitors);
                if hosts.is_none() {
                    notes.push(format!(
                        "mon_host='{monitors}' is more than <host> elements can say, and is left out: write them, or a \
                         <config file='...'/> that names the monitors"
                    ));
                }
                hosts
            });
            let conf = conf.iter().map(|conf| format!("<config{}/>", attributes([("file", conf.as_str())])));
            format!(
                "<source{}>{}{}{content}</source>",
                attributes([("protocol", "rbd"), ("name", name)]),
                hosts.unwrap_or_default(),
                conf.collect::<String>()
            )
        }
    }
}

/// Removes our element; with the last disk also `<disks>`, what was added to share the memory, and a `<metadata>` in which
/// nothing is left.
fn remove_element(
    xml: &str,
    domain: Node<'_, '_>,
    ours: Node<'_, '_>,
    element: Option<Node<'_, '_>>,
    edits: &mut Edits,
) {
    let count = |node: Node<'_, '_>| node.children().filter(Node::is_element).count();
    if count(ours) > 1 {
        edits.remove(xml, element.map_or(0..0, |element| element.range()));
        return;
    }
    if let Some(added) = ours.attribute(memory::ADDED) {
        memory::unshare(xml, domain, added, edits);
    }
    let is_blank = |node: Node<'_, '_>| node.is_text() && node.text().unwrap_or_default().trim().is_empty();
    match child(domain, "metadata") {
        Some(metadata) if metadata.children().all(|node| node == ours || is_blank(node)) => {
            edits.remove(xml, metadata.range());
        }
        _ => edits.remove(xml, ours.range()),
    }
}
