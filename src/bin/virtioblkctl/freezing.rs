//! The options that `snapshot` and `attend` share: the disks, and how their guest is frozen.

use std::path::PathBuf;

use clap::Args;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::host::connection;
use virtioblkd::internal::snapshot::USAGE;
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
    /// Errors: libvirt is another host's, whose domain of this name is another guest.
    pub fn agent(&self, level: Consistency, domain: Option<&str>) -> Result<Option<AgentAddress>, Failure> {
        let named = self.qga.clone().map(AgentAddress::Socket).or(self.libvirt.clone().map(AgentAddress::Domain));
        let own = domain.filter(|_| level != Consistency::Crash).map(|domain| AgentAddress::Domain(domain.to_owned()));
        let agent = named.or(own);
        if let Some(AgentAddress::Domain(_)) = agent {
            connection::refuse_remote().map_err(|error| Failure::new(USAGE, error))?;
        }
        Ok(agent)
    }
}
