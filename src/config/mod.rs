//! The command line and the configuration file (TOML, the same names), together one checked [`Config`]. The command line wins.
//!
//! Reads the file given with `--config` and touches nothing else: whether an image, a path or a group exists is found
//! out by who uses it. Options follow QEMU's back-end program conventions (docs/interop/vhost-user.rst); those beyond
//! them are ours.

mod args;
mod file;
mod rbd;
mod values;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches};
use log::LevelFilter;

use crate::backend::file::Locking;
use crate::backend::point_in_time::ScratchOptions;
use crate::backend::rbd::RbdOptions;
use crate::backend::stable::StableWrites;
use crate::control::Access;
use crate::engine::{CacheMode, OnError};
use crate::sandbox::SandboxLevel;
use args::Args;
pub use file::file_keys;
pub(crate) use file::nearest;
pub use values::disk_size;

/// The answer to `--print-capabilities`: the features that QEMU's conventions name for a block back-end.
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// What the daemon was told to do. Constant once made; read by main and the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the front-end connects.
    pub listen: Listen,
    /// What stands behind the disk.
    pub backend: BackendKind,
    /// The user said that the image is raw, whatever it looks like.
    pub is_raw: bool,
    /// Writes are refused, and the guest is told so.
    pub read_only: bool,
    /// When a write is acknowledged and what a flush does.
    pub cache: CacheMode,
    /// The quiesce socket, if wanted.
    pub control: Option<ControlSocket>,
    /// Most queues that a front-end may use (1 to 256).
    pub num_queues: u16,
    /// Largest ring that a front-end may set, in descriptors: a power of two.
    pub queue_size: u16,
    /// VIRTIO_BLK_T_GET_ID's answer, at most 20 bytes of printable ASCII. Empty by default, as QEMU's own device has it:
    /// a name made from the file's name would change with it, and would show the guest how the host names things.
    pub serial: String,
    /// Bytes; `None`: what the image's medium has.
    pub logical_block_size: Option<u32>,
    /// The guest's discards free space in the image.
    pub discard_unmap: bool,
    /// Bytes of the unit of discards that the guest is told; `None`: what the image's medium has.
    pub discard_granularity: Option<u32>,
    /// What is done about guests that change a buffer while its write is under way.
    pub stable_writes: StableWrites,
    /// Which failed requests are kept from the guest until somebody mended the cause.
    pub on_error: OnError,
    /// How long a ring's thread looks for work before it sleeps, at most.
    pub poll_max: Duration,
    /// How long the holders of a quiesced disk together may keep the guest's writes waiting; `None`: no bound.
    pub max_hold: Option<Duration>,
    /// When QEMU's image locks are taken and obeyed.
    pub locking: Locking,
    /// Where to write the process id, if wanted.
    pub pid_file: Option<PathBuf>,
    /// What is logged.
    pub log_level: LevelFilter,
    /// What is given up once everything is open.
    pub sandbox: SandboxLevel,
    /// Who to be then, by name or number; `None`: who started us.
    pub user: Option<String>,
    /// Directories that point-in-time copies may go to, and beneath.
    pub copy_dirs: Vec<PathBuf>,
    /// Where old data of copies may go while their target is slow, and how many bytes of it.
    pub scratch: Option<ScratchOptions>,
    /// The control socket of the daemon that the guest is taken over from.
    pub take_over: Option<PathBuf>,
}

/// Where the front-end connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A socket that we make and remove.
    Path {
        /// Its path.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Its group, by name or number; `None`: the process's.
        group: Option<String>,
    },
    /// A listening socket that we inherited under this number.
    Fd(i32),
}

/// For the log and the status: the path, or `fd N`.
impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Path { path, .. } => path.display().fmt(f),
            Listen::Fd(number) => write!(f, "fd {number}"),
        }
    }
}

/// The quiesce socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSocket {
    /// Its path.
    pub path: PathBuf,
    /// Its permission bits.
    pub mode: u32,
    /// What users beside root and the daemon's own may do, if the bits let them in.
    pub others: Access,
}

/// What stands behind the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// A raw file or a block device.
    File(PathBuf),
    /// A Ceph RBD image, with all that opening it takes.
    Rbd(Box<RbdOptions>),
    /// Nothing; so many bytes of it. For measuring.
    Null(u64),
    /// Memory of so many bytes, gone at the end. For tests.
    Mem(u64),
    /// A file of which some writes are kept back for this time or twice as long. For tests of a daemon that is killed.
    Slow {
        /// The file.
        path: PathBuf,
        /// How long.
        delay: Duration,
        /// And INFLIGHT_SHMFD is not offered: the guest must then hang, or the test finds nothing.
        forgets: bool,
    },
}

impl BackendKind {
    /// The file or block device, if there is one.
    pub(crate) fn file(&self) -> Option<&Path> {
        match self {
            BackendKind::File(path) | BackendKind::Slow { path, .. } => Some(path),
            _ => None,
        }
    }
}

/// What an argument list asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Serve the disk.
    Run(Box<Config>),
    /// Print this text and end well (`--help`, `--version`, `--print-capabilities`).
    Print(String),
}

/// A command line or a file that cannot be obeyed. Its text names the option or the key, what was given and what is
/// allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

fn refuse<T>(message: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(message.into()))
}

impl Config {
    /// Makes a configuration of an argument list, the program's name first, and the file that it may name. Called once,
    /// by main.
    pub fn from_args<I, T>(args: I) -> Result<Invocation, ConfigError>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString>,
    {
        let mut args: Vec<OsString> = args.into_iter().map(Into::into).collect();
        // QEMU's conventions: other options are ignored, so wrong ones are too.
        if args.iter().skip(1).any(|arg| arg == "--print-capabilities") {
            return Ok(Invocation::Print(format!("{CAPABILITIES}\n")));
        }
        let matches = match Args::command().try_get_matches_from(&args) {
            Ok(matches) => matches,
            Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
                return Ok(Invocation::Print(error.to_string()));
            }
            Err(error) => return refuse(strip(&error)),
        };
        if let Some(path) = matches.get_one::<PathBuf>("config") {
            let given = |key: &str| matches.value_source(&key.replace('-', "_")) == Some(ValueSource::CommandLine);
            let from_file = file::read(path)?.into_iter().filter(|(key, _)| !outranked(key, given));
            args.splice(1..1, from_file.map(|(_, argument)| argument));
        }
        let matches = Args::command().try_get_matches_from(&args).map_err(|error| ConfigError(strip(&error)))?;
        let args = Args::from_arg_matches(&matches).map_err(|error| ConfigError(strip(&error)))?;
        Ok(Invocation::Run(Box::new(args.check()?)))
    }
}

/// Whether the command line makes the file's `key` void.
fn outranked(key: &str, given: impl Fn(&str) -> bool) -> bool {
    given(key)
        || match key {
            "fd" => given("socket-path"),
            "socket-path" | "socket-mode" | "socket-group" => given("fd"),
            _ => false,
        }
}

/// clap's message without its own `error: `, which main adds.
fn strip(error: &clap::Error) -> String {
    let text = error.to_string();
    text.strip_prefix("error: ").unwrap_or(&text).trim_end().to_string()
}

#[cfg(test)]
mod tests;
