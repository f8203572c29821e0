//! PURE. The options of `virtioblkctl snapshot`: the level, the disks, and the method for each. They are checked before
//! anything is changed.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::base::figures::count;

/// What a snapshot promises. A later value promises more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Consistency {
    /// All disks hold what a power cut at one instant would leave.
    Crash,
    /// The guest's filesystems were also frozen at that instant: they hold everything that programs wrote, and need no
    /// repair.
    Filesystem,
    /// Hooks on the host or in the guest have also made the applications still, and succeeded.
    Application,
}

impl Consistency {
    /// Returns the level's name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Consistency::Crash => "crash",
            Consistency::Filesystem => "filesystem",
            Consistency::Application => "application",
        }
    }
}

impl FromStr for Consistency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Consistency::Crash, Consistency::Filesystem, Consistency::Application];
        known
            .into_iter()
            .find(|level| level.name() == text)
            .ok_or_else(|| format!("there is no level '{text}': give crash, filesystem or application"))
    }
}

/// How a snapshot is taken. Paths may contain `{}`, which becomes the image's file name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// FICLONE to this path: XFS, btrfs, bcachefs.
    Reflink(PathBuf),
    /// A point-in-time copy to this path, made by the daemon.
    Copy(PathBuf),
    /// An NBD export of the instant to the clients of a socket at this path, served by the daemon.
    Nbd(PathBuf),
    /// A snapshot of this name, made by the image's store (Ceph RBD) through the daemon; `None`: [`default_name`].
    Rbd(Option<String>),
    /// A command, run once while all disks are held.
    Exec(OsString),
}

/// All methods, for messages.
pub const METHODS: &str = "reflink:PATH (XFS, btrfs), copy:PATH (any filesystem), nbd:SOCKET (read by NBD clients), rbd or rbd:NAME (Ceph RBD) or \
                        exec:COMMAND (LVM, ZFS, anything)";

impl Method {
    /// Parses `METHOD:ARGUMENT`.
    pub fn parse(text: &OsString) -> Result<Self, String> {
        let bytes = text.as_bytes();
        let split = bytes.iter().position(|byte| *byte == b':');
        let (method, rest) = split.map_or((bytes, &b""[..]), |at| (&bytes[..at], &bytes[at + 1..]));
        let rest = OsString::from_vec(rest.to_vec());
        match method {
            b"reflink" | b"copy" | b"nbd" | b"exec" if rest.is_empty() => {
                Err(format!("'{}' lacks what follows the colon: give {METHODS}", text.to_string_lossy()))
            }
            b"reflink" => Ok(Method::Reflink(rest.into())),
            b"copy" => Ok(Method::Copy(rest.into())),
            b"nbd" => Ok(Method::Nbd(rest.into())),
            b"exec" => Ok(Method::Exec(rest)),
            b"rbd" if rest.is_empty() => Ok(Method::Rbd(None)),
            b"rbd" => match rest.to_str().filter(|name| !name.contains(['@', '/'])) {
                Some(name) => Ok(Method::Rbd(Some(name.to_owned()))),
                None => Err(format!("'{}' is no name for a snapshot: UTF-8 without @ and /", text.to_string_lossy())),
            },
            _ => Err(format!("'{}' is no way to take a snapshot: give {METHODS}", text.to_string_lossy())),
        }
    }

    /// Returns the method's name in the receipt.
    pub fn name(&self) -> &'static str {
        match self {
            Method::Reflink(_) => "reflink",
            Method::Copy(_) => "copy",
            Method::Nbd(_) => "nbd",
            Method::Rbd(_) => "rbd",
            Method::Exec(_) => "exec",
        }
    }
}

/// How the guest's agent is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentAddress {
    /// The socket of QEMU's guest agent channel.
    Socket(PathBuf),
    /// A libvirt domain: its name, id or UUID.
    Domain(String),
}

impl fmt::Display for AgentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AgentAddress::Socket(path) => write!(f, "the guest agent at '{}'", path.display()),
            AgentAddress::Domain(name) => write!(f, "the guest agent of libvirt's domain '{name}'"),
        }
    }
}

