//! The order of the folders, checked on the text of `src/`: which folder may name what, and which files
//! may be unsafe. Comments and the insides of string literals are blanked first.

mod imports;

use std::fs;
use std::path::{Path, PathBuf};

/// Files that may hold `unsafe`, each with its reason. A file that is not written yet may stand here.
const UNSAFE_FILES: &[(&str, &str)] = &[
    ("src/backend/buffer.rs", "iovecs"),
    ("src/backend/preadv.rs", "preadv2 and pwritev2 on iovecs"),
    ("src/backend/uring/mod.rs", "submissions point into buffers that the kernel uses"),
    ("src/backend/rbd/sys.rs", "the functions of librados and librbd"),
    ("src/backend/rbd/handle.rs", "calls them"),
    ("src/backend/rbd/luks.rs", "calls them"),
    ("src/backend/rbd/aio.rs", "calls them; memory that they use"),
    ("src/backend/rbd/callbacks.rs", "calls them; is called by them"),
    ("src/virtio/virtqueue/guest_memory.rs", "guest memory as iovecs and atomics"),
    ("src/virtio/shared_memory/sigbus.rs", "a signal handler that maps zeroes over memory that vanished"),
    ("src/sandbox/sigsys.rs", "a signal handler that names the system call that was stopped"),
    ("src/base/syscalls.rs", "system calls that no safe wrapper has"),
    ("src/snapshot/spawn.rs", "a command with another signal mask"),
    ("src/server/inherited.rs", "a descriptor that is known by its number alone"),
];

/// In files under `folder` none of `words` may stand, `but` apart.
struct Rule {
    folder: &'static str,
    words: &'static [&'static str],
    but: Option<&'static str>,
}

const RULES: [Rule; 22] = [
    Rule {
        folder: "src/engine/",
        words: &["std::fs", "std::net", "std::os", "std::thread", "std::time", "std::io", "std::sync", "std::process"],
        but: None,
    },
    Rule { folder: "src/backend/", words: &["crate::virtio", "crate::control"], but: None },
    Rule { folder: "src/virtio/", words: &["crate::control", "File::open", "File::create", "OpenOptions"], but: None },
    // Descriptors that the front-end hands over arrive as `std::fs::File`.
    Rule { folder: "src/virtio/", words: &["std::fs"], but: Some("std::fs::File") },
    Rule { folder: "src/control/", words: &["crate::virtio"], but: None },
    // Each folder of the device uses only those below it.
    Rule {
        folder: "src/virtio/virtqueue/",
        words: &[
            "virtio::blk",
            "virtio::shared_memory",
            "virtio::rings",
            "virtio::worker",
            "virtio::vhost_user",
            "virtio::device",
        ],
        but: None,
    },
    Rule {
        folder: "src/virtio/blk/",
        words: &["virtio::shared_memory", "virtio::rings", "virtio::worker", "virtio::vhost_user", "virtio::device"],
        but: None,
    },
    Rule {
        folder: "src/virtio/shared_memory/",
        words: &["virtio::rings", "virtio::worker", "virtio::vhost_user", "virtio::device"],
        but: None,
    },
    Rule { folder: "src/virtio/rings/", words: &["virtio::worker", "virtio::vhost_user", "virtio::device"], but: None },
    Rule { folder: "src/virtio/worker/", words: &["virtio::vhost_user", "virtio::device"], but: None },
    Rule { folder: "src/virtio/vhost_user/", words: &["virtio::device"], but: None },
    // The back-ends do not know who reads an instant, and its readers know nothing of the device.
    Rule { folder: "src/backend/", words: &["crate::export"], but: None },
    Rule {
        folder: "src/export/",
        words: &["crate::virtio", "crate::control", "crate::config", "crate::server"],
        but: None,
    },
    Rule { folder: "src/upgrade/", words: &["crate::virtio", "crate::backend", "crate::control"], but: None },
    // Only the server, main and the tools know the configuration.
    Rule { folder: "src/backend/", words: &["crate::config"], but: None },
    Rule { folder: "src/virtio/", words: &["crate::config"], but: None },
    Rule { folder: "src/control/", words: &["crate::config"], but: None },
    Rule { folder: "src/sandbox/", words: &["crate::config"], but: None },
    Rule { folder: "src/snapshot/", words: &["crate::config"], but: None },
    Rule { folder: "src/upgrade/", words: &["crate::config"], but: None },
    Rule {
        folder: "src/disk/",
        words: &["crate::config", "crate::virtio", "crate::control", "crate::backend"],
        but: None,
    },
    Rule {
        folder: "src/base/",
        words: &[
            "crate::backend",
            "crate::virtio",
            "crate::control",
            "crate::config",
            "crate::server",
            "crate::sandbox",
            "crate::snapshot",
            "crate::upgrade",
        ],
        but: None,
    },
];

/// Where a path in the engine may begin, beside its own modules and types. Anything else names another folder or another
/// crate.
const ENGINE_MAY_USE: [&str; 4] = ["std", "super", "self", "crate::engine"];

