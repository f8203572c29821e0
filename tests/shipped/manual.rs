//! The manual pages and the completions of shells: they have every option, and the programs that show them find no fault.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kit::guest::tell;
use kit::programs;
use virtioblkd::internal::config;

/// Has virtioblkctl write them.
fn pages() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("room");
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
    let output = command.arg("pages").arg(directory.path()).current_dir(programs::root()).output().expect("it starts");
    assert!(output.status.success(), "{output:?}");
    directory
}

/// The manual pages.
fn files(directory: &Path) -> Vec<PathBuf> {
    let sections =
        ["man1", "man5", "man7"].map(|section| fs::read_dir(directory.join("man").join(section)).expect("written"));
    sections.into_iter().flatten().map(|file| file.expect("an entry").path()).collect()
}

/// The text of a page without roff's marks.
fn text(page: &Path) -> String {
    let text = fs::read_to_string(page).expect("a page");
    ["\\fB", "\\fI", "\\fR", "\\"].iter().fold(text, |text, mark| text.replace(mark, ""))
}

#[test]
fn each_command_has_a_page_with_its_options_and_each_key_is_described() {
    let directory = pages();
    let daemon = text(&directory.path().join("man/man1/virtioblkd.1"));
    let keys = text(&directory.path().join("man/man5/virtioblkd.toml.5"));
    for argument in config::command().get_arguments().filter(|argument| !argument.is_hide_set()) {
        let long = format!("--{}", argument.get_long().expect("long options only"));
        assert!(daemon.contains(&long), "virtioblkd(1) lacks {long}");
    }
    for key in config::file_keys() {
        assert!(keys.contains(&format!("\n{key} = ")), "virtioblkd.toml(5) lacks {key}");
    }
    for section in ["EXAMPLES", "NOTES", "EXIT STATUS", "FILES", "SEE ALSO"] {
        assert!(daemon.contains(&format!(".SH {section}\n")), "virtioblkd(1) lacks {section}");
    }
    let help = Command::new(env!("CARGO_BIN_EXE_virtioblkctl")).arg("--help").output().expect("it starts");
    let help = String::from_utf8(help.stdout).expect("text");
    let commands =
        help.split("Commands:").nth(1).and_then(|text| text.split("Options:").next()).expect("a list of commands");
    let is_name = |line: &&str| line.starts_with("  ") && !line.starts_with("   ");
    let names: Vec<&str> = commands.lines().filter(is_name).filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.len() > 12, "{help}");
    for name in names.iter().filter(|name| **name != "help") {
        let page = directory.path().join(format!("man/man1/virtioblkctl-{name}.1"));
        assert!(page.exists(), "there is no {}", page.display());
    }
}

#[test]
fn programs_that_show_manual_pages_find_no_fault() {
    let directory = pages();
    let files = files(directory.path());
    assert!(files.len() > 20, "{files:?}");
    let mut shown = 0;
    for (program, arguments) in [
        ("groff", &["-man", "-Tutf8", "-Kutf8", "-ww", "-z"][..]),
        ("mandoc", &["-Tlint", "-Wwarning"][..]),
        ("man", &["--warnings=w", "-E", "UTF-8", "-l", "-Tutf8", "-Z"][..]),
    ] {
        for page in &files {
            let mut command = Command::new(program);
            command.args(arguments).arg(page).env("LC_ALL", "C.UTF-8").env("MANWIDTH", "80").stdin(Stdio::null());
            let Ok(output) = command.output() else {
                tell(&format!("SKIPPED: {program} is not installed: the pages were not shown with it"));
                break;
            };
            shown += 1;
            let found = String::from_utf8_lossy(&output.stderr).into_owned();
            let lint =
                if program == "mandoc" { String::from_utf8_lossy(&output.stdout).into_owned() } else { String::new() };
            assert!(found.is_empty() && lint.is_empty(), "{program} {}: {found}{lint}", page.display());
        }
    }
    tell(&format!("{shown} pages were shown"));
}

#[test]
fn each_shell_accepts_its_completions() {
    let directory = pages();
    for (shell, pattern) in [("bash", "{}.bash"), ("zsh", "_{}"), ("fish", "{}.fish")] {
        for program in ["virtioblkd", "virtioblkctl"] {
            let file = directory.path().join("completions").join(shell).join(pattern.replace("{}", program));
            let text = fs::read_to_string(&file).expect("written");
            let option = if program == "virtioblkd" { "stable-writes" } else { "control" };
            assert!(text.contains(option), "{}", file.display());
            match Command::new(shell).arg("-n").arg(&file).output() {
                Ok(output) => assert!(output.status.success(), "{shell}: {output:?}"),
                Err(_) => tell(&format!("SKIPPED: {shell} is not installed: its completions were not tried")),
            }
        }
    }
}
