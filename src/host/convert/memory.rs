//! The guest's memory, which QEMU must share with a vhost-user server: made shared at the first disk, and made what it
//! was when the last one has left.

use roxmltree::Node;

use super::super::domain::{DomainError, child, refuse};
use super::super::edits::{Edits, end_of_content, indentation};

/// The attribute of our `<disks>` that says what was added. Its values: `memoryBacking`, `access`, `source-access`.
pub(in crate::host) const ADDED: &str = "shared_memory_added";

/// Makes the domain's memory shared, and returns what was added. It is not shared yet.
pub(super) fn share(text: &str, domain: Node<'_, '_>, edits: &mut Edits) -> Result<&'static str, DomainError> {
    let numa = child(domain, "cpu").and_then(|cpu| child(cpu, "numa"));
    let cells = numa.iter().flat_map(|numa| numa.children().filter(|node| node.has_tag_name("cell")));
    if cells.into_iter().any(|cell| cell.attribute("memAccess").is_some_and(|access| access != "shared")) {
        return refuse("a NUMA cell has memAccess='private': make it shared, which a vhost-user disk needs");
    }
    let Some(backing) = child(domain, "memoryBacking") else {
        let Some(before) = child(domain, "devices") else { return refuse("the domain has no <devices>") };
        let indent = indentation(text, before);
        let element = format!(
            "<memoryBacking>{indent}  <source type='memfd'/>{indent}  <access mode='shared'/>{indent}</memoryBacking>{indent}"
        );
        edits.insert(before.range().start, if indent.is_empty() { element.replace("  <", "<") } else { element });
        return Ok("memoryBacking");
    };
    if let Some(access) = child(backing, "access") {
        return refuse(format!(
            "<memoryBacking> has <access mode='{}'/>: make it shared, which a vhost-user disk needs",
            access.attribute("mode").unwrap_or_default()
        ));
    }
    let source = child(backing, "source").map(|source| source.attribute("type").unwrap_or_default().to_owned());
    if source.as_deref() == Some("anonymous") {
        return refuse("<memoryBacking> has <source type='anonymous'/>, which cannot be shared: make it memfd");
    }
    let needs_source = source.is_none() && child(backing, "hugepages").is_none();
    let new = if needs_source { "<source type='memfd'/><access mode='shared'/>" } else { "<access mode='shared'/>" };
    match end_of_content(text, backing) {
        Ok(at) => edits.insert(at, new),
        Err(range) => edits.replace(range, format!("<memoryBacking>{new}</memoryBacking>")),
    }
    Ok(if needs_source { "source-access" } else { "access" })
}

/// Removes what [`share`] added.
pub(super) fn unshare(text: &str, domain: Node<'_, '_>, added: &str, edits: &mut Edits) {
    let Some(backing) = child(domain, "memoryBacking") else { return };
    let access = child(backing, "access").filter(|access| access.attribute("mode") == Some("shared"));
    let source = child(backing, "source").filter(|source| source.attribute("type") == Some("memfd"));
    let count = backing.children().filter(Node::is_element).count();
    let ours = access.iter().count() + source.iter().count();
    if added == "memoryBacking" && count == ours {
        edits.remove(text, backing.range());
        return;
    }
    for node in access.into_iter().chain(source.filter(|_| added != "access")) {
        edits.remove(text, node.range());
    }
}
