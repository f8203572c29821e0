//! The command line's options, and the rules that concern several options: which are required, and which exclude others.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use log::LevelFilter;

use super::rbd::{self, RbdArgs};
use super::values::{self, Mode, RawFormat, Switch};
use super::{BackendKind, Config, ConfigError, ControlSocket, Listen, refuse};
use crate::backend::file::Locking;
use crate::backend::point_in_time::ScratchOptions;
use crate::backend::stable::StableWrites;
use crate::base::version::VERSION;
use crate::control::Access;
use crate::engine::{CacheMode, OnError};
use crate::sandbox::SandboxLevel;

/// The default mode of the vhost-user socket: its owner may connect.
const DEFAULT_SOCKET_MODE: u32 = 0o600;
/// The default mode of the vhost-user socket with `--socket-group`: that group may connect too.
const DEFAULT_GROUP_SOCKET_MODE: u32 = 0o660;
/// The default mode of the control socket.
const DEFAULT_CONTROL_MODE: u32 = 0o600;
/// The default limit of queues. It is generous because a queue that the guest does not use costs nothing: it has no thread. It is the largest, too.
pub(crate) const DEFAULT_NUM_QUEUES: u16 = 256;
/// The default size of a copy's scratch file, in bytes.
const DEFAULT_SCRATCH_SIZE: u64 = 1 << 30;
/// The default limit of a queue's size: the largest `queue-size` that QEMU accepts.
pub(crate) const DEFAULT_QUEUE_SIZE: u16 = 1024;

/// A vhost-user-blk server: serves one raw image or Ceph RBD image to QEMU, and pauses the guest's writes on request.
///
/// It runs in the foreground and serves one front-end after another. On SIGTERM, SIGINT or SIGHUP it drains, syncs,
/// removes its sockets and ends with status 0. A second signal ends it at once. Status 1 means a failure at run time, and
/// status 2 a wrong command line or configuration file.
#[derive(Debug, Parser)]
#[command(name = "virtioblkd", version = VERSION, max_term_width = 100, args_override_self = false)]
pub(super) struct Args {
    /// Listen for the front-end (QEMU) on this Unix socket. The socket of a server that has ended is replaced
    #[arg(long, alias = "socket", value_name = "PATH")]
    pub(super) socket_path: Option<PathBuf>,

    /// Use the listening Unix socket that was inherited as this file descriptor, instead of --socket-path
    #[arg(long, value_name = "N", value_parser = values::fd)]
    fd: Option<i32>,

    /// The raw image: a file or a block device
    #[arg(long, alias = "file", value_name = "PATH")]
    blk_file: Option<PathBuf>,

    /// The image's format; only raw images are served. With this option the daemon does not warn of an image that looks like
    /// another format (a guest can write such a header)
    #[arg(long, value_name = "raw", value_parser = values::format)]
    format: Option<RawFormat>,