/// The options of `virtioblkctl snapshot`.
#[derive(Clone, Debug)]
pub struct SnapshotPlan {
    /// The control sockets, one for each disk.
    pub disks: Vec<PathBuf>,
    /// The level to reach.
    pub level: Consistency,
    /// The methods: one for each disk, or one for all.
    pub methods: Vec<Method>,
    /// The agent that freezes the guest's filesystems.
    pub agent: Option<AgentAddress>,
    /// The directory of the host's hooks.
    pub hooks: Option<PathBuf>,
    /// Continue with a weaker level if `level` is not reached.
    pub or_weaker: bool,
    /// How long the disks may take until all of them are still.
    pub timeout: Duration,
    /// How long the guest's freeze and each hook may take.
    pub freeze_timeout: Duration,
    /// The longest time for which the disks may be held.
    pub lease: Duration,
    /// The bandwidth limit of each copy, in bytes a second; 0: no limit.
    pub bandwidth: u64,
    /// Compute the SHA-256 of each snapshot.
    pub digest: bool,
    /// Do not wait for the end of copies.
    pub background: bool,
    /// Show the progress of copies on standard error.
    pub progress: bool,
    /// The name of each disk's export.
    pub export_names: Vec<String>,
    /// An export ends when no client has been connected for this long.
    pub idle: Duration,
    /// The most bytes of old data that an export keeps; `None`: the daemon decides.
    pub scratch_size: Option<u64>,
}

/// What the methods need to know of a disk's image.
#[derive(Clone, Debug)]
pub struct DiskImage {
    /// The path of the file or block device. `None`: the image has none.
    pub path: Option<PathBuf>,
    /// The image's store makes snapshots, which is then the default method.
    pub makes_snapshots: bool,
}

impl SnapshotPlan {
    /// Checks that the options can be combined. The error names those that cannot, and how to fix it.
    pub fn check(&self) -> Result<(), String> {
        let is_exec = |method: &Method| matches!(method, Method::Exec(_));
        let is_nbd = |method: &Method| matches!(method, Method::Nbd(_));
        let by_daemon = |method: &Method| matches!(method, Method::Copy(_)) || is_nbd(method);
        let all_copies = !self.methods.is_empty() && self.methods.iter().all(by_daemon);
        check_disks(&self.disks)?;
        if self.methods.iter().any(is_exec) && self.methods.len() > 1 {
            return Err("exec: runs once for all disks: give it alone, as the only --to".into());
        }
        if self.methods.len() > 1 && self.methods.len() != self.disks.len() {
            let (methods, disks) = (self.methods.len(), self.disks.len());
            return Err(format!(
                "{methods} --to for {}: give one for each disk, in their order, or one for all",
                count(disks as u64, "disk")
            ));
        }
        if self.digest && self.methods.iter().any(is_exec) {
            return Err("--digest is not possible with exec:, which keeps to itself what it makes".into());
        }
        let is_rbd = |method: &Method| matches!(method, Method::Rbd(_));
        if self.digest && (self.methods.is_empty() || self.methods.iter().any(is_rbd)) {
            return Err("--digest is for reflink: and copy:, which make files: Ceph keeps its own checksums".into());
        }
        if self.digest && self.methods.iter().any(is_nbd) {
            return Err(
                "--digest is for reflink: and copy:, which make files: have the client of nbd: compute it".into()
            );
        }
        if self.bandwidth != 0 && !all_copies {
            return Err("--bandwidth limits copy: and nbd: alone; the other ways copy nothing".into());
        }
        if self.background && !all_copies {
            return Err("--background is for copy: and nbd: alone; the other ways are done at the instant".into());
        }
        check_agent(self.level, self.agent.as_ref())
    }

    /// Returns the method for each disk, with `{}` replaced, paths absolute and snapshots named.
    pub fn methods(&self, disks: &[DiskImage], default_name: &str) -> Result<Vec<Method>, String> {
        let mut resolved: Vec<Method> = Vec::new();
        for (at, DiskImage { path: image, makes_snapshots }) in disks.iter().enumerate() {
            let shown = self.disks.get(at).map(|disk| disk.display().to_string()).unwrap_or_default();
            let method = match self.methods.as_slice() {
                [] if *makes_snapshots => &Method::Rbd(None),
                [] => {
                    return Err(format!("how to take the snapshot of '{shown}' is missing: give --to with {METHODS}"));
                }
                [only] => only,
                methods => &methods[at],
            };
            let fill = |path: &Path| absolute(path, image.as_deref());
            let method = match method {
                Method::Reflink(path) => Method::Reflink(fill(path)?),
                Method::Copy(path) => Method::Copy(fill(path)?),
                Method::Nbd(path) => Method::Nbd(fill(path)?),
                Method::Rbd(_) if !makes_snapshots => {
                    return Err(format!("the disk behind '{shown}' is no Ceph RBD image: give it another --to"));
                }
                Method::Rbd(name) => Method::Rbd(Some(name.clone().unwrap_or_else(|| default_name.to_owned()))),
                Method::Exec(command) => Method::Exec(command.clone()),
            };
            if let Method::Reflink(path) | Method::Copy(path) | Method::Nbd(path) = &method
                && resolved
                    .iter()
                    .any(|other| matches!(other, Method::Reflink(o) | Method::Copy(o) | Method::Nbd(o) if o == path))
            {
                return Err(format!(
                    "two disks would go to '{}': put {{}} into --to, which becomes the image's file name, or give one \
                     --to a disk",
                    path.display()
                ));
            }
            if let Method::Reflink(path) | Method::Copy(path) = &method {
                check_partial(path, disks.iter().filter_map(|disk| disk.path.as_deref()))?;
            }
            resolved.push(method);
        }
        Ok(resolved)
    }
}

