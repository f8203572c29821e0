//! Rules on paths (Landlock): what the daemon may still open, make and remove. Everything else is refused with EACCES,
//! whoever asks the kernel, io_uring included. Besides: no TCP unless the image is reached over a network, no signal to
//! and no abstract socket of other processes.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, PathFdError, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

use super::{Needs, Stage, ceph};
use crate::config::{BackendKind, Config, Listen};

/// What was read and tested; the crate leaves out what the kernel lacks.
const KNOWN: ABI = ABI::V9;

/// To make files, to write, read and rename them, and to remove them.
const CREATE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    ReadDir | ReadFile | WriteFile | Truncate | MakeReg | RemoveFile
});

/// Where a rule begins, open, so that a later rename does not matter; and what is allowed there and beneath.
pub(super) struct Rule {
    place: Box<dyn AsFd + Send>,
    access: BitFlags<AccessFs>,
}

/// Why there are no rules.
#[derive(Debug)]
pub enum PathsError {
    /// A path that a rule begins at cannot be opened; which option named it.
    Open(&'static str, PathFdError),
    /// The kernel does not take them.
    Rules(RulesetError),
}

impl fmt::Display for PathsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PathsError::Open(option, PathFdError::OpenCall { source, path, .. }) => {
                write!(
                    f,
                    "{option}: '{}' cannot be opened: {source}; create it first, or correct the path",
                    path.display()
                )
            }
            PathsError::Open(option, error) => write!(f, "{option}: {error}"),
            PathsError::Rules(error) => write!(f, "the kernel refuses the rules on paths (Landlock): {error}"),
        }
    }
}

impl From<RulesetError> for PathsError {
    fn from(error: RulesetError) -> Self {
        PathsError::Rules(error)
    }
}

/// The rules that a configuration needs. Once its sockets and its pid file are there, and before the user changes: who
/// may open what counts again at each use.
pub(super) fn rules(config: &Config, stage: Stage, copy_dirs: Vec<OwnedFd>) -> Result<Vec<Rule>, PathsError> {
    let copies = copy_dirs.into_iter().map(|place| Rule { place: Box::new(place), access: CREATE });
    let mut rules: Vec<Rule> = copies.collect();
    let mut add = |option, path: &Path, access| match PathFd::new(path) {
        Ok(place) => {
            rules.push(Rule { place: Box::new(place), access });
            Ok(())
        }
        Err(error) => Err(PathsError::Open(option, error)),
    };
    if let Some(path) = config.backend.file() {
        // Each ring opens it for itself.
        let write = AccessFs::WriteFile | AccessFs::Truncate;
        let write = if config.read_only { BitFlags::EMPTY } else { write };
        add("--blk-file", path, write | AccessFs::ReadFile | AccessFs::IoctlDev)?;
    }
    if let BackendKind::Rbd(options) = &config.backend {
        let (read, written) = ceph::paths(options);
        for path in &read {
            let access = AccessFs::ReadFile | AccessFs::ReadDir;
            let access = match path {
                path if path.is_dir() => access,
                // The only one among them that is written to.
                path if path == Path::new("/dev/null") => AccessFs::ReadFile | AccessFs::WriteFile,
                _ => AccessFs::ReadFile.into(),
            };
            add("Ceph", path, access)?;
        }
        // It is opened once.
        let state = options.state_file.as_deref().filter(|_| stage == Stage::Opening).map(directory_of);
        for path in written.iter().map(PathBuf::as_path).chain(state) {
            add("Ceph", path, CREATE | AccessFs::MakeSock)?;
        }
    }
    if stage == Stage::Serving {
        serving(config, &mut add)?;
    }
    // What the kernel tells of the image's device and of ourselves, and what malloc(3) asks before it gives memory back.
    // Where it is not mounted nothing can be read.
    for (path, access) in [
        ("/sys", AccessFs::ReadFile | AccessFs::ReadDir),
        ("/proc/self", AccessFs::ReadFile | AccessFs::ReadDir),
        ("/proc/sys/vm/overcommit_memory", AccessFs::ReadFile.into()),
    ] {
        if Path::new(path).exists() {
            add(path, Path::new(path), access)?;
        }
    }
    Ok(rules)
}

/// How a rule is added: the option that names the place, the place, what is allowed there.
type Add<'a> = dyn FnMut(&'static str, &Path, BitFlags<AccessFs>) -> Result<(), PathsError> + 'a;

/// What is needed beside the image.
fn serving(config: &Config, add: &mut Add<'_>) -> Result<(), PathsError> {
    let socket = match &config.listen {
        Listen::Path { path, .. } => Some(path),
        Listen::Fd(_) => None,
    };
    let control = config.control.as_ref().map(|control| &control.path);
    for (option, path) in
        [("--socket-path", socket), ("--control-path", control), ("--pid-file", config.pid_file.as_ref())]
    {
        if let Some(path) = path {
            // To remove it at the end.
            add(option, directory_of(path), AccessFs::RemoveFile.into())?;
        }
    }
    // systemd is told of the end. A name that begins with '@' is no path.
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET").map(PathBuf::from)
        && path.is_absolute()
        && path.exists()
    {
        add("NOTIFY_SOCKET", &path, AccessFs::ResolveUnix.into())?;
    }
    Ok(())
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Restricts the calling thread and those that it starts. Returns what is in force, for the log; `Err(None)`: this
/// kernel has none of it.
pub(super) fn confine(rules: Vec<Rule>, needs: Needs) -> Result<String, Option<PathsError>> {
    let set = || -> Result<_, RulesetError> {
        let mut ruleset = Ruleset::default().handle_access(AccessFs::from_all(KNOWN))?.scope(Scope::Signal)?;
        // systemd's socket may be an abstract one.
        if !std::env::var_os("NOTIFY_SOCKET").is_some_and(|name| name.as_encoded_bytes().starts_with(b"@")) {
            ruleset = ruleset.scope(Scope::AbstractUnixSocket)?;
        }
        if !needs.network {
            ruleset = ruleset.handle_access(AccessNet::from_all(KNOWN))?;
        }
        let rules = rules.into_iter().map(|rule| Ok::<_, RulesetError>(PathBeneath::new(rule.place, rule.access)));
        ruleset.create()?.add_rules(rules)?.restrict_self()
    };
    let status = set().map_err(|error| Some(PathsError::Rules(error)))?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) | (_, LandlockStatus::NotEnabled | LandlockStatus::NotImplemented) => Err(None),
        (_, LandlockStatus::Available { effective_abi, .. }) => Ok(format!("Landlock {effective_abi:?}")),
    }
}
