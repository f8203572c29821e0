//! `virtioblkctl proxmox-hook` and `proxmox-args`: Proxmox VE calls the first before a VM starts and after it has ended.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::clean;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::host::hook::Host;
use virtioblkd::internal::host::proxmox::{Directories, Machine};

use crate::print;

/// The VM, and where what belongs to it is.
#[derive(Args)]
pub(crate) struct Vm {
    /// The VM's id
    #[arg(value_parser = clap::value_parser!(u32).range(1..1_000_000_000))]
    vmid: u32,
    /// The directory of the VMs' disks, VMID.xml
    #[arg(long, value_name = "DIR", default_value = "/etc/virtioblkd/proxmox")]
    disks: PathBuf,
    /// The directory of Proxmox VE's configurations of VMs, VMID.conf
    #[arg(long, value_name = "DIR", default_value = "/etc/pve/qemu-server")]
    machines: PathBuf,
}

impl Vm {
    fn directories(&self) -> Directories {
        Directories { disks: self.disks.clone(), machines: self.machines.clone() }
    }
}

/// The arguments that qemu-server passes to a hookscript.
#[derive(Args)]
pub(crate) struct ProxmoxHook {
    #[command(flatten)]
    vm: Vm,
    /// pre-start or post-stop; nothing is done at post-start and pre-stop, and at others a message says so
    phase: String,
}

/// The VM's host. Its QEMU runs as root, which needs no group to reach the sockets.
fn host() -> Result<Host, String> {
    Host::of_this_user().map(|host| Host { qemu_group: None, ..host })
}

/// qemu-server shows what a hookscript prints on standard error in the task's log.
pub(crate) fn run(options: &ProxmoxHook) -> ExitCode {
    let directories = options.vm.directories();
    let machine = Machine::new(options.vm.vmid, &directories);
    // As qemu-server sets it (vm_start_nolock).
    let is_migrated = std::env::var_os("PVE_MIGRATED_FROM").is_some_and(|node| !node.is_empty());
    let result = match options.phase.as_str() {
        "pre-start" => host().and_then(|host| machine.before_start(&host, is_migrated)),
        "post-stop" => host().and_then(|host| machine.after_stop(&host)),
        "post-start" | "pre-stop" => Ok(()),
        phase => {
            logging::message(format_args!(
                "proxmox-hook does nothing at the phase '{}': only pre-start and post-stop concern the VM's disks",
                clean(phase)
            ));
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::message(error);
            ExitCode::FAILURE
        }
    }
}

/// Prints the arguments for the VM's `args:`.
pub(crate) fn print_arguments(vm: &Vm) -> Result<(), Failure> {
    let directories = vm.directories();
    let arguments = host().and_then(|host| Machine::new(vm.vmid, &directories).arguments(&host));
    print(&format!("{}\n", clean(&arguments.map_err(|error| Failure::new("proxmox", error))?)))
}
