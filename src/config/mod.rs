//! Parses the command line and the configuration file (TOML with the same names) into one checked [`Config`]. The command
//! line overrides the file.
//!
//! This module reads the file given with `--config` and nothing else. Whether an image, a path or a group exists is checked
//! by the module that uses it. The options follow QEMU's conventions for back-end programs (docs/interop/vhost-user.rst);
//! the conventions do not cover all of them.

mod args;
mod file;
mod rbd;
pub mod throttle_section;
mod toml_error;
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
use crate::engine::throttle::Limits;
use crate::engine::{CacheMode, OnError};
use crate::sandbox::SandboxLevel;
use args::Args;
pub(crate) use args::{DEFAULT_NUM_QUEUES, DEFAULT_QUEUE_SIZE};
pub use file::file_keys;
pub(crate) use file::nearest;
pub use values::{disk_size, limit};

/// The output of `--print-capabilities`: the features that QEMU's conventions define for a block back-end.
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// The daemon's configuration, which does not change while the daemon runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The vhost-user socket, to which the front-end connects.
    pub listen: Listen,
    /// The kind of image and its location.
    pub backend: BackendKind,
    /// The operator stated that the image is raw, even if it looks like another format.
    pub is_raw: bool,
    /// The daemon refuses writes, and the guest sees a read-only disk.
    pub read_only: bool,
    /// The cache mode: when a write is acknowledged and what a flush does.
    pub cache: CacheMode,
    /// The control socket, if there is one.
    pub control: Option<ControlSocket>,
    /// The most queues that a front-end may use (1 to 256).
    pub num_queues: u16,
    /// The largest queue that a front-end may set, in descriptors: a power of two.
    pub queue_size: u16,
    /// The disk's serial number, which VIRTIO_BLK_T_GET_ID returns: at most 20 bytes of printable ASCII. It is empty by
    /// default, as QEMU's own device has it. A serial derived from the file's name would change with that name, and would
    /// show the guest how the host names its files.
    pub serial: String,
    /// The logical block size in bytes. `None`: that of the image's device.
    pub logical_block_size: Option<u32>,
    /// The guest's discards free space in the image.
    pub discard_unmap: bool,
    /// The unit of discards in bytes that the guest is advised to use. `None`: that of the image's device.
    pub discard_granularity: Option<u32>,
    /// How to protect the image from guests that change a buffer while its write is in flight.
    pub stable_writes: StableWrites,
    /// Which failed requests are retained until an operator has fixed the cause.
    pub on_error: OnError,
    /// How long a queue's thread may poll for the next request before it sleeps.
    pub poll_max: Duration,
    /// The limits of the disk's rates at the start.
    pub limits: Limits,
    /// How long the holders of a quiesced disk together may make the guest's writes wait. `None`: no limit.
    pub max_hold: Option<Duration>,
    /// When the daemon holds QEMU's image locks.
    pub locking: Locking,
    /// The file for the process id, if there is one.
    pub pid_file: Option<PathBuf>,
    /// The least severe level that is logged.
    pub log_level: LevelFilter,
    /// The rights that the daemon gives up once everything is open.
    pub sandbox: SandboxLevel,
    /// The user that the daemon becomes once everything is open, by name or number. `None`: it does not change its user.
    pub user: Option<String>,
    /// The directories in which, and below which, point-in-time copies are allowed.
    pub copy_dirs: Vec<PathBuf>,
    /// The scratch files for old data of copies whose target is slow.
    pub scratch: Option<ScratchOptions>,
    /// The control socket of the daemon from which this one takes the guest over.
    pub take_over: Option<PathBuf>,
}

/// The vhost-user socket, to which the front-end connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A socket that the daemon binds and removes.
    Path {
        /// The socket's path.
        path: PathBuf,
        /// The socket's permission bits.
        mode: u32,
        /// The socket's group, by name or number. `None`: the process's group.
        group: Option<String>,
    },
    /// A listening socket that the process inherited as this descriptor.
    Fd(i32),
}

/// The path, or `fd N`, for the log and the status.
impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Path { path, .. } => path.display().fmt(f),
            Listen::Fd(number) => write!(f, "fd {number}"),
        }
    }
}

/// The control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSocket {
    /// The socket's path.
    pub path: PathBuf,
    /// The socket's permission bits.
    pub mode: u32,
    /// What users other than root and the daemon's own may do, if the permission bits let them connect.
    pub others: Access,
}

