//! `--check`: whether the daemon could serve its disk. The options, the image, the sandbox and the places of the sockets are
//! checked, and nothing is started: no socket is bound, no lock is taken, and a daemon that serves the image is not disturbed.
//! Whether another process uses the image or listens on a socket is not checked, and neither is a descriptor of `--fd`: that
//! may be different at the start.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Access;

use super::{ServerError, permissions, socket, wiring};
use crate::backend::image_format::FormatCheck;
use crate::config::{Config, Listen};
use crate::sandbox::Sandbox;

/// The longest path of a Unix socket in bytes (unix(7)).
const MAX_SOCKET_PATH: usize = 107;
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
    if let Some(path) = &config.pid_file {
        check_directory("--pid-file", path)?;
    }
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
    if path.as_os_str().as_bytes().len() > MAX_SOCKET_PATH {
        return refuse(option, path, format!("a socket's path has at most {MAX_SOCKET_PATH} bytes: use a shorter one"));
    }
    check_directory(option, path)
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
