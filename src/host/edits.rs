//! PURE. Changes of an XML text that leave every other byte as it is.

use std::ops::Range;

use roxmltree::Node;

/// Changes of one text, given by positions in it as it was.
#[derive(Default)]
pub(super) struct Edits {
    list: Vec<(Range<usize>, String)>,
}

impl Edits {
    /// Puts `new` in the place of these bytes. Ranges of one text must not overlap.
    pub(super) fn replace(&mut self, range: Range<usize>, new: impl Into<String>) {
        self.list.push((range, new.into()));
    }

    /// Puts `new` before the byte at `at`. Two insertions at one place stay in their order.
    pub(super) fn insert(&mut self, at: usize, new: impl Into<String>) {
        self.replace(at..at, new);
    }

    /// Removes a node, and the white space before it.
    pub(super) fn remove(&mut self, text: &str, range: Range<usize>) {
        let start = text[..range.start].trim_end_matches([' ', '\t', '\n', '\r']).len();
        self.replace(start..range.end, "");
    }

    /// The changed text.
    pub(super) fn apply(mut self, text: &str) -> String {
        self.list.sort_by_key(|(range, _)| (range.start, range.end));
        let mut changed = String::with_capacity(text.len() + 1024);
        let mut at = 0;
        for (range, new) in self.list {
            changed.push_str(&text[at..range.start]);
            changed.push_str(&new);
            at = range.end;
        }
        changed.push_str(&text[at..]);
        changed
    }
}

/// Text as an attribute's value between single quotes. A parser makes spaces of tabs and line breaks that are not written
/// as references.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '\t' => escaped.push_str("&#9;"),
            '\n' => escaped.push_str("&#10;"),
            '\r' => escaped.push_str("&#13;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// ` name='value'` for each.
pub(super) fn attributes<'a>(list: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    list.into_iter().map(|(name, value)| format!(" {name}='{}'", escape(value))).collect()
}

/// An element as text, with plain names: without prefixes, comments and declarations of namespaces. White space beside
/// elements is indentation and is left out; in an element that has only text it is kept.
pub(super) fn plain(node: Node<'_, '_>) -> String {
    let name = node.tag_name().name();
    let list = attributes(node.attributes().map(|one| (one.name(), one.value())));
    let has_elements = node.children().any(|child| child.is_element());
    let content = node.children().map(|child| match child.text().filter(|_| child.is_text()) {
        Some(text) if has_elements => escape(text.trim()),
        Some(text) => escape(text),
        None if child.is_element() => plain(child),
        None => String::new(),
    });
    match content.collect::<String>().as_str() {
        "" => format!("<{name}{list}/>"),
        content => format!("<{name}{list}>{content}</{name}>"),
    }
}

/// The line break and indentation before a node; empty where it does not begin its line.
pub(super) fn indentation<'a>(text: &'a str, node: Node<'_, '_>) -> &'a str {
    let before = &text[..node.range().start];
    let blank = before.trim_end_matches([' ', '\t']).len();
    match before[..blank].ends_with('\n') {
        true => &text[blank - 1..before.len()],
        false => "",
    }
}

/// Where to insert a child behind all others of `node`, and the element's text if it must be rewritten because it is empty
/// (`<metadata/>`): `Err` has the range of the whole element then.
pub(super) fn end_of_content(text: &str, node: Node<'_, '_>) -> Result<usize, Range<usize>> {
    let range = node.range();
    let source = &text[range.clone()];
    match source.rfind("</") {
        Some(end) => Ok(range.start + source[..end].trim_end_matches([' ', '\t', '\n', '\r']).len()),
        None => Err(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use roxmltree::Document;

    #[test]
    fn only_what_is_named_changes() {
        let text = "<a>\n  <b/>\n  <c x='1'/>\n</a>";
        let document = Document::parse(text).unwrap();
        let [b, c] = ["b", "c"].map(|name| document.descendants().find(|node| node.has_tag_name(name)).unwrap());
        let mut edits = Edits::default();
        edits.remove(text, b.range());
        edits.replace(c.attribute_node("x").unwrap().range_value(), escape("it's <2>"));
        edits.insert(end_of_content(text, document.root_element()).unwrap(), format!("{}<d/>", indentation(text, c)));
        assert_eq!(edits.apply(text), "<a>\n  <c x='it&apos;s &lt;2&gt;'/>\n  <d/>\n</a>");
        assert_eq!(end_of_content(text, b), Err(b.range()));
    }

    #[test]
    fn every_value_survives_being_written_and_read() {
        for value in [" a  b ", "a\tb\nc\rd", "it's <\"&amp;>", "@", "über"] {
            let text = format!("<a{}>{}</a>", attributes([("x", value)]), escape(value));
            let document = Document::parse(&text).unwrap();
            let (node, again) = (document.root_element(), plain(document.root_element()));
            assert_eq!((node.attribute("x"), node.text()), (Some(value), Some(value)), "{text}");
            assert_eq!(again, text);
        }
        let document = Document::parse("<a>\n  <b> x<!-- - -->y </b>\n</a>").unwrap();
        assert_eq!(plain(document.root_element()), "<a><b> xy </b></a>");
    }
}
