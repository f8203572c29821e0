//! PURE. Explains an error of the TOML parser: what is wrong with the line, and how to fix it. The parser itself says only which
//! character it expected.

/// The beginnings of the parser's messages for which one advice fits each line.
const ADVICE: [(&str, &str); 9] = [
    (
        "duplicate key",
        "the key occurs twice: remove one line; copy-dir, rbd-option and throttle may be lists: [\"A\", \"B\"]",
    ),
    ("unclosed table", "the section's name is not closed: add ]"),
    ("unclosed array", "the list is not closed: add ]"),
    ("missing comma", "two values of a list have no comma between them: add one"),
    ("unexpected key or value", "text follows the value: write each key on a line of its own, and a comment after #"),
    ("key with no value", "the line has no '=': write key = value"),
    ("unquoted keys cannot be empty", "the line has no key before the '=': write key = value"),
    (
        "unexpected leading zero",
        "a number begins with 0: write permission bits in quotes, such as \"0660\", others without 0",
    ),
    ("missing escaped value", "a backslash is special in \"...\": write it twice, or use '...' for the quotes"),
];
/// The beginnings of the parser's messages about a text that has only its first quote.
const UNCLOSED: [&str; 2] = ["invalid basic string", "invalid literal string"];
/// The longest value that is repeated in an advice.
const MAX_VALUE: usize = 100;

/// Returns the reason and the fix. `message`: the parser's. `line`: the line of the file that it names.
pub(super) fn explain(message: &str, line: &str) -> String {
    if let Some((_, advice)) = ADVICE.iter().find(|(start, _)| message.starts_with(start)) {
        return (*advice).to_owned();
    }
    let unclosed = UNCLOSED.iter().any(|start| message.starts_with(start));
    match line.split_once('=').map(|(key, value)| (key.trim(), value.trim())) {
        _ if unclosed => "the text's quotes do not match: begin and end it with the same quote".to_owned(),
        Some((key, value)) if value.len() <= MAX_VALUE => value_advice(key, value).unwrap_or_else(|| general(message)),
        _ => general(message),
    }
}

fn general(message: &str) -> String {
    format!("{message}; write each option as key = value, and put text in quotes (virtioblkd.toml(5) has an example)")
}

/// Returns the advice for a value that is no TOML.
fn value_advice(key: &str, value: &str) -> Option<String> {
    let value = value.split(" #").next().unwrap_or(value).trim();
    if value.is_empty() || value.starts_with('#') {
        return Some(format!("'{key}' has no value: write one after the '='"));
    }
    if value.starts_with(['\u{201c}', '\u{201d}', '\u{201e}', '\u{2018}', '\u{2019}']) {
        let text = value.trim_matches(|character: char| !character.is_ascii());
        return Some(format!("these quotes are not TOML's: write {key} = \"{text}\""));
    }
    match value.to_lowercase().as_str() {
        "true" | "yes" => return Some(format!("write {key} = true, in small letters")),
        "false" | "no" => return Some(format!("write {key} = false, in small letters")),
        _ => {}
    }
    match value {
        list if list.starts_with('[') => Some("put each text of the list in quotes: [\"A\", \"B\"]".to_owned()),
        text if text.contains(['"', '\'', '\\']) => None,
        text => Some(format!("put the text in quotes: {key} = \"{text}\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::file;

    /// The explanation of a file's error, with the line in front.
    fn explained(text: &str) -> String {
        file::parse("f", text).expect_err("not TOML").0
    }

    #[test]
    fn each_error_of_toml_has_the_fix_for_its_line() {
        let table = [
            ("cache = none", r#"f:1: not TOML: put the text in quotes: cache = "none""#),
            ("\nblk-file = /a/b # the disk", r#"f:2: not TOML: put the text in quotes: blk-file = "/a/b""#),
            ("scratch-size = 4G", r#"put the text in quotes: scratch-size = "4G""#),
            ("[rbd-option]\nrbd_cache = none", r#"f:2: not TOML: put the text in quotes: rbd_cache = "none""#),
            ("cache: none", "the line has no '='"),
            ("cache none", "the line has no '='"),
            ("<disk/>", "the line has no '='"),
            ("= 3", "no key before the '='"),
            ("cache =", "'cache' has no value"),
            ("cache = # none", "'cache' has no value"),
            ("[disk", "the section's name is not closed"),
            ("cache = \"a\"\ncache = \"b\"", "f:2: not TOML: the key occurs twice"),
            ("throttle = \"a=1\"\nthrottle = \"b=1\"", "copy-dir, rbd-option and throttle may be lists"),
            ("cache = \"none", "quotes do not match"),
            ("cache = 'none", "quotes do not match"),
            ("cache = \u{201c}none\u{201d}", r#"these quotes are not TOML's: write cache = "none""#),
            ("copy-dir = [\"/a\"", "the list is not closed"),
            ("copy-dir = [\"/a\" \"/b\"]", "no comma"),
            ("copy-dir = [/a]", r#"put each text of the list in quotes: ["A", "B"]"#),
            ("serial = \"a\\q\"", "a backslash is special"),
            ("socket-mode = 0660", r#"in quotes, such as "0660""#),
            ("cache = \"none\" discard = \"unmap\"", "each key on a line of its own"),
            ("read-only = yes", "write read-only = true, in small letters"),
            ("read-only = False", "write read-only = false, in small letters"),
            ("serial = a\"b", "put text in quotes (virtioblkd.toml(5) has an example)"),
        ];
        for (text, part) in table {
            let message = explained(text);
            assert!(message.contains(part), "{text}: '{part}' is missing in: {message}");
        }
    }

    #[test]
    fn a_section_is_named_as_such_and_not_compared_with_options() {
        for text in
            ["[disk]\ncache = \"none\"", "[[disk]]\ncache = \"none\"", "[cache]\nx = 1", "disk.cache = \"none\""]
        {
            let message = explained(text);
            assert!(message.contains("f:1: ") && message.contains("is a section or a table"), "{message}");
            assert!(!message.contains("nearest"), "{message}");
        }
        assert!(explained("[copy-dir]\nx = \"/a\"").contains("is a section"));
        assert!(explained("[[rbd-option]]\nx = \"y\"").contains("in single brackets"));
        assert!(explained("virtioblkd = 1").contains("unknown key 'virtioblkd'; virtioblkd.toml(5) lists"));
    }
}
