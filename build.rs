//! Sets `VIRTIOBLKD_VERSION` and `VIRTIOBLKD_REVISION` for the compiler: the version, with the git revision of the sources.
//!
//! The revision is `VIRTIOBLKD_REVISION` of the environment, which makers of packages set, or what git says, or nothing: a
//! release's archive has no git. A debug build has none either, because each commit would otherwise build everything anew.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=VIRTIOBLKD_REVISION");
    let given = std::env::var("VIRTIOBLKD_REVISION").ok().filter(|revision| !revision.is_empty());
    let optimized = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let revision = given.or_else(|| optimized.then(of_git).flatten()).unwrap_or_default();
    let version = std::env::var("CARGO_PKG_VERSION").expect("cargo sets it");
    let whole = if revision.is_empty() { version } else { format!("{version} ({revision})") };
    println!("cargo:rustc-env=VIRTIOBLKD_REVISION={revision}");
    println!("cargo:rustc-env=VIRTIOBLKD_VERSION={whole}");
}

/// The commit of this directory, with `-dirty` if a file differs from it. `None` if the directory is no git repository of
/// ours: an unpacked archive may be below another one.
fn of_git() -> Option<String> {
    let here = std::fs::canonicalize(".").ok()?;
    if std::fs::canonicalize(git(&["rev-parse", "--show-toplevel"])?).ok()? != here {
        return None;
    }
    // The log of HEAD changes with each commit and checkout; the sources decide about `-dirty`.
    for name in ["HEAD", "logs/HEAD"] {
        println!("cargo:rerun-if-changed={}", git(&["rev-parse", "--git-path", name])?);
    }
    for sources in ["src", "Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={sources}");
    }
    git(&["describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"])
}

/// What git prints, if it succeeds.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
