//! The options by their names, and what one option alone cannot tell: what is missing, and what contradicts what.

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
use crate::control::Access;
use crate::engine::{CacheMode, OnError};
use crate::sandbox::SandboxLevel;

/// Mode of the vhost-user socket when nothing was said: its owner may connect.
const SOCKET_MODE: u32 = 0o600;
/// Mode of the vhost-user socket when a group was named: that group may connect too.
const GROUP_SOCKET_MODE: u32 = 0o660;
/// Mode of the control socket when nothing was said.
const CONTROL_MODE: u32 = 0o600;
/// Generous, since it costs nothing: a thread exists only for a ring in use.
const NUM_QUEUES: u16 = 256;
/// Bytes of a copy's scratch file.
const SCRATCH_SIZE: u64 = 1 << 30;
/// QEMU's largest `queue-size`.
const QUEUE_SIZE: u16 = 1024;

/// A vhost-user-blk server: serves one raw image or Ceph RBD image to QEMU, truthfully, and holds it still on request.
///
/// It stays in the foreground and serves one front-end after another. SIGTERM, SIGINT or SIGHUP: drains, syncs,
/// removes its sockets and ends with status 0; a second signal ends it at once. Status 1: a failure at run time;
/// 2: a wrong command line or file.
#[derive(Debug, Parser)]
#[command(name = "virtioblkd", version, max_term_width = 100, args_override_self = false)]
pub(super) struct Args {
    /// Listen for the front-end (QEMU) on this Unix socket; a dead server's socket is replaced
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,

    /// Take over this listening Unix socket instead, inherited under this number
    #[arg(long, value_name = "N", value_parser = values::fd)]
    fd: Option<i32>,

    /// The raw image: a file or a block device
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,

    /// The image's format: only raw images are served. Said explicitly, an image that looks like another format (a guest can
    /// write such a header) is not warned of
    #[arg(long, value_name = "raw", value_parser = values::format)]
    format: Option<RawFormat>,

