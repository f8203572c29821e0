//! Proxmox VE's hookscript: starts a VM's daemons before the VM and ends them after it.
//!
//! qemu-server calls it as `HOOKSCRIPT VMID PHASE` (`PVE::GuestHelpers::exec_hookscript`). Only a failure at `pre-start`, which
//! comes before QEMU (`vm_start_nolock`), stops anything. `post-stop` comes after QEMU, whatever ended it (`vm_stop_cleanup`,
//! `qm cleanup`), but for the source of a live migration, where nothing is called. On a migration's target, `PVE_MIGRATED_FROM`
//! names the source.
//!
//! A VM's disks are described by our element (`metadata`), in a file of the VM's own, because a VM's configuration has no
//! place for it. QEMU gets its devices by `args:` of that configuration.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::domain::{Domain, read_description};
use super::hook::{self, Disk, Host};
use super::metadata::{self, NAMESPACE};
use crate::base::trust;

/// The memory of a VM whose configuration does not say (`$memory_fmt` of PVE::QemuServer::Memory), in MiB.
const DEFAULT_MEMORY: u64 = 512;

/// Where Proxmox VE and the administrator keep what belongs to a VM.
#[derive(Clone, Debug)]
pub struct Directories {
    /// Descriptions of disks, `VMID.xml`.
    pub disks: PathBuf,
    /// Proxmox VE's configurations, `VMID.conf`.
    pub machines: PathBuf,
}

/// A VM of this node.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    id: u32,
    directories: &'a Directories,
}

impl<'a> Machine<'a> {
    /// The VM with this id.
    pub fn new(id: u32, directories: &'a Directories) -> Self {
        Machine { id, directories }
    }

    /// Starts the daemons of the VM's disks, and returns when they listen. `is_migrated`: another node's daemons still have
    /// the images.
    pub fn before_start(&self, host: &Host, is_migrated: bool) -> Result<(), String> {
        let disks = self.disks(host)?;
        self.check_arguments(&disks)?;
        hook::start_disks(host, &disks, is_migrated).map_err(|error| format!("VM {}: {error}", self.id))
    }

    /// Ends the daemons that were started for the VM.
    pub fn after_stop(&self, host: &Host) -> Result<(), String> {
        hook::end_disks(host, &self.domain(), |target| Some(self.socket(host, target)), hook::END_TIMEOUT)
    }

    /// The line `args:` for the VM's configuration that connects QEMU to its disks.
    pub fn arguments(&self, host: &Host) -> Result<String, String> {
        Ok(arguments(&self.disks(host)?, memory(&self.configuration()?)))
    }

    /// What stands for the VM where a libvirt domain is expected. A UUID of its own: its files have it in their names.
    fn domain(&self) -> Domain {
        Domain {
            name: self.id.to_string(),
            uuid: format!("00000000-0000-0000-0000-{:012}", self.id),
            has_shared_memory: true,
            disks: Vec::new(),
            other_targets: Vec::new(),
        }
    }

    fn disks(&self, host: &Host) -> Result<Vec<Disk>, String> {
        let path = self.directories.disks.join(format!("{}.xml", self.id));
        let named = |error: String| format!("VM {}: {}: {error}", self.id, path.display());
        let file = File::open(&path).map_err(|error| {
            named(format!("{error}: describe the VM's disks there (docs/proxmox.md), or remove the VM's hookscript"))
        })?;
        trust::check_open(&path, &file)?;
        let text = read_description(file).map_err(|error| format!("{} {error}", path.display()))?;
        let domain = self.domain();
        let described = metadata::of_element(&domain.name, &text).map_err(|error| named(error.to_string()))?;
        if described.is_empty() {
            return Err(named(format!("it describes no disk: put a <disk> into <disks xmlns='{NAMESPACE}'>")));
        }
        let disk = |options: metadata::DiskOptions| Disk {
            domain: domain.name.clone(),
            target: options.target.clone(),
            socket: self.socket(host, &options.target),
            places: host.places.disk(&domain, &options.target),
            options,
        };
        Ok(described.into_iter().map(disk).collect())
    }

