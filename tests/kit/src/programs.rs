//! Where the programs under test are, and a directory for what tests write.
//!
//! Cargo names both to a test program alone (`CARGO_BIN_EXE_...`, `CARGO_TARGET_TMPDIR`), when it is compiled. Here they
//! are found beside the running test program, which cargo puts into `deps` beside them.

use std::path::{Path, PathBuf};
use std::process::Command;
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

/// Makes an executable of `text`, a script. A process of its own writes it: a program that another test starts has, until its
/// exec, a copy of each descriptor of this process, and no file can be executed while one is open for writing (ETXTBSY).
pub fn make_script(path: &Path, text: &str) {
    let write = r#"printf %s "$1" > "$0" && chmod 755 "$0""#;
    let written = Command::new("sh").args(["-c", write]).arg(path).arg(text).status().expect("sh starts");
    assert!(written.success(), "{} is not written", path.display());
}

/// Copies an executable, as [`make_script`] writes one.
pub fn copy_program(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg(from).arg(to).status().expect("cp starts");
    assert!(copied.success(), "{} is not written", to.display());
}

/// The sources' directory.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the kit is in tests/kit")
}
