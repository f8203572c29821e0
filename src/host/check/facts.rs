//! What the host says of a domain's disks. Nothing here changes anything, and every question is bounded in time.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::super::domain::{self, Domain, QemuImage};
use super::super::hook::Host;
use super::super::listing::{self, Directories};
use super::super::metadata::{self, DiskOptions};
use super::super::virsh;
use super::apparmor::{self, MissingRule};
use crate::backend::image_format::{self, ImageEnds};
use crate::snapshot::child::{CommandEnd, output};

/// How long a look at an image may take, whose storage may hang.
const IMAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the host says.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Each disk's image, by its target.
    pub images: Vec<(String, ImageFact)>,
    /// Which file or device each disk's image is, by its target. Two names of one image are equal here.
    pub identities: Vec<(String, String)>,
    /// Directories of the domain's sockets that do not exist, and that the hook does not make.
    pub missing_directories: Vec<PathBuf>,
    /// vhost-user sockets that daemons of this host have.
    pub served: Vec<PathBuf>,
    /// libvirt's hook is installed.
    pub has_hook: bool,
    /// The user that the daemons run as, where the host lacks it.
    pub missing_user: Option<String>,
    /// AppArmor is on: whether the rule for our sockets is installed.
    pub apparmor_rule: Option<bool>,
    /// AppArmor is on, and does not let libvirt's daemon execute the hook.
    pub apparmor_hook: Option<MissingRule>,
    /// SELinux enforces: the label of the sockets' directory.
    pub selinux_label: Option<String>,
    /// QEMU's version, as libvirt says it.
    pub qemu: Option<(u32, u32)>,
}

/// What is known of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageFact {
    /// Its daemon can open it.
    Usable,
    /// It does not exist.
    Missing(PathBuf),
    /// The daemon's user may not open it.
    NotUsable {
        /// The image.
        path: PathBuf,
        /// The user.
        user: String,
    },
    /// Its header is another format's.
    OfAnotherFormat {
        /// The image.
        path: PathBuf,
        /// The format.
        format: String,
    },
    /// The user that its element names does not exist.
    NoUser(String),
    /// It can be opened, and no disk can be served from it.
    Unsuitable {
        /// The image.
        path: PathBuf,
        /// What it is, as the end of a sentence that begins with "it".
        why: String,
        /// What to do.
        fix: String,
    },
    /// Why it was not looked at.
    Unchecked(String),
}

impl Facts {
    /// Asks this host about the disks of this description. One that cannot be read has none.
    pub fn of_this_host(host: &Host, directories: &Directories, xml: &str) -> Self {
        let disks = metadata::of_xml(xml).unwrap_or_default();
        let domain = Domain::parse(xml);
        let sockets = domain.iter().flat_map(|domain| domain.disks.iter().map(|disk| Path::new(&disk.socket)));
        let user = host.daemon_user;
        let images = disks.iter().map(|disk| (disk.target.clone(), image(disk, user)));
        let identity = |(target, path): (String, PathBuf)| Some((target, stat(&path).ok()??.identity));
        let ours = disks.iter().filter_map(|disk| Some((disk.target.clone(), path(disk)?.to_owned())));
        let paths = qemu_images(xml).into_iter().map(|image| (image.target, PathBuf::from(image.name)));
        let paths = paths.filter(|(_, path)| path.is_absolute()).chain(ours);
        let (hook, rules) = (hook(), Path::new(apparmor::RULES));
        // A user's own libvirt is not confined.
        let confines = rustix::process::geteuid().is_root() && apparmor::is_on();
        Facts {
            images: images.collect(),
            identities: paths.filter_map(identity).collect(),
            missing_directories: missing_directories(sockets, &host.places.sockets),
            served: served(directories),
            has_hook: hook.is_some(),
            missing_user: user.filter(|user| !exists(user)).map(str::to_owned),
            apparmor_rule: confines.then(|| apparmor::has_socket_rule(rules)).flatten(),
            apparmor_hook: hook.filter(|_| confines).and_then(|hook| apparmor::missing_hook_rule(rules, &hook)),
            selinux_label: selinux_label(&host.places.sockets),
            qemu: qemu(),
        }
    }
}

