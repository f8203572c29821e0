//! The host's hooks: executables `freeze` and `thaw` in a directory, as librbd's quiesce callbacks allow. `freeze`
//! succeeds if it has made its application still; `thaw` is called in either case.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;

use super::child::run;
use super::plan::Consistency;
use super::wait::CancelFd;

/// A directory of hooks.
pub struct Hooks {
    directory: PathBuf,
    environment: Vec<(String, OsString)>,
}

/// Checks that both hooks exist and are executable, and that no other user can change them. The error names what is
/// missing.
pub fn check(directory: &Path) -> Result<(), String> {
    for name in ["freeze", "thaw"] {
        let path = directory.join(name);
        let shown = path.display();
        let fix = "--hooks DIR needs two executables, DIR/freeze and DIR/thaw";
        let metadata = path.metadata().map_err(|error| format!("the hook '{shown}' cannot be used: {error}; {fix}"))?;
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            return Err(format!("the hook '{shown}' is not executable: chmod +x it; {fix}"));
        }
        crate::base::trust::check(&path).map_err(|why| format!("the hook '{shown}' is not run: {why}"))?;
    }
    Ok(())
}

/// Returns the environment variables of hooks and `exec:`: the level, and the control socket and the image's path of
/// each disk. A path may have any byte except NUL in it, so each has a variable of its own. The variables with lists
/// are for names without spaces.
pub fn environment<'a>(
    disks: impl Iterator<Item = (&'a Path, Option<&'a Path>)>,
    level: Consistency,
) -> Vec<(String, OsString)> {
    let (controls, images): (Vec<&OsStr>, Vec<&OsStr>) =
        disks.map(|(control, image)| (control.as_os_str(), image.map(Path::as_os_str).unwrap_or_default())).unzip();
    let mut environment = vec![
        ("VIRTIOBLK_DISKS".to_owned(), images.join(OsStr::new(" "))),
        ("VIRTIOBLK_CONTROLS".to_owned(), controls.join(OsStr::new(" "))),
        ("VIRTIOBLK_LEVEL".to_owned(), level.name().into()),
    ];
    environment.push(("VIRTIOBLK_DISK_COUNT".to_owned(), images.len().to_string().into()));
    for (at, (image, control)) in images.into_iter().zip(controls).enumerate() {
        environment.push((format!("VIRTIOBLK_DISK_{}", at + 1), image.to_owned()));
        environment.push((format!("VIRTIOBLK_CONTROL_{}", at + 1), control.to_owned()));
    }
    environment
}

impl Hooks {
    /// Creates the hooks of a directory. `environment`: variables that the hooks get in addition to our own
    /// environment.
    pub fn new(directory: &Path, environment: Vec<(String, OsString)>) -> Self {
        Hooks { directory: directory.to_owned(), environment }
    }

    /// Runs `freeze` or `thaw` for `timeout` at most; a hook that hangs is killed. The error names the hook.
    pub fn call(&self, name: &str, timeout: Duration, cancel: CancelFd<'_>) -> Result<(), String> {
        let path = self.directory.join(name);
        let mut command = Command::new(&path);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        // Our standard output is for the receipt.
        command.stdout(std::io::stderr());
        let ended = run(command, SigSet::empty(), false, Instant::now() + timeout, cancel)
            .map_err(|error| format!("the hook '{}' cannot be run: {error}", path.display()))?;
        ended.describe_failure(timeout).map_or(Ok(()), |what| Err(format!("the hook '{}' {what}", path.display())))
    }
}