    /// The vhost-user socket of a disk.
    fn socket(&self, host: &Host, target: &str) -> PathBuf {
        host.places.sockets.join(format!("{}-{target}.sock", self.id))
    }

    fn configuration(&self) -> Result<String, String> {
        let path = self.directories.machines.join(format!("{}.conf", self.id));
        fs::read_to_string(&path).map_err(|error| format!("VM {}: cannot read {}: {error}", self.id, path.display()))
    }

    /// A QEMU without these arguments would run without the disks; one whose memory is not shared would hang.
    fn check_arguments(&self, disks: &[Disk]) -> Result<(), String> {
        let configuration = self.configuration()?;
        let given = setting(&configuration, "args").unwrap_or_default();
        let fix = || {
            let wanted = arguments(disks, memory(&configuration));
            format!("give the VM these arguments, beside others that it has: qm set {} --args '{wanted}'", self.id)
        };
        let has_socket = |disk: &&Disk| given.contains(&format!("path={},", disk.socket.display()));
        if let Some(disk) = disks.iter().find(|disk| !has_socket(disk)) {
            return Err(format!("VM {}: its args do not connect QEMU to the disk {}: {}", self.id, disk.target, fix()));
        }
        // qemu-server itself shares the memory of a VM with huge pages or virtiofs (print_mem_object, config).
        let is_on = |key: &str| setting(&configuration, key).is_some_and(|value| value != "0");
        let is_shared = given.contains("share=on") || is_on("hugepages") || is_on("virtiofs0");
        match (is_shared, is_on("numa")) {
            (true, _) => Ok(()),
            (false, true) => Err(format!(
                "VM {}: with numa: 1 its memory is shared by huge pages only: qm set {0} --hugepages 2, or --numa 0",
                self.id
            )),
            (false, false) => Err(format!("VM {}: its memory is not shared: {}", self.id, fix())),
        }
    }
}

/// A setting of the VM that runs; those of its snapshots come after it (`parse_vm_config`).
fn setting<'a>(configuration: &'a str, key: &str) -> Option<&'a str> {
    let current = configuration.lines().take_while(|line| !line.starts_with('['));
    current.filter_map(|line| line.split_once(':')).find(|(name, _)| *name == key).map(|(_, value)| value.trim())
}

/// `memory: 2048` or `memory: current=2048`, in MiB.
fn memory(configuration: &str) -> u64 {
    let value = setting(configuration, "memory").unwrap_or_default();
    value.trim_start_matches("current=").parse().unwrap_or(DEFAULT_MEMORY)
}

fn arguments(disks: &[Disk], memory: u64) -> String {
    let mut words = format!(
        "-object memory-backend-memfd,id=virtioblkd-memory,size={memory}M,share=on -machine memory-backend=virtioblkd-memory"
    );
    for disk in disks {
        let (target, socket) = (&disk.target, path(&disk.socket));
        let queues = disk.option("num-queues").map(|queues| format!(",num-queues={queues}")).unwrap_or_default();
        words += &format!(
            " -chardev socket,id=virtioblkd-{target},path={socket},reconnect-ms=1000 -device \
             vhost-user-blk-pci,id=virtioblkd-{target}-disk,chardev=virtioblkd-{target}{queues}"
        );
    }
    words
}

/// A path in one of QEMU's options, where a comma stands twice.
fn path(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIGURATION: &str = "args: -cpu host\nmemory: 2048\nname: web\n\n[before]\nargs: -S\nmemory: 1\nnuma: 1\n";

    #[test]
    fn settings_are_those_of_the_machine_and_not_of_its_snapshots() {
        assert_eq!(setting(CONFIGURATION, "args"), Some("-cpu host"));
        assert_eq!((setting(CONFIGURATION, "numa"), memory(CONFIGURATION)), (None, 2048));
        assert_eq!((memory("memory: current=4096\n"), memory("name: a\n")), (4096, DEFAULT_MEMORY));
    }

    #[test]
    fn a_comma_in_a_path_is_no_end_of_an_option() {
        assert_eq!(path(Path::new("/run/a,b")), "/run/a,,b");
    }
}
