//! Where the programs under test are, and a directory for what tests write.
//!
//! Cargo names both to a test program alone (`CARGO_BIN_EXE_...`, `CARGO_TARGET_TMPDIR`), when it is compiled. Here they
//! are found beside the running test program, which cargo puts into `deps` beside them.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The directory of the programs that were built with this test program: `target/debug`, for example.
fn build_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let own = std::env::current_exe().expect("a running program's path");
        let deps = own.parent().filter(|dir| dir.ends_with("deps"));
        deps.and_then(Path::parent).unwrap_or_else(|| panic!("{} is not in cargo's deps", own.display())).into()
    })
}

/// The daemon, as it was just built.
pub fn virtioblkd() -> PathBuf {
    build_dir().join("virtioblkd")
}

/// The operator's command, as it was just built.
pub fn virtioblkctl() -> PathBuf {
    build_dir().join("virtioblkctl")
}

/// Cargo's target directory.
pub fn target_dir() -> &'static Path {
    build_dir().parent().expect("a profile's directory is in the target directory")
}

/// A new directory on the build's filesystem, gone when dropped. Images live here, as /tmp may have no O_DIRECT.
pub fn disk_dir() -> tempfile::TempDir {
    let dir = target_dir().join("tmp");
    std::fs::create_dir_all(&dir).expect("a directory");
    tempfile::tempdir_in(dir).expect("a directory")
}

/// The sources' directory.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the kit is in tests/kit")
}