    /// Refuse writes, and tell the guest
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = values::truth)]
    read_only: Option<Switch>,

    /// When a write is acknowledged: none (O_DIRECT, when the device has it), directsync (O_DIRECT, when durable),
    /// writeback (when the host's cache has it), writethrough (when durable), unsafe (as writeback, and the guest's
    /// flushes are ignored) [default: none]
    #[arg(long, value_name = "MODE", value_parser = values::cache)]
    cache: Option<CacheMode>,

    /// Answer virtioblkctl and QMP clients on this Unix socket
    #[arg(long, value_name = "PATH")]
    control_path: Option<PathBuf>,

    /// Permission bits of the control socket: who may connect can hold the disk still, copy it and make snapshots; see
    /// --control-access. Only root and the daemon's user can take the guest over, end the daemon or cut the disk
    /// [default: 0600]
    #[arg(long, value_name = "OCTAL", value_parser = values::mode)]
    control_mode: Option<Mode>,

    /// What other users may do whom --control-mode lets in: operate (hold, copy, snapshot, continue, grow the disk) or
    /// read-only (ask and watch) [default: operate]
    #[arg(long, value_name = "operate|read-only", value_parser = values::control_access)]
    control_access: Option<Access>,

    /// Most queues that a front-end may use, 1 to 256 [default: 256]
    #[arg(long, value_name = "N", value_parser = values::num_queues)]
    num_queues: Option<u16>,

    /// Largest ring that a front-end may set, a power of two from 2 to 32768 [default: 1024]
    #[arg(long, value_name = "N", value_parser = values::queue_size)]
    queue_size: Option<u16>,

    /// The disk's serial number as the guest sees it, at most 20 ASCII characters [default: none]
    #[arg(long, value_name = "TEXT", value_parser = values::serial)]
    serial: Option<String>,

    /// Smallest unit that the guest may address, 512 or 4096 [default: the image's medium's]
    #[arg(long, value_name = "BYTES", value_parser = values::logical_block_size)]
    logical_block_size: Option<u32>,

    /// Whether the guest's discards free space in the image, unmap or ignore [default: unmap]
    #[arg(long, value_name = "unmap|ignore", value_parser = values::discard)]
    discard: Option<Switch>,

    /// The unit that the guest's discards should fill, a power of two from the logical block size to 1G; others are served
    /// all the same. Windows 11 needs 32K or more [default: the image's medium's]
    #[arg(long, value_name = "SIZE", value_parser = values::discard_granularity)]
    discard_granularity: Option<u32>,

    /// What if the guest changes a buffer while its write is under way: copy (each write is copied first, except where
    /// the host copies it anyway), detect (changes are counted and told), off, or auto (copy where the medium asks for
    /// buffers that stay as they are) [default: auto]
    #[arg(long, value_name = "HOW", value_parser = values::stable_writes)]
    stable_writes: Option<StableWrites>,

    /// When a request fails: report (the guest gets the error), stop (it is kept, and the ring waits for `virtioblkctl
    /// continue`), enospc (stop where space is missing, else report) [default: enospc]
    #[arg(long, value_name = "enospc|report|stop", value_parser = values::on_error)]
    on_error: Option<OnError>,

    /// How long a ring's thread looks for the next request before it sleeps, at most, in nanoseconds (up to 1000000). Saves
    /// a wake-up for each small request, and takes processor time; given up where it does not pay. 0: not at all
    /// [default: 0]
    #[arg(long, value_name = "NS", value_parser = values::poll_max)]
    poll_max_ns: Option<Duration>,

    /// How long a quiesced disk may keep the guest's writes waiting, whoever holds it and however many do, such as 30s: no
    /// hold goes beyond that, and new holders are refused until writes have flowed [default: only each hold's lease ends
    /// it]
    #[arg(long, value_name = "TIME", value_parser = crate::base::units::time)]
    max_hold: Option<Duration>,

    /// QEMU's image locks: auto (held from start to end), in-use (only while a guest runs: for live migration) or off
    /// [default: auto]
    #[arg(long, value_name = "auto|in-use|off", value_parser = values::locking)]
    locking: Option<Locking>,

    /// Permission bits of the vhost-user socket: who may connect can read and write the disk
    /// [default: 0600, and 0660 with --socket-group]
    #[arg(long, value_name = "OCTAL", value_parser = values::mode)]
    socket_mode: Option<Mode>,

    /// Give the vhost-user socket to this group (a name or a number); under libvirt the one that QEMU runs in,
    /// kvm on Debian
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,

    /// Write the process id to this file, and hold a lock on it
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,

    /// Read options from this TOML file, named as here without the dashes; the command line wins
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// What to log on stderr: error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL", value_parser = values::log_level)]
    log_level: Option<LevelFilter>,

    /// What the daemon gives up once everything is open: on (most of the file system, new programs, other processes, the
    /// network), no-filter (the same without the filter of system calls), off [default: on]
    #[arg(long, value_name = "on|no-filter|off", value_parser = values::sandbox)]
    sandbox: Option<SandboxLevel>,

    /// Become this user (a name or a number) once everything is open; it must be able to open the image
    #[arg(long, value_name = "USER")]
    user: Option<String>,

    /// Let point-in-time copies go to this directory and those beneath; may be given more than once. In the sandbox
    /// nothing can be created elsewhere. For a filesystem that is mounted later, name a directory above its mount point
    #[arg(long, value_name = "DIR")]
    copy_dir: Vec<PathBuf>,

    /// Make an unnamed file in this directory, on a fast local disk, for each point-in-time copy: old data that the guest's
    /// writes wait for goes there while the copy's target is slow
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,

    /// Bytes that such a file may take, such as 4G [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = crate::base::units::bytes)]
    scratch_size: Option<u64>,

    /// Take the guest over from the daemon behind this control socket, while the guest runs, and let that one end
    /// (virtioblkctl upgrade starts a daemon so). Whatever fails, that one serves on
    #[arg(long, value_name = "CONTROL")]
    take_over: Option<PathBuf>,

    /// Print what this back-end can do, as JSON, and end; other options are ignored
    #[arg(long)]
    print_capabilities: bool,

    /// file, null, `null:SIZE`, `mem:SIZE`, `slow:MS` or `forgetful:MS`
    #[arg(long, value_name = "KIND", hide = true, value_parser = values::backend)]
    backend: Option<values::Backend>,

    #[command(flatten)]
    rbd: RbdArgs,
}