fn qemu_images(xml: &str) -> Vec<QemuImage> {
    let document = domain::document(xml);
    let images = |document: &roxmltree::Document<'_>| domain::domain_node(document).map(domain::qemu_images).ok();
    document.ok().as_ref().and_then(images).unwrap_or_default()
}

/// A user by name or number: a number needs no entry.
fn exists(user: &str) -> bool {
    user.parse::<u32>().is_ok() || nix::unistd::User::from_name(user).is_ok_and(|user| user.is_some())
}

fn missing_directories<'a>(sockets: impl Iterator<Item = &'a Path>, made_by_hook: &Path) -> Vec<PathBuf> {
    let directories = sockets.filter(|path| path.is_absolute()).filter_map(Path::parent);
    let mut missing: Vec<PathBuf> = directories.filter(|path| *path != made_by_hook).map(Path::to_owned).collect();
    missing.sort();
    missing.dedup();
    missing.retain(|path| !path.is_dir());
    missing
}

fn served(directories: &Directories) -> Vec<PathBuf> {
    let found = listing::find(directories).unwrap_or_default();
    let states = listing::states(&found);
    states.iter().filter_map(|state| state.vhost_socket().map(Path::to_owned)).collect()
}

/// The program that is libvirt's hook here, with links resolved. Any program whose name ends as ours does: see
/// `libvirt_hook::arguments`.
fn hook() -> Option<PathBuf> {
    let configuration = match rustix::process::geteuid().is_root() {
        true => Some(PathBuf::from("/etc/libvirt")),
        false => std::env::var_os("HOME").map(|home| Path::new(&home).join(".config/libvirt")),
    };
    let entries = configuration.and_then(|path| fs::read_dir(path.join("hooks/qemu.d")).ok());
    let mut paths = entries.into_iter().flatten().flatten().map(|entry| entry.path());
    paths.find(|path| is_hook(path)).map(|path| path.canonicalize().unwrap_or(path))
}

/// A link whose program is gone, or a program that cannot be run, is no hook.
fn is_hook(path: &Path) -> bool {
    let is_program = |metadata: fs::Metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
    path.as_os_str().as_encoded_bytes().ends_with(b"virtioblkd") && fs::metadata(path).is_ok_and(is_program)
}

fn option<'a>(disk: &'a DiskOptions, key: &str) -> Option<&'a str> {
    disk.options.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
}

fn path(disk: &DiskOptions) -> Option<&Path> {
    option(disk, "blk-file").map(Path::new)
}

fn image(disk: &DiskOptions, user: Option<&str>) -> ImageFact {
    let option = |key: &str| option(disk, key);
    let Some(path) = path(disk) else {
        return ImageFact::Unchecked("it is Ceph's".into());
    };
    let mut is_there = Command::new("test");
    is_there.arg("-e").arg(path);
    match run(is_there) {
        Ok(true) => {}
        Ok(false) => return ImageFact::Missing(path.to_owned()),
        Err(why) => return ImageFact::Unchecked(why),
    }
    if let Some(fact) = unsuitable(path, option("logical-block-size")) {
        return fact;
    }
    match (option("user"), user) {
        (Some(user), _) if !exists(user) => return ImageFact::NoUser(user.to_owned()),
        (None, Some(user)) if !exists(user) => return ImageFact::Unchecked("its daemon's user does not exist".into()),
        _ => {}
    }
    let mut test = vec!["-r", "PATH"];
    if option("read-only") != Some("true") {
        test.extend(["-a", "-w", "PATH"]);
    }
    let own_path = path.as_os_str();
    let fill = |word: &&str| if *word == "PATH" { own_path.to_owned() } else { (*word).into() };
    let user = option("user").or(user);
    let mut command = match user {
        Some(user) => {
            let mut command = Command::new("setpriv");
            command.args([&format!("--reuid={user}"), &format!("--regid={}", group_of(user)), "--init-groups", "test"]);
            command
        }
        None => Command::new("test"),
    };
    command.args(test.iter().map(fill));
    match run(command) {
        Err(why) => ImageFact::Unchecked(why),
        Ok(false) => ImageFact::NotUsable { path: path.to_owned(), user: user.unwrap_or("of this session").to_owned() },
        Ok(true) if option("format") == Some("raw") => ImageFact::Usable,
        Ok(true) => format(path),
    }
}

