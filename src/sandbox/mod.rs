//! The rights that the daemon gives up once everything is open, so that a guest or a front-end that takes control of it
//! gains little.
//!
//! Main takes these steps in this order, before any other thread exists:
//!
//! 1. Become another user (`--user`), or as root give up all capabilities but three.
//! 2. Forbid core dumps and debuggers of the same user (prctl(2), PR_SET_DUMPABLE), because guest memory is mapped here.
//! 3. Give up new privileges by any program (PR_SET_NO_NEW_PRIVS), and install rules on paths (Landlock) that permit the
//!    image, the directories for copies (`--copy-dir`, `--scratch`), and the removal of sockets and pid file.
//! 4. Install the filter of system calls (seccomp): no program can be started, no process created or touched, no network
//!    reached.
//!
//! An image that a storage library reaches over a network (Ceph) is opened by a thread that has taken step 3 already,
//! because the library's threads inherit its restrictions. The library may open connections and the files that its
//! configuration names.
//!
//! If the kernel lacks a feature, a warning names it, and the disk is served regardless: a guest without its disk is
//! the greater harm, and the operator sees the warning. If `--user` fails, the daemon does not start, because the
//! operator required it. A `--copy-dir` or `--scratch` that cannot be opened is no error, because only the image
//! decides whether the disk is served.
//!
//! `virtioblkctl`, which runs hooks and commands and makes reflinks, has no sandbox.

mod ceph;
mod copy_dirs;
mod path_rules;
pub mod permissions;
mod sigsys;
mod syscall_filter;
mod user;

use std::fmt;
use std::io;
use std::path::PathBuf;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use crate::backend::file;
use crate::backend::point_in_time::CopyDirectory;
use crate::base::systemd;
use permissions::{ImageNeeds, Permissions};
use user::Account;

/// The values of `--sandbox`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SandboxLevel {
    /// The whole sandbox.
    #[default]
    On,
    /// The sandbox without the filter of system calls, for a C library or a storage library that makes unknown calls.
    NoFilter,
    /// Only `--user`.
    Off,
}

/// The phase for which rules on paths are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RulePurpose {
    /// A storage library opens the image.
    Opening,
    /// The daemon serves the disk.
    Serving,
}

