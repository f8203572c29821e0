//! PURE. Our element in a domain's `<metadata>`: what a vhost-user disk's daemon is started with.
//!
//! ```xml
//! <metadata>
//!   <v:disks xmlns:v='urn:virtioblkd:libvirt:1'>
//!     <v:disk target='vda' file='/var/lib/libvirt/images/a.raw' cache='none' serial='root'/>
//!     <v:disk target='vdb' rbd='volumes/db' cache='writeback' ceph_user='libvirt'>
//!       <v:rbd_option name='rbd_cache_size' value='67108864'/>
//!       <v:copy_dir path='/backup'/>
//!     </v:disk>
//!   </v:disks>
//! </metadata>
//! ```
//!
//! An attribute is an option of virtioblkd with underscores, as libvirt writes names. Where libvirt has a word of its own
//! for the same thing on other disks, that word stands instead (`LIBVIRT_WORDS`). The element lies in `<metadata>` because
//! libvirt refuses these settings on a disk of type vhostuser (`virDomainDiskVhostUserValidate`) and keeps foreign
//! elements only there. docs/libvirt.md is the same for users.

use std::path::Path;

use roxmltree::{Document, Node};

use super::domain::{DomainError, child, content, document, domain_node, refuse};
use super::edits;
use crate::config;

/// The namespace of our elements.
pub const NAMESPACE: &str = "urn:virtioblkd:libvirt:1";

/// Attributes that have libvirt's word, and the option that says the same.
const LIBVIRT_WORDS: [(&str, &str); 5] = [
    ("file", "blk-file"),
    ("readonly", "read-only"),
    ("error_policy", "on-error"),
    ("queues", "num-queues"),
    ("rbd", "rbd"),
];

/// Options that the hook sets itself.
const SET_BY_HOOK: [&str; 4] = ["socket-path", "fd", "control-path", "pid-file"];

/// Options that may be given several times: elements of their own, with these attributes joined by `=`.
const ELEMENTS: [(&str, &str, &[&str]); 2] =
    [("copy_dir", "copy-dir", &["path"]), ("rbd_option", "rbd-option", &["name", "value"])];

/// Our element's children that are no options: what a disk was before `virtioblkctl domain convert`.
const NOT_OPTIONS: [&str; 1] = [super::convert::KEPT];

/// Attributes of `<disks>`.
const OF_DISKS: [&str; 1] = [super::convert::ADDED];

/// libvirt's element of limits: it has an element for each.
const IOTUNE: &str = "iotune";

/// The option that stands for [`IOTUNE`]'s elements.
const THROTTLE: &str = "throttle";

/// Whether an option may be given several times.
pub(super) fn is_repeated(key: &str) -> bool {
    key == THROTTLE || ELEMENTS.iter().any(|(_, other, _)| *other == key)
}

/// The element that stands for an option which may be given several times, from the words of a command line:
/// `copy_dir=PATH`, `rbd_option=NAME=VALUE`. `None`: an attribute stands for the option.
pub(super) fn element(name: &str, value: &str) -> Option<Result<String, String>> {
    if name != IOTUNE && is_of_iotune(name) {
        return Some(Ok(format!("<{IOTUNE}><{name}>{}</{name}></{IOTUNE}>", edits::escape(value))));
    }
    let (.., attributes) = ELEMENTS.iter().find(|(element, ..)| *element == name)?;
    let values: Vec<&str> = value.splitn(attributes.len(), '=').collect();
    if values.len() < attributes.len() {
        let form = attributes.iter().map(|attribute| attribute.to_uppercase()).collect::<Vec<_>>().join("=");
        return Some(Err(format!("{name}={value} is incomplete: give {name}={form}")));
    }
    Some(Ok(format!("<{name}{}/>", edits::attributes(attributes.iter().copied().zip(values)))))
}