/// What `stat` says of a file.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    kind: String,
    size: u64,
    identity: String,
}

/// Asks in a process of its own: the storage may hang. `None`: the answer is not understood.
fn stat(path: &Path) -> Result<Option<Stat>, String> {
    let mut command = Command::new("stat");
    command.args(["-L", "-c", "%d:%i|%t:%T|%s|%F", "--"]).arg(path).env("LC_ALL", "C");
    match output(command, Instant::now() + IMAGE_TIMEOUT, None) {
        Ok((CommandEnd::Status(status), text, _)) if status.success() => Ok(parsed_stat(&text)),
        Ok(_) => Ok(None),
        Err(error) => Err(format!("stat: {error}")),
    }
}

fn parsed_stat(text: &str) -> Option<Stat> {
    let mut parts = text.trim_end().split('|');
    let (inode, device, size, kind) = (parts.next()?, parts.next()?, parts.next()?.parse().ok()?, parts.next()?);
    // A device is one device whatever file stands for it.
    let identity = if kind == "block special file" { format!("device {device}") } else { inode.to_owned() };
    Some(Stat { kind: kind.to_owned(), size, identity })
}

/// What the daemon would refuse at its start: see `backend::file::open`.
fn unsuitable(path: &Path, logical_block_size: Option<&str>) -> Option<ImageFact> {
    let stat = stat(path).ok()??;
    let block = logical_block_size.and_then(|size| size.parse().ok()).filter(|size| *size > 0).unwrap_or(512);
    let (why, fix) = match stat.kind.as_str() {
        "block special file" => return None,
        "regular file" | "regular empty file" if stat.size == 0 => {
            ("is empty".to_owned(), "give it a size (truncate -s 10G FILE), or correct file= in <metadata>".to_owned())
        }
        "regular file" if !stat.size.is_multiple_of(block) => (
            format!("has {} bytes, which is no multiple of the {block}-byte logical blocks", stat.size),
            format!("round it up: truncate -s %{block} FILE"),
        ),
        "regular file" => return None,
        other => (format!("is a {other}, and neither a file nor a block device"), "correct file= in <metadata>".into()),
    };
    Some(ImageFact::Unsuitable { path: path.to_owned(), why, fix })
}

fn group_of(user: &str) -> String {
    let found = nix::unistd::User::from_name(user).ok().flatten();
    found.map_or_else(|| user.to_owned(), |user| user.gid.to_string())
}

/// Reads the header in a process of its own: the storage may hang.
fn format(path: &Path) -> ImageFact {
    let mut command = Command::new("od");
    command.args(["-An", "-v", "-tx1", "-N128"]).arg(path);
    let text = match output(command, Instant::now() + IMAGE_TIMEOUT, None) {
        Ok((CommandEnd::Status(status), text, _)) if status.success() => text,
        _ => return ImageFact::Usable,
    };
    let head = text.split_whitespace().filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    match image_format::recognize(&ImageEnds { head, tail: Vec::new() }) {
        Some(format) => ImageFact::OfAnotherFormat { path: path.to_owned(), format: format.to_owned() },
        None => ImageFact::Usable,
    }
}

