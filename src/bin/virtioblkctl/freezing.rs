//! The options that `snapshot` and `attend` share: the disks, and how their guest is frozen.

use std::path::PathBuf;

use clap::Args;
use virtioblkd::internal::snapshot::plan::{AgentAddress, Consistency};

#[derive(Args)]
pub struct Freezing {
    /// Freeze the guest through the socket of its agent (qemu-ga)
    #[arg(long, value_name = "SOCKET", conflicts_with = "libvirt")]
    qga: Option<PathBuf>,
    /// Freeze the guest through virsh, if libvirt has the agent's channel of this domain
    #[arg(long, value_name = "DOMAIN")]
    libvirt: Option<String>,
    /// Run DIR/freeze before the freeze and DIR/thaw after the thaw, on the host
    #[arg(long, value_name = "DIR")]
    pub hooks: Option<PathBuf>,
}

impl Freezing {
    /// How to reach the guest's agent, if it is used. `domain`: the domain of --domain, whose agent is used if the level needs
    /// one.
    pub fn agent(&self, level: Consistency, domain: Option<&str>) -> Option<AgentAddress> {
        let named = self.qga.clone().map(AgentAddress::Socket).or(self.libvirt.clone().map(AgentAddress::Domain));
        let own = domain.filter(|_| level != Consistency::Crash).map(|domain| AgentAddress::Domain(domain.to_owned()));
        named.or(own)
    }
}