/// Whether libvirt's `<iotune>` has an element or attribute of this name (`virDomainDiskIoTuneDefFormat`).
fn is_of_iotune(name: &str) -> bool {
    let base = name.strip_suffix("_max_length").or(name.strip_suffix("_max")).unwrap_or(name);
    matches!(base, "iotune" | "throttlefilters") || base.ends_with("_bytes_sec") || base.ends_with("_iops_sec")
}

/// The options that libvirt's `<iotune>` stands for, one for each of its elements.
fn iotune(element: Node<'_, '_>) -> Result<Vec<(String, String)>, DomainError> {
    if let Some(other) = element.attributes().next() {
        return refuse(format!("unknown attribute '{}' of <{IOTUNE}>: its limits are elements", other.name()));
    }
    let limits = element.children().filter(Node::is_element);
    let limits = limits.map(|limit| {
        let (name, value) = (limit.tag_name().name(), content(limit));
        (THROTTLE.to_owned(), format!("{}={}", name.replace('_', "-"), value.trim()))
    });
    Ok(limits.collect())
}

/// What our element says of one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// The disk's `<target dev='...'>`.
    pub target: String,
    /// Options of virtioblkd without their dashes, each with its value, in the element's order. Only `copy-dir`,
    /// `rbd-option` and `throttle` may occur several times.
    pub options: Vec<(String, String)>,
}

/// Whether a description can have our element at all. A quick look at its bytes: other domains cost no parsing.
pub fn is_mentioned(xml: &str) -> bool {
    xml.contains(NAMESPACE)
}

/// [`read`] for a whole description.
pub fn of_xml(xml: &str) -> Result<Vec<DiskOptions>, DomainError> {
    read(&document(xml)?)
}

/// [`read`] for our element alone, in a file of its own. `name`: what stands for the domain's name in errors.
pub(super) fn of_element(name: &str, text: &str) -> Result<Vec<DiskOptions>, DomainError> {
    let element =
        text.trim_start().strip_prefix("<?xml").and_then(|rest| Some(rest.split_once("?>")?.1)).unwrap_or(text);
    // An element that does not end would end with the wrong reason.
    document(text)?;
    of_xml(&format!("<domain><name>{}</name><metadata>{element}</metadata></domain>", edits::escape(name)))
}

/// The disks that our element describes; empty without such an element. An error names the domain, the disk, and what
/// to write instead.
pub fn read(document: &Document<'_>) -> Result<Vec<DiskOptions>, DomainError> {
    let domain = domain_node(document)?;
    let name = child(domain, "name").and_then(|name| name.text()).unwrap_or_default();
    let Some(metadata) = child(domain, "metadata") else { return Ok(Vec::new()) };
    let Some(ours) = metadata.children().find(|node| node.tag_name().namespace() == Some(NAMESPACE)) else {
        return Ok(Vec::new());
    };
    if ours.tag_name().name() != "disks" {
        return refuse(format!(
            "domain {name}: unknown element <{}> of {NAMESPACE} in <metadata>: it is <disks>",
            ours.tag_name().name()
        ));
    }
    if let Some(other) = ours.attributes().find(|attribute| !OF_DISKS.contains(&attribute.name())) {
        return refuse(format!(
            "domain {name}: unknown attribute '{}' of <disks>: a disk's are <disk>'s",
            other.name()
        ));
    }
    let mut found: Vec<DiskOptions> = Vec::new();
    for node in ours.children().filter(Node::is_element) {
        if node.tag_name().name() != "disk" {
            return refuse(format!(
                "domain {name}: unknown element <{}> in <disks>: it is <disk>",
                node.tag_name().name()
            ));
        }
        let disk = disk(node).map_err(|error| DomainError(format!("domain {name}: {error}")))?;
        if found.iter().any(|other| other.target == disk.target) {
            return refuse(format!("domain {name}: <metadata> describes the disk {} twice: keep one", disk.target));
        }
        found.push(disk);
    }
    Ok(found)
}