/// The kind of image, and its location.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// A raw file or a block device.
    File(PathBuf),
    /// A Ceph RBD image, with its options.
    Rbd(Box<RbdOptions>),
    /// A disk of this many bytes that stores nothing. For measuring.
    Null(u64),
    /// Memory of this many bytes, which ends with the process. For tests.
    Mem(u64),
    /// A file that delays some writes by this time or twice as long. For tests that kill the daemon.
    Slow {
        /// The file.
        path: PathBuf,
        /// The delay.
        delay: Duration,
        /// The device does not offer INFLIGHT_SHMFD. The guest must then hang; if it does not, the test proves nothing.
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

/// What the program is to do, by its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Serve the disk.
    Run(Box<Config>),
    /// Check that the disk can be served, and end (`--check`).
    Check(Box<Config>),
    /// Serve the disk in another process while a command runs (`--run`).
    RunCommand(RunCommand),
    /// Print this text and end with status 0 (`--help`, `--version`, `--print-capabilities`).
    Print(String),
}

/// A command that runs while a daemon serves the disk (`--run`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunCommand {
    /// The shell command, in which `{socket}` and `{control}` are not replaced yet.
    pub command: String,
    /// The arguments of the daemon, without the program's name.
    pub arguments: Vec<OsString>,
    /// The vhost-user socket. `None`: the options name none, so the caller chooses one.
    pub socket: Option<PathBuf>,
    /// The control socket, if there is one.
    pub control: Option<PathBuf>,
}

/// Other names of options, for the habits that users of other servers have. Only the command line knows them.
const ALIASES: [(&str, &str); 2] = [("--socket", "--socket-path"), ("--file", "--blk-file")];

/// Returns the argument with the option's own name, if it has one of `ALIASES`.
pub fn with_own_name(argument: &str) -> String {
    let (name, value) = match argument.find('=') {
        Some(at) => argument.split_at(at),
        None => (argument, ""),
    };
    let own = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, own)| own);
    format!("{own}{value}")
}

/// The definition of the command line, for the manual pages and the completions of shells.
pub fn command() -> clap::Command {
    Args::command()
}

/// An error in the command line or the configuration file. Its text names the option or the key, what was given and what is
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
    /// Parses an argument list, which begins with the program's name, and the configuration file that it may name. Called
    /// once, by main.
    pub fn from_args<I, T>(args: I) -> Result<Invocation, ConfigError>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString>,
    {
        let mut args: Vec<OsString> = args.into_iter().map(Into::into).collect();
        // By QEMU's conventions other options are ignored, so invalid ones are too.
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
        let given = args.split_off(1.min(args.len()));
        args.extend(given.iter().cloned());
        if let Some(path) = matches.get_one::<PathBuf>("config") {
            let given = |key: &str| matches.value_source(&key.replace('-', "_")) == Some(ValueSource::CommandLine);
            let from_file = file::read(path)?.into_iter().filter(|(key, _)| !is_overridden(key, given));
            args.splice(1..1, from_file.map(|(_, argument)| argument));
        }
        let matches = Args::command().try_get_matches_from(&args).map_err(|error| ConfigError(strip(&error)))?;
        let parsed = Args::from_arg_matches(&matches).map_err(|error| ConfigError(strip(&error)))?;
        if parsed.check {
            return Ok(Invocation::Check(Box::new(parsed.check()?)));
        }
        match parsed.run.clone() {
            Some(command) => Ok(Invocation::RunCommand(run_command(command, parsed, given)?)),
            None => Ok(Invocation::Run(Box::new(parsed.check()?))),
        }
    }
}

/// Checks the options of a daemon that a command is run with. `arguments`: the command line without the program's name.
fn run_command(command: String, mut args: Args, arguments: Vec<OsString>) -> Result<RunCommand, ConfigError> {
    let (socket, control) = (args.socket_path.clone(), args.control_path.clone());
    // The socket that the caller chooses is checked by the daemon.
    args.socket_path.get_or_insert_with(|| PathBuf::from("{socket}"));
    args.check()?;
    let mut words = arguments.into_iter();
    let mut arguments = Vec::new();
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("--run") => drop(words.next()),
            Some(word) if word.starts_with("--run=") => {}
            _ => arguments.push(word),
        }
    }
    Ok(RunCommand { command, arguments, socket, control })
}

/// Whether the command line overrides the file's `key`.
fn is_overridden(key: &str, given: impl Fn(&str) -> bool) -> bool {
    given(key)
        || match key {
            "fd" => given("socket-path"),
            "socket-path" | "socket-mode" | "socket-group" => given("fd"),
            _ => false,
        }
}

/// Returns clap's message without its prefix `error: `, which main adds.
fn strip(error: &clap::Error) -> String {
    let text = error.to_string();
    text.strip_prefix("error: ").unwrap_or(&text).trim_end().to_string()
}

#[cfg(test)]
mod tests;
