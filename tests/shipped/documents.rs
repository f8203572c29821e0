//! The documents name files and tests that exist, their links lead somewhere, and the site has every page.

use std::fs;
use std::path::{Path, PathBuf};

/// The folders of this repository whose files documents name.
const FOLDERS: [&str; 7] = ["benches/", "docs/", "fuzz/", "qemu-configs/", "scripts/", "src/", "tests/"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every page at the top of the repository, in `docs` and in `tests`.
fn pages() -> Vec<PathBuf> {
    let is_page = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    let entries = ["", "docs", "tests"].map(|folder| fs::read_dir(root().join(folder)).expect("a folder"));
    entries.into_iter().flatten().map(|entry| entry.expect("an entry").path()).filter(is_page).collect()
}

/// The words between backticks that begin with one of [`FOLDERS`].
fn names(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|name| FOLDERS.iter().any(|folder| name.starts_with(folder)) && !name.contains(' '))
}

/// What is wrong with a name of the form `file` or `file::test`.
fn fault(name: &str) -> Option<String> {
    let (file, test) = name.split_once("::").map_or((name, None), |(file, test)| (file, Some(test)));
    // A name in capitals or with a star stands for many.
    if file.contains(|c: char| c == '*' || c.is_ascii_uppercase()) && !file.ends_with(".S") && !file.ends_with(".md") {
        return None;
    }
    let path = root().join(file);
    if !path.exists() {
        return Some(format!("there is no {file}"));
    }
    let test = test?;
    let text = fs::read_to_string(&path).unwrap_or_default();
    let exists = text.contains(&format!("fn {test}(")) || text.contains(&format!("mod {test} {{"));
    (!exists).then(|| format!("{file} has no {test}"))
}

#[test]
fn every_file_and_test_that_a_document_names_exists() {
    let mut wrong = Vec::new();
    let mut checked = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).expect("a page");
        for name in names(&text) {
            checked += 1;
            wrong.extend(fault(name).map(|fault| format!("{}: {fault}", page.display())));
        }
    }
    assert!(checked > 100, "only {checked} names were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_name_that_does_not_exist_is_found() {
    let own = "tests/shipped/documents.rs";
    assert_eq!(fault(own), None);
    assert_eq!(fault(&format!("{own}::a_name_that_does_not_exist_is_found")), None);
    assert!(fault(&format!("{own}::nothing")).is_some());
    assert!(fault("tests/shipped/nothing.rs").is_some());
}

/// The links of a page that lead to this repository: file and anchor.
fn links(text: &str) -> Vec<(&str, Option<&str>)> {
    let mut fenced = false;
    let prose = text.lines().filter(|line| {
        fenced ^= line.starts_with("```");
        !fenced
    });
    let targets = prose.flat_map(|line| line.split("](").skip(1)).filter_map(|rest| rest.split(')').next());
    let own = targets.filter(|target| !target.contains("://") && !target.contains(' '));
    own.map(|target| target.split_once('#').map_or((target, None), |(file, anchor)| (file, Some(anchor)))).collect()
}

/// The anchor of a heading, as GitHub and mdBook make it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

#[test]
fn every_link_of_a_document_leads_to_a_page_or_a_heading() {
    let mut all = pages();
    all.extend(["qemu-configs/README.md", "qemu-configs/snapshot/README.md"].map(|page| root().join(page)));
    let (mut wrong, mut checked) = (Vec::new(), 0);
    for page in all {
        let text = fs::read_to_string(&page).expect("a page");
        for (file, heading) in links(&text) {
            checked += 1;
            let target = if file.is_empty() { page.clone() } else { page.parent().expect("a folder").join(file) };
            let linked = fs::read_to_string(&target).unwrap_or_default();
            let has = |heading: &str| {
                linked
                    .lines()
                    .filter_map(|line| line.trim_start_matches('#').strip_prefix(' '))
                    .any(|it| anchor(it) == heading)
            };
            if !target.exists() || heading.is_some_and(|heading| !has(heading)) {
                wrong.push(format!("{}: {file}#{}", page.display(), heading.unwrap_or_default()));
            }
        }
    }
    assert!(checked > 50, "only {checked} links were found");
    assert!(wrong.is_empty(), "these lead nowhere:\n{}", wrong.join("\n"));
}

#[test]
fn the_sites_summary_has_every_page() {
    let summary = fs::read_to_string(root().join("docs/SUMMARY.md")).expect("a page");
    let listed: Vec<&str> = links(&summary).into_iter().map(|(file, _)| file).collect();
    for entry in fs::read_dir(root().join("docs")).expect("a folder") {
        let name = entry.expect("an entry").file_name().into_string().expect("text");
        let needed = name.ends_with(".md") && name != "SUMMARY.md";
        assert!(!needed || listed.contains(&name.as_str()), "docs/SUMMARY.md lacks {name}");
    }
}
