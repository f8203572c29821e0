//! `--check`: whether the daemon could serve its disk. The options, the image, the sandbox and the places of the sockets are
//! checked, and nothing is started: no socket is bound, no lock is taken, and a daemon that serves the image is not disturbed.
//! Whether another process uses the image or listens on a socket is not checked, and neither is a descriptor of `--fd`: that
//! may be different at the start.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Access;

use super::{ServerError, permissions, socket, wiring};
use crate::backend::image_format::FormatCheck;
use crate::base::unix_listener;
use crate::config::{Config, Listen};
use crate::sandbox::Sandbox;

/// How long the look at the image's first and last bytes may take.
const FORMAT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a place for a socket or a pid file cannot be used.
#[derive(Debug)]
pub struct PlaceError {
    option: &'static str,
    path: PathBuf,
    why: String,
}

impl fmt::Display for PlaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} '{}': {}", self.option, self.path.display(), self.why)
    }
}

impl std::error::Error for PlaceError {}

/// Checks that the disk can be served. Returns a description of it. Called once by main, before any other thread exists.
/// This process has entered the sandbox afterwards.
pub fn check(config: &Config) -> Result<String, ServerError> {
    let sandbox = Sandbox::prepare(permissions::of(config)).map_err(ServerError::Sandbox)?;
    // A descriptor of the service manager is missing here.
    if let Listen::Path { path, .. } = &config.listen {
        socket::prepare(&config.listen).map_err(ServerError::Socket)?;
        check_socket("--socket-path", path)?;
    }
    if let Some(control) = &config.control {
        check_socket("--control-path", &control.path)?;
    }
    check_places(config)?;
    let open = || wiring::open_image(config).map_err(ServerError::Image);
    let image = sandbox.open(open).map_err(ServerError::Sandbox)??;
    let size = image.geometry().size;
    let description = format!(
        "{} of {size} bytes: it can be served in cache mode {} on {}, unless another \
         process uses the image or a socket by then",
        image.describe(),
        config.cache,
        config.listen
    );
    // This finds out whether the user of --user may open the image.
    sandbox.enter().map_err(ServerError::Sandbox)?;
    if !config.is_raw {
        let format = Arc::new(FormatCheck::default());
        format.start(image);
        format.wait(FORMAT_TIMEOUT);
    }
    Ok(description)
}

fn check_socket(option: &'static str, path: &Path) -> Result<(), ServerError> {
    match unix_listener::check_path(path) {
        Ok(()) => check_directory(option, path),
        Err(error) => refuse(option, path, error.to_string()),
    }
}

/// Checks the places of `--pid-file`, `--copy-dir` and `--scratch`. The daemon serves the disk without the last two, but an
/// operator who checks a configuration wants to know that they are missing.
fn check_places(config: &Config) -> Result<(), ServerError> {
    if let Some(path) = &config.pid_file {
        check_directory("--pid-file", path)?;
        if path.symlink_metadata().is_ok_and(|found| !found.is_file()) {
            return refuse("--pid-file", path, "it is not a regular file: remove it, or use another path".into());
        }
    }
    let copy_dirs = config.copy_dirs.iter().map(|path| ("--copy-dir", path));
    let scratch = config.scratch.iter().map(|scratch| ("--scratch", &scratch.directory));
    for (option, path) in copy_dirs.chain(scratch) {
        let why = match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => continue,
            Ok(_) => "it is not a directory".to_owned(),
            Err(error) => error.to_string(),
        };
        let fix = "create it, or correct the path (virtioblkd would serve the disk, without copies there)";
        return refuse(option, path, format!("{why}; {fix}"));
    }
    Ok(())
}

/// Checks that a file can be created at `path`.
fn check_directory(option: &'static str, path: &Path) -> Result<(), ServerError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let why = match std::fs::metadata(directory) {
        Ok(found) if !found.is_dir() => "it is not a directory".to_owned(),
        Ok(_) => match rustix::fs::access(directory, Access::WRITE_OK | Access::EXEC_OK) {
            Ok(()) => return Ok(()),
            Err(errno) => std::io::Error::from(errno).to_string(),
        },
        Err(error) => error.to_string(),
    };
    refuse(
        option,
        path,
        format!(
            "its directory '{}' cannot be used: {why}; create it, or run as a user that may write there",
            directory.display()
        ),
    )
}

fn refuse(option: &'static str, path: &Path, why: String) -> Result<(), ServerError> {
    Err(ServerError::Place(PlaceError { option, path: path.to_owned(), why }))
}