/// Why the sandbox cannot be prepared or entered, so that the daemon does not start. Each text says what failed, why,
/// and how to fix it.
#[derive(Debug)]
pub enum SandboxError {
    /// `--user` names no user; the lookup's error, if it failed.
    NoUser(String, Option<io::Error>),
    /// Only root can become another user.
    NotRoot(String),
    /// A step of becoming that user failed; the text names it.
    Switch(String, &'static str, io::Error),
    /// That user may not open the image.
    Image(String, PathBuf, io::Error),
    /// Capabilities cannot be dropped.
    Capabilities(io::Error),
    /// No io_uring can be created with the rights that are left.
    IoUring(io::Error),
    /// prctl(2), setrlimit(2) or sigaction(2) failed; the text says what the call was for.
    Process(&'static str, io::Error),
    /// The rules on paths cannot be made or installed.
    Paths(path_rules::PathsError),
}

impl fmt::Display for SandboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SandboxError::NoUser(name, None) => {
                write!(f, "--user: there is no user '{name}' on this host: name one of getent(1) passwd, or its number")
            }
            SandboxError::NoUser(name, Some(error)) => write!(f, "--user: cannot look up '{name}': {error}"),
            SandboxError::NotRoot(name) => {
                write!(f, "--user {name}: only root can become another user: start virtioblkd as root, or as that user")
            }
            SandboxError::Switch(name, what, error) => write!(
                f,
                "--user {name}: {what}: {error}; let virtioblkd start with the capabilities SETUID and SETGID, or as \
                 that user"
            ),
            SandboxError::Image(name, path, error) => write!(
                f,
                "--user {name}: that user cannot open {0} ({error}), and each queue opens it again: let the user or one of \
                 its groups read and write it, as by 'setfacl -m u:{name}:rw {0}', or ask for root (--user root)",
                path.display()
            ),
            SandboxError::Capabilities(error) => {
                write!(f, "cannot drop capabilities: {error}; start virtioblkd as another user, or with --sandbox off")
            }
            SandboxError::IoUring(error) => write!(
                f,
                "without root's capabilities the kernel gives us no io_uring: {error}; put a group of the daemon's user \
                 into the sysctl kernel.io_uring_group, or use --sandbox off"
            ),
            SandboxError::Process(what, error) => write!(f, "cannot {what}: {error}; --sandbox off does without"),
            SandboxError::Paths(error @ path_rules::PathsError::Rules(_)) => {
                write!(f, "{error}; --sandbox off does without")
            }
            SandboxError::Paths(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for SandboxError {}

/// A sandbox that is not entered yet.
pub struct Sandbox {
    permissions: Permissions,
    user: Option<Account>,
    copy_dirs: Vec<copy_dirs::StartDirectory>,
}

impl Sandbox {
    /// Looks up the user and opens the directories that `permissions` name. Called by main before anything else is
    /// opened.
    pub fn prepare(permissions: Permissions) -> Result<Self, SandboxError> {
        let user = permissions.user.as_deref().map(Account::find).transpose()?;
        let copy_dirs = match permissions.level {
            SandboxLevel::Off => Vec::new(),
            SandboxLevel::On | SandboxLevel::NoFilter => {
                let scratch = permissions.scratch.as_ref();
                copy_dirs::open_all(&permissions.copy_dirs, scratch)
            }
        };
        Ok(Sandbox { permissions, user, copy_dirs })
    }

    /// Returns the result of opening each `--copy-dir`.
    pub fn copy_directories(&self) -> Vec<CopyDirectory> {
        let copies = self.copy_dirs.iter().filter(|opened| !opened.scratch);
        copies.map(|opened| opened.facts.clone()).collect()
    }

    /// Calls `open`, which opens the image. A storage library starts threads then, to which later rules on paths do not
    /// apply. It is therefore called in a thread that is restricted already, and its threads inherit the restriction.
    /// Called by main before `enter`.
    pub fn open<T: Send>(&self, open: impl FnOnce() -> T + Send) -> Result<T, SandboxError> {
        if !self.permissions.needs.network || self.permissions.level == SandboxLevel::Off {
            return Ok(open());
        }
        let rules =
            path_rules::rules(&self.permissions, RulePurpose::Opening, Vec::new()).map_err(SandboxError::Paths)?;
        let switch = self.user.is_some();
        let restricted = move || {
            user::keep_few_capabilities(switch)?;
            match path_rules::confine(rules, self.permissions.needs) {
                // A kernel without such rules is reported once, at the end.
                Ok(_) | Err(None) => Ok(open()),
                Err(Some(error)) => Err(SandboxError::Paths(error)),
            }
        };
        // A panic has ended the process.
        std::thread::scope(|scope| scope.spawn(restricted).join().expect("no panic"))
    }

    /// Gives up, for good, the rights that the daemon does not need any more. Called once, by main, when everything is
    /// open and bound and no other thread of ours exists, because rules on paths and capabilities apply to one thread.
    pub fn enter(mut self) -> Result<(), SandboxError> {
        // The rules' paths are opened as root, because Landlock needs access to them.
        let rules = self.rules()?;
        match &self.user {
            Some(user) => user.assume(&self.permissions)?,
            None => user::warn_of_root(),
        }
        if self.permissions.level != SandboxLevel::Off {
            user::keep_few_capabilities(false)?;
        }
        self.restrict(rules)
    }

    fn rules(&mut self) -> Result<Vec<path_rules::PathRule>, SandboxError> {
        match self.permissions.level {
            SandboxLevel::Off => Ok(Vec::new()),
            SandboxLevel::On | SandboxLevel::NoFilter => {
                let copy_dirs = self.copy_dirs.drain(..).filter_map(|opened| opened.place).collect();
                path_rules::rules(&self.permissions, RulePurpose::Serving, copy_dirs).map_err(SandboxError::Paths)
            }
        }
    }

    /// Checks that io_urings can be created with the rights that are left, because without the filter each virtqueue
    /// creates one when it starts; kernel.io_uring_disabled=1 requires a right that is gone now. With the filter they
    /// exist already.
    fn check_io_uring(&self) -> Result<(), SandboxError> {
        match self.permissions.makes_io_urings_first() || !self.permissions.needs.io_uring {
            true => Ok(()),
            false => file::probe_io_uring().map_err(SandboxError::IoUring),
        }
    }

    fn restrict(&self, rules: Vec<path_rules::PathRule>) -> Result<(), SandboxError> {
        if self.permissions.level == SandboxLevel::Off {
            log::warn!("the sandbox is off: an intruder in this daemon can do what its user can");
            return Ok(());
        }
        let needs = self.permissions.needs;
        self.check_io_uring()?;
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|errno| {
            SandboxError::Process("keep guest memory out of core dumps (PR_SET_DUMPABLE)", errno.into())
        })?;
        setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
            .map_err(|errno| SandboxError::Process("forbid core dumps (RLIMIT_CORE)", errno.into()))?;
        rustix::thread::set_no_new_privs(true)
            .map_err(|errno| SandboxError::Process("give up new privileges (PR_SET_NO_NEW_PRIVS)", errno.into()))?;
        let paths = match path_rules::confine(rules, needs) {
            Ok(confined) => Some(confined),
            Err(Some(error)) => return Err(SandboxError::Paths(error)),
            Err(None) => {
                log::warn!(
                    "this kernel has no rules on paths (Landlock: CONFIG_SECURITY_LANDLOCK, and landlock among the lsm= \
                     at boot): an intruder in this daemon can open what its user can"
                );
                None
            }
        };
        let filtered = self.filter_calls(needs)?;
        let calls = if filtered { "seccomp" } else { "no system call filter" };
        let user = rustix::process::geteuid().as_raw();
        match paths {
            Some(confined) => {
                log::info!("sandbox: {confined}{}, {calls}, user {user}", warn_of_lacks(&confined, filtered))
            }
            None => log::info!("sandbox: no Landlock, {calls}, user {user}"),
        }
        Ok(())
    }

    /// Installs the filter of system calls, unless it is off. Returns whether it is in force.
    fn filter_calls(&self, needs: ImageNeeds) -> Result<bool, SandboxError> {
        if self.permissions.level == SandboxLevel::NoFilter {
            log::warn!("system calls are not filtered (--sandbox no-filter)");
            return Ok(false);
        }
        sigsys::install().map_err(|error| SandboxError::Process("handle SIGSYS", error))?;
        let installed = syscall_filter::install(needs);
        if let Err(error) = &installed {
            log::warn!("system calls cannot be filtered here ({error}): an intruder in this daemon can make any");
        }
        Ok(installed.is_ok())
    }
}

/// Warns of what neither this kernel's rules on paths nor the filter stop. Returns a text for the log with what the
/// filter stops in place of the rules.
fn warn_of_lacks(confined: &path_rules::PathRestriction, filtered: bool) -> String {
    let (open, stopped) = confined.lacks(filtered, systemd::is_connected());
    if !open.is_empty() {
        log::warn!(
            "this kernel's rules on paths ({confined}) do not forbid everything: an intruder in this daemon can {}; a newer \
             kernel, as named, forbids that",
            open.join(", ")
        );
    }
    match stopped.is_empty() {
        true => String::new(),
        false => format!(" (which cannot forbid to {}, so that seccomp alone does)", stopped.join(", ")),
    }
}