/// Returns the default name of a snapshot, the same for all disks: `virtioblk-20261122T055212.345Z`. `now`: the time
/// since the epoch.
pub fn default_name(now: Duration) -> String {
    format!("virtioblk-{}", crate::base::logging::utc(now).replace([':', '-'], ""))
}

/// Checks that at least one disk is named, and none twice.
pub fn check_disks(disks: &[PathBuf]) -> Result<(), String> {
    if disks.is_empty() {
        return Err("no disk is named: give --disk with its name or control socket, or --domain DOMAIN".into());
    }
    for (at, disk) in disks.iter().enumerate() {
        if disks[..at].iter().any(|other| same(other, disk)) {
            return Err(format!("the disk '{}' is named twice: name each once", disk.display()));
        }
    }
    Ok(())
}

/// Fails if the level needs an agent and there is none.
pub fn check_agent(level: Consistency, agent: Option<&AgentAddress>) -> Result<(), String> {
    if level == Consistency::Crash || agent.is_some() {
        return Ok(());
    }
    Err(format!(
        "level {} needs the guest's agent: give --qga SOCKET, or --libvirt DOMAIN where libvirt has the channel",
        level.name()
    ))
}

/// Fails if an image has the name of the incomplete snapshot at `path`: PATH.partial.
fn check_partial<'a>(path: &Path, mut images: impl Iterator<Item = &'a Path>) -> Result<(), String> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    match images.find(|image| same(image, &partial)) {
        None => Ok(()),
        Some(image) => Err(format!(
            "a snapshot at '{}' is called '{}' until it is complete, and that is the name of a disk's image: choose \
             another name for the snapshot",
            path.display(),
            image.display()
        )),
    }
}