    /// Refuse writes. The guest sees a read-only disk
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = values::truth)]
    read_only: Option<Switch>,

    /// The cache mode, which decides when a write is acknowledged: none (O_DIRECT, when the device has it), directsync
    /// (O_DIRECT, when it is durable), writeback (when the host's page cache has it), writethrough (when it is durable),
    /// unsafe (as writeback, and the guest's flushes are ignored) [default: none]
    #[arg(long, value_name = "MODE", value_parser = values::cache)]
    cache: Option<CacheMode>,

    /// Serve virtioblkctl and QMP clients on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub(super) control_path: Option<PathBuf>,

    /// Permission bits of the control socket. A user who may connect can quiesce the disk, copy it and make snapshots; see
    /// --control-access. Only root and the daemon's user can take the guest over, end the daemon or shrink the disk
    /// [default: 0600]
    #[arg(long, value_name = "OCTAL", value_parser = values::mode)]
    control_mode: Option<Mode>,

    /// What the other users to whom --control-mode gives access may do: operate (quiesce, copy, snapshot, continue, grow the
    /// disk) or read-only (query and watch) [default: operate]
    #[arg(long, value_name = "operate|read-only", value_parser = values::control_access)]
    control_access: Option<Access>,

    /// The most queues that a front-end may use, 1 to 256 [default: 256]
    #[arg(long, value_name = "N", value_parser = values::num_queues)]
    num_queues: Option<u16>,

    /// The largest queue that a front-end may set, in descriptors: a power of two from 2 to 32768 [default: 1024]
    #[arg(long, value_name = "N", value_parser = values::queue_size)]
    queue_size: Option<u16>,

    /// The disk's serial number as the guest sees it, at most 20 ASCII characters [default: none]
    #[arg(long, value_name = "TEXT", value_parser = values::serial)]
    serial: Option<String>,

    /// The smallest unit that the guest may address, 512 or 4096 [default: that of the image's device]
    #[arg(long, value_name = "BYTES", value_parser = values::logical_block_size)]
    logical_block_size: Option<u32>,

    /// Whether the guest's discards free space in the image, unmap or ignore [default: unmap]
    #[arg(long, value_name = "unmap|ignore", value_parser = values::discard)]
    discard: Option<Switch>,

    /// The unit of discards that the guest is advised to use, a power of two from the logical block size to 1G. Other
    /// discards are served, too. Windows 11 needs 32K or more [default: that of the image's device]
    #[arg(long, value_name = "SIZE", value_parser = values::discard_granularity)]
    discard_granularity: Option<u32>,

    /// How to protect the image from a guest that changes a buffer while its write is in flight: copy (copy each write
    /// first, except where the host copies it anyway), detect (count and report the changes), off, or auto (copy where the
    /// image's device needs unchanged buffers) [default: auto]
    #[arg(long, value_name = "HOW", value_parser = values::stable_writes)]
    stable_writes: Option<StableWrites>,

    /// When a request fails: report (the guest gets the error), stop (the request is retained, and its queue waits for
    /// `virtioblkctl continue`), enospc (stop if space is missing, else report) [default: enospc]
    #[arg(long, value_name = "enospc|report|stop", value_parser = values::on_error)]
    on_error: Option<OnError>,

    /// How long a queue's thread may poll for the next request before it sleeps, in nanoseconds (up to 1000000). Polling
    /// saves a wake-up for each small request and takes processor time. A queue stops polling while it does not pay. 0: no
    /// polling [default: 0]
    #[arg(long, value_name = "NS", value_parser = values::poll_max)]
    poll_max_ns: Option<Duration>,

    /// Limit the disk's rates, in libvirt's words (virsh blkdeviotune): {total,read,write}-{bytes,iops}-sec, each with -max
    /// (the rate of a burst) and -max-length (its seconds), and size-iops-sec. Bytes may have a unit, such as
    /// total-iops-sec=500,read-bytes-sec=10M; may be given several times. virtioblkctl throttle changes them
    #[arg(long, value_name = "NAME=VALUE,...", value_delimiter = ',', value_parser = values::throttle)]
    throttle: Vec<values::Throttle>,

    /// How long the holders of a quiesced disk together may make the guest's writes wait, such as 30s. No hold lasts longer,
    /// and new holders are refused until writes have continued [default: only each hold's lease limits it]
    #[arg(long, value_name = "TIME", value_parser = crate::base::units::time)]
    max_hold: Option<Duration>,

    /// When to hold QEMU's image locks: auto (from start to end), in-use (only while a guest runs: for live migration) or
    /// off [default: auto]
    #[arg(long, value_name = "auto|in-use|off", value_parser = values::locking)]
    locking: Option<Locking>,

    /// Permission bits of the vhost-user socket. A user who may connect can read and write the disk
    /// [default: 0600, and 0660 with --socket-group]
    #[arg(long, value_name = "OCTAL", value_parser = values::mode)]
    socket_mode: Option<Mode>,

    /// Set the vhost-user socket's group (a name or a number). Under libvirt use the group that QEMU runs in, kvm on
    /// Debian
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,

    /// Write the process id to this file, and lock the file
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,

    /// Read options from this TOML file, in which they have the names that they have here, without the dashes. The command
    /// line overrides the file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// What to log on stderr: error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL", value_parser = values::log_level)]
    log_level: Option<LevelFilter>,

    /// The rights that the daemon gives up once everything is open: on (most of the filesystem, new programs, other
    /// processes, the network), no-filter (the same without the filter of system calls), off (none) [default: on]
    #[arg(long, value_name = "on|no-filter|off", value_parser = values::sandbox)]
    sandbox: Option<SandboxLevel>,

    /// Become this user (a name or a number) once everything is open. The user must be able to open the image
    #[arg(long, value_name = "USER")]
    user: Option<String>,

    /// Allow point-in-time copies in this directory and those below it; may be given several times. The sandbox prevents
    /// copies elsewhere. For a filesystem that is mounted later, give a directory above its mount point
    #[arg(long, value_name = "DIR")]
    copy_dir: Vec<PathBuf>,

    /// Create an unnamed file in this directory, on a fast local disk, for each point-in-time copy. While the copy's target
    /// is slow, old data is written to this file, so that the guest's writes need not wait for the target
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,

    /// The largest size of such a file, such as 4G [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = crate::base::units::bytes)]
    scratch_size: Option<u64>,

    /// Take the running guest over from the daemon that has this control socket; that daemon then ends. If anything fails,
    /// it serves on. virtioblkctl upgrade starts the new daemon with this option
    #[arg(long, value_name = "CONTROL")]
    take_over: Option<PathBuf>,

    /// Check the options, the configuration file, the image and the places of the sockets, print the result, and end. Nothing
    /// is started, and a daemon that serves the image is not disturbed: whether another process uses the image or a socket is
    /// not checked. Status 1: the image or a place cannot be used. Status 2: a wrong command line or configuration file
    #[arg(long)]
    pub(super) check: bool,

    /// Run this shell command when the daemon listens, and end the daemon when the command has ended. The exit status is the
    /// command's. `{socket}` in it becomes the path of the vhost-user socket, and `{control}` that of the control socket.
    /// Without --socket-path the socket is in a directory of its own, which is removed at the end
    #[arg(long, value_name = "COMMAND")]
    pub(super) run: Option<String>,

    /// Print what this back-end supports, as JSON, and end. Other options are ignored
    #[arg(long)]
    print_capabilities: bool,

    /// file, null, `null:SIZE`, `mem:SIZE`, `slow:MS` or `forgetful:MS`
    #[arg(long, value_name = "KIND", hide = true, value_parser = values::backend)]
    backend: Option<values::Backend>,

    #[command(flatten)]
    rbd: RbdArgs,
}

