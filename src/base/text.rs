//! Makes text safe for a terminal and a log that other programs wrote: a guest's agent, a client, a file's name.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

/// Escapes every character that a terminal obeys or that begins a new line: C0 and C1 controls, DEL, the controls of
/// writing direction, and Unicode's separators of lines and paragraphs. So a text is one line and shows in the order in
/// which it is stored. All output to a terminal or a log passes here, except JSON.
pub fn clean(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    for character in text.chars() {
        if is_unsafe(character) {
            cleaned.extend(character.escape_default());
        } else {
            cleaned.push(character);
        }
    }
    cleaned
}

/// Cleans each line of a text as [`clean`] does, and keeps the line breaks.
pub fn clean_lines(text: &str) -> String {
    text.split('\n').map(clean).collect::<Vec<_>>().join("\n")
}

/// Makes serialized JSON, on one line or several, safe for a terminal. JSON's own escapes leave DEL, C1 and the
/// controls of direction as they are. Those occur in strings only, where `\uXXXX` means the same. A newline occurs only
/// between values, and stays.
pub fn clean_json(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    for character in text.chars() {
        if character != '\n' && is_unsafe(character) {
            // All of them are in the basic plane. Writing to a String cannot fail.
            let _ = write!(cleaned, "\\u{:04x}", u32::from(character));
        } else {
            cleaned.push(character);
        }
    }
    cleaned
}

/// Formats a value, such as a path, and cleans the text as [`clean`] does.
pub fn shown(value: impl fmt::Display) -> String {
    clean(&value.to_string())
}

fn is_unsafe(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Encodes the bytes of a path or word in base64 if they are not UTF-8: JSON has text, in which such bytes are altered.
pub(crate) fn base64_unless_utf8(word: &OsStr) -> Option<String> {
    word.to_str().is_none().then(|| BASE64.encode(word.as_encoded_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn what_a_terminal_obeys_is_escaped_and_the_rest_stays() {
        for (text, cleaned) in [
            ("plain, Grüße, 日本語 'q' \"q\" \\", "plain, Grüße, 日本語 'q' \"q\" \\"),
            ("a\nb\r\tc\0", "a\\nb\\r\\tc\\u{0}"),
            ("\u{1b}[2J", "\\u{1b}[2J"),
            ("\u{7f}\u{9b}2J\u{85}", "\\u{7f}\\u{9b}2J\\u{85}"),
            ("\u{202e}txt.exe\u{2066}\u{61c}\u{200f}", "\\u{202e}txt.exe\\u{2066}\\u{61c}\\u{200f}"),
            ("one\u{2028}two\u{2029}three", "one\\u{2028}two\\u{2029}three"),
        ] {
            assert_eq!(clean(text), cleaned);
        }
        assert_eq!(clean_lines("a\n\u{1b}b\n"), "a\n\\u{1b}b\n");
    }

    #[test]
    fn json_that_was_cleaned_means_the_same() {
        let value = serde_json::json!({"na\u{9b}me": ["\u{7f}\u{202e}\u{2028}x\n\u{1b}", 1, null]});
        for text in [value.to_string(), format!("{value:#}")] {
            let cleaned = clean_json(&text);
            assert!(!cleaned.lines().any(|line| line.chars().any(is_unsafe)), "{cleaned}");
            assert_eq!(cleaned.lines().count(), text.lines().count());
            assert_eq!(serde_json::from_str::<Value>(&cleaned).unwrap(), value);
        }
    }
}
