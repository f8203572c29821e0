//! Which module imports which, read from the text, and whether the imports between the modules of one folder run in a
//! circle.

use std::collections::{BTreeMap, BTreeSet};

use super::{Source, named_paths, words_at};

/// Folders whose members must not import each other in a circle. The empty one is `src` itself.
const FOLDERS: [&str; 4] = ["", "virtio", "control", "sandbox"];

/// Which member of a folder imports which others, each with one file that does.
type Imports = BTreeMap<String, BTreeMap<String, String>>;

#[test]
fn no_imports_between_the_members_of_a_folder_run_in_a_circle() {
    let files = super::sources();
    let circles: Vec<String> = FOLDERS.iter().filter_map(|folder| circle(&imports(&files, folder))).collect();
    assert!(circles.is_empty(), "imports run in a circle:\n{}", circles.join("\n"));
}

#[test]
fn a_circle_is_found() {
    let sources = [
        Source::new("src/a/mod.rs", "pub mod x;"),
        Source::new("src/a/x.rs", "use crate::b::{Thing, other::deep};"),
        Source::new("src/b/mod.rs", "fn f() { crate::c::call() }"),
        Source::new("src/c.rs", "use super::a::x::Name;"),
    ];
    let found = circle(&imports(&sources, "")).expect("a -> b -> c -> a");
    for part in ["a -> b (src/a/x.rs)", "b -> c (src/b/mod.rs)", "c -> a (src/c.rs)"] {
        assert!(found.contains(part), "{found}");
    }
    assert_eq!(circle(&imports(&sources[..3], "")), None);
}

/// The imports between the members of `folder`.
fn imports(files: &[Source], folder: &str) -> Imports {
    let folder: Vec<&str> = folder.split("::").filter(|part| !part.is_empty()).collect();
    let modules: Vec<Vec<String>> = files.iter().map(|file| module_of(&file.path)).collect();
    let is_member =
        |name: &str| modules.iter().any(|m| m.len() > folder.len() && starts(m, &folder) && m[folder.len()] == name);
    let mut imports = Imports::new();
    for (file, module) in files.iter().zip(&modules) {
        if module.len() <= folder.len() || !starts(module, &folder) {
            continue;
        }
        let from = &module[folder.len()];
        for path in absolute_paths(&file.code, module) {
            if let Some(to) = path.get(folder.len()).filter(|_| starts(&path, &folder))
                && to != from
                && is_member(to)
            {
                imports.entry(from.clone()).or_default().entry(to.clone()).or_insert_with(|| file.path.clone());
            }
        }
    }
    imports
}

fn starts(path: &[String], folder: &[&str]) -> bool {
    path.len() >= folder.len() && path.iter().zip(folder).all(|(part, name)| part == name)
}

/// `src/virtio/worker/mod.rs` is virtio, worker; `src/main.rs` and the programs belong to no module.
fn module_of(path: &str) -> Vec<String> {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs");
    if inner == "main" || inner == "lib" || inner.starts_with("bin/") {
        return Vec::new();
    }
    inner.split('/').filter(|part| *part != "mod").map(str::to_string).collect()
}

/// Every path into this crate that `code` names, from the crate's root.
fn absolute_paths(code: &str, module: &[String]) -> Vec<Vec<String>> {
    let mut named = named_paths(code);
    for start in ["crate", "super"] {
        for end in words_at(code, start) {
            let rest = &code[end..];
            let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').unwrap_or(rest.len());
            named.push(format!("{start}{}", &rest[..length]));
        }
    }
    named.iter().filter_map(|path| absolute(path, module)).collect()
}

/// A path as written in `module`, from the crate's root. `None` for what belongs to another crate.
fn absolute(path: &str, module: &[String]) -> Option<Vec<String>> {
    let mut parts: Vec<&str> = path.split("::").filter(|part| !part.is_empty()).collect();
    let mut base = match *parts.first()? {
        "crate" => Vec::new(),
        "super" | "self" => module.to_vec(),
        _ => return None,
    };
    while let Some(&first) = parts.first().filter(|first| ["crate", "super", "self"].contains(first)) {
        if first == "super" {
            base.pop();
        }
        parts.remove(0);
    }
    base.extend(parts.into_iter().map(str::to_string));
    Some(base)
}

/// The first circle, as a line of imports with the files that make them.
fn circle(imports: &Imports) -> Option<String> {
    imports.keys().find_map(|start| {
        let mut reached = BTreeSet::new();
        let way = way_back(imports, start, start, &mut reached)?;
        let names: Vec<&String> = std::iter::once(start).chain(&way).collect();
        let line = |pair: &[&String]| format!("{} -> {} ({})", pair[0], pair[1], imports[pair[0]][pair[1]]);
        Some(names.windows(2).map(line).collect::<Vec<_>>().join(", "))
    })
}

/// The members on a way from `from` to `goal`, `goal` last.
fn way_back(imports: &Imports, from: &str, goal: &str, reached: &mut BTreeSet<String>) -> Option<Vec<String>> {
    for to in imports.get(from)?.keys() {
        if to == goal {
            return Some(vec![to.clone()]);
        }
        if reached.insert(to.clone())
            && let Some(mut way) = way_back(imports, to, goal, reached)
        {
            way.insert(0, to.clone());
            return Some(way);
        }
    }
    None
}