#[test]
fn every_room_names_only_what_it_may() {
    let files = sources();
    assert!(files.iter().any(|file| file.path.starts_with("src/engine/")), "src/engine/ was not found");
    let broken: Vec<String> = files.iter().flat_map(violations).collect();
    assert!(broken.is_empty(), "the layering is broken (see the head of src/lib.rs):\n{}", broken.join("\n"));
}

#[test]
fn each_rule_refuses_text_that_breaks_it() {
    let cases = [
        ("src/engine/gate.rs", "use std::time::Instant;"),
        ("src/engine/gate.rs", "use crate::disk::Event;"),
        ("src/engine/gate.rs", "use log::warn;"),
        ("src/engine/gate.rs", "pub use libc::EIO;"),
        ("src/engine/gate.rs", "fn f() -> crate::backend::OpId { todo!() }"),
        ("src/engine/gate.rs", "use std::{\n    fmt,\n    time::Duration,\n};"),
        ("src/backend/file/mod.rs", "use crate::virtio::request::Request;"),
        ("src/backend/file/mod.rs", "use crate::{engine::Errno, virtio};"),
        ("src/virtio/worker/mod.rs", "let file = std::fs::File::open(path)?;"),
        ("src/virtio/worker/mod.rs", "use std::{fs, fmt};"),
        ("src/virtio/vhost_user/handler.rs", "use std::fs::{self, File};"),
        ("src/virtio/vhost_user/handler.rs", "let disk = std::fs::File::open(path);"),
        ("src/virtio/vhost_user/handler.rs", "let disk = File::open(path);"),
        ("src/virtio/worker/mod.rs", "crate::control::socket::notify();"),
        ("src/control/socket.rs", "use crate::virtio::worker;"),
        ("src/server/mod.rs", "let x = unsafe { *pointer };"),
        ("src/server/mod.rs", "#![allow(unsafe_code)]"),
        ("src/server/mod.rs", "let (quote, x) = ('\"', r\"\\\"); unsafe { f() } // \""),
        ("src/server/mod.rs", "/* unsafe */ unsafe fn f() {}"),
        ("src/backend/uring/mod.rs", "//! About rings.\nunsafe impl Send for Uring {}"),
    ];
    for (path, text) in cases {
        assert!(!violations(&Source::new(path, text)).is_empty(), "not refused: {path}: {text}");
    }
}

#[test]
fn text_that_keeps_the_rules_passes() {
    let cases = [
        ("src/engine/gate.rs", "use std::collections::VecDeque;\npub use super::RequestId;\nuse crate::engine::Kind;"),
        ("src/engine/gate.rs", "// use std::time\n/* unsafe /* std::fs */ std::io */ struct Gate;"),
        ("src/engine/gate.rs", "/// As `crate::backend` says, std::time and unsafe are elsewhere.\nstruct Unsafe;"),
        ("src/virtio/vhost_user/handler.rs", "use std::fs::File;\nfn f(file: File) {}"),
        ("src/virtio/vhost_user/handler.rs", "use std::{fs::File, os::fd::AsFd};"),
        ("src/virtio/worker/mod.rs", "use std::fs::File;"),
        ("src/virtio/worker/mod.rs", "let ring = \"http://example.org\"; // std::fs"),
        ("src/backend/uring/mod.rs", "//! UNSAFE. The uring.\n#![allow(unsafe_code)]\nunsafe impl Send for Uring {}"),
        ("src/config/mod.rs", "Unsafe, \"unsafe\", \"unsafe { }\""),
        ("src/engine/gate.rs", "let c = '\"'; let text = r#\"use std::io; \"crate::disk\" \"#;"),
        ("src/engine/mod.rs", "mod gate;\npub use gate::WriteGate;\nuse Kind::*;\nfn f() -> impl Sized + use<'_> {}"),
    ];
    for (path, text) in cases {
        assert_eq!(violations(&Source::new(path, text)), Vec::<String>::new());
    }
}

/// One file, its comments blanked.
struct Source {
    /// From the package's root, with forward slashes.
    path: String,
    first_line: String,
    code: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Source {
        let first_line = text.lines().next().unwrap_or_default().to_string();
        Source { path: path.to_string(), first_line, code: without_comments(text) }
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    let mut folders = vec![root.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
                files.push(Source::new(&name, &fs::read_to_string(&path).unwrap()));
            }
        }
    }
    files
}

/// What is wrong with a file, a line each.
fn violations(file: &Source) -> Vec<String> {
    let Source { path, code, .. } = file;
    let mut found = Vec::new();
    let paths = named_paths(code);
    for rule in RULES.iter().filter(|rule| path.starts_with(rule.folder)) {
        let allowed = rule.but.unwrap_or("");
        let code = if allowed.is_empty() { code.clone() } else { code.replace(allowed, "") };
        for word in rule.words {
            if has_path(&code, word) || paths.iter().any(|used| used != allowed && begins_with(used, word)) {
                found.push(format!("{path} names {word}, which {} must not", rule.folder));
            }
        }
    }
    if path.starts_with("src/engine/") {
        for used in &paths {
            if !ENGINE_MAY_USE.iter().any(|may| begins_with(used, may)) && !is_local(code, used) {
                found.push(format!("{path} imports {used}: the engine imports std and itself only"));
            }
        }
        for (at, _) in code.match_indices("crate::") {
            if !code[at..].starts_with("crate::engine") {
                found.push(format!("{path} names another folder: {}", code[at..].lines().next().unwrap_or_default()));
            }
        }
    }
    found.extend(unsafe_violation(file));
    found
}