fn same(one: &Path, other: &Path) -> bool {
    one == other || matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// Returns `path` as an absolute path, with `{}` replaced.
fn absolute(path: &Path, image: Option<&Path>) -> Result<PathBuf, String> {
    let shown = path.display();
    let bytes = path.as_os_str().as_bytes();
    let mut filled = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(at) = rest.windows(2).position(|two| two == b"{}") {
        let name = image.and_then(Path::file_name).ok_or_else(|| {
            format!("'{shown}' has {{}} in it, but the disk has no image with a file name: write the name out")
        })?;
        filled.extend_from_slice(&rest[..at]);
        filled.extend_from_slice(name.as_bytes());
        rest = &rest[at + 2..];
    }
    filled.extend_from_slice(rest);
    let filled = PathBuf::from(OsString::from_vec(filled));
    if filled.as_os_str().as_bytes().ends_with(b"/") || filled.is_dir() {
        return Err(format!("'{}' is a directory: name a file in it, for example with {{}}", filled.display()));
    }
    std::path::absolute(&filled).map_err(|error| format!("'{}' has no absolute path: {error}", filled.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(disks: &[&str], methods: &[&str]) -> SnapshotPlan {
        SnapshotPlan {
            disks: disks.iter().map(PathBuf::from).collect(),
            level: Consistency::Crash,
            methods: methods.iter().map(|method| Method::parse(&OsString::from(method)).unwrap()).collect(),
            agent: None,
            hooks: None,
            or_weaker: false,
            timeout: Duration::from_secs(10),
            freeze_timeout: Duration::from_secs(30),
            lease: Duration::from_secs(30),
            bandwidth: 0,
            digest: false,
            background: false,
            progress: false,
            export_names: vec![],
            idle: Duration::from_secs(60),
            scratch_size: None,
        }
    }

    #[test]
    fn options_that_cannot_be_combined_are_refused_with_a_fix() {
        let base = || plan(&["/a", "/b"], &["copy:/x/{}"]);
        assert_eq!(base().check(), Ok(()));
        let cases = [
            (plan(&[], &["copy:/x"]), "--disk"),
            (plan(&["/a", "/a"], &["copy:/x"]), "twice"),
            (SnapshotPlan { digest: true, ..plan(&["/a"], &[]) }, "--digest"),
            (SnapshotPlan { digest: true, ..plan(&["/a", "/b"], &["rbd", "copy:/x"]) }, "--digest"),
            (SnapshotPlan { background: true, ..plan(&["/a"], &[]) }, "--background"),
            (plan(&["/a", "/b"], &["copy:/x", "exec:true"]), "alone"),
            (plan(&["/a", "/b", "/c"], &["copy:/x", "copy:/y"]), "one for each disk"),
            (SnapshotPlan { digest: true, ..plan(&["/a"], &["exec:true"]) }, "--digest"),
            (SnapshotPlan { digest: true, ..plan(&["/a"], &["nbd:/x"]) }, "--digest"),
            (SnapshotPlan { bandwidth: 1, ..plan(&["/a"], &["reflink:/x"]) }, "--bandwidth"),
            (SnapshotPlan { background: true, ..plan(&["/a", "/b"], &["reflink:/x", "copy:/y"]) }, "--background"),
            (SnapshotPlan { level: Consistency::Filesystem, ..base() }, "--qga"),
            (SnapshotPlan { level: Consistency::Application, hooks: Some("/h".into()), ..base() }, "--libvirt"),
        ];
        for (plan, word) in cases {
            let error = plan.check().expect_err(word);
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn methods_are_parsed() {
        let method = |text: &str| Method::parse(&OsString::from(text));
        assert_eq!(method("reflink:/a:b"), Ok(Method::Reflink("/a:b".into())));
        assert_eq!(method("nbd:/run/b.sock"), Ok(Method::Nbd("/run/b.sock".into())));
        assert_eq!(method("exec:lvcreate -s"), Ok(Method::Exec("lvcreate -s".into())));
        assert_eq!(method("rbd:monday"), Ok(Method::Rbd(Some("monday".into()))));
        assert_eq!((method("rbd"), method("rbd:")), (Ok(Method::Rbd(None)), Ok(Method::Rbd(None))));
        assert!(method("rbd:a@b").unwrap_err().contains("without @"));
        for bad in ["", "reflink", "reflink:", "nbd:", "zfs:/a", "exec:"] {
            assert!(method(bad).expect_err(bad).contains("exec:COMMAND"));
        }
    }

    #[test]
    fn braces_in_a_target_become_the_images_name() {
        let file = |path: &str| DiskImage { path: Some(path.into()), makes_snapshots: false };
        let disks = [file("/i/a.raw"), file("/i/b.raw")];
        let methods = plan(&["/a", "/b"], &["copy:/nowhere/x-{}-{}"]).methods(&disks, "n").unwrap();
        assert_eq!(
            methods,
            [Method::Copy("/nowhere/x-a.raw-a.raw".into()), Method::Copy("/nowhere/x-b.raw-b.raw".into())]
        );
        let same = plan(&["/a", "/b"], &["copy:/nowhere/x"]).methods(&disks, "n").unwrap_err();
        assert!(same.contains("{}"), "{same}");
        let nameless = plan(&["/a"], &["reflink:/nowhere/{}"])
            .methods(&[DiskImage { path: None, makes_snapshots: false }], "n")
            .unwrap_err();
        assert!(nameless.contains("no image"), "{nameless}");
        for method in ["copy:/i/a", "reflink:/i/a"] {
            let partial = plan(&["/a", "/b"], &["copy:/x", method]).methods(&[file("/i/a.partial"), file("/i/b")], "n");
            assert!(partial.clone().is_err_and(|why| why.contains("another name")), "{partial:?}");
        }
        assert!(plan(&["/a"], &["copy:/nowhere/"]).methods(&disks[..1], "n").unwrap_err().contains("directory"));
        assert!(plan(&["/a"], &["copy:/tmp"]).methods(&disks[..1], "n").unwrap_err().contains("directory"));
    }

    #[test]
    fn a_disk_whose_store_makes_snapshots_needs_no_method() {
        let disks = [
            DiskImage { path: None, makes_snapshots: true },
            DiskImage { path: Some("/i/b.raw".into()), makes_snapshots: false },
        ];
        let rbd = |name: &str| Method::Rbd(Some(name.into()));
        assert_eq!(plan(&["/a"], &[]).methods(&disks[..1], "n"), Ok(vec![rbd("n")]));
        let missing = plan(&["/a", "/b"], &[]).methods(&disks, "n").unwrap_err();
        assert!(missing.contains("'/b'") && missing.contains("reflink:PATH"), "{missing}");
        let mixed = plan(&["/a", "/b"], &["rbd", "copy:/nowhere/{}"]).methods(&disks, "n").unwrap();
        assert_eq!(mixed, [rbd("n"), Method::Copy("/nowhere/b.raw".into())]);
        let other = plan(&["/a", "/b"], &["rbd:m"]).methods(&disks, "n").unwrap_err();
        assert!(other.contains("'/b'") && other.contains("no Ceph RBD image"), "{other}");
        assert_eq!(default_name(Duration::from_millis(1_795_326_732_345)), "virtioblk-20261122T055212.345Z");
    }
}
