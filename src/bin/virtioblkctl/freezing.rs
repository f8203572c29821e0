//! The options that `snapshot` and `attend` share: which disks, and who freezes their guest.

use std::path::PathBuf;

use clap::Args;
use virtioblkd::internal::snapshot::plan::{AgentAt, Consistency};

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
    /// Where the guest's agent is, if it is asked. `domain`: that of --domain, whose agent is asked where the level needs one.
    pub fn agent(&self, level: Consistency, domain: Option<&str>) -> Option<AgentAt> {
        let named = self.qga.clone().map(AgentAt::Socket).or(self.libvirt.clone().map(AgentAt::Domain));
        let own = domain.filter(|_| level != Consistency::Crash).map(|domain| AgentAt::Domain(domain.to_owned()));
        named.or(own)
    }
}
