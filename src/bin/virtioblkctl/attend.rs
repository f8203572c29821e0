//! The subcommand `attend`: its options become a plan; each freeze is told on standard output.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::clean_json;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::snapshot::attend::{self, Plan};
use virtioblkd::internal::snapshot::plan::Consistency;
use virtioblkd::internal::snapshot::receipt::Receipt;

use crate::chosen::Chosen;
use crate::duration;
use crate::freezing::Freezing;

#[derive(Args)]
pub struct Attend {
    /// A disk of the guest: its name, or its control socket; once for each. Or --domain for all of a domain
    #[arg(long = "disk", value_name = "DISK")]
    disks: Vec<PathBuf>,
    /// What is promised: filesystem (needs --qga, --libvirt or --domain), application (needs hooks besides), crash (hooks alone)
    #[arg(long, value_name = "LEVEL", value_parser = str::parse::<Consistency>)]
    level: Consistency,
    #[command(flatten)]
    freezing: Freezing,
    /// Let a weaker snapshot be taken, and say so, where the level cannot be reached; without it that one fails
    #[arg(long)]
    or_weaker: bool,
    /// Give up if the guest's filesystems are not frozen by then; also for each hook
    #[arg(long, value_name = "TIME", default_value = "6s", value_parser = duration)]
    freeze_timeout: Duration,
}

/// Attends until a signal.
pub fn run(options: &Attend, chosen: &Chosen, json: bool) -> Result<(), Failure> {
    let disks = chosen.several(&options.disks)?;
    let plan = Plan {
        disks: disks.controls(),
        level: options.level,
        agent: options.freezing.agent(options.level, disks.domain.as_deref()),
        hooks: options.freezing.hooks.clone(),
        or_weaker: options.or_weaker,
        timeout: options.freeze_timeout,
    };
    attend::attend(&plan, |receipt| tell(receipt, json))
}

/// One line a freeze, or its JSON.
fn tell(receipt: &Receipt, json: bool) {
    let line = match serde_json::to_string(receipt) {
        Ok(text) if json => clean_json(&text),
        Ok(_) => receipt.line(),
        Err(error) => format!("the receipt: {error}"),
    };
    // A guest is frozen or thawed whether anybody reads of it or not.
    if !logging::print_line(&line) {
        logging::message("nobody reads standard output: the receipt of a freeze is lost");
    }
}
