//! The subcommand `attend`: turns its options into a plan, and prints each freeze on standard output.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::clean_json;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::snapshot::attend::{self, AttendPlan};
use virtioblkd::internal::snapshot::plan::Consistency;
use virtioblkd::internal::snapshot::receipt::Receipt;

use crate::chosen::Chosen;
use crate::duration;
use crate::freezing::Freezing;

#[derive(Args)]
pub struct Attend {
    /// A disk of the guest: its name, or its control socket; give it once for each. Or use --domain for all disks of a domain
    #[arg(long = "disk", value_name = "DISK")]
    disks: Vec<PathBuf>,
    /// What each snapshot must hold: filesystem (needs --qga, --libvirt or --domain), application (also needs --hooks),
    /// crash (needs --hooks alone)
    #[arg(long, value_name = "LEVEL", value_parser = str::parse::<Consistency>)]
    level: Consistency,
    #[command(flatten)]
    freezing: Freezing,
    /// If the level cannot be reached, allow a weaker snapshot and report that. Without this option the snapshot fails
    #[arg(long)]
    or_weaker: bool,
    /// How long freezing the guest's filesystems may take, and each hook
    #[arg(long, value_name = "TIME", default_value = "6s", value_parser = duration)]
    freeze_timeout: Duration,
}

/// Attends until a signal arrives.
pub fn run(options: &Attend, chosen: &Chosen, json: bool) -> Result<(), Failure> {
    let disks = chosen.several(&options.disks)?;
    let plan = AttendPlan {
        disks: disks.controls(),
        level: options.level,
        agent: options.freezing.agent(options.level, disks.domain.as_deref())?,
        hooks: options.freezing.hooks.clone(),
        or_weaker: options.or_weaker,
        timeout: options.freeze_timeout,
    };
    attend::attend(&plan, |receipt| print_receipt(receipt, json))
}

/// Prints one line for each freeze, or its JSON.
fn print_receipt(receipt: &Receipt, json: bool) {
    let line = match serde_json::to_string(receipt) {
        Ok(text) if json => clean_json(&text),
        Ok(_) => receipt.line(),
        Err(error) => format!("the receipt: {error}"),
    };
    // An unread standard output must not delay a freeze or a thaw.
    if !logging::print_line(&line) {
        logging::message("standard output is not read: the receipt of a freeze is lost");
    }
}