fn disk(node: Node<'_, '_>) -> Result<DiskOptions, DomainError> {
    let Some(target) = node.attribute("target") else {
        return refuse(
            "a <disk> in <metadata> has no target: name the disk's <target dev='...'>, such as target='vda'",
        );
    };
    // The target is a part of file names and of a unit's name.
    if target.is_empty() || target.len() > 32 || !target.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return refuse(format!("target='{target}' is no disk's target: letters and digits, such as vda"));
    }
    let of_disk = |error: DomainError| DomainError(format!("disk {target}: {error}"));
    let mut options = Vec::new();
    for attribute in node.attributes().filter(|attribute| attribute.name() != "target") {
        options.extend(option(attribute.name(), attribute.value()).map_err(of_disk)?);
    }
    let elements = node.children().filter(Node::is_element);
    for element in elements.filter(|element| !NOT_OPTIONS.contains(&element.tag_name().name())) {
        match element.tag_name().name() {
            IOTUNE => options.extend(iotune(element).map_err(of_disk)?),
            _ => options.push(repeated_option(element).map_err(of_disk)?),
        }
    }
    check(&options).map_err(of_disk)?;
    Ok(DiskOptions { target: target.to_owned(), options })
}

/// The option that an attribute stands for; `None` where the value asks for the default.
fn option(attribute: &str, value: &str) -> Result<Option<(String, String)>, DomainError> {
    let Some(key) = key_of(attribute) else { return refuse(unknown(attribute)) };
    let value = match (attribute, value) {
        ("cache", "default") => return Ok(None),
        ("error_policy", "enospace") => "enospc",
        ("error_policy", "ignore") => {
            return refuse(
                "error_policy='ignore' would let the guest take failed writes for done: use stop, report or enospace",
            );
        }
        ("error_policy", other) if !["stop", "report"].contains(&other) => {
            return refuse("error_policy is stop, report or enospace (libvirt's words)");
        }
        ("readonly" | "rbd_allow_override", _) => match value {
            "yes" => "true",
            "no" => "false",
            _ => return refuse(format!("{attribute} is yes or no, not '{value}'")),
        },
        _ => value,
    };
    if key == "blk-file" && !Path::new(value).is_absolute() {
        return refuse(format!("file='{value}' is no absolute path: the daemon does not run in your directory"));
    }
    Ok(Some((key, value.to_owned())))
}

fn repeated_option(element: Node<'_, '_>) -> Result<(String, String), DomainError> {
    let name = element.tag_name().name();
    if name == "throttlefilters" {
        return refuse("<throttlefilters>: virtioblkd has one set of limits for a disk: use <iotune>");
    }
    if is_of_iotune(name) {
        return refuse(format!("<{name}> is an element of <{IOTUNE}>"));
    }
    let Some((_, key, attributes)) = ELEMENTS.iter().find(|(known, ..)| *known == name) else {
        let known = ELEMENTS.map(|(known, ..)| format!("<{known}>")).join(", ");
        let known = format!("{known}, <{IOTUNE}>");
        return refuse(format!("unknown element <{name}>: the known ones are {known}; all else is an attribute"));
    };
    let mut values = Vec::new();
    for attribute in *attributes {
        match element.attribute(*attribute) {
            Some(value) => values.push(value),
            None => return refuse(format!("<{name}> has no {attribute}='...'")),
        }
    }
    match element.attributes().find(|attribute| !attributes.contains(&attribute.name())) {
        Some(other) => refuse(format!("unknown attribute '{}' of <{name}>", other.name())),
        None => Ok(((*key).to_owned(), values.join("="))),
    }
}

/// The option's name without dashes in front.
fn key_of(attribute: &str) -> Option<String> {
    attributes().into_iter().find(|(known, _)| known == attribute).map(|(_, key)| key)
}