impl Args {
    /// What one option alone cannot tell: what is missing, and what contradicts what.
    pub(super) fn check(self) -> Result<Config, ConfigError> {
        self.check_paths_differ()?;
        let control = self.control()?;
        let scratch = self.scratch()?;
        let discard_granularity = self.discard_granularity()?;
        Ok(Config {
            listen: self.listen()?,
            backend: self.backend()?,
            is_raw: self.format.is_some(),
            read_only: self.read_only.is_some_and(|switch| switch.0),
            cache: self.cache.unwrap_or_default(),
            control,
            num_queues: self.num_queues.unwrap_or(NUM_QUEUES),
            queue_size: self.queue_size.unwrap_or(QUEUE_SIZE),
            serial: self.serial.unwrap_or_default(),
            logical_block_size: self.logical_block_size,
            discard_unmap: self.discard.is_none_or(|switch| switch.0),
            discard_granularity,
            stable_writes: self.stable_writes.unwrap_or_default(),
            on_error: self.on_error.unwrap_or_default(),
            poll_max: self.poll_max_ns.unwrap_or_default(),
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

    fn scratch(&self) -> Result<Option<ScratchOptions>, ConfigError> {
        match &self.scratch {
            Some(directory) => {
                let size = self.scratch_size.unwrap_or(SCRATCH_SIZE);
                Ok(Some(ScratchOptions { directory: directory.clone(), size }))
            }
            None if self.scratch_size.is_some() => refuse("--scratch-size needs --scratch"),
            None => Ok(None),
        }
    }

    fn discard_granularity(&self) -> Result<Option<u32>, ConfigError> {
        if self.discard_granularity.is_some() && self.discard.is_some_and(|switch| !switch.0) {
            return refuse(
                "--discard-granularity needs --discard unmap: with --discard ignore the disk offers no discards; leave out \
                 one of them",
            );
        }
        Ok(self.discard_granularity)
    }

    fn control(&self) -> Result<Option<ControlSocket>, ConfigError> {
        match &self.control_path {
            Some(path) => Ok(Some(ControlSocket {
                path: path.clone(),
                mode: self.control_mode.map_or(CONTROL_MODE, |mode| mode.0),
                others: self.control_access.unwrap_or_default(),
            })),
            None if self.control_mode.is_some() => refuse("--control-mode needs --control-path"),
            None if self.control_access.is_some() => refuse("--control-access needs --control-path"),
            None => Ok(None),
        }
    }

    fn listen(&self) -> Result<Listen, ConfigError> {
        match (&self.socket_path, self.fd) {
            (Some(path), None) => {
                let default = if self.socket_group.is_some() { GROUP_SOCKET_MODE } else { SOCKET_MODE };
                let mode = self.socket_mode.map_or(default, |mode| mode.0);
                Ok(Listen::Path { path: path.clone(), mode, group: self.socket_group.clone() })
            }
            (None, Some(_)) if self.socket_mode.is_some() || self.socket_group.is_some() => {
                refuse("--socket-mode and --socket-group need --socket-path: a socket given with --fd is its maker's")
            }
            (None, Some(fd)) => Ok(Listen::Fd(fd)),
            (Some(_), Some(_)) => refuse("--socket-path and --fd exclude each other: give one of them"),
            (None, None) => refuse("no socket given: --socket-path PATH, or --fd N for one that is already listening"),
        }
    }

    fn backend(&self) -> Result<BackendKind, ConfigError> {
        if let Some(name) = &self.rbd.rbd {
            if self.backend.is_some() || self.blk_file.is_some() {
                return refuse("--rbd and --blk-file (or --backend) exclude each other: a process serves one disk");
            }
            if self.locking.is_some() {
                return refuse("--locking is for files: an RBD image has --rbd-lock");
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
                refuse("no image given: --blk-file PATH of a raw image or a block device, or --rbd POOL/IMAGE")
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

    /// A slip of the hand must not put a socket where the image is.
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