fn unsafe_violation(file: &Source) -> Option<String> {
    let Source { path, first_line, code } = file;
    // The mode's name is a word of the trade: only the keyword counts, which is followed by a space or a brace.
    let keyword = |word: &str| words_at(code, word).any(|end| code[end..].trim_start().starts_with(KEYWORD_FOLLOWERS));
    if !keyword("unsafe") && !code.contains("allow(unsafe_code)") {
        return None;
    }
    if !UNSAFE_FILES.iter().any(|(allowed, _)| allowed == path) {
        return Some(format!("{path} is unsafe: only the files listed in tests/layering/main.rs may be"));
    }
    if !first_line.starts_with("//! UNSAFE.") {
        return Some(format!("{path} is unsafe: its first line must begin with '//! UNSAFE.'"));
    }
    None
}

/// What follows the keyword `unsafe`: a block, or an item.
const KEYWORD_FOLLOWERS: fn(char) -> bool = |next| next == '{' || next.is_ascii_lowercase();

/// Whether `word` stands in `code` as a whole path: `std::io` is not in `std::iovec`.
fn has_path(code: &str, word: &str) -> bool {
    words_at(code, word).next().is_some()
}

/// The end of every whole-word occurrence.
fn words_at<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).filter_map(move |(start, _)| {
        let end = start + word.len();
        let free = !code[..start].ends_with(is_name) && !code[end..].starts_with(is_name);
        free.then_some(end)
    })
}

/// Whether a path begins with a type (crates have small letters) or a module that this file declares.
fn is_local(code: &str, path: &str) -> bool {
    let first = path.split("::").next().unwrap_or(path);
    first.starts_with(char::is_uppercase) || has_path(code, &format!("mod {first}"))
}

fn begins_with(path: &str, start: &str) -> bool {
    path.strip_prefix(start).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Every path that a `use` names, its braces multiplied out: `use std::{fmt, io::Read}` is std::fmt and std::io::Read.
fn named_paths(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for end in words_at(code, "use") {
        // `use<'a>` in a type is no import.
        let Some(length) = code[end..].find(';').filter(|_| !code[end..].starts_with('<')) else { continue };
        let tree: String = code[end..end + length].split_whitespace().collect::<Vec<_>>().join(" ");
        multiply_out("", tree.trim(), &mut paths);
    }
    paths
}

fn multiply_out(head: &str, tree: &str, paths: &mut Vec<String>) {
    let Some((start, rest)) = tree.split_once('{') else {
        let name = tree.split(" as ").next().unwrap_or(tree).trim();
        paths.push(format!("{head}{name}").trim_start_matches("::").to_string());
        return;
    };
    let head = format!("{head}{}", start.trim());
    let inner = rest.rsplit_once('}').map_or(rest, |(inner, _)| inner);
    let (mut depth, mut from) = (0, 0);
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                multiply_out(&head, inner[from..at].trim(), paths);
                from = at + 1;
            }
            _ => {}
        }
    }
    if !inner[from..].trim().is_empty() {
        multiply_out(&head, inner[from..].trim(), paths);
    }
}

/// Blanks line and block comments (which nest) and the insides of strings.
fn without_comments(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let (kept, length) = match c {
            '/' if rest.starts_with("//") => (" ", rest.find('\n').unwrap_or(rest.len())),
            '/' if rest.starts_with("/*") => (" ", block_comment(rest)),
            '"' => ("\"\"", string(rest)),
            'r' if !code.ends_with(|c: char| c.is_alphanumeric() || c == '_') && raw_string(rest).is_some() => {
                ("\"\"", raw_string(rest).unwrap_or(rest.len()))
            }
            // A quote as a character would open a string.
            '\'' if rest.starts_with("'\"'") => (" ", 3),
            '\'' if rest.starts_with("'\\\"'") => (" ", 4),
            _ => (&rest[..c.len_utf8()], c.len_utf8()),
        };
        code.push_str(kept);
        rest = &rest[length..];
    }
    code
}

/// Bytes of the raw string literal that `text` begins with, if it does.
fn raw_string(text: &str) -> Option<usize> {
    let hashes = text[1..].len() - text[1..].trim_start_matches('#').len();
    let inner = text[1 + hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let length = inner.find(&close).map_or(inner.len(), |at| at + close.len());
    Some(2 + hashes + length)
}

/// Bytes of the block comment that `text` begins with.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest.starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

/// Bytes of the string literal that `text` begins with, its escapes heeded.
fn string(text: &str) -> usize {
    let mut is_escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}
