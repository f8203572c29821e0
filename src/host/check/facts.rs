//! What the host says of a domain's disks. Nothing here changes anything, and every question is bounded in time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::super::hook::Host;
use super::super::listing::{self, Directories};
use super::super::metadata::DiskOptions;
use super::super::virsh;
use crate::backend::image_format::{self, ImageEnds};
use crate::snapshot::child::{Ended, output};

/// How long a look at an image may take, whose storage may hang.
const IMAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the host says.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Each disk's image, by its target.
    pub images: Vec<(String, ImageFact)>,
    /// vhost-user sockets that daemons of this host have.
    pub served: Vec<PathBuf>,
    /// libvirt's hook is installed.
    pub has_hook: bool,
    /// The user that the daemons run as, where the host lacks it.
    pub missing_user: Option<String>,
    /// AppArmor is on: whether the rule for our sockets is installed.
    pub apparmor_rule: Option<bool>,
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
    /// Why it was not looked at.
    Unchecked(String),
}

impl Facts {
    /// Asks this host about these disks.
    pub fn of_this_host(host: &Host, directories: &Directories, disks: &[DiskOptions]) -> Self {
        let user = host.daemon_user;
        let exists = |user: &&str| nix::unistd::User::from_name(user).is_ok_and(|user| user.is_some());
        let image_of = |disk: &DiskOptions| (disk.target.clone(), image(disk, user));
        Facts {
            images: disks.iter().map(image_of).collect(),
            served: served(directories),
            has_hook: has_hook(),
            missing_user: user.filter(|user| !exists(user)).map(str::to_owned),
            apparmor_rule: apparmor_rule(),
            selinux_label: selinux_label(&host.places.sockets),
            qemu: qemu(),
        }
    }
}

fn served(directories: &Directories) -> Vec<PathBuf> {
    let found = listing::find(directories).unwrap_or_default();
    let states = listing::states(&found);
    let socket = |status: &serde_json::Value| status["daemon"]["vhost-socket"].as_str().map(PathBuf::from);
    states.iter().filter_map(|state| socket(state.status.as_ref()?)).collect()
}

/// A hook is any program there whose name ends as ours does: see `libvirt_hook::arguments`.
fn has_hook() -> bool {
    let configuration = match rustix::process::geteuid().is_root() {
        true => Some(PathBuf::from("/etc/libvirt")),
        false => std::env::var_os("HOME").map(|home| Path::new(&home).join(".config/libvirt")),
    };
    let entries = configuration.and_then(|path| fs::read_dir(path.join("hooks/qemu.d")).ok());
    let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.into_iter().any(|name| name.as_encoded_bytes().ends_with(b"virtioblkd"))
}

fn image(disk: &DiskOptions, user: Option<&str>) -> ImageFact {
    let option = |key: &str| disk.options.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
    let Some(path) = option("blk-file").map(Path::new) else {
        return ImageFact::Unchecked("it is Ceph's".into());
    };
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
    let mut exists = Command::new("test");
    exists.arg("-e").arg(own_path);
    command.args(test.iter().map(fill));
    match (run(exists), run(command)) {
        (Ok(false), _) => ImageFact::Missing(path.to_owned()),
        (Err(why), _) | (_, Err(why)) => ImageFact::Unchecked(why),
        (_, Ok(false)) => {
            ImageFact::NotUsable { path: path.to_owned(), user: user.unwrap_or("of this session").to_owned() }
        }
        (_, Ok(true)) if option("format") == Some("raw") => ImageFact::Usable,
        (_, Ok(true)) => format(path),
    }
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
        Ok((Ended::Status(status), text, _)) if status.success() => text,
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
        Ok((Ended::Status(status), ..)) if status.code() == Some(127) => Err(format!("{name} cannot be run")),
        Ok((Ended::Status(status), ..)) => Ok(status.success()),
        Ok(_) => Err("its storage does not answer".into()),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

fn apparmor_rule() -> Option<bool> {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled").ok()?;
    let is_libvirts = Path::new("/etc/apparmor.d/abstractions/libvirt-qemu").exists();
    (enabled.trim() == "Y" && is_libvirts)
        .then(|| Path::new("/etc/apparmor.d/abstractions/libvirt-qemu.d/virtioblkd").exists())
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
}
