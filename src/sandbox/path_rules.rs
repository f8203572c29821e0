//! Rules on paths (Landlock), which list what the daemon may still open, create and remove. The kernel refuses
//! everything else with EACCES, in every kind of call, io_uring included. The daemon also cannot make TCP connections,
//! unless the image is reached over a network, and cannot send to other processes' abstract sockets or signal those
//! processes.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, PathFdError, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

use super::permissions::{ImageNeeds, Permissions};
use super::{RulePurpose, ceph};

/// The newest version of Landlock that we know and have tested. The crate leaves out what the kernel lacks.
const KNOWN: ABI = ABI::V9;

/// The access to create files, write, read and rename them, and remove them.
const CREATE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    ReadDir | ReadFile | WriteFile | Truncate | MakeReg | RemoveFile
});

/// A rule: a file or directory, and what is allowed on it and beneath it. The place is open, so that a later rename
/// does not matter.
pub(super) struct PathRule {
    place: Box<dyn AsFd + Send>,
    access: BitFlags<AccessFs>,
}

/// Why the rules cannot be made or installed.
#[derive(Debug)]
pub enum PathsError {
    /// The path of a rule cannot be opened. The text is the option that names the path.
    Open(&'static str, PathFdError),
    /// The kernel refuses the rules.
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

/// Makes the rules that a configuration needs. Called when the sockets and the pid file exist, and before the user
/// changes; the kernel still checks the new user's permissions at each use.
pub(super) fn rules(
    permissions: &Permissions,
    stage: RulePurpose,
    copy_dirs: Vec<OwnedFd>,
) -> Result<Vec<PathRule>, PathsError> {
    let copies = copy_dirs.into_iter().map(|place| PathRule { place: Box::new(place), access: CREATE });
    let mut rules: Vec<PathRule> = copies.collect();
    let mut add = |option, path: &Path, access| match PathFd::new(path) {
        Ok(place) => {
            rules.push(PathRule { place: Box::new(place), access });
            Ok(())
        }
        Err(error) => Err(PathsError::Open(option, error)),
    };
    if let Some(path) = &permissions.image {
        // Each virtqueue opens the image for itself.
        let write = AccessFs::WriteFile | AccessFs::Truncate;
        let write = if permissions.read_only { BitFlags::EMPTY } else { write };
        add("--blk-file", path, write | AccessFs::ReadFile | AccessFs::IoctlDev)?;
    }
    if let Some(options) = &permissions.ceph {
        let (read, written) = ceph::paths(options);
        for path in &read {
            let access = AccessFs::ReadFile | AccessFs::ReadDir;
            let access = match path {
                path if path.is_dir() => access,
                // The only one of these paths that is written to.
                path if path == Path::new("/dev/null") => AccessFs::ReadFile | AccessFs::WriteFile,
                _ => AccessFs::ReadFile.into(),
            };
            add("Ceph", path, access)?;
        }
        // The state file is opened only once.
        let state = options.state_file.as_deref().filter(|_| stage == RulePurpose::Opening).map(directory_of);
        for path in written.iter().map(PathBuf::as_path).chain(state) {
            add("Ceph", path, CREATE | AccessFs::MakeSock)?;
        }
    }
    if stage == RulePurpose::Serving {
        serving(permissions, &mut add)?;
    }
    // malloc(3) reads this file before it returns memory to the kernel. The properties of the image's device were read
    // before.
    let memory = Path::new("/proc/sys/vm/overcommit_memory");
    if memory.exists() {
        add("/proc", memory, AccessFs::ReadFile.into())?;
    }
    Ok(rules)
}

/// The function that adds a rule. Its arguments are the option that names the path, the path, and what is allowed
/// there.
type AddRule<'a> = dyn FnMut(&'static str, &Path, BitFlags<AccessFs>) -> Result<(), PathsError> + 'a;

/// Adds the rules for serving the disk, besides those for the image.
fn serving(permissions: &Permissions, add: &mut AddRule<'_>) -> Result<(), PathsError> {
    let mut directories: Vec<(&Path, Vec<&'static str>)> = Vec::new();
    for (option, path) in &permissions.removable {
        let directory = directory_of(path);
        match directories.iter_mut().find(|(known, _)| *known == directory) {
            Some((_, options)) => options.push(option),
            None => directories.push((directory, vec![option])),
        }
    }
    for (directory, options) in directories {
        match reason_to_keep(directory) {
            None => add(options[0], directory, AccessFs::RemoveFile.into())?,
            Some(reason) => log::log!(
                // The daemon that this one replaces has warned.
                if permissions.is_take_over { log::Level::Debug } else { log::Level::Warn },
                "{}",
                kept_files(&options, directory, &reason)
            ),
        }
    }
    Ok(())
}

/// Returns why the removal of files in a directory is not permitted, or `None` if it is. A rule applies to everything
/// beneath the directory, so there is none for a directory with others beneath it, such as /run. The daemon's files are
/// then left at its end, and the next start replaces them. A directory that cannot be listed counts as one with others
/// beneath it.
fn reason_to_keep(directory: &Path) -> Option<String> {
    match directory_in(directory) {
        Ok(None) => None,
        Ok(Some(name)) => Some(format!("contains the directory '{}'", name.display())),
        Err(error) => Some(format!("cannot be listed ({error}), so it may contain directories")),
    }
}

/// Returns the warning that the daemon's files will be left in a directory. `options`: those that name the files.
fn kept_files(options: &[&str], directory: &Path, reason: &str) -> String {
    let (files, them) = if options.len() == 1 { ("file", "it") } else { ("files", "them") };
    format!(
        "the {files} of {} will remain when virtioblkd ends, and its next start replaces {them}: '{}' {reason}, and with the \
         right to remove files there an intruder in virtioblkd could remove those in directories beneath, too; to have {them} \
         removed, put {them} into a directory that contains no others and that virtioblkd may list",
        options.join(" and "),
        directory.display()
    )
}

/// Returns the name of a directory in `directory`, if there is one. Fails if `directory` cannot be listed completely.
fn directory_in(directory: &Path) -> io::Result<Option<OsString>> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => return Ok(Some(entry.file_name())),
            Ok(_) => {}
            // The entry was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The rules on paths that are in force.
pub(super) struct PathRestriction {
    /// The kernel's version of Landlock.
    abi: ABI,
    network: bool,
}

/// A feature that a version of Landlock introduced: since which Linux, and what an intruder can do without it.
struct LandlockFeature {
    abi: ABI,
    linux: &'static str,
    reach: &'static str,
    /// Whether the filter of system calls stops the same.
    stopped_by: StoppedBy,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum StoppedBy {
    /// Nothing else stops it.
    Nowhere,
    /// The filter stops it.
    Filter,
    /// The filter stops it if no datagram socket is open. systemd's socket (NOTIFY_SOCKET) is one, and can send to any
    /// socket.
    FilterWithoutDatagrams,
}

/// The features after those of the first version. ABI 2 permits more than ABI 1; ABI 7 and 8 introduce no rule.
const LANDLOCK_FEATURES: &[LandlockFeature] = &[
    LandlockFeature { abi: ABI::V3, linux: "6.2", reach: "truncate files of its user", stopped_by: StoppedBy::Nowhere },
    LandlockFeature { abi: ABI::V4, linux: "6.7", reach: "make TCP connections", stopped_by: StoppedBy::Filter },
    LandlockFeature {
        abi: ABI::V5,
        linux: "6.10",
        reach: "command devices by ioctl(2)",
        stopped_by: StoppedBy::Filter,
    },
    LandlockFeature {
        abi: ABI::V6,
        linux: "6.12",
        reach: "signal processes of its user",
        stopped_by: StoppedBy::Filter,
    },
    LandlockFeature {
        abi: ABI::V6,
        linux: "6.12",
        reach: "send to abstract Unix sockets",
        stopped_by: StoppedBy::FilterWithoutDatagrams,
    },
    LandlockFeature {
        abi: ABI::V9,
        linux: "7.1",
        reach: "send to Unix sockets by their path",
        stopped_by: StoppedBy::FilterWithoutDatagrams,
    },
];

impl PathRestriction {
    /// Returns what an intruder can do because the kernel lacks a feature, and what only the filter of system calls
    /// stops; each with the Linux that has the feature. `filtered`: there is a filter; `datagrams`: a datagram socket
    /// is open.
    pub(super) fn lacks(&self, filtered: bool, datagrams: bool) -> (Vec<String>, Vec<String>) {
        let lacking = LANDLOCK_FEATURES.iter().filter(|it| it.abi > self.abi && !(self.network && it.abi == ABI::V4));
        let (stopped, open): (Vec<_>, Vec<_>) = lacking.partition(|it| match it.stopped_by {
            StoppedBy::Nowhere => false,
            StoppedBy::Filter => filtered,
            StoppedBy::FilterWithoutDatagrams => filtered && !datagrams,
        });
        let named =
            |list: Vec<&LandlockFeature>| list.iter().map(|it| format!("{} (Linux {})", it.reach, it.linux)).collect();
        (named(open), named(stopped))
    }
}

/// The text for the log.
impl fmt::Display for PathRestriction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Landlock {:?}", self.abi)
    }
}

/// Restricts the calling thread and the threads that it starts later. Returns what is in force. `Err(None)`: this
/// kernel does not have Landlock.
pub(super) fn confine(rules: Vec<PathRule>, needs: ImageNeeds) -> Result<PathRestriction, Option<PathsError>> {
    let set = || -> Result<_, RulesetError> {
        // Scopes do not affect systemd's socket, which is connected already.
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(KNOWN))?
            .scope(Scope::Signal)?
            .scope(Scope::AbstractUnixSocket)?;
        if !needs.network {
            ruleset = ruleset.handle_access(AccessNet::from_all(KNOWN))?;
        }
        let rules = rules.into_iter().map(|rule| Ok::<_, RulesetError>(PathBeneath::new(rule.place, rule.access)));
        ruleset.create()?.add_rules(rules)?.restrict_self()
    };
    let status = set().map_err(|error| Some(PathsError::Rules(error)))?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) | (_, LandlockStatus::NotEnabled | LandlockStatus::NotImplemented) => Err(None),
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            Ok(PathRestriction { abi: effective_abi, network: needs.network })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_that_cannot_be_listed_counts_as_one_with_directories_beneath() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(reason_to_keep(dir.path()), None);
        fs::create_dir(dir.path().join("beneath")).unwrap();
        assert_eq!(reason_to_keep(dir.path()), Some("contains the directory 'beneath'".into()));
        fs::remove_dir(dir.path().join("beneath")).unwrap();
        // Files can be made and removed there by everybody, and be seen by none.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o333)).unwrap();
        let path = dir.path().to_owned();
        // As far as the kernel is concerned a thread has a user of its own; root could list it.
        let may = std::thread::spawn(move || {
            if rustix::process::geteuid().is_root() {
                let uid = rustix::process::Uid::from_raw(54321);
                rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            }
            reason_to_keep(&path)
        });
        let reason = may.join().unwrap().expect("a reason");
        assert!(reason.contains("cannot be listed"), "{reason}");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    }

    #[test]
    fn the_warning_of_files_that_remain_names_their_options_once() {
        let text = kept_files(&["--socket-path", "--control-path"], Path::new("."), "contains the directory 'backup'");
        assert!(text.starts_with("the files of --socket-path and --control-path will remain"), "{text}");
        assert!(text.contains("'.' contains the directory 'backup'") && text.contains("put them into"), "{text}");
        assert!(kept_files(&["--pid-file"], Path::new("/run"), "x").starts_with("the file of --pid-file will remain"));
    }

    #[test]
    fn what_the_kernel_lacks_is_named_unless_the_filter_stops_it() {
        let lacks = |abi, network, filtered, datagrams| PathRestriction { abi, network }.lacks(filtered, datagrams);
        let (open, stopped) = lacks(ABI::V9, false, false, true);
        assert_eq!((open.len(), stopped.len()), (0, 0));
        // Linux 6.18.
        let (open, stopped) = lacks(ABI::V7, false, true, false);
        assert_eq!((open.len(), &*stopped), (0, &["send to Unix sockets by their path (Linux 7.1)".to_string()][..]));
        assert_eq!(lacks(ABI::V7, false, true, true).0, stopped, "systemd's socket sends datagrams");
        assert_eq!(lacks(ABI::V7, false, false, false).0, stopped);
        // Linux 6.1.
        let (open, stopped) = lacks(ABI::V2, false, true, false);
        assert_eq!((open, stopped.len()), (vec!["truncate files of its user (Linux 6.2)".to_string()], 5));
        assert_eq!(lacks(ABI::V2, true, false, false).0.len(), 5, "a network is needed");
    }
}