/// Whether a command succeeds. The error: it did not end, or could not be run.
fn run(command: Command) -> Result<bool, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    match output(command, Instant::now() + IMAGE_TIMEOUT, None) {
        Ok((CommandEnd::Status(status), ..)) if status.code() == Some(127) => Err(format!("{name} cannot be run")),
        Ok((CommandEnd::Status(status), ..)) => Ok(status.success()),
        Ok(_) => Err("its storage does not answer".into()),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

fn selinux_label(sockets: &Path) -> Option<String> {
    let enforced = fs::read_to_string("/sys/fs/selinux/enforce").ok()?;
    if enforced.trim() != "1" || !sockets.exists() {
        return None;
    }
    let mut label = [0u8; 256];
    let length = rustix::fs::getxattr(sockets, "security.selinux", &mut label).ok()?;
    Some(String::from_utf8_lossy(&label[..length]).trim_end_matches('\0').to_owned())
}

/// `Running hypervisor: QEMU 10.0.2`.
fn qemu() -> Option<(u32, u32)> {
    let text = virsh::run(&["version"], virsh::QUERY_TIMEOUT).ok()?;
    version(&text)
}

fn version(text: &str) -> Option<(u32, u32)> {
    let line = text.lines().find(|line| line.contains("QEMU") && line.starts_with("Running hypervisor"))?;
    let mut numbers = line.rsplit(' ').next()?.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_version_is_libvirts_word() {
        let text = "Using API: QEMU 11.3.0\nRunning hypervisor: QEMU 7.2.15\n";
        assert_eq!(version(text), Some((7, 2)));
        assert_eq!(version("Running hypervisor: Xen 4.1.0"), None);
    }

    fn disk(options: &[(&str, &str)]) -> DiskOptions {
        let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        DiskOptions { target: "vda".into(), options: options.collect() }
    }

    #[test]
    fn an_image_that_no_disk_can_be_served_from_is_unsuitable() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, size: u64| {
            let path = directory.path().join(name);
            fs::File::create(&path).and_then(|file| file.set_len(size)).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (empty, odd, good) = (file("empty", 0), file("odd", 513), file("good", 4096 + 512));
        let why = |path: &str, more: &[(&str, &str)]| match image(&disk(&[&[("blk-file", path)], more].concat()), None)
        {
            ImageFact::Unsuitable { why, .. } => why,
            other => format!("{other:?}"),
        };
        assert_eq!(why(&empty, &[]), "is empty");
        assert!(why(&odd, &[]).contains("513 bytes"));
        assert_eq!(why(&good, &[]), "Usable");
        assert!(why(&good, &[("logical-block-size", "4096")]).contains("4096-byte"));
        assert!(why(directory.path().to_str().unwrap(), &[]).contains("is a directory"));
        assert!(why("/dev/null", &[]).contains("character special file"));
        // A host without the daemons' user has a finding of its own, and this one.
        let missing = image(&disk(&[("blk-file", "/no/such/image")]), Some("no-such-user"));
        assert_eq!(missing, ImageFact::Missing("/no/such/image".into()));
        assert_eq!(why(&good, &[("user", "no-such-user")]), r#"NoUser("no-such-user")"#);
    }

    #[test]
    fn two_names_of_one_image_have_one_identity() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("a"), "a").unwrap();
        fs::write(path("b"), "b").unwrap();
        fs::hard_link(path("a"), path("hard")).unwrap();
        std::os::unix::fs::symlink("a", path("soft")).unwrap();
        let identity = |name: &str| stat(&path(name)).unwrap().unwrap().identity;
        assert_eq!((identity("hard"), identity("soft")), (identity("a"), identity("a")));
        assert_ne!(identity("b"), identity("a"));
        let device = parsed_stat("5:9|fd:1|0|block special file\n").unwrap();
        assert_eq!(device.identity, "device fd:1");
    }

    #[test]
    fn a_hook_whose_program_is_gone_is_no_hook() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::os::unix::fs::symlink("/bin/sh", path("50-virtioblkd")).unwrap();
        std::os::unix::fs::symlink("/no/such/program", path("51-virtioblkd")).unwrap();
        std::os::unix::fs::symlink("/bin/sh", path("other")).unwrap();
        fs::write(path("52-virtioblkd"), "").unwrap();
        let found = ["50-virtioblkd", "51-virtioblkd", "52-virtioblkd", "other"].map(|name| is_hook(&path(name)));
        assert_eq!(found, [true, false, false, false]);
    }

    #[test]
    fn a_sockets_directory_is_missing_unless_the_hook_makes_it() {
        let sockets = ["/no/such/a.sock", "/no/such/b.sock", "/no/hook/c.sock", "/tmp/d.sock", "relative"];
        let missing = missing_directories(sockets.iter().map(Path::new), Path::new("/no/hook"));
        assert_eq!(missing, [PathBuf::from("/no/such")]);
    }
}
