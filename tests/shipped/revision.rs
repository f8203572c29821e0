//! The build script finds the git revision, and does without git.

use std::fs;
use std::path::Path;
use std::process::Command;

use kit::programs;

/// Compiles build.rs.
fn build_script(directory: &Path) -> std::path::PathBuf {
    let program = directory.join("build-script");
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition", "2024", "-o"]).arg(&program).arg(programs::root().join("build.rs"));
    assert!(rustc.status().expect("rustc").success());
    program
}

/// The version that the script sets in this directory.
fn version(script: &Path, directory: &Path, profile: &str, given: Option<&str>) -> String {
    let mut command = Command::new(script);
    command
        .current_dir(directory)
        .env("PROFILE", profile)
        .env("CARGO_PKG_VERSION", "1.2.3")
        .env_remove("VIRTIOBLKD_REVISION");
    // A repository above the build directory is not the sources'.
    command
        .env_remove("GIT_DIR")
        .env_remove("GIT_WORK_TREE")
        .envs(given.map(|revision| ("VIRTIOBLKD_REVISION", revision)));
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    let line = text.lines().find_map(|line| line.strip_prefix("cargo:rustc-env=VIRTIOBLKD_VERSION="));
    line.unwrap_or_else(|| panic!("{text}")).to_owned()
}

fn git(directory: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new("git");
    command.current_dir(directory).args(["-c", "user.name=a", "-c", "user.email=a@b"]).args(arguments);
    let output = command.output().expect("git");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

#[test]
fn a_release_build_has_the_revision_of_its_own_repository() {
    let place = tempfile::tempdir().expect("room");
    let script = build_script(place.path());
    let sources = place.path().join("sources");
    fs::create_dir(&sources).expect("room");
    assert_eq!(version(&script, &sources, "release", None), "1.2.3", "an archive without git");
    if Command::new("git").arg("--version").output().is_err() {
        return kit::guest::tell("SKIPPED: git is not installed: the revision was not looked for");
    }
    git(&sources, &["init", "-q"]);
    fs::write(sources.join("file"), "one").expect("room");
    git(&sources, &["add", "file"]);
    git(&sources, &["commit", "-q", "-m", "first"]);
    let commit = git(&sources, &["rev-parse", "--short=10", "HEAD"]);
    assert_eq!(version(&script, &sources, "release", None), format!("1.2.3 ({commit})"));
    assert_eq!(version(&script, &sources, "debug", None), "1.2.3");
    assert_eq!(version(&script, &sources, "release", Some("0.1-2~bpo")), "1.2.3 (0.1-2~bpo)");
    fs::write(sources.join("file"), "two").expect("room");
    assert_eq!(version(&script, &sources, "release", None), format!("1.2.3 ({commit}-dirty)"));
    let below = sources.join("unpacked");
    fs::create_dir(&below).expect("room");
    assert_eq!(version(&script, &below, "release", None), "1.2.3", "the repository of another program");
}