/// Every attribute that a `<disk>` may have, but `target`, with the option that it stands for.
pub fn attributes() -> Vec<(String, String)> {
    let own = LIBVIRT_WORDS.iter().map(|(attribute, key)| ((*attribute).to_owned(), (*key).to_owned()));
    let has_own_word = |key: &str| LIBVIRT_WORDS.iter().any(|(_, other)| *other == key);
    let others = config::file_keys().into_iter();
    let others = others.filter(|key| !has_own_word(key) && !is_repeated(key) && !SET_BY_HOOK.contains(&key.as_str()));
    own.chain(others.map(|key| (key.replace('-', "_"), key))).collect()
}

fn unknown(attribute: &str) -> String {
    let dashed = attribute.replace('_', "-");
    if SET_BY_HOOK.contains(&dashed.as_str()) {
        return format!("'{attribute}' is set by the hook: leave it out");
    }
    if let Some((word, _)) = LIBVIRT_WORDS.iter().find(|(_, key)| *key == dashed) {
        return format!("unknown attribute '{attribute}'; it is '{word}' here, as in libvirt");
    }
    if is_of_iotune(&attribute.replace('-', "_")) || attribute == THROTTLE {
        return format!(
            "{attribute}: limits are elements, as in libvirt: <{IOTUNE}><total_iops_sec>500</total_iops_sec></{IOTUNE}>"
        );
    }
    let known = attributes();
    match config::nearest(known.iter().map(|(name, _)| name.as_str()), &attribute.replace('-', "_")) {
        Some(name) => format!("unknown attribute '{attribute}'; the nearest known one is '{name}'"),
        None => format!("unknown attribute '{attribute}'"),
    }
}

/// Whether virtioblkd takes these options. Its own words say what is wrong.
fn check(options: &[(String, String)]) -> Result<(), DomainError> {
    if !options.iter().any(|(key, _)| key == "blk-file" || key == "rbd") {
        return refuse("no image: give file='PATH' or rbd='POOL/IMAGE'");
    }
    let arguments = options.iter().map(|(key, value)| format!("--{key}={value}"));
    let program = ["virtioblkd", "--socket-path=/socket", "--control-path=/control"].map(str::to_owned);
    match config::Config::from_args(program.into_iter().chain(arguments)) {
        Ok(_) => Ok(()),
        Err(error) => Err(DomainError(in_attributes(error.to_string().lines().next().unwrap_or_default()))),
    }
}

