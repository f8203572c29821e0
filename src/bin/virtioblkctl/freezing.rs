//! The options that `snapshot` and `attend` share: which disks, and who freezes their guest.

use std::path::PathBuf;

use clap::Args;
use virtioblkd::internal::snapshot::plan::AgentAt;

#[derive(Args)]
pub struct Freezing {
    /// The socket of the guest's agent
    #[arg(long, value_name = "SOCKET", conflicts_with = "libvirt")]
    qga: Option<PathBuf>,
    /// The libvirt domain, where libvirt has the agent's channel (through virsh)
    #[arg(long, value_name = "DOMAIN")]
    libvirt: Option<String>,
    /// Call DIR/freeze before and DIR/thaw after, on the host
    #[arg(long, value_name = "DIR")]
    pub hooks: Option<PathBuf>,
}

impl Freezing {
    /// Where the guest's agent is, if it is asked.
    pub fn agent(&self) -> Option<AgentAt> {
        self.qga.clone().map(AgentAt::Socket).or(self.libvirt.clone().map(AgentAt::Domain))
    }
}

/// The disks named with --disk, or the one that the global option names.
pub fn disks(named: &[PathBuf], control: Option<&PathBuf>) -> Vec<PathBuf> {
    if named.is_empty() { control.cloned().into_iter().collect() } else { named.to_vec() }
}
