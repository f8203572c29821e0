//! The shipped schema of our element in a domain's `<metadata>` says what the code says.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use kit::guest::tell;
use kit::programs;
use roxmltree::{Document, Node};
use virtioblkd::internal::host::metadata;

const SCHEMA: &str = "qemu-configs/libvirt/virtioblkd.rng";

fn named<'a>(node: Node<'a, 'a>, tag: &'static str, name: &'static str) -> Node<'a, 'a> {
    let mut all = node.descendants();
    let found = all.find(|node| node.tag_name().name() == tag && node.attribute("name") == Some(name));
    found.unwrap_or_else(|| panic!("no <{tag} name='{name}'>"))
}

/// The attributes of an element in the schema, without those of its children, each with the values that it may have.
fn attributes<'a>(element: Node<'a, 'a>) -> Vec<(&'a str, Vec<&'a str>)> {
    let is_own = |node: &Node<'a, 'a>| node.ancestors().find(|a| a.tag_name().name() == "element") == Some(element);
    let all = element.descendants().filter(|node| node.tag_name().name() == "attribute").filter(is_own);
    let values = |node: Node<'a, 'a>| {
        let values = node.descendants().filter(|node| node.tag_name().name() == "value");
        values.filter_map(|value| value.text()).collect()
    };
    all.map(|node| (node.attribute("name").expect("a name"), values(node))).collect()
}

/// A domain with this element.
fn domain(disk: &str) -> String {
    format!("<domain><name>vm1</name><metadata>{}</metadata></domain>", element(disk))
}

fn element(disk: &str) -> String {
    format!("<v:disks xmlns:v='{}'>{disk}</v:disks>", metadata::NAMESPACE)
}

#[test]
fn the_schema_of_the_metadata_has_the_attributes_of_the_code() {
    let text = fs::read_to_string(programs::root().join(SCHEMA)).expect("shipped");
    let document = Document::parse(&text).expect("XML");
    assert_eq!(document.root_element().attribute("ns"), Some(metadata::NAMESPACE));
    let disk = named(document.root_element(), "element", "disk");
    let found: BTreeSet<String> = attributes(disk).into_iter().map(|(name, _)| name.to_owned()).collect();
    let known = metadata::attributes().into_iter().map(|(name, _)| name);
    let expected: BTreeSet<String> = known.chain(["target".to_owned()]).collect();
    assert_eq!(found, expected, "{SCHEMA}");
    for (name, value) in
        attributes(disk).into_iter().flat_map(|(name, all)| all.into_iter().map(move |one| (name, one)))
    {
        let image = if name.starts_with("rbd") { "rbd='p/i'" } else { "file='/a'" };
        let disk = format!("<v:disk target='vda' {image} {name}='{value}'/>");
        metadata::of_xml(&domain(&disk)).unwrap_or_else(|error| panic!("{name}='{value}': {error}"));
    }
}

#[test]
fn xmllint_judges_metadata_as_the_code_does() {
    let cases = [
        "<v:disk target='vda' file='/a' cache='none' queues='2' max_hold='30s'/>",
        "<v:disk target='vdb' rbd='p/i'><v:rbd_option name='rbd_cache' value='true'/><v:copy_dir path='/b'/></v:disk>",
        "<v:disk target='vda' file='/a'><v:qemu_disk type='file'><driver io='native'/></v:qemu_disk></v:disk>",
        "<v:disk target='vda' file='/a' cahce='none'/>",
        "<v:disk target='vda' file='/a' cache='odd'/>",
        "<v:disk target='vda' file='/a' readonly='true'/>",
        "<v:disk target='vda' file='a'/>",
        "<v:disk target='../a' file='/a'/>",
        "<v:disk target='vda' file='/a' rbd='p/i'/>",
        "<v:disk target='vda'/>",
        "<v:disk target='vda' file='/a'><v:copy_dir/></v:disk>",
        "<v:disc target='vda' file='/a'/>",
    ];
    let directory = tempfile::tempdir().expect("room");
    let mut good = 0;
    for disk in cases {
        let is_good = metadata::of_xml(&domain(disk)).is_ok();
        good += u32::from(is_good);
        let file = directory.path().join("element.xml");
        fs::write(&file, element(disk)).expect("room");
        let mut xmllint = Command::new("xmllint");
        xmllint.arg("-noout").arg("-relaxng").arg(programs::root().join(SCHEMA)).arg(&file);
        match xmllint.output() {
            Ok(judged) => assert_eq!(judged.status.success(), is_good, "{disk}: {judged:?}"),
            Err(_) => return tell("SKIPPED: xmllint is not installed: the schema was not tried"),
        }
    }
    assert_eq!(good, 3);
}