/// Replaces the options in a message of virtioblkd by the attributes and elements that stand for them: `'--queue-size <N>'`
/// becomes `queue_size`.
fn in_attributes(message: &str) -> String {
    let known = attributes();
    let word = |option: &str| match ELEMENTS.iter().find(|(_, key, _)| *key == option) {
        Some((element, ..)) => Some(format!("<{element}>")),
        None => known.iter().find(|(_, key)| key == option).map(|(attribute, _)| attribute.clone()),
    };
    let mut parts = message.split("--");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end =
            part.find(|character: char| !(character.is_ascii_lowercase() || character == '-')).unwrap_or(part.len());
        let (option, rest) = part.split_at(end);
        let Some(word) = word(option) else {
            text += "--";
            text += part;
            continue;
        };
        // clap quotes an option together with the name of its value.
        let value = rest.strip_prefix(" <").and_then(|rest| rest.split_once(">'"));
        match (value, text.ends_with('\'')) {
            (Some((_, rest)), true) => {
                text.pop();
                text += &word;
                text += rest;
            }
            _ => {
                text += &word;
                text += rest;
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_disks(disks: &str) -> Result<Vec<DiskOptions>, String> {
        let xml = format!(
            "<domain><name>vm1</name><metadata><o:other xmlns:o='urn:other'/>\
             <v:disks xmlns:v='{NAMESPACE}'>{disks}</v:disks></metadata></domain>"
        );
        assert!(is_mentioned(&xml));
        read(&document(&xml).unwrap()).map_err(|error| error.to_string())
    }

    fn options(disk: &str) -> Vec<(String, String)> {
        read_disks(disk).unwrap().remove(0).options
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn libvirts_words_become_options() {
        let disk = "<v:disk target='vda' file='/a' cache='none' discard='unmap' error_policy='enospace' serial='x' \
                    readonly='yes' queues='4' queue_size='256' logical_block_size='4096' stable_writes='copy'/>";
        let expected = pairs(&[
            ("blk-file", "/a"),
            ("cache", "none"),
            ("discard", "unmap"),
            ("on-error", "enospc"),
            ("serial", "x"),
            ("read-only", "true"),
            ("num-queues", "4"),
            ("queue-size", "256"),
            ("logical-block-size", "4096"),
            ("stable-writes", "copy"),
        ]);
        assert_eq!(options(disk), expected);
        assert_eq!(options("<v:disk target='vda' file='/a' cache='default'/>"), pairs(&[("blk-file", "/a")]));
    }

    #[test]
    fn errors_of_virtioblkd_name_attributes_instead_of_its_options() {
        let cases = [
            ("file='/a' cache='nonne'", "invalid value 'nonne' for cache:"),
            ("file='/a' queue_size='100'", "invalid value '100' for queue_size: use a power of two"),
            ("file='/a' queues='0'", "for queues: use a number from 1 to 256"),
            ("file='/a' error_policy='halt'", "error_policy is stop, report or enospace"),
            ("file='/a' rbd='p/i'", "rbd and file exclude each other"),
            ("rbd='p/i' locking='off'", "locking is for files: use rbd_lock for an RBD image"),
            ("file='/a' scratch_size='1G'", "scratch_size needs scratch"),
            ("file='/a' format='qcow2'", "with format raw or without"),
        ];
        for (attributes, part) in cases {
            let error = read_disks(&format!("<v:disk target='vda' {attributes}/>")).unwrap_err();
            assert!(error.contains(part), "{error}");
            let ours = error.replace("qemu-img convert", "");
            assert!(!ours.contains("--"), "{error}");
        }
        let element = "<v:disk target='vda' rbd='p/i'><v:rbd_option name=' ' value='1'/></v:disk>";
        let error = read_disks(element).unwrap_err();
        assert!(error.contains("for <rbd_option>: use"), "{error}");
        assert_eq!(in_attributes("see --help, 'a --b' and --take-over"), "see --help, 'a --b' and --take-over");
    }

    #[test]
    fn repeated_options_are_elements() {
        let disk = "<v:disk target='vdb' rbd='p/i'><v:rbd_option name='rbd_cache' value='true'/>\
                    <v:rbd_option name='rbd_cache_size' value='1'/><v:copy_dir path='/b'/></v:disk>";
        let expected = pairs(&[
            ("rbd", "p/i"),
            ("rbd-option", "rbd_cache=true"),
            ("rbd-option", "rbd_cache_size=1"),
            ("copy-dir", "/b"),
        ]);
        assert_eq!(options(disk), expected);
    }

    #[test]
    fn libvirts_iotune_becomes_limits() {
        let disk = "<v:disk target='vda' file='/a'><v:iotune><v:total_iops_sec>500</v:total_iops_sec>\
                    <v:write_bytes_sec_max_length> 3 </v:write_bytes_sec_max_length>\
                    <v:write_bytes_sec_max>20</v:write_bytes_sec_max><v:write_bytes_sec>10</v:write_bytes_sec>\
                    </v:iotune></v:disk>";
        let expected = [
            ("blk-file", "/a"),
            ("throttle", "total-iops-sec=500"),
            ("throttle", "write-bytes-sec-max-length=3"),
            ("throttle", "write-bytes-sec-max=20"),
            ("throttle", "write-bytes-sec=10"),
        ];
        assert_eq!(options(disk), pairs(&expected));
        assert_eq!(options("<v:disk target='vda' file='/a'><v:iotune/></v:disk>"), pairs(&[("blk-file", "/a")]));
        let word = element("read_iops_sec", "5").unwrap().unwrap();
        let disk = format!("<disk target='vda' file='/a' xmlns='{NAMESPACE}'>{word}</disk>");
        assert_eq!(options(&disk)[1], ("throttle".to_owned(), "read-iops-sec=5".to_owned()));
    }

    #[test]
    fn errors_name_domain_disk_and_what_to_write() {
        let cases = [
            ("<v:disk file='/a'/>", "has no target"),
            ("<v:disk target='../x' file='/a'/>", "is no disk's target"),
            ("<v:disk target='vda'/>", "vm1: disk vda: no image"),
            ("<v:disk target='vda' file='a'/>", "no absolute path"),
            (
                "<v:disk target='vda' file='/a' cahce='none'/>",
                "unknown attribute 'cahce'; the nearest known one is 'cache'",
            ),
            ("<v:disk target='vda' file='/a' cache='nonne'/>", "disk vda: invalid value 'nonne'"),
            ("<v:disk target='vda' file='/a' error_policy='ignore'/>", "use stop, report or enospace"),
            ("<v:disk target='vda' file='/a' error_policy='enospc'/>", "libvirt's words"),
            ("<v:disk target='vda' file='/a' readonly='true'/>", "readonly is yes or no"),
            ("<v:disk target='vda' file='/a' num_queues='1'/>", "it is 'queues' here"),
            ("<v:disk target='vda' file='/a' socket_path='/x'/>", "is set by the hook"),
            ("<v:disk target='vda' file='/a' backend='null'/>", "unknown attribute 'backend'"),
            ("<v:disk target='vda' file='/a' rbd='p/i'/>", "exclude each other"),
            ("<v:disk target='vda' file='/a'/><v:disk target='vda' file='/b'/>", "vda twice"),
            ("<v:disk target='vda' file='/a'><v:iotune a='1'/></v:disk>", "unknown attribute 'a' of <iotune>"),
            ("<v:disk target='vda' file='/a'><v:throttlefilters/></v:disk>", "use <iotune>"),
            (
                "<v:disk target='vda' file='/a'><v:total_iops_sec>1</v:total_iops_sec></v:disk>",
                "an element of <iotune>",
            ),
            ("<v:disk target='vda' file='/a' total_iops_sec='9'/>", "total_iops_sec: limits are elements"),
            ("<v:disk target='vda' file='/a' throttle='total-iops-sec=9'/>", "throttle: limits are elements"),
            (
                "<v:disk target='vda' file='/a'><v:iotune><v:total_iops_sek>1</v:total_iops_sek></v:iotune></v:disk>",
                "the nearest known one is 'total-iops-sec'",
            ),
            (
                "<v:disk target='vda' file='/a'><v:iotune><v:group_name>a</v:group_name></v:iotune></v:disk>",
                "not built yet",
            ),
            ("<v:disk target='vda' file='/a'><v:iotun/></v:disk>", "unknown element <iotun>"),
            ("<v:disk target='vda' file='/a'><v:copy_dir/></v:disk>", "has no path="),
            ("<v:dik target='vda'/>", "unknown element <dik>"),
        ];
        for (disks, reason) in cases {
            let error = read_disks(disks).unwrap_err();
            assert!(error.contains(reason) && error.contains("domain vm1"), "{disks}: {error}");
        }
    }

    #[test]
    fn a_domain_without_our_element_has_no_disks_of_ours() {
        let xml = "<domain><name>a</name><metadata><x xmlns='urn:other'/></metadata></domain>";
        assert!(!is_mentioned(xml));
        assert_eq!(read(&document(xml).unwrap()), Ok(Vec::new()));
        assert_eq!(read(&document("<domain><name>a</name></domain>").unwrap()), Ok(Vec::new()));
    }
}