impl Args {
    /// Checks the rules that concern several options.
    pub(super) fn check(self) -> Result<Config, ConfigError> {
        self.check_paths_differ()?;
        self.check_run()?;
        let control = self.control()?;
        let scratch = self.scratch()?;
        let discard_granularity = self.discard_granularity()?;
        let limits = values::limits(&self.throttle).map_err(|why| ConfigError(format!("--throttle: {why}")))?;
        Ok(Config {
            listen: self.listen()?,
            backend: self.backend()?,
            is_raw: self.format.is_some(),
            read_only: self.read_only.is_some_and(|switch| switch.0),
            cache: self.cache.unwrap_or_default(),
            control,
            num_queues: self.num_queues.unwrap_or(DEFAULT_NUM_QUEUES),
            queue_size: self.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE),
            serial: self.serial.unwrap_or_default(),
            logical_block_size: self.logical_block_size,
            discard_unmap: self.discard.is_none_or(|switch| switch.0),
            discard_granularity,
            stable_writes: self.stable_writes.unwrap_or_default(),
            on_error: self.on_error.unwrap_or_default(),
            poll_max: self.poll_max_ns.unwrap_or_default(),
            limits,
            max_hold: self.max_hold,
            locking: self.locking.unwrap_or_default(),
            pid_file: self.pid_file,
            log_level: self.log_level.unwrap_or(LevelFilter::Info),
            sandbox: self.sandbox.unwrap_or_default(),
            user: self.user,
            copy_dirs: self.copy_dir,
            scratch,
            take_over: self.take_over,
        })
    }

    /// Checks the rules of `--run`: the command needs a daemon of its own, with a socket that has a path.
    fn check_run(&self) -> Result<(), ConfigError> {
        let Some(command) = &self.run else { return Ok(()) };
        if command.trim().is_empty() {
            return refuse("--run needs a command, such as --run 'qemu-system-x86_64 ... {socket} ...'");
        }
        if self.check {
            return refuse("--check starts nothing, so --run has no effect: leave out one of them");
        }
        if self.fd.is_some() || self.take_over.is_some() {
            return refuse("--run starts a daemon of its own: leave out --fd and --take-over, or leave out --run");
        }
        if command.contains("{control}") && self.control_path.is_none() {
            return refuse("--run has {control}, and there is no control socket: add --control-path PATH");
        }
        Ok(())
    }

    fn scratch(&self) -> Result<Option<ScratchOptions>, ConfigError> {
        match &self.scratch {
            Some(directory) => {
                let size = self.scratch_size.unwrap_or(DEFAULT_SCRATCH_SIZE);
                Ok(Some(ScratchOptions { directory: directory.clone(), size }))
            }
            None if self.scratch_size.is_some() => refuse("--scratch-size needs --scratch DIR"),
            None => Ok(None),
        }
    }

    fn discard_granularity(&self) -> Result<Option<u32>, ConfigError> {
        if self.discard_granularity.is_some() && self.discard.is_some_and(|switch| !switch.0) {
            return refuse(
                "--discard-granularity needs --discard unmap: with --discard ignore the guest is offered no discards; leave \
                 out one of them",
            );
        }
        Ok(self.discard_granularity)
    }

    fn control(&self) -> Result<Option<ControlSocket>, ConfigError> {
        match &self.control_path {
            Some(path) => Ok(Some(ControlSocket {
                path: path.clone(),
                mode: self.control_mode.map_or(DEFAULT_CONTROL_MODE, |mode| mode.0),
                others: self.control_access.unwrap_or_default(),
            })),
            None if self.control_mode.is_some() => refuse("--control-mode needs --control-path PATH"),
            None if self.control_access.is_some() => refuse("--control-access needs --control-path PATH"),
            None => Ok(None),
        }
    }

    fn listen(&self) -> Result<Listen, ConfigError> {
        match (&self.socket_path, self.fd) {
            (Some(path), None) => {
                let default = if self.socket_group.is_some() { DEFAULT_GROUP_SOCKET_MODE } else { DEFAULT_SOCKET_MODE };
                let mode = self.socket_mode.map_or(default, |mode| mode.0);
                Ok(Listen::Path { path: path.clone(), mode, group: self.socket_group.clone() })
            }
            (None, Some(_)) if self.socket_mode.is_some() || self.socket_group.is_some() => refuse(
                "--socket-mode and --socket-group need --socket-path: the program that bound the socket of --fd sets \
                     its mode and group",
            ),
            (None, Some(fd)) => Ok(Listen::Fd(fd)),
            (Some(_), Some(_)) => refuse("--socket-path and --fd exclude each other: give one of them"),
            (None, None) => {
                refuse("no socket given: give --socket-path PATH, or --fd N for an inherited listening socket")
            }
        }
    }

    fn backend(&self) -> Result<BackendKind, ConfigError> {
        if let Some(name) = &self.rbd.rbd {
            if self.backend.is_some() || self.blk_file.is_some() {
                return refuse("--rbd and --blk-file exclude each other: a daemon serves one disk; give one of them");
            }
            if self.locking.is_some() {
                return refuse("--locking is for files: use --rbd-lock for an RBD image");
            }
            let common = rbd::Common {
                mode: self.cache.unwrap_or_default(),
                read_only: self.read_only.is_some_and(|switch| switch.0),
                logical_block_size: self.logical_block_size,
                discard_unmap: self.discard.is_none_or(|switch| switch.0),
                has_control: self.control_path.is_some(),
            };
            return self.rbd.backend(name, common);
        }
        self.rbd.refuse_without_image()?;
        match (&self.backend, &self.blk_file) {
            (None | Some(values::Backend::File), Some(path)) => Ok(BackendKind::File(path.clone())),
            (None | Some(values::Backend::File), None) => {
                refuse("no image given: give --blk-file PATH of a raw image or a block device, or --rbd POOL/IMAGE")
            }
            (Some(values::Backend::Slow { delay, forgets }), Some(path)) => {
                Ok(BackendKind::Slow { path: path.clone(), delay: *delay, forgets: *forgets })
            }
            (Some(values::Backend::Slow { .. }), None) => refuse("--backend slow needs --blk-file PATH"),
            (Some(_), Some(_)) => refuse("--backend null or mem has no image: leave out --blk-file"),
            (Some(values::Backend::Null(size)), None) => Ok(BackendKind::Null(*size)),
            (Some(values::Backend::Mem(size)), None) => Ok(BackendKind::Mem(*size)),
        }
    }

    /// Refuses options that name the same path, because a socket or a pid file must not replace the image.
    fn check_paths_differ(&self) -> Result<(), ConfigError> {
        let paths: Vec<(&str, &Path)> = [
            ("--socket-path", &self.socket_path),
            ("--blk-file", &self.blk_file),
            ("--control-path", &self.control_path),
            ("--pid-file", &self.pid_file),
            ("--config", &self.config),
        ]
        .into_iter()
        .map(|(name, path)| (name, path.as_deref()))
        .chain(self.rbd.paths())
        .filter_map(|(name, path)| Some((name, path?)))
        .collect();
        for (at, (name, path)) in paths.iter().enumerate() {
            if let Some((other, _)) = paths[at + 1..].iter().find(|(_, other)| other == path) {
                return refuse(format!("{name} and {other} are both '{}': give each its own path", path.display()));
            }
        }
        Ok(())
    }
}
